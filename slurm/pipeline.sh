#!/bin/bash
# All stages as one chain of jobs, each after the success of the one before:
#   slurm/pipeline.sh configs/demo [sbatch options ...]
# Every stage's YAML in that folder names the run before it (model: runs/...). A stage that fails ends the chain.
set -euo pipefail
folder=${1:?name the folder of the stages, such as configs/demo}
shift
here=$(dirname "$0")
before=''
for stage in autoencoder text image video interpolation; do
    config=$folder/$stage.yaml
    [[ -f $config ]] || continue
    job=$(sbatch --parsable --kill-on-invalid-dep=yes ${before:+--dependency=afterok:$before} \
        --job-name="$stage" "$@" "$here/train.sbatch" "$config")
    before=${job%%;*}
    echo "$stage: job $before"
done
[[ -n $before ]] || { echo "$folder: holds no stage's YAML (autoencoder.yaml, ...)" >&2; exit 2; }
