#!/usr/bin/env bash
# Table 3 of v1, Table 4 of v2: FLOPs, peak memory and samples/s of models with random weights (no
# download).
# Without a GPU only FLOPs, unless SIZE=cpu. SIZE="7b 13b" OUT=folder; arguments go to
# `python -m eval bench`, e.g. --dry-run or --repeats 9.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
out="${OUT:-outputs/table3_efficiency}"
for size in ${SIZE:-7b 13b}; do
  "$PYTHON" -m eval bench --table3 --new-tokens 3 --size "$size" \
    --out "$out/$size.json" "$@"
done
if has_results "$out" "$@"; then
  "$PYTHON" -m eval table 3 --results "$out"
fi
