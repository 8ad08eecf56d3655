"""The folder of a run: made or found again, held by one process, and bound to the configuration it began with."""

import contextlib
import os
import platform
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from videodiff import config as configs
from videodiff.config import Config
from videodiff.errors import LostError, UserError, disk_error
from videodiff.training import status
from videodiff.training.checkpoint import Checkpoints
from videodiff.training.distributed import from_first, gather_to_first, raise_from_first, rank
from videodiff.training.lease import Holder, Lease
from videodiff.training.lease import read as read_lease
from videodiff.training.status import Status

CHECKPOINTS = "checkpoints"
MACHINES = "machines.txt"
STATUS_SECONDS = 5.0  # between two writings
SHARED_SECONDS = 20.0  # until another node sees a new file of a network disk


class Attempt:
    """One start of a run, from its first to its last moment: a context manager around all that may go wrong.

    Once opened it holds the folder's lease on rank 0 and writes its status; how it ends is noted there, for the next.
    """

    def __init__(self, folder: Path, config: Config, steps: int) -> None:
        self.folder, self.config, self.steps = folder, config, steps
        self.token = ""  # of this start; what it has not finished bears it
        self._status = Status()
        self._lease: Lease | None = None
        self._written = 0.0
        self._complained = False  # of a status that can't be written

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._close(error)

    def open(self) -> None:
        """Take the folder. Collective. Raises UserError when it can't be written, is another's or begun otherwise."""
        problem: str | UserError | None = None
        if rank() == 0:
            try:
                problem = self._open()
            except UserError as error:
                problem = error
            except OSError as error:
                problem = disk_error(error, cannot_write(self.folder, error))
        raise_from_first(problem)
        self.token = from_first(self._lease.holder.token if self._lease is not None else "")
        self._check_shared()

    def _check_shared(self) -> None:
        """Every rank must see rank 0's folder: parts of a checkpoint on another disk would be lost."""
        end = time.monotonic() + SHARED_SECONDS
        while not (seen := (holder := read_lease(self.folder)) is not None and holder.token == self.token):
            if time.monotonic() > end:
                break
            time.sleep(0.1)  # a network disk may take a moment
        blind = gather_to_first("" if seen else f"rank {rank()} on {socket.gethostname()}")
        names = ", ".join(filter(None, blind)) if blind is not None else ""
        raise_from_first(
            f"run.dir={self.folder}: not the same folder for {names}; name one on a disk that all nodes share"
            if names
            else None
        )

    def check(self) -> None:
        """Raise LostError when another has taken over. To be asked before anything is published; rank 0 alone knows."""
        if self._lease is not None:
            self._lease.check()

    def step(self, record: Mapping[str, Any]) -> None:
        """Note a finished step, now and then on disk."""
        if self._lease is None:
            return
        self._lease.check(look=False)
        now = self._status
        now.step, now.loss = record["step"], record.get("loss", now.loss)
        if (seconds := record.get("seconds")) is not None:
            before = now.seconds_per_step
            now.seconds_per_step = seconds if before is None else 0.95 * before + 0.05 * seconds
        now.skipped = record.get("skipped", now.skipped)
        if time.monotonic() - self._written > STATUS_SECONDS:
            self._try_write()

    def saved(self, step: int) -> None:
        """Note a checkpoint."""
        self._status.save(step)
        self._try_write()

    def complete(self, step: int) -> None:
        """Note that all is done."""
        self._status.state, self._status.step = "complete", step

    def stopped(self, reason: str) -> None:
        """Note that the run was told to stop and has saved."""
        self._status.fail("stopped", reason)

    def ended(self, reason: str, mistake: bool) -> None:
        """Note what ends this process at once: another rank that is gone or hangs, or its mistake."""
        self._status.fail("failed" if mistake else "interrupted", reason)
        with contextlib.suppress(LostError, OSError):
            self.check()
            self._write()

    def _open(self) -> str | None:
        """Make the run's folder, or compare the configuration with that of its checkpoints. Returns the problem."""
        path = self.folder / "config.yaml"
        self.folder.mkdir(parents=True, exist_ok=True)
        lease = Lease(self.folder, Holder.this())
        if problem := lease.take():
            return problem
        self._lease = lease
        self._status = status.read(self.folder) or Status()
        self._status.open(self.steps)
        self._write()
        checkpoints = Checkpoints(self.folder / CHECKPOINTS, 1)
        begun = checkpoints.exist()
        if self._status.checkpoint and not begun:
            return (
                f"{self.folder / CHECKPOINTS}: no checkpoint is there, but {status.FILE} tells of one "
                f"({self._status.checkpoint}); copy {CHECKPOINTS}/ too, or name a new run.dir to start anew"
            )
        if begun and self._status.checkpoint_step > checkpoints.last_step():
            print(
                f"{self.folder}: {status.FILE} tells of a checkpoint of {self._status.checkpoint}, the newest here is "
                f"of step {checkpoints.last_step()}; it goes on from there",
                flush=True,
            )
        # Without a checkpoint there is nothing to go on with: the start failed, and this may be the command mended.
        if path.is_file() and begun:
            changes = configs.differences(configs.load(type(self.config), path), self.config)
            if forbidden := [str(change) for change in changes if not change.operational]:
                return (
                    f"{path}: this run began with another configuration ({'; '.join(forbidden)}); "
                    "take the values back, or name a new run.dir"
                )
            for change in changes:
                print(f"{self.folder}: goes on with {change}", flush=True)
        configs.save(self.config, path)
        record_machine(self.folder)
        return None

    def _close(self, error: BaseException | None) -> None:
        if self._lease is None:
            return
        if error is not None and not isinstance(error, (SystemExit, KeyboardInterrupt)):
            lost = isinstance(error, LostError) or not isinstance(error, UserError)
            text = " ".join(str(error).split()) or type(error).__name__
            self._status.fail("interrupted" if lost else "failed", text)
        elif self._status.state == "training":
            self._status.state = "interrupted"
        with contextlib.suppress(LostError, OSError):  # the folder is another's, or can't be written: the error says so
            self._lease.check()
            self._write()
        self._lease.give_back()

    def _try_write(self) -> None:
        """The status is for readers: one that can't be written now is no reason to end a run, and is tried again."""
        try:
            self._write()
            self._complained = False
        except OSError as error:
            self._written = time.monotonic()
            if not self._complained:
                self._complained = True
                name = self.folder / status.FILE
                print(f"{name}: can't be written ({error.strerror or error}); training goes on", flush=True)

    def _write(self) -> None:
        if self._lease is not None:
            self._status.write(self.folder)
            self._written = time.monotonic()


def cannot_write(folder: Path, error: OSError) -> str:
    """The line that tells a user so."""
    return f"run.dir={folder}: can't be written ({error.strerror or error}); name another folder"


def record_machine(folder: Path) -> None:
    """A line in `machines.txt` of the run for each machine that it ran on, in the order of first use."""
    path = folder / MACHINES
    known = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if (here := machine()) not in known:
        path.write_text("\n".join([*known, here]) + "\n", encoding="utf-8")


def machine() -> str:
    """What computes here: the GPU's name, or the processor's and the number of its cores; and PyTorch's version."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{os.cpu_count()} CPU cores ({_processor()})"
    return f"{name}, PyTorch {torch.__version__}"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
