#!/usr/bin/env bash
# Checks the installation: two runs of the bundled model on two items per task; about a minute.
# LIMIT=2 OUT=folder; arguments go to `python -m eval sweep`.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
out="${OUT:-outputs/smoke}"
evaluate sweep configs/sweeps/smoke.yaml --out "$out" --offline \
  --limit "${LIMIT:-2}" "$@"
has_results "$out" "$@" || exit "$status"
"$PYTHON" -m eval table 1 --suite mini --results "$out"
exit "$status"
