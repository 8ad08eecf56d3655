"""One writer for a run folder: a lease with a heartbeat, which holds on disks without locks and between machines.

A node whose cable is cut keeps its old process alive beside the attempt that replaces it. So the lease names its holder
(job, attempt, host, process); it is taken over at once from an earlier attempt of the same job and from a process that
is dead, else only when its heart has stopped; and who has lost it publishes nothing more.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from videodiff.errors import LostError

FILE = "lease.json"
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0  # without a heartbeat
FAREWELL_SECONDS = 30.0  # a process that has lost its lease, and hangs, ends itself after these


@dataclass(frozen=True)
class Holder:
    """Who writes in a run folder. job, attempt: Slurm's; "" and 0 without. born: when the process began, in ticks."""

    job: str
    attempt: int
    host: str
    machine: str
    pid: int
    born: str
    token: str = field(default_factory=lambda: secrets.token_hex(4))

    @classmethod
    def this(cls) -> "Holder":
        """This process."""
        job, attempt = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return cls(job, attempt, socket.gethostname(), _machine(), os.getpid(), _born(os.getpid()))

    def __str__(self) -> str:
        job = f"job {self.job}, attempt {self.attempt}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}"

    def gives_way(self, other: "Holder") -> bool:
        """Whether `other` may take the lease although this one's heart beats."""
        if self.job and self.job == other.job and other.attempt > self.attempt:
            return True
        return self.machine == other.machine and _born(self.pid) != self.born

    def lives_here(self, other: "Holder") -> bool:
        """Whether `other`, on the same machine, sees that this process lives."""
        return self.machine == other.machine and _born(self.pid) == self.born


class Lease:
    """The right to write in a folder, held from `take` to `give_back`."""

    def __init__(self, folder: Path, holder: Holder) -> None:
        self.path, self.holder = folder / FILE, holder
        self._over = threading.Event()
        self._lost = ""
        self._thread: threading.Thread | None = None

    def take(self) -> str | None:
        """Take the lease and keep it alive; returns the problem when another has it."""
        draft = self.path.with_name(f".{FILE}.{self.holder.token}")
        first: float | None = None
        try:
            while True:
                draft.write_text(json.dumps(asdict(self.holder)), encoding="utf-8")
                if _place(draft, self.path):
                    break
                before, beat = read(self.path.parent), _beat_of(self.path)
                if before == self.holder:  # a network disk made it, and its answer was lost
                    break
                silent = draft.stat().st_mtime - beat  # both by the disk's clock
                if silent >= STALE_SECONDS or (before is not None and before.gives_way(self.holder)):
                    self._remove(before)
                    continue
                first = beat if first is None else first
                if beat != first or (before is not None and before.lives_here(self.holder)):
                    return (
                        f"run.dir={self.path.parent}: {before or 'another process'} trains in it; wait for its end or "
                        "stop it, or name a new run.dir"
                    )
                time.sleep(BEAT_SECONDS / 5)  # until its heart beats, or has stood still for too long
        finally:
            draft.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return None

    def _remove(self, before: Holder | None) -> None:
        """Take away the lease of `before`: of several that try, one succeeds."""
        aside = self.path.with_name(f".{FILE}.{self.holder.token}.gone")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        gone = _parse(aside)
        if gone is not None and gone != before:  # another was quicker, this is its own new lease
            _place(aside, self.path)
        aside.unlink()

    def check(self, look: bool = True) -> None:
        """Raise LostError when another has taken over; without `look`, when the last heartbeat found it so."""
        if problem := self._problem() if look else self._lost:
            raise LostError(problem)

    def _problem(self) -> str:
        now = read(self.path.parent)
        if not self._lost and (now is None or now.token != self.holder.token):
            what = f"{now} has taken over" if now is not None else "its lease is gone"
            self._lost = (
                f"run.dir={self.path.parent}: {what}; this process ({self.holder}) stops and changes nothing more"
            )
        return self._lost

    def give_back(self) -> None:
        """Let another take the folder."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            now = read(self.path.parent)
            if now is not None and now.token == self.holder.token:
                self.path.unlink(missing_ok=True)

    def _keep(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the disk is away for a moment; if it stays away another will take over
                if problem := self._problem():
                    if not self._over.wait(FAREWELL_SECONDS):  # the loop would have noticed: it hangs, on a dead peer
                        print(problem, flush=True)
                        os._exit(os.EX_TEMPFAIL)
                    return
                os.utime(self.path)


def read(folder: Path) -> Holder | None:
    """Who holds the folder; None when nobody does, or its file is torn."""
    return _parse(folder / FILE)


def _parse(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def is_alive(folder: Path) -> bool:
    """Whether somebody holds the folder and its heart beats."""
    holder = read(folder)
    if holder is None or (holder.machine == _machine() and _born(holder.pid) != holder.born):
        return False
    return time.time() - _beat_of(folder / FILE) < STALE_SECONDS


def _place(draft: Path, path: Path) -> bool:
    """Give `path` the contents of `draft` unless it exists, in one move; False when it does."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):  # a disk may come without hard links
            raise
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(draft.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


def _beat_of(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _machine() -> str:
    """Equal for two processes only if each can see whether the other lives."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _born(pid: int) -> str:
    """When a process began, "" when there is none: a number that a new process got is told apart by it."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:  # not ours, but there
        pass
    return "unknown"
