# shellcheck shell=bash
# Sourced by the job scripts: where the software lives on this cluster. Edit this file, not the scripts.
#   module load cuda python
# shellcheck source=/dev/null
source "${VIDEODIFF_VENV:-$SLURM_SUBMIT_DIR/.venv}/bin/activate"
