"""What a run says while it trains: metrics.jsonl, TensorBoard, a bar on a terminal, a line now and then in a file."""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from videodiff.errors import UserError

LINE_EVERY_SECONDS = 10.0


def cut_back(path: Path, step: int) -> None:
    """Keep the lines of steps 1..`step` of a metrics file; a torn last line goes too. No file: nothing to do."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line + "\n" for line in lines if 0 < _step_of(line) <= step]
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text("".join(kept), encoding="utf-8")
    os.replace(draft, path)


class Report:
    """The voice of rank 0; the other ranks hold a silent one. A context manager.

    wandb: a project of Weights & Biases that gets the numbers too.
    log_every: a line each so many steps where standard output is no terminal; None: one about every ten seconds.
    """

    def __init__(
        self, folder: Path, step: int, steps: int, log_every: int | None, wandb: str | None, silent: bool
    ) -> None:
        self.silent, self.steps, self.log_every = silent, steps, log_every
        self._bar: Progress | None = None
        self._board: Any = None
        self._wandb: Any = None
        self._losses: list[float] = []
        self._since = time.perf_counter()
        if silent:
            return
        cut_back(folder / "metrics.jsonl", step)
        self._file = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - closed with the report
        self._board = self._tensorboard(folder / "tensorboard", step)
        self._wandb = _wandb(folder, wandb) if wandb is not None else None
        console = Console(file=sys.stdout)
        if console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("train", total=steps, completed=step, text="")
            self._bar.start()

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        if self.silent:
            return
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file.close()

    def say(self, text: str) -> None:
        """One line to the reader."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self.silent:
            print(text, flush=True)

    def step(self, record: Mapping[str, Any]) -> None:
        """Write the record of a finished step. Numbers that are not finite become null: JSON has no other word."""
        if self.silent:
            return
        finite = {key: None if _is_odd(value) else value for key, value in record.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in record.items():
                if key != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(key, value, record["step"])
        if self._wandb is not None:
            numbers = {key: value for key, value in record.items() if isinstance(value, (int, float))}
            self._wandb.log(numbers, step=record["step"])
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], text=f"loss {record['loss']:.4f}")
            return
        self._losses.append(record["loss"])
        if self._is_time(record["step"]):
            self._line(record)

    def _is_time(self, step: int) -> bool:
        if step == self.steps:
            return True
        if self.log_every is not None:
            return step % self.log_every == 0
        return time.perf_counter() - self._since >= LINE_EVERY_SECONDS

    def _line(self, record: Mapping[str, Any]) -> None:
        now = time.perf_counter()
        pace = (now - self._since) / len(self._losses)
        loss = sum(self._losses) / len(self._losses)
        left = pace * (self.steps - record["step"])
        self.say(
            f"step {record['step']}/{self.steps}  loss {loss:.4f}  grad_norm {record['grad_norm']:.3g}  "
            f"lr {record['lr']:.3g}  {pace:.3g} s/step  {left / 60:.0f} min left"
        )
        self._losses, self._since = [], now

    def _tensorboard(self, folder: Path, step: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say("no TensorBoard events: tensorboard is not installed (pip install tensorboard)")
            return None
        return SummaryWriter(str(folder), purge_step=step + 1)


def _wandb(folder: Path, project: str) -> Any:
    """A run of Weights & Biases that is the same one when training goes on."""
    try:
        import wandb
    except ImportError:
        raise UserError(f"run.wandb={project}: wandb is not installed; pip install 'videodiff[wandb]'") from None
    number = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    mode = os.environ.get("WANDB_MODE", "offline")
    return wandb.init(project=project, dir=str(folder), id=number, name=folder.name, resume="allow", mode=mode)


def _step_of(line: str) -> int:
    """The step of a line of metrics.jsonl, 0 when it is torn."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


def _is_odd(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
