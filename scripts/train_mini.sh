#!/usr/bin/env bash
# Train the bundled model from scratch on two CPU cores; run again to continue after a kill.
# Extra arguments go to the trainer, e.g. --out runs/mini --threads 4.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# Spinning barriers burn the own time slice on a shared machine.
export OMP_WAIT_POLICY=PASSIVE
exec "$PYTHON" -m scripts.mini_training.train "$@"
