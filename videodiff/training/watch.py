"""The ranks watch one another: one that dies or hangs ends the job within a set time, and is named.

Each rank tells rank 0, over a connection of its own to the group's store, that it lives and how far it is; rank 0 looks
at what all have told, and writes what is wrong on a board that the others read: so the work grows as the number of
ranks does, not as its square. A dead process stops telling; a hanging loop falls behind the others, who wait for it in
a collective. One thread talks, and another judges, since talking may itself hang: on a host that went without a word.
"""

import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

import torch.distributed as dist

from videodiff.errors import LostError, UserError
from videodiff.training.distributed import barrier, rank, world

BEAT_SECONDS = 1.0
DEAD_SECONDS = 60.0  # without a sign of life
TOLD_SECONDS = 10.0  # that a rank may take to notice by itself that another stopped with a problem
SILENT_BEATS = 5  # without a sign of life, where something is known to be wrong
NAMED = 8  # of many ranks
_NUMBERS = itertools.count()  # of the watches of a process, equal on all ranks: none reads what another left
GO_ON = "the same command goes on from the last checkpoint"


class Phase(IntEnum):
    """What a rank is at: the acts of a start, then those of each step, in their order."""

    TAKING_THE_FOLDER = 0
    READING_MODELS_AND_DATA = 1
    CHOOSING_A_CHECKPOINT = 2
    BUILDING_THE_ENGINE = 3
    WAITING_FOR_DATA = 4
    COMPUTING = 5
    STEP_FINISHED = 6
    SAVING = 7
    DRAWING_SAMPLES = 8

    @property
    def words(self) -> str:
        """The name as it is read."""
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True)
class Sign:
    """What a rank tells of itself. mistake: the problem is the user's to mend."""

    rank: int
    where: str
    beat: int
    step: int
    phase: int
    problem: str
    mistake: bool

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.where})"


@dataclass(frozen=True)
class Board:
    """What rank 0 makes of all signs. silent, dead: who tells nothing, for five beats (or never did), for a minute;
    behind: who is least far, and at what; problem: that of the first rank with one, `stopped`, and of whom."""

    beat: int
    where: str
    silent: str
    dead: str
    behind: str
    stopped: int = -1
    problem: str = ""
    mistake: bool = False


