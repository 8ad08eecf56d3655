# shellcheck shell=bash
# Sourced by the job scripts: where the software lives on this cluster, and its network. Edit this file, not the scripts.
#   module load cuda python
# VIDEODIFF_CONTAINER=image.sqsh (enroot with the pyxis plugin) or image.sif (apptainer) runs the ranks in a container
# that has videodiff on its PATH; VIDEODIFF_MOUNTS names folders of the cluster to see in there: /data,/scratch.
if [[ -z ${VIDEODIFF_CONTAINER:-} ]]; then
    # shellcheck source=/dev/null
    source "${VIDEODIFF_VENV:-$SLURM_SUBMIT_DIR/.venv}/bin/activate"
fi

# The network between nodes. What is not set is found by NCCL and gloo themselves.
#   export NCCL_SOCKET_IFNAME=ib0         # the interface for the rendezvous, where several are up
#   export GLOO_SOCKET_IFNAME=ib0         # the same for the CPU's collectives
#   export NCCL_IB_HCA=mlx5               # which InfiniBand adapters
#   export NCCL_DEBUG=WARN                # INFO tells which network was chosen
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1  # a broken collective ends its rank instead of hanging

# CPU threads of a rank: what Slurm gave the task, not what the node has.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# What goes before a command in a container: srun's options, or a command of its own.
for_srun=()
before=()
case ${VIDEODIFF_CONTAINER:-} in
    '') ;;
    *.sif) before=(apptainer exec --nv --bind "$PWD${VIDEODIFF_MOUNTS:+,$VIDEODIFF_MOUNTS}" "$VIDEODIFF_CONTAINER") ;;
    *)
        for_srun=(--container-image="$VIDEODIFF_CONTAINER" --container-workdir="$PWD")
        for_srun+=(--container-mounts="$PWD:$PWD${VIDEODIFF_MOUNTS:+,$VIDEODIFF_MOUNTS}")
        ;;
esac

# A command once, where the ranks run: here, or in the container. (bash before 4.4 knows no empty array: hence the +.)
once() {
    if [[ -z ${VIDEODIFF_CONTAINER:-} ]]; then
        "$@"
    else
        srun --nodes=1 --ntasks=1 ${for_srun[@]+"${for_srun[@]}"} ${before[@]+"${before[@]}"} "$@"
    fi
}

# What the ranks of a warned job have to save and leave; below the lead of --signal, since the script then still has to
# ask whether the job comes back. Longer saves need both: sbatch --signal=B:USR1@900, and this at 780.
VIDEODIFF_SAVE_SECONDS=${VIDEODIFF_SAVE_SECONDS:-240}

# Every rank of a job:  ranks videodiff train ...  The script that calls it may be warned meanwhile (USR1), or before,
# when it noted that in `warned`, as is done here: it is passed on until the ranks save and leave. Returns what srun
# returned.
ranks() {
    # No fall-back to localhost: a job whose ranks can't find one another must fail, not train alone on each node.
    local hosts code=0 tasks=${SLURM_TASKS_PER_NODE:-}
    : "${SLURM_JOB_NODELIST:?is not set: start this in a job, with sbatch or salloc}"
    : "${SLURM_JOB_ID:?is not set: start this in a job, with sbatch or salloc}"
    : "${SLURM_NTASKS:?is not set: give sbatch or salloc --ntasks-per-node=N, a task for each GPU}"
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || return 1
    tasks=${tasks%%[(,]*}  # "8(x4)", "2,1": those of this node, as SLURM_GPUS_ON_NODE are
    if [[ -n ${SLURM_GPUS_ON_NODE:-} && -n $tasks && $SLURM_GPUS_ON_NODE != "$tasks" ]]; then
        echo "error: $SLURM_GPUS_ON_NODE GPUs but $tasks tasks on a node, and a task takes one GPU; give sbatch" \
            "--gpus-per-node=N --ntasks-per-node=N" >&2
        exit 2
    fi
    export MASTER_ADDR=${hosts%%$'\n'*}
    # Below 32768, where Linux takes the ports of outgoing connections from.
    export MASTER_PORT=$((10000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 20000))
    export WORLD_SIZE=$SLURM_NTASKS
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
    # The ranks expand their own variables. USR1 is ignored until Python listens to it: it would end a rank that imports.
    # --gpu-bind=none: every rank sees all GPUs of its node and takes that of its number there.
    # shellcheck disable=SC2016
    srun --kill-on-bad-exit=1 ${SLURM_GPUS_ON_NODE:+--gpu-bind=none} ${for_srun[@]+"${for_srun[@]}"} \
        ${before[@]+"${before[@]}"} \
        bash -c 'trap "" USR1; export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"' rank "$@" &
    step=$!
    # CONT is not trapped: Slurm sends it beside USR1, and bash would lose one of the two.
    trap 'warned=1; farewell "$step" & trap "" USR1' USR1
    if [[ -n ${warned:-} ]]; then kill -USR1 $$; fi
    while kill -0 "$step" 2>/dev/null; do
        wait "$step" || true
    done
    wait "$step" || code=$?
    trap '' USR1
    return "$code"
}

# The job begins again, later or at once.
come_back() {
    for _ in {1..20}; do  # the controller may be away for a moment
        if scontrol requeue "$SLURM_JOB_ID"; then return 0; fi
        sleep 30
    done
    return 1
}

# Pass a warning on to a step, again and again: ranks that still start don't listen. Ranks that hang, or save for too
# long, must not keep the script until Slurm ends both: srun ends its step on TERM, and by KILL it ends itself.
farewell() {
    local left=$((VIDEODIFF_SAVE_SECONDS * 5 / 6))
    while ((left > 0)); do
        kill -USR1 "$1" 2>/dev/null || return 0
        sleep $((left < 10 ? left : 10))
        left=$((left - 10))
    done
    kill -TERM "$1" 2>/dev/null || return 0
    echo "the ranks did not leave in time (VIDEODIFF_SAVE_SECONDS=$VIDEODIFF_SAVE_SECONDS) and are ended" >&2
    sleep $((VIDEODIFF_SAVE_SECONDS - VIDEODIFF_SAVE_SECONDS * 5 / 6))
    kill -KILL "$1" 2>/dev/null || true
}
