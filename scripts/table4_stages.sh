#!/usr/bin/env bash
# Table 4 of v1, Table 5 of v2: Stage 1, Stage 2 and both, on four image benchmarks. Can be resumed.
# GPUS=0,1 LIMIT=100 MODEL=name SUITE=name OUT=folder; arguments go to `python -m eval run`.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_and_show 4 table4_stages "$@"
