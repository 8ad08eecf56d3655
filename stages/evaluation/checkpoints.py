"""Which models a call judges: one, or the checkpoints of a run, those that are there or those that come."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from videodiff.errors import UserError
from videodiff.model import DESCRIPTION, Weights, find
from videodiff.training import distributed, status
from videodiff.training.run_folder import CHECKPOINTS
from videodiff.video_io import write_json

INDEX = "checkpoints.json"
POLL_SECONDS = 5.0
TOLD_SECONDS = 300.0  # between two lines that say what is waited for
SILENT_SECONDS = 600.0  # after which a run that trains is thought to be dead
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


def subjects(model: str, choice: Choice, weights: Chosen, known: Sequence[Subject] = ()) -> list[Subject]:
    """What is to be judged of a model, a checkpoint or a run, by step. Collective: rank 0 looks for all.

    known: what was judged before, see `judged_before`. Raises UserError on all ranks when there is nothing.
    """
    found, problem = None, None
    if distributed.rank() == 0:
        try:
            found = _subjects(model, choice, weights, known)
        except UserError as error:
            problem = str(error)
    distributed.raise_from_first(problem)
    return distributed.from_first(found) or []


def _subjects(model: str, choice: Choice, weights: Chosen, known: Sequence[Subject]) -> list[Subject]:
    kinds = _kinds(weights)
    if choice.last:
        folder = find(model)
        return [Subject(folder, kind, kind if len(kinds) > 1 else "", _step(folder)) for kind in kinds]
    run = Path(model)
    if not (run / CHECKPOINTS).is_dir():
        raise UserError(f"{model}: not a run with checkpoints, --checkpoints chooses among them; leave it out")
    found = _found(run, choice, kinds)
    if not found:
        raise UserError(f"{model}: holds no checkpoint with a step that is a multiple of {choice.every}; say all")
    return [subject for subject in found if not _is_kept_of(subject, known)]


def follow(
    model: str, choice: Choice, weights: Chosen, known: Sequence[Subject], say: Callable[[str], None]
) -> Iterator[Subject]:
    """The checkpoints of a run that trains, each as soon as it is there, until the run is complete or has failed.

    Collective: rank 0 looks, and all ranks are given the same. Raises UserError for what can't become a run.
    """
    run = Path(model)
    if choice.last:
        raise UserError("--watch judges each new checkpoint; say --checkpoints all or every:N")
    if (run / DESCRIPTION).is_file() or not run.absolute().parent.is_dir():
        raise UserError(f"{model}: not the folder of a run; name the one that run.dir names in its YAML")
    done: set[str] = set()
    told = -TOLD_SECONDS
    while True:
        look = _look(run, choice, _kinds(weights), known) if distributed.rank() == 0 else None
        state, step, silent, found = distributed.from_first(look) or ("", 0, 0.0, [])
        new = [subject for subject in found if subject.name not in done]
        yield from new
        done |= {subject.name for subject in new}
        if state in ("complete", "failed") and not new:
            say(f"{run}: {state} at step {step}")
            return
        if not new:
            if time.monotonic() - told > TOLD_SECONDS:
                dead = f", but silent for {silent / 60:.0f} min: has it died?" if silent > SILENT_SECONDS else ""
                say(f"{run}: waiting for the next checkpoint (step {step}, {state or 'not begun'}{dead})")
                told = time.monotonic()
            time.sleep(POLL_SECONDS)


def judged_before(out: Path) -> list[Subject]:
    """What an earlier call judged in `out`: the checkpoints may be gone, what is known of them is not. Collective."""
    return distributed.from_first(_judged_before(out) if distributed.rank() == 0 else [])


def _judged_before(out: Path) -> list[Subject]:
    try:
        told = json.loads((out / INDEX).read_text(encoding="utf-8"))["checkpoints"]
        found = [Subject(Path(), entry["weights"], entry["name"], entry["step"]) for entry in told]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [subject for subject in found if (out / subject.name / "evaluation.json").is_file()]


def write_index(out: Path, done: Sequence[Subject]) -> None:
    """Say which evaluations lie in folders of `out`; of a single one, which lies in `out` itself, nothing."""
    if not any(subject.name for subject in done):
        (out / INDEX).unlink(missing_ok=True)
        return
    ordered = sorted(done, key=lambda subject: (subject.step or 0, subject.weights))
    told = [{"name": subject.name, "step": subject.step, "weights": subject.weights} for subject in ordered]
    write_json(out / INDEX, {"checkpoints": told})


def _kinds(weights: Chosen) -> tuple[Weights, ...]:
    return ("ema", "raw") if weights == "both" else (weights,)


def _look(
    run: Path, choice: Choice, kinds: tuple[Weights, ...], known: Sequence[Subject]
) -> tuple[str, int, float, list[Subject]]:
    """State, step, seconds for which a run that trains has been silent, and checkpoints; these after the state, so that
    the last one is there when a run is complete."""
    told = status.read(run)
    found = [subject for subject in _found(run, choice, kinds) if not _is_kept_of(subject, known)]
    if told is None:
        return "", 0, 0.0, found
    return told.state, told.step, time.time() - told.written if told.state == "training" else 0.0, found


def _is_kept_of(subject: Subject, known: Sequence[Subject]) -> bool:
    """Whether this is the averaged weights that were kept of a checkpoint which was judged when it was whole: another
    file of equal weights."""
    return subject.folder.name.startswith("average-") and subject.name in {before.name for before in known}


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
