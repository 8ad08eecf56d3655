#!/bin/bash
# Several stages as one chain of jobs, each after the success of the one before; sbatch's options after `--`:
#   slurm/pipeline.sh configs/demo -- --nodes=2
#   slurm/pipeline.sh configs/emu/{image,video_256,video_512,video_512_16,finetune,interpolation}.yaml -- --nodes=32
# A folder stands for its autoencoder.yaml, text.yaml, image.yaml, video.yaml and interpolation.yaml. A stage that fails
# ends the chain.
set -euo pipefail
here=$(dirname "$0")
configs=()
while (($#)) && [[ $1 != -- ]]; do
    if [[ -d $1 ]]; then
        for stage in autoencoder text image video interpolation; do
            if [[ -f $1/$stage.yaml ]]; then configs+=("$1/$stage.yaml"); fi
        done
    elif [[ -f $1 ]]; then
        configs+=("$1")
    else
        echo "$1: no such folder or file; name the stages' YAMLs, and sbatch's options after --" >&2
        exit 2
    fi
    shift
done
if (($#)); then shift; fi
if ((${#configs[@]} == 0)); then
    echo "no stage is named: give a folder such as configs/demo, or the stages' YAMLs in order" >&2
    exit 2
fi
before=''
for config in "${configs[@]}"; do
    stage=$(basename "$config" .yaml)
    job=$(sbatch --parsable --kill-on-invalid-dep=yes ${before:+--dependency=afterok:$before} \
        --job-name="$stage" "$@" "$here/train.sbatch" "$config")
    before=${job%%;*}
    echo "$stage: job $before"
done
