#!/usr/bin/env bash
# The papers' Tables 1, 4, 5 and 6 for the bundled model and its nine tasks, through lmms-eval; 15
# minutes on 2 cores. Can be resumed.
# LIMIT=8 OUT=folder; arguments go to `python -m eval sweep`, e.g. --jobs 4.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
out="${OUT:-outputs/reproduce_mini}"
evaluate sweep configs/sweeps/mini_methods.yaml configs/runs/mini_table4.yaml \
  configs/runs/mini_tables56.yaml --out "$out" --offline --jobs 2 ${LIMIT:+--limit "$LIMIT"} "$@"
has_results "$out" "$@" || exit "$status"
for table in 1 4 "5 --version v2" "6 --version v2"; do
  # shellcheck disable=SC2086  # a table and its options
  "$PYTHON" -m eval table $table --suite mini --results "$out"
done
"$PYTHON" -m eval report "$out"
exit "$status"
