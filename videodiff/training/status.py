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
from typing import Literal

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

    fruitless: starts, this one among them, since the last one that saved anything. attempt: Slurm's, at that time.
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
    cap: int = 0
    job: str = ""
    attempt: int = 0
    written: float = 0.0

    def write(self, folder: Path) -> None:
        """Replace the file; a reader never sees half of it."""
        self.written = time.time()
        draft = folder / f".{FILE}.{os.getpid()}"
        draft.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        draft.replace(folder / FILE)

    def fail(self, state: Literal["interrupted", "failed"], problem: str) -> None:
        """Note why the run ended."""
        self.state, self.problem, self.problem_time = state, problem, time.time()

    def saved(self, step: int) -> None:
        """Note a checkpoint: what this attempt does is not in vain."""
        self.checkpoint, self.checkpoint_time = f"step {step}", time.time()
        self.fruitless, (self.job, self.attempt) = 0, _slurm()


def read(folder: Path) -> Status | None:
    """The status of a run; None when it has none, or an unreadable one."""
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return Status(**{field.name: values[field.name] for field in fields(Status) if field.name in values})
    except (OSError, ValueError, TypeError):
        return None


def verdict(folder: Path, cap: int) -> tuple[Verdict, str]:
    """Whether to start the run again, and why; `cap` counts starts in a row that save nothing (run.max_fruitless)."""
    job, attempt = _slurm()
    status = read(folder)
    if status is None:
        tries = attempt + 1 if job else 0
        if tries >= cap:
            return Verdict.OVER_THE_CAP, f"{tries} attempts of job {job} did not come so far as to open {folder}"
        return Verdict.GO_ON, f"{folder}: not begun"
    if status.state == "complete":
        return Verdict.COMPLETE, f"all {status.steps} steps are done"
    if status.state == "failed":
        return Verdict.HOPELESS, status.problem
    holder = lease.read(folder)
    if holder is not None and holder.job != job and job and lease.is_alive(folder):
        return Verdict.HOPELESS, f"{holder} trains in it"
    fruitless = status.fruitless
    if job and job == status.job:
        fruitless = max(fruitless, attempt - status.attempt)
    if fruitless >= cap:
        why = f"; the last: {status.problem}" if status.problem else ""
        return Verdict.OVER_THE_CAP, f"{fruitless} starts in a row saved nothing (run.max_fruitless={cap}){why}"
    return Verdict.GO_ON, f"{status.steps - status.step} steps are left"


def describe(folder: Path, cap: int) -> str:
    """The status in plain text, a few lines."""
    status, now = read(folder), time.time()
    if status is None:
        return f"{folder}: no run has begun here"
    holder = lease.read(folder)
    lives = holder is not None and lease.is_alive(folder)
    state = status.state
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
        left = (status.steps - status.step) * status.seconds_per_step
        progress.append(f"{status.seconds_per_step:.3g} s/step")
        progress.append(f"{_time(left)} left" if status.step < status.steps else "")
    if status.skipped:
        progress.append(f"{status.skipped} steps skipped")
    lines.append("  " + ", ".join(part for part in progress if part))
    saved = f"{status.checkpoint}, {_time(now - status.checkpoint_time)} ago" if status.checkpoint else "none yet"
    lines.append(f"  last checkpoint: {saved}")
    problem = f"{status.problem} ({_time(now - status.problem_time)} ago)" if status.problem else "none"
    lines.append(f"  last problem: {problem}")
    code, why = verdict(folder, cap)
    if code is not Verdict.COMPLETE and not lives:
        advice = "the same command goes on" if code is Verdict.GO_ON else "mend it before the next start"
        lines.append(f"  {why}; {advice}")
    return "\n".join(lines)


def _slurm() -> tuple[str, int]:
    return os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _time(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.0f} s"
