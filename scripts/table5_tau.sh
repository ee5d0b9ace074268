#!/usr/bin/env bash
# Table 5 of v1, supplement Table 2 of v2: the threshold tau of Stage 2, on four image benchmarks.
# Can be resumed.
# GPUS=0,1 LIMIT=100 MODEL=name SUITE=name OUT=folder; arguments go to `python -m eval run`.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_and_show 5 table5_tau "$@"
