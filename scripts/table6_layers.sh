#!/usr/bin/env bash
# Table 6 of v1, supplement Table 3 of v2: the probe layers of Stage 2, on four image benchmarks.
# Can be resumed.
# GPUS=0,1 LIMIT=100 MODEL=name SUITE=name OUT=folder; arguments go to `python -m eval run`.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_and_show 6 table6_layers "$@"
