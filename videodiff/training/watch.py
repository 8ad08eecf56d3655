"""The ranks watch one another: one that dies or hangs ends the job within a set time, and is named.

Each rank's thread tells the others, over a connection of its own to the group's store, that it lives and how far its
loop is. A dead process stops telling; a hanging loop falls behind the others, who wait for it in a collective.
"""

import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from videodiff.errors import LostError
from videodiff.training.distributed import barrier, rank, world

BEAT_SECONDS = 1.0
DEAD_SECONDS = 60.0  # without a sign of life
PHASES = ("waiting for data", "computing", "with its step finished")


@dataclass
class Sign:
    """What a rank last told of itself, and when it came (`monotonic`)."""

    rank: int
    where: str
    beat: int
    step: int
    phase: int
    problem: str
    came: float

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.where})"


class Watch:
    """A context manager around the loop, on every rank; alone it does nothing.

    patience: seconds that a step may take; a rank that hangs longer, or shows no sign of life for a minute, is named
    and every rank ends (status 75).
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._step, self._phase, self._problem = 0, 0, ""
        self._moved = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._signs: dict[int, Sign] = {}

    def __enter__(self) -> "Watch":
        if world() > 1:
            store = dist.distributed_c10d._get_default_store().clone()
            self._store = dist.PrefixStore("watch", store)
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Tell the others of an error that ends this rank; learn who is gone when a collective failed here."""
        if self._thread is None:
            return
        if error is None or isinstance(error, SystemExit):
            barrier()  # who stopped telling while another is still at work would be taken for dead
        elif not isinstance(error, KeyboardInterrupt):
            foreign = isinstance(error, RuntimeError) and ("peer" in str(error) or "Connection" in str(error))
            if foreign and (gone := self._who_is_gone()):
                self._stop()
                raise LostError(gone) from error
            if not foreign:
                self._problem = " ".join(str(error).split()) or type(error).__name__
                time.sleep(2 * BEAT_SECONDS)  # the thread tells it
        self._stop()

    def at(self, step: int, phase: int) -> None:
        """This rank's loop has come to a phase (of PHASES) of a step."""
        self._step, self._phase, self._moved = step, phase, time.monotonic()

    def _stop(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        beat = 0
        where = f"process {os.getpid()} on {socket.gethostname()}"
        while not self._over.wait(BEAT_SECONDS):
            beat += 1
            try:
                self._store.set(str(rank()), json.dumps([where, beat, self._step, self._phase, self._problem]))
                self._look()
            except (RuntimeError, dist.DistError) as error:  # the store lives on rank 0
                if rank() == 0 or self._over.wait(5 * BEAT_SECONDS):
                    return
                self._end(f"rank 0 is gone ({str(error).splitlines()[0]})")
            if silent := self._silent(DEAD_SECONDS):
                self._end(f"step {self._step + 1}: no sign of life from {silent} for {DEAD_SECONDS:.0f} s")
            if time.monotonic() - self._moved > self.patience:
                self._end(self._who_hangs())

    def _look(self) -> None:
        now = time.monotonic()
        for other in range(world()):
            if self._store.check([str(other)]):
                sign = Sign(other, *json.loads(self._store.get(str(other))), now)
                before = self._signs.get(other)
                if before is None or before.beat != sign.beat:
                    self._signs[other] = sign

    def _end(self, reason: str) -> None:
        print(f"{reason}; the job ends here, the same command goes on from the last checkpoint", flush=True)
        os._exit(os.EX_TEMPFAIL)

    def _who_hangs(self) -> str:
        moved = f"step {self._step + 1}: nothing moved for {self.patience:.0f} s (run.patience)"
        if silent := self._silent(5 * BEAT_SECONDS):
            return f"{moved}; no sign of life from {silent}"
        last = min((sign.step, sign.phase) for sign in self._signs.values())
        behind = [str(sign) for sign in self._signs.values() if (sign.step, sign.phase) == last]
        names = ", ".join(behind) if len(behind) < world() else "every rank"
        return f"{moved}; {PHASES[last[1]]}: {names}"

    def _silent(self, seconds: float) -> str:
        """The other ranks that have told nothing for so long."""
        now = time.monotonic()
        return ", ".join(str(s) for s in self._signs.values() if s.rank != rank() and now - s.came > seconds)

    def _who_is_gone(self) -> str:
        """After a collective failed: who told of a problem, else who does not tell anything any more."""
        began = time.monotonic()
        while time.monotonic() - began < DEAD_SECONDS:
            if told := [sign for sign in self._signs.values() if sign.problem and sign.rank != rank()]:
                return f"{told[0]} stopped: {told[0].problem}"
            if self._thread is None or not self._thread.is_alive():  # the store is gone, and rank 0 with it
                break
            if silent := self._silent(5 * BEAT_SECONDS):
                return f"{silent} is gone; the same command goes on from the last checkpoint"
            time.sleep(BEAT_SECONDS / 4)
        return ""
