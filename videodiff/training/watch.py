"""The ranks watch one another: one that dies or hangs ends the job within a set time, and is named.

Each rank tells the others, over a connection of its own to the group's store, that it lives and how far its loop is.
A dead process stops telling; a hanging loop falls behind the others, who wait for it in a collective. One thread talks,
and another judges, since talking may itself hang: on a host that went without a word.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from videodiff.errors import LostError, UserError
from videodiff.training.distributed import barrier, rank, world

BEAT_SECONDS = 1.0
DEAD_SECONDS = 60.0  # without a sign of life
TOLD_SECONDS = 10.0  # that a rank may take to notice by itself that another stopped with a problem
PHASES = ("waiting for data", "computing", "with its step finished")
GO_ON = "the same command goes on from the last checkpoint"


@dataclass
class Sign:
    """What a rank last told of itself, and when it came (`monotonic`). mistake: the problem is the user's to mend."""

    rank: int
    where: str
    beat: int
    step: int
    phase: int
    problem: str
    mistake: bool
    came: float

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.where})"


class Watch:
    """A context manager around the loop, on every rank; alone it does nothing.

    patience: seconds that a step may take; a rank that hangs longer, or shows no sign of life for a minute, is named
    and every rank ends (status 75). on_end: hears of it before, and whether it was a mistake of the user's.
    """

    def __init__(self, patience: float, on_end: Callable[[str, bool], None] = lambda reason, mistake: None) -> None:
        self.patience, self.on_end = patience, on_end
        self._step, self._phase = 0, 0
        self._problem, self._mistake = "", False
        self._began = self._moved = self._exchanged = time.monotonic()
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._signs: dict[int, Sign] = {}
        self._lost_store = ""

    def __enter__(self) -> "Watch":
        self._began = self._moved = self._exchanged = time.monotonic()
        if world() > 1:
            store: Any = dist.distributed_c10d._get_default_store()  # torch's stubs know no clone
            self._store = dist.PrefixStore("watch", store.clone())
            for name, work in (("talk", self._talk), ("judge", self._judge)):
                self._threads.append(threading.Thread(target=work, name=name, daemon=True))
                self._threads[-1].start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Tell the others of an error that ends this rank; learn who is gone when a collective failed here."""
        if not self._threads:
            return
        if error is None or isinstance(error, SystemExit):
            barrier()  # who stopped telling while another is still at work would be taken for dead
        elif not isinstance(error, KeyboardInterrupt):
            foreign = isinstance(error, RuntimeError) and ("peer" in str(error) or "Connection" in str(error))
            if foreign and (found := self._who_is_gone()):
                self._stop()
                reason, mistake = found
                raise (UserError if mistake else LostError)(reason) from error
            if not foreign:
                self._mistake = isinstance(error, UserError) and not isinstance(error, LostError)
                self._problem = " ".join(str(error).split()) or type(error).__name__
                time.sleep(2 * BEAT_SECONDS)  # to be told
        self._stop()

    def at(self, step: int, phase: int) -> None:
        """This rank's loop has come to a phase (of PHASES) of a step."""
        self._step, self._phase, self._moved = step, phase, time.monotonic()

    def _stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(5)  # the one that talks may hang

    def _talk(self) -> None:
        beat = 0
        where = f"process {os.getpid()} on {socket.gethostname()}"
        while not self._over.wait(BEAT_SECONDS if beat else 0):  # the first at once: who dies young has a name too
            beat += 1
            told = [where, beat, self._step, self._phase, self._problem, self._mistake]
            try:
                self._store.set(str(rank()), json.dumps(told))
                self._look()
            except (RuntimeError, dist.DistError) as error:  # the store lives on rank 0
                self._lost_store = str(error).splitlines()[0]
                return
            self._exchanged = time.monotonic()

    def _look(self) -> None:
        keys = [str(other) for other in range(world())]
        known = keys if self._store.check(keys) else [key for key in keys if self._store.check([key])]
        now = time.monotonic()
        for key, value in zip(known, self._store.multi_get(known) if known else [], strict=True):
            where, beat, step, phase, problem, mistake = json.loads(value)
            sign = Sign(int(key), where, beat, step, phase, problem, mistake, now)
            before = self._signs.get(sign.rank)
            if before is None or before.beat != sign.beat:
                self._signs[sign.rank] = sign

    def _judge(self) -> None:
        problem_since: float | None = None
        while not self._over.wait(BEAT_SECONDS):
            now = time.monotonic()
            if rank() and (self._lost_store or now - self._exchanged > DEAD_SECONDS):
                if not self._over.wait(5 * BEAT_SECONDS):
                    self._end(f"rank 0 is gone ({self._lost_store or 'it does not answer'})")
                return
            if silent := self._silent(DEAD_SECONDS, or_never=False):  # who comes late is no dead one
                self._end(f"step {self._step + 1}: no sign of life from {silent} for {DEAD_SECONDS:.0f} s")
            told = [sign for sign in self._signs.values() if sign.problem and sign.rank != rank()]
            problem_since = (problem_since or now) if told else None
            if problem_since is not None and now - problem_since > TOLD_SECONDS:
                self._end(f"{told[0]} stopped: {told[0].problem}", told[0].mistake)
            if now - self._moved > self.patience:
                self._end(self._who_hangs())

    def _end(self, reason: str, mistake: bool = False) -> None:
        print(reason if mistake else f"{reason}; the job ends here, {GO_ON}", flush=True)
        self.on_end(reason, mistake)
        os._exit(os.EX_TEMPFAIL)

    def _who_hangs(self) -> str:
        moved = f"step {self._step + 1}: nothing moved for {self.patience:.0f} s (run.patience)"
        if silent := self._silent(5 * BEAT_SECONDS):
            return f"{moved}; no sign of life from {silent}"
        last = min((sign.step, sign.phase) for sign in self._signs.values())
        behind = [str(sign) for sign in self._signs.values() if (sign.step, sign.phase) == last]
        names = ", ".join(behind) if len(behind) < world() else "every rank"
        return f"{moved}; {PHASES[last[1]]}: {names}"

    def _silent(self, seconds: float, or_never: bool = True) -> str:
        """The other ranks that have told nothing for so long, those among them that never did."""
        now, found = time.monotonic(), []
        for other in range(world()):
            sign = self._signs.get(other)
            if other != rank() and (sign or or_never) and now - (self._began if sign is None else sign.came) > seconds:
                found.append(str(sign or f"rank {other}"))
        return ", ".join(found)

    def _who_is_gone(self) -> tuple[str, bool] | None:
        """After a collective failed: who told of a problem, else who does not tell anything any more."""
        began = time.monotonic()
        while time.monotonic() - began < DEAD_SECONDS:
            if told := [sign for sign in self._signs.values() if sign.problem and sign.rank != rank()]:
                return f"{told[0]} stopped: {told[0].problem}", told[0].mistake
            if self._lost_store:
                break
            if silent := self._silent(5 * BEAT_SECONDS):
                return f"{silent} is gone; {GO_ON}", False
            time.sleep(BEAT_SECONDS / 4)
        return (f"rank 0 is gone ({self._lost_store}); {GO_ON}", False) if self._lost_store and rank() else None
