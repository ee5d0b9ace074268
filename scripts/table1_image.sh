#!/usr/bin/env bash
# Table 1 of v1 and v2: eight image benchmarks, LLaVA-NeXT-7B, one run per GPU. Can be resumed.
#   MODEL=llava_next_13b   the 13B rows, spread over all GPUs
#   SUITE=image_local      VizWiz and VQAv2 on their public splits, without submission servers
# Also GPUS=0,1 LIMIT=100 OUT=folder; arguments go to `python -m eval run`, e.g. --dry-run.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_and_show 1 table1_image "$@"
