"""The processes of a run: how many, which one am I, and the few things that they tell one another.

The same command works alone and under a launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT
(torchrun does). Alone there is no network at all: the group of one lives in this process's memory and needs no port.
"""

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from videodiff.errors import LostError, UserError
from videodiff.training.rendezvous import JOIN_SECONDS, meet, rank_and_world

Value = TypeVar("Value")

# The others wait in a collective while rank 0 draws sample grids or hashes a checkpoint.
PATIENCE = timedelta(hours=1)
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
LAUNCHER_VARIABLES = (*RANK_VARIABLES, "MASTER_ADDR", "MASTER_PORT")


def start(join_seconds: float = JOIN_SECONDS) -> None:
    """Join the process group that the environment describes, a group of one without any. Again: does nothing.

    Raises UserError when the launcher's variables are there in part only, or Slurm started several tasks without them;
    LostError when not all ranks come within `join_seconds`.
    """
    if dist.is_initialized():
        return
    launched_as(LAUNCHER_VARIABLES)  # refuses what can't be
    alone = "WORLD_SIZE" not in os.environ
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if alone:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=PATIENCE)
        atexit.register(_leave)  # NCCL complains of a group that outlives its program
    else:
        store, own, count = meet(join_seconds)
        store.set_timeout(PATIENCE)
        dist.init_process_group(backend, store=store, rank=own, world_size=count, timeout=PATIENCE)


def launched_as(needed: Sequence[str] = RANK_VARIABLES) -> tuple[int, int]:
    """(rank, world) by the environment, of which `needed` must be there; (0, 1) without a launcher. Joins nothing.

    Raises UserError, as `start` does.
    """
    missing = [name for name in needed if name not in os.environ]
    alone = "WORLD_SIZE" not in os.environ
    if missing and not alone:
        raise UserError(
            f"environment: WORLD_SIZE is set but {', '.join(missing)} is not; start with torchrun, or unset WORLD_SIZE"
        )
    if alone and os.environ.get("RANK"):
        raise UserError(
            f"environment: RANK={os.environ['RANK']} but WORLD_SIZE is not set, each rank would work alone; export "
            f"{', '.join(needed)} in every process, or unset RANK"
        )
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if alone and "SLURM_PROCID" in os.environ and tasks != "1":
        raise UserError(
            f"environment: Slurm started {tasks} tasks (SLURM_NTASKS) but WORLD_SIZE is not set, each would work "
            f"alone; use slurm/train.sbatch, or export {', '.join(needed)} in every task"
        )
    return (0, 1) if alone else rank_and_world()


def cleanup() -> None:
    """The last call of a program. A group of one stays: DeepSpeed holds on to it for a next run.

    A process of several ends here when all went well: torch's and DeepSpeed's threads are not always taken down in
    order when the interpreter exits, and a finished run would now and then die of SIGABRT ("terminate called without
    an active exception"), which a launcher takes for a failure.
    """
    if world() == 1:
        return
    if sys.exc_info()[0] is None:
        dist.barrier()  # nobody leaves while another still talks to it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    dist.destroy_process_group()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """Where this process computes: its own GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", device_index(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()))
    return torch.device("cpu")


def device_index(local_rank: int, count: int) -> int:
    """Which of the `count` GPUs that a process sees is its own. One alone is: Slurm may show each task only its GPU.

    Raises UserError when there are more processes than GPUs.
    """
    if count == 1:
        return 0
    if local_rank >= count:
        raise UserError(
            f"environment: LOCAL_RANK={local_rank} but this process sees {count} GPUs; start at most {count} processes "
            "on this machine, or show it more in CUDA_VISIBLE_DEVICES"
        )
    return local_rank


def barrier() -> None:
    """Wait until every process is here."""
    if world() > 1:
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of `values` (any shape, equal on all ranks) over the processes; the argument is left as it is."""
    total = values.detach().clone()
    if world() > 1:
        dist.all_reduce(total)
    return total


def gather_to_first(value: Value) -> list[Value] | None:
    """One value of each process, in the order of ranks, on rank 0; None on the others."""
    if world() == 1:
        return [value]
    gathered: list[Any] | None = [None] * world() if rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered


def from_first(value: Value) -> Value:
    """Rank 0's value, on every process."""
    if world() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box)
    return box[0]


def raise_from_first(problem: str | UserError | None) -> None:
    """Raise UserError (or LostError, where `problem` is one) on every process when rank 0 found a problem, so that none
    is left waiting for another. It is told once, by rank 0."""
    told = from_first(None if problem is None else (str(problem), isinstance(problem, LostError)))
    if told is not None:
        message, lost = told
        error = (LostError if lost else UserError)(message)
        error.echoed, error.shared = rank() != 0, True
        raise error


def raise_from_any(problem: str | None) -> None:
    """Raise UserError on every process when any of them found a problem: that of the first one that did."""
    problems = gather_to_first(problem)
    raise_from_first(None if problems is None else next(filter(None, problems), None))


def together(make: Callable[[], Value]) -> Value:
    """What `make` makes, on every process; where it fails (UserError) on any, all of them fail, and one tells it."""
    if world() == 1:
        return make()
    made, problem = None, None
    try:
        made = make()
    except UserError as error:
        problem = str(error)
    raise_from_any(problem)
    return made  # type: ignore[return-value]  # there was no problem


def gather_rows(rows: Tensor) -> Tensor:
    """The rows [B, ...] of all ranks, [world * B, ...] in the order of ranks, for losses that compare samples.

    Gradients flow back to the rank that a row came from, summed over the losses of all ranks.
    """
    return rows if world() == 1 else _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(world())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(world())[rank()]
