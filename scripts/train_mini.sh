#!/usr/bin/env bash
# Train the bundled model from scratch on two CPU cores; run again to continue after a kill.
# Extra arguments go to the trainer, e.g. --out runs/mini --threads 4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Spinning barriers burn the own time slice on a shared machine.
export OMP_WAIT_POLICY=PASSIVE
exec "${PYTHON:-python}" -m llava_todre.mini.train "$@"
