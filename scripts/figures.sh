#!/usr/bin/env bash
# The papers' figures from the bundled model and stored results: PNG, SVG and their numbers.
# NAMES="kept pareto" (default: all)  OUT=folder; arguments go to `python -m eval figure`,
# e.g. --samples 48 or --methods outputs/demo/results.json.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck disable=SC2086  # several names
"$PYTHON" -m eval figure ${NAMES:-all} --out "${OUT:-docs/figures}" "$@"
