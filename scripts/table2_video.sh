#!/usr/bin/env bash
# Table 2 of v1 and v2: four video benchmarks, LLaVA-NeXT-7B, one run per GPU. Can be resumed.
#   SUITE=video_local      EgoSchema on its public subset, without its submission server
# Also GPUS=0,1 LIMIT=100 MODEL=name OUT=folder; arguments go to `python -m eval run`.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_and_show 2 table2_video "$@"
