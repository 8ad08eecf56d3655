#!/bin/bash
# Several stages as one chain of jobs, each after the success of the one before; sbatch's options after `--`:
#   slurm/pipeline.sh configs/demo -- --nodes=2
#   slurm/pipeline.sh configs/emu/{image,video_256,video_512,video_512_16,finetune,interpolation}.yaml \
#     -- --nodes=32 --gpus-per-node=8 --ntasks-per-node=8
# A folder stands for its autoencoder, text, image, image_prompt, video, interpolation and upscale.yaml, as far as it has
# them; what else lies in it is named and left out. A stage that fails ends the chain.
set -euo pipefail
here=$(dirname "$0")
configs=()
while (($#)) && [[ $1 != -- ]]; do
    if [[ -d $1 ]]; then
        folder=${1%/}
        for stage in autoencoder text image image_prompt video interpolation upscale; do
            if [[ -f $folder/$stage.yaml ]]; then configs+=("$folder/$stage.yaml"); fi
        done
        others=()
        for config in "$folder"/*.yaml; do
            case " ${configs[*]:-} " in *" $config "*) ;; *) if [[ -f $config ]]; then others+=("$config"); fi ;; esac
        done
        if ((${#others[@]})) && [[ -f $folder/image.yaml && ! -f $folder/video.yaml ]]; then
            echo "$folder: it has no video.yaml, but ${others[*]}; name the stages' YAMLs in order instead of the folder" >&2
            exit 2
        fi
        if ((${#others[@]} && ${#configs[@]})); then echo "left out: ${others[*]}" >&2; fi
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
