"""How a run stands, for people and for job scripts: `status.json` of its folder, written while it trains.

A job script asks one question, whether to start again. `verdict` answers it: a run that is complete, one that fails for
a reason that a new start can't mend, and one whose starts bring nothing any more, are left alone.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

from videodiff.training import lease

FILE = "status.json"


class Verdict(IntEnum):
    """Exit codes of `videodiff status --exit-code`."""

    COMPLETE = 0
    GO_ON = 3
    HOPELESS = 4
    OVER_THE_CAP = 5


@dataclass
class Status:
    """state: failed is for good (a user's mistake), interrupted is not. Times in seconds since 1970.

    fruitless: starts, this one among them, since the last one that saved anything. opened, saved: Slurm's (job,
    attempt) that last opened the run, and that last saved in it; "" and 0 without Slurm.
    """

    state: Literal["training", "complete", "stopped", "interrupted", "failed"] = "training"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    seconds_per_step: float | None = None
    skipped: int = 0
    checkpoint: str = ""
    checkpoint_time: float = 0.0
    problem: str = ""
    problem_time: float = 0.0
    fruitless: int = 0
    opened: tuple[str, int] = ("", 0)
    saved: tuple[str, int] = ("", 0)
    written: float = 0.0

    @property
    def checkpoint_step(self) -> int:
        """Of the last checkpoint that was noted, 0 without."""
        return int(self.checkpoint.removeprefix("step ") or 0)

    def open(self, steps: int) -> None:
        """Note that a start has come so far."""
        here = slurm()
        self.fruitless = self.fruitless + 1 if self.opened[0] == here[0] else 1  # another job, mended perhaps
        self.state, self.steps, self.opened = "training", steps, here

    def write(self, folder: Path) -> None:
        """Replace the file; a reader never sees half of it."""
        self.written = time.time()
        draft = folder / f".{FILE}.{os.getpid()}"
        draft.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        draft.replace(folder / FILE)

    def fail(self, state: Literal["interrupted", "failed", "stopped"], problem: str) -> None:
        """Note why the run ended."""
        self.state, self.problem, self.problem_time = state, problem, time.time()

    def save(self, step: int) -> None:
        """Note a checkpoint: what this attempt does is not in vain."""
        self.checkpoint, self.checkpoint_time = f"step {step}", time.time()
        self.fruitless, self.saved = 0, slurm()


def read(folder: Path) -> Status | None:
    """The status of a run; None when it has none, or a torn one. Raises OSError when the disk doesn't answer."""
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        known = {field.name: values[field.name] for field in fields(Status) if field.name in values}
        told: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
        return Status(**told)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
        return None


def verdict(folder: Path, steps: int, cap: int) -> tuple[Verdict, str]:
    """Whether to start a run of `steps` steps again, and why; `cap` counts starts in a row that save nothing.

    Under Slurm (SLURM_JOB_ID, SLURM_RESTART_COUNT) it is this job that asks: what an earlier start left in the file
    decides nothing when this attempt did not even come so far as to open the run.
    """
    job, attempt = slurm()
    status, holder = read(folder), lease.read(folder)
    if job and holder is not None and holder.job == job and holder.attempt > attempt:
        return Verdict.HOPELESS, f"{holder} has taken over"
    if job and holder is not None and holder.job != job and lease.is_alive(folder):
        return Verdict.HOPELESS, f"{holder} trains in it"
    if status is None:
        if job and attempt + 1 >= cap:
            return Verdict.OVER_THE_CAP, f"{attempt + 1} attempts of job {job} did not come so far as to open {folder}"
        return Verdict.GO_ON, f"{folder}: not begun"
    if status.state == "complete" and status.step >= steps:
        return Verdict.COMPLETE, f"all {status.step} steps are done"
    if status.state == "failed" and (not job or status.opened == (job, attempt)):
        return Verdict.HOPELESS, status.problem
    fruitless = status.fruitless
    if job:
        fruitless = attempt - status.saved[1] if status.saved[0] == job else attempt + 1
    if fruitless >= cap:
        why = f"; the last: {status.problem}" if status.problem else ""
        return Verdict.OVER_THE_CAP, f"{fruitless} starts in a row saved nothing (run.max_fruitless={cap}){why}"
    return Verdict.GO_ON, f"{steps - status.step} steps are left"


def describe(folder: Path, steps: int, cap: int) -> str:
    """The status in plain text, a few lines."""
    status, now = read(folder), time.time()
    if status is None:
        return f"{folder}: no run has begun here"
    holder = lease.read(folder)
    lives = holder is not None and lease.is_alive(folder)
    state: str = status.state
    if state == "training" and not lives:
        state, who = "interrupted", "its process is gone"
    else:
        who = str(holder) if lives else ""
    lines = [f"{folder}: {state}" + (f" ({who})" if who else "")]
    share = f" ({100 * status.step / status.steps:.0f} %)" if status.steps else ""
    progress = [f"step {status.step} of {status.steps}{share}"]
    if status.loss is not None:
        progress.append(f"loss {status.loss:.4f}")
    if status.seconds_per_step is not None:
        progress.append(f"{status.seconds_per_step:.3g} s/step")
        if status.step < status.steps:
            progress.append(f"{_time((status.steps - status.step) * status.seconds_per_step)} left")
    if status.skipped:
        progress.append(f"{status.skipped} steps skipped")
    lines.append("  " + ", ".join(progress))
    saved = f"{status.checkpoint}, {_time(now - status.checkpoint_time)} ago" if status.checkpoint else "none yet"
    lines.append(f"  last checkpoint: {saved}")
    problem = f"{status.problem} ({_time(now - status.problem_time)} ago)" if status.problem else "none"
    lines.append(f"  last problem: {problem}")
    code, why = verdict(folder, steps, cap)
    if code is not Verdict.COMPLETE and not lives:
        advice = "the same command goes on" if code is Verdict.GO_ON else "mend it before the next start"
        lines.append(f"  {why}; {advice}")
    return "\n".join(lines)


def slurm() -> tuple[str, int]:
    """The job that this process belongs to and its attempt; "" and 0 without Slurm."""
    return os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _time(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.0f} s"
