"""How the ranks of a job find one another: within a set time, and who does not come is named.

torch's own way waits as long as a collective may take, an hour here, and then tells how many are missing, not who.
"""

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from videodiff.errors import LostError, UserError

JOIN_SECONDS = 600.0  # that a rank may take to come: on a slow disk thousands import torch at once
NAMED = 8  # of many that are missing


def meet(seconds: float = JOIN_SECONDS) -> tuple[dist.Store, int, int]:
    """(store, rank, world): what the ranks make their group by, once all of them are there, by the environment.

    Raises UserError for variables that can't be, LostError on every rank that is there when one does not come in
    `seconds`.
    """
    rank, world = rank_and_world()
    address, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 1, 2**16 - 1)
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun has one of its own there
    patience = timedelta(seconds=seconds)
    try:
        store = dist.TCPStore(address, port, None, rank == 0 and not served, patience, wait_for_workers=False)
        missing = _missing(store, rank, world, patience)
    except dist.DistError as error:
        raise LostError(
            f"rank {rank} on {socket.gethostname()} does not find the others by MASTER_ADDR={address}, "
            f"MASTER_PORT={port} ({str(error).splitlines()[0]}); see what became of rank 0, and start again"
        ) from None
    if missing:
        lost = LostError(f"{missing} of {world} did not come within {seconds:.0f} s; the same command tries again")
        lost.echoed = rank != 0
        raise lost
    return store, rank, world


def rank_and_world() -> tuple[int, int]:
    """(rank, world) by the environment; UserError for what can't be."""
    world = _number("WORLD_SIZE", 1, 2**31)
    return _number("RANK", 0, world - 1), world


def _missing(store: dist.Store, rank: int, world: int, patience: timedelta) -> str:
    """Which ranks have not come, "" when all have; rank 0 counts them, and tells it."""
    keys = [f"rank {other}" for other in range(world)]
    store.set(keys[rank], "here")
    if rank:
        store.wait(["missing"], 2 * patience)  # rank 0 may have come as late as a rank may
        return store.get("missing").decode()
    try:
        store.wait(keys, patience)
        missing = []
    except dist.DistStoreError:
        missing = [key for key in keys if not store.check([key])]
    names = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
    store.set("missing", names)
    if names:
        time.sleep(2)  # for the others to hear it: the store goes with this process
    return names


def _number(name: str, low: int, high: int) -> int:
    text = os.environ[name]
    if not text.isdecimal() or not low <= int(text) <= high:
        raise UserError(f"environment: {name}={text!r} is no number in {low}..{high}; start with torchrun or srun")
    return int(text)
