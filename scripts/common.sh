# shellcheck shell=bash
# What the scripts of the tables share; sourced, not run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Which Python: PYTHON where it is set, else the checkout's own environment, else the shell's.
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python
  [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
  "$PYTHON" -c 'import importlib.util as u; raise SystemExit(u.find_spec("torch") is None)' || {
    echo "llava_todre is not installed here: make setup" >&2
    exit 1
  }
fi

# run_and_show TABLE NAME [ARGUMENTS]: the runs of configs/runs/NAME.yaml, then the table.
# Variables: GPUS=0,1,..  LIMIT=items per task  MODEL=name or path  SUITE=name  OUT=folder
run_and_show() {
  local table="$1" name="$2"
  shift 2
  local out="${OUT:-outputs/$name}"
  "$PYTHON" -m eval run "configs/runs/$name.yaml" --out "$out" \
    ${GPUS:+--gpus "$GPUS"} ${LIMIT:+--limit "$LIMIT"} \
    ${MODEL:+--set "model=$MODEL"} ${SUITE:+--set "suite=$SUITE"} "$@"
  if has_results "$@"; then
    "$PYTHON" -m eval table "$table" --results "$out" ${SUITE:+--suite "$SUITE"}
  fi
}

# Whether runs started with these arguments have ended when the command has.
has_results() {
  [[ " $* " != *" --dry-run "* && " $* " != *" --slurm "* ]]
}
