# shellcheck shell=bash
# What the scripts of the tables share; sourced, not run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# run_and_show TABLE NAME [ARGUMENTS]: the runs of configs/runs/NAME.yaml, then the table.
# Variables: GPUS=0,1,..  LIMIT=items per task  MODEL=name or path  SUITE=name  OUT=folder
run_and_show() {
  local table="$1" name="$2"
  shift 2
  local out="${OUT:-outputs/$name}"
  "${PYTHON:-python}" -m eval run "configs/runs/$name.yaml" --out "$out" \
    ${GPUS:+--gpus "$GPUS"} ${LIMIT:+--limit "$LIMIT"} \
    ${MODEL:+--set "model=$MODEL"} ${SUITE:+--set "suite=$SUITE"} "$@"
  if has_results "$@"; then
    "${PYTHON:-python}" -m eval table "$table" --results "$out" ${SUITE:+--suite "$SUITE"}
  fi
}

# Whether runs started with these arguments have ended when the command has.
has_results() {
  [[ " $* " != *" --dry-run "* && " $* " != *" --slurm "* ]]
}
