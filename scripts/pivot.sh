#!/usr/bin/env bash
# Supplement Table 1 of v2: the first token of Stage 1, on four image benchmarks. Can be resumed.
# GPUS=0,1 LIMIT=100 MODEL=name SUITE=name OUT=folder; arguments go to `python -m eval run`.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_and_show pivot pivot "$@"
