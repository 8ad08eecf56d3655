"""Which models a call judges: one, or the checkpoints of a run, those that are there or those that come."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from videodiff.errors import UserError
from videodiff.model import DESCRIPTION, Weights, find
from videodiff.training import distributed, status
from videodiff.training.run_folder import CHECKPOINTS

POLL_SECONDS = 5.0
TOLD_SECONDS = 300.0  # between two lines that say what is waited for
Chosen = Literal["ema", "raw", "both"]


@dataclass(frozen=True)
class Subject:
    """One model to be judged: its folder, which of its weights, and its name within what is written ("" alone)."""

    folder: Path
    weights: Weights
    name: str = ""
    step: int | None = None


@dataclass(frozen=True)
class Choice:
    """`--checkpoints`: the last one, all, or those whose step is a multiple of `every`."""

    last: bool
    every: int = 1

    @classmethod
    def parse(cls, text: str) -> Choice:
        """UserError for what is none of them."""
        if text in ("last", "all"):
            return cls(text == "last")
        if (found := re.fullmatch(r"every[ :=]?([0-9]+)", text)) and int(found[1]) > 0:
            return cls(False, int(found[1]))
        raise UserError(f"--checkpoints {text!r}: say last, all, or every:N (those whose step is a multiple of N)")


def subjects(model: str, choice: Choice, weights: Chosen) -> list[Subject]:
    """What is to be judged of a model, a checkpoint or a run, by step. Raises UserError when there is nothing."""
    kinds: tuple[Weights, ...] = ("ema", "raw") if weights == "both" else (weights,)
    if choice.last:
        folder = find(model)
        return [Subject(folder, kind, kind if len(kinds) > 1 else "", _step(folder)) for kind in kinds]
    run = Path(model)
    if not (run / CHECKPOINTS).is_dir():
        raise UserError(f"{model}: not a run with checkpoints, --checkpoints chooses among them; leave it out")
    found = _found(run, choice, kinds)
    if not found:
        raise UserError(f"{model}: holds no checkpoint with a step that is a multiple of {choice.every}; say all")
    return found


def follow(model: str, choice: Choice, weights: Chosen, say: Callable[[str], None]) -> Iterator[Subject]:
    """The checkpoints of a run that trains, each as soon as it is there, until the run is complete or has failed.

    Collective: rank 0 looks, and all ranks are given the same.
    """
    if choice.last:
        raise UserError("--watch judges each new checkpoint; say --checkpoints all or every:N")
    run, kinds = Path(model), (("ema", "raw") if weights == "both" else (weights,))
    done: set[str] = set()
    told = -TOLD_SECONDS
    while True:
        state, step = distributed.from_first(_state(run) if distributed.rank() == 0 else ("", 0))
        # Looked at after the state: the last checkpoint is there when a run is complete.
        new = distributed.from_first([s for s in _found(run, choice, kinds) if s.name not in done])
        yield from new
        done |= {subject.name for subject in new}
        if state in ("complete", "failed") and not new:
            say(f"{run}: {state} at step {step}")
            return
        if not new:
            if time.monotonic() - told > TOLD_SECONDS:
                say(f"{run}: waiting for the next checkpoint (step {step}, {state or 'not begun'})")
                told = time.monotonic()
            time.sleep(POLL_SECONDS)


def _found(run: Path, choice: Choice, kinds: tuple[Weights, ...]) -> list[Subject]:
    """Of each step the checkpoint, or where that is gone the model of averaged weights that was kept of it."""
    chosen = []
    steps: dict[int, Path] = {}
    for pattern in ("average-*[0-9]", "step-*[0-9]"):
        for folder in sorted((run / CHECKPOINTS).glob(f"{pattern}/{DESCRIPTION}")):
            steps[_step(folder.parent) or 0] = folder.parent
    for step, folder in sorted(steps.items()):
        if step % choice.every == 0:
            here = kinds if folder.name.startswith("step-") else tuple(kind for kind in kinds if kind == "ema")
            chosen += [Subject(folder, kind, f"step-{step:08d}-{kind}", step) for kind in here]
    return chosen


def _step(folder: Path) -> int | None:
    found = re.fullmatch(r"(?:step|average)-([0-9]+)", folder.name)
    return int(found[1]) if found else None


def _state(run: Path) -> tuple[str, int]:
    told = status.read(run)
    return ("", 0) if told is None else (told.state, told.step)
