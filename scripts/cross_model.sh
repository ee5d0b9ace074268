#!/usr/bin/env bash
# Table 3 of v2, other models: Qwen2.5-VL-7B on image and video benchmarks.
# configs/runs/cross_model.yaml says why not InternVL2-8B.
# GPUS=0,1,..  LIMIT=items per task  MODEL=name or path  SUITE=one of the two  OUT=folder
# Arguments go to `python -m eval run`.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
out="${OUT:-outputs/cross_model}"
for suite in ${SUITE:-image video}; do
  evaluate run configs/runs/cross_model.yaml --out "$out" --set "suite=$suite" \
    ${GPUS:+--gpus "$GPUS"} ${LIMIT:+--limit "$LIMIT"} ${MODEL:+--set "model=$MODEL"} "$@"
done
has_results "$out" "$@" || exit "$status"
"$PYTHON" -m eval table cross_model --results "$out"
exit "$status"
