# shellcheck shell=bash
# Shared by the scripts of the tables; sourced, not run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Python: $PYTHON if set, else the checkout's .venv, else the shell's.
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python
  [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
  "$PYTHON" -c 'import importlib.util as u; raise SystemExit(u.find_spec("torch") is None)' || {
    echo "llava_todre is not installed here: make setup" >&2
    exit 1
  }
fi

# evaluate COMMAND ARGUMENTS: `python -m eval`. If some runs fail, the tables of the others are still
# shown, so scripts end with "exit $status".
status=0
evaluate() {
  "$PYTHON" -m eval "$@" || status=$?
  [[ $status -le 1 ]] || exit "$status"
}

# run_and_show TABLE NAME [ARGUMENTS]: the runs of configs/runs/NAME.yaml, then the table.
# Variables: GPUS=0,1,..  LIMIT=items per task  MODEL=name or path  SUITE=name  OUT=folder
run_and_show() {
  local table="$1" name="$2"
  shift 2
  local out="${OUT:-outputs/$name}"
  evaluate run "configs/runs/$name.yaml" --out "$out" \
    ${GPUS:+--gpus "$GPUS"} ${LIMIT:+--limit "$LIMIT"} \
    ${MODEL:+--set "model=$MODEL"} ${SUITE:+--set "suite=$SUITE"} "$@"
  if has_results "$out" "$@"; then
    "$PYTHON" -m eval table "$table" --results "$out" ${SUITE:+--suite "$SUITE"}
  fi
  exit "$status"
}

# has_results OUT ARGUMENTS: whether runs with these arguments have ended and written results.
has_results() {
  [[ " $* " != *" --dry-run "* && " $* " != *" --slurm "* ]] || return 1
  [[ $status == 0 ]] || compgen -G "$1/*.json" > /dev/null
}
