#!/usr/bin/env bash
# Trains the bundled model from scratch on two CPU cores. Can be resumed.
# Extra arguments go to the trainer, e.g. --out runs/mini --threads 4.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# Threads that spin while they wait are slow on a shared machine.
export OMP_WAIT_POLICY=PASSIVE
exec "$PYTHON" -m scripts.mini_training.train "$@"