class Watch:
    """A context manager around a run, on every rank; alone it does nothing.

    patience: seconds that a step, or an act of the start, may take; a rank that hangs longer, or shows no sign of life
    for a minute, is named and every rank ends (status 75). on_end: hears of it before, and whether it was a mistake of
    the user's.
    """

    def __init__(self, patience: float, on_end: Callable[[str, bool], None] = lambda reason, mistake: None) -> None:
        self.patience, self.on_end = patience, on_end
        self._step, self._phase = 0, Phase.TAKING_THE_FOLDER
        self._problem, self._mistake = "", False
        self._moved = self._heard = time.monotonic()  # the loop; rank 0
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._board: Board | None = None
        self._lost_store = ""

    def __enter__(self) -> "Watch":
        self._moved = self._heard = time.monotonic()
        if world() > 1:
            store: Any = dist.distributed_c10d._get_default_store()  # torch's stubs know no clone
            self._store = dist.PrefixStore(f"watch {next(_NUMBERS)}", store.clone())
            for name, work in (("talk", self._talk), ("judge", self._judge)):
                self._threads.append(threading.Thread(target=work, name=name, daemon=True))
                self._threads[-1].start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Tell the others of an error that ends this rank; learn who is gone when a collective failed here."""
        if not self._threads:
            return
        try:
            if error is None or isinstance(error, SystemExit):
                barrier()  # who stopped telling while another is still at work would be taken for dead
            elif isinstance(error, Exception):
                self._explain(error)
        except RuntimeError as failed:
            self._explain(failed)
            raise
        finally:
            self._stop()

    def at(self, step: int, phase: Phase) -> None:
        """This rank has come to a phase of a step."""
        self._step, self._phase, self._moved = step, phase, time.monotonic()

    def _explain(self, error: Exception) -> None:
        """Raise who is gone, or stopped, in place of a collective that failed of it; tell any other error."""
        if getattr(error, "shared", False):
            if rank():  # a launcher ends all with the first that ends: rank 0, which tells it, goes before
                time.sleep(BEAT_SECONDS)
            return
        if _of_a_peer(error) and (found := self._who_is_gone()):
            self._linger()
            raise found from error
        self._mistake = isinstance(error, UserError) and not isinstance(error, LostError)
        self._problem = " ".join(str(error).split()) or type(error).__name__
        self._linger()
        if isinstance(error, UserError) and (board := self._board) is not None and self._is_told(board):
            error.echoed = board.problem.endswith(f": {self._problem}")  # a mistake that all find, one tells

    def _linger(self) -> None:
        """Until this rank's problem is on the board and the others have read it, which goes with rank 0."""
        time.sleep(3 * BEAT_SECONDS)

    def _stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(5)  # the one that talks may hang

    def _talk(self) -> None:
        beat = 0
        where = f"process {os.getpid()} on {socket.gethostname()}"
        signs = _Signs()
        while not self._over.wait(BEAT_SECONDS if beat else 0):  # the first at once: who dies young has a name too
            beat += 1
            own = Sign(rank(), where, beat, self._step, self._phase, self._problem, self._mistake)
            try:
                self._store.set(f"{rank()}", json.dumps(asdict(own)))
                if rank() == 0:
                    self._board = signs.read(self._store, own)
                    self._store.set("board", json.dumps(asdict(self._board)))
                elif self._store.check(["board"]):
                    board = Board(**json.loads(self._store.get("board")))
                    if self._board is None or board.beat != self._board.beat:
                        self._board, self._heard = board, time.monotonic()
            except (RuntimeError, dist.DistError) as error:  # the store lives on rank 0
                self._lost_store = str(error).splitlines()[0]
                return

    def _judge(self) -> None:
        problem_since: float | None = None
        while not self._over.wait(BEAT_SECONDS):
            now, board = time.monotonic(), self._board
            if rank() and (self._lost_store or (board is not None and now - self._heard > DEAD_SECONDS)):
                if not self._over.wait(5 * BEAT_SECONDS):
                    self._end(f"{self._first()} is gone ({self._lost_store or 'it does not answer'})")
                return
            if board is not None and board.dead:
                self._end(f"{self._place()}: no sign of life from {board.dead} for {DEAD_SECONDS:.0f} s")
            told = board is not None and self._is_told(board)
            problem_since = (problem_since or now) if told else None
            if board is not None and problem_since is not None and now - problem_since > TOLD_SECONDS:
                self._end(board.problem, board.mistake)
            if now - self._moved > self.patience:
                moved = f"{self._place()}: nothing moved for {self.patience:.0f} s (run.patience)"
                silent = self._silent()
                behind = board.behind if board is not None else "nobody knows where the others are"
                self._end(f"{moved}; no sign of life from {silent}" if silent else f"{moved}; {behind}")

    def _end(self, reason: str, mistake: bool = False) -> None:
        print(reason if mistake else f"{reason}; the job ends here, {GO_ON}", flush=True)
        self.on_end(reason, mistake)
        if rank() == 0:
            self._linger()
        os._exit(os.EX_TEMPFAIL)

    def _place(self) -> str:
        return f"step {self._step + 1}" if self._phase >= Phase.WAITING_FOR_DATA else "before the first step"

    def _first(self) -> str:
        return f"rank 0 ({self._board.where})" if self._board is not None else "rank 0"

    def _silent(self) -> str:
        """Who tells nothing any more: by the board, or who writes it."""
        if rank() and (self._board is None or time.monotonic() - self._heard > SILENT_BEATS * BEAT_SECONDS):
            return self._first()
        return self._board.silent if self._board is not None else ""

    def _is_told(self, board: Board) -> bool:
        return board.stopped not in (-1, rank())

    def _who_is_gone(self) -> UserError | None:
        """After a collective failed: who told of a problem, else who does not tell anything any more."""
        began = time.monotonic()
        while time.monotonic() - began < DEAD_SECONDS:
            board = self._board
            if board is not None and self._is_told(board):
                return _told((UserError if board.mistake else LostError)(board.problem))
            if self._lost_store:
                return LostError(f"{self._first()} is gone ({self._lost_store}); {GO_ON}") if rank() else None
            if silent := self._silent():
                return _told(LostError(f"{silent} is gone; {GO_ON}"))
            time.sleep(BEAT_SECONDS / 4)
        return None


class _Signs:
    """Of all ranks, on rank 0, and when each last changed."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._last: dict[int, tuple[Sign, float]] = {}

    def read(self, store: Any, own: Sign) -> Board:
        """Look at what the ranks have told."""
        keys = [str(other) for other in range(world())]
        known = keys if store.check(keys) else [key for key in keys if store.check([key])]
        now = time.monotonic()
        for value in store.multi_get(known):
            sign = Sign(**json.loads(value))
            if sign.rank not in self._last or self._last[sign.rank][0].beat != sign.beat:
                self._last[sign.rank] = sign, now
        signs = [sign for sign, _ in self._last.values()]
        never = [f"rank {other}" for other in range(world()) if other not in self._last]
        if now - self._began <= SILENT_BEATS * BEAT_SECONDS:
            never = []
        least = min((sign.step, sign.phase) for sign in signs)
        behind = [str(sign) for sign in signs if (sign.step, sign.phase) == least]
        who = _names(behind) if len(behind) < len(signs) else "every rank"
        first = min((sign for sign in signs if sign.problem), key=lambda sign: sign.rank, default=None)
        return Board(
            own.beat,
            own.where,
            silent=_names([*self._older(now, SILENT_BEATS * BEAT_SECONDS), *never]),
            dead=_names(self._older(now, DEAD_SECONDS)),  # who comes late is no dead one
            behind=f"{Phase(least[1]).words}: {who}",
            stopped=-1 if first is None else first.rank,
            problem="" if first is None else f"{first} stopped: {first.problem}",
            mistake=first is not None and first.mistake,
        )

    def _older(self, now: float, seconds: float) -> list[str]:
        return [str(sign) for sign, came in self._last.values() if sign.rank and now - came > seconds]


def _names(ranks: list[str]) -> str:
    return ", ".join(ranks[:NAMED]) + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")


def _told(error: UserError) -> UserError:
    """What rank 0's board says, rank 0 prints."""
    error.echoed = rank() != 0
    return error


def _of_a_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank did: gloo's errors name their source, NCCL's have a type."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "peer", "Connection"))
