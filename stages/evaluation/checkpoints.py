"""Which models a call judges: one, or the checkpoints of a run, those that are there or those that come."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from stages.evaluation.kept import differences, protocol_of, without_model
from videodiff.errors import UserError
from videodiff.model import find, numbered
from videodiff.parts import DESCRIPTION, Weights
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
        raise UserError(
            f"--checkpoints {text!r}: say last, all, or every N or every:N (those whose step is a multiple of N)"
        )


def subjects(model: str, choice: Choice, weights: Chosen, known: Sequence[Subject] = ()) -> list[Subject]:
    """What is to be judged of a model, a checkpoint or a run, by step. Collective: rank 0 looks for all.

    known: what was judged before, see `Index`. Raises UserError on all ranks when there is nothing.
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
        of = (
            f" with a step that is a multiple of {choice.every}; say all" if choice.every > 1 else " yet; train further"
        )
        raise UserError(f"{model}: holds no checkpoint{of}, or name another run")
    return [subject for subject in found if not _is_kept_of(subject, known)]


def follow(
    model: str, choice: Choice, weights: Chosen, done: Sequence[Subject], say: Callable[[str], None]
) -> Iterator[Subject]:
    """The checkpoints of a run that trains, each as soon as it is there, until the run is complete or has failed.

    done: what is judged, to which the caller adds each when it is. None is given twice: of one that was gone before it
    could be judged there may come the averaged weights that were kept. Collective: rank 0 looks, and all ranks are
    given the same. Raises UserError for what can't become a run.
    """
    run = Path(model)
    if choice.last:
        raise UserError("--watch judges each new checkpoint; say --checkpoints all or every:N")
    if (run / DESCRIPTION).is_file() or not run.absolute().parent.is_dir():
        raise UserError(f"{model}: not the folder of a run; name the one that run.dir names in its YAML")
    told = -TOLD_SECONDS
    given: set[Subject] = set()
    while True:
        look = _look(run, choice, _kinds(weights), done) if distributed.rank() == 0 else None
        state, step, silent, found = distributed.from_first(look) or ("", 0, 0.0, [])
        new = [subject for subject in found if subject not in given]
        given.update(new)
        yield from new
        if state in ("complete", "failed") and not new:
            say(f"{run}: {state} at step {step}")
            return
        if not new:
            if time.monotonic() - told > TOLD_SECONDS:
                dead = f", but silent for {silent / 60:.0f} min: has it died?" if silent > SILENT_SECONDS else ""
                say(f"{run}: waiting for the next checkpoint (step {step}, {state or 'not begun'}{dead})")
                told = time.monotonic()
            time.sleep(POLL_SECONDS)


class Index:
    """`checkpoints.json` of a folder: which models were judged into folders of it, of which run and by which protocol.
    They may be gone, what is known of them is not. A single evaluation lies in the folder itself and has no index.
    It holds no path: run and folder may be moved.

    done: they, and what this call judges, see `add`. unread: name -> why it could not be read, see `skip`. Collective:
    rank 0 reads and writes.
    """

    def __init__(self, out: Path, model: str) -> None:
        self._path, self._run = out / INDEX, Path(model).resolve().name
        self._told, known = distributed.from_first(self._read() if distributed.rank() == 0 else ({}, []))
        self.known: tuple[Subject, ...] = tuple(known)
        self.done: list[Subject] = list(known)
        self.unread: dict[str, str] = dict(self._told.get("unread", {}))

    def _read(self) -> tuple[dict[str, Any], list[Subject]]:
        try:
            told = json.loads(self._path.read_text(encoding="utf-8"))
            found = [Subject(Path(), e["weights"], e["name"], e["step"]) for e in told["checkpoints"]]
        except (OSError, ValueError, KeyError, TypeError):
            return {}, []
        return told, [each for each in found if (self._path.parent / each.name / "evaluation.json").is_file()]

    def check(self, subject: Subject, protocol: dict[str, Any]) -> None:
        """Raise UserError, on every rank, where a model may not stand on one page with those that are there."""
        distributed.raise_from_first(self._problem(subject, protocol) if self.known else None)

    def _problem(self, subject: Subject, protocol: dict[str, Any]) -> str | None:
        run = Path(self._told.get("run", "")).name  # of older ones the whole path
        unlike = differences(self._told.get("protocol", {}), without_model(protocol, own_tower=True))
        if not subject.name:
            problem = f"evaluations of {len(self.known)} checkpoints, of which a single one would write over the index"
        elif run != self._run:
            problem = f"evaluations of {run}, and this is {self._run} (if it was renamed, write so into {INDEX})"
        elif first := list(islice(unlike, 3)):
            problem = f"evaluations by another protocol ({'; '.join(first)})"
        else:
            return None
        return f"{self._path.parent}: holds {problem}; name another folder with --out"

    def add(self, subject: Subject, protocol: dict[str, Any]) -> None:
        """A model is judged: say so, unless it is a single one, which lies in the folder itself."""
        self.done[:] = [*(before for before in self.done if before.name != subject.name), subject]
        self.unread.pop(subject.name, None)
        if distributed.rank() > 0:
            return
        if not subject.name:
            self._path.unlink(missing_ok=True)  # of checkpoints whose evaluations are gone: see `check`
            return
        self._told["protocol"] = without_model(protocol, own_tower=True)
        self._write()

    def skip(self, subject: Subject, reason: str) -> None:
        """A checkpoint can't be read: say so on the page of the others, as long as it can't."""
        self.unread[subject.name] = reason
        if distributed.rank() == 0 and any(each.name for each in self.done):
            self._write()

    def _write(self) -> None:
        ordered = sorted(self.done, key=lambda each: (each.step or 0, each.weights))
        told = [{"name": each.name, "step": each.step, "weights": each.weights} for each in ordered]
        unread = {"unread": dict(sorted(self.unread.items()))} if self.unread else {}
        write_json(self._path, {"run": self._run, "protocol": self._told["protocol"], "checkpoints": told, **unread})


def placed(subject: Subject, out: Path, model: str) -> Subject:
    """Averaged weights under a name of their own, where their folder in `out` holds samples of another model: of the
    whole checkpoint, which went before its evaluation was finished. Collective. model: what protocols call it."""
    told = protocol_of(out / subject.name) if distributed.rank() == 0 and _is_average(subject) else None
    is_other = distributed.from_first(told is not None and told.get("model") != model)
    return replace(subject, name=f"{subject.folder.name}-{subject.weights}") if is_other else subject


def _kinds(weights: Chosen) -> tuple[Weights, ...]:
    return ("ema", "raw") if weights == "both" else (weights,)


def _look(
    run: Path, choice: Choice, kinds: tuple[Weights, ...], done: Sequence[Subject]
) -> tuple[str, int, float, list[Subject]]:
    """State, step, seconds for which a run that trains has been silent, and checkpoints; these after the state, so that
    the last one is there when a run is complete."""
    told = status.read(run)
    found = [each for each in _found(run, choice, kinds) if each not in done and not _is_kept_of(each, done)]
    if told is None:
        return "", 0, 0.0, found
    return told.state, told.step, time.time() - told.written if told.state == "training" else 0.0, found


def _is_kept_of(subject: Subject, known: Sequence[Subject]) -> bool:
    """Whether this is the averaged weights that were kept of a checkpoint which was judged when it was whole: another
    file of equal weights."""
    return _is_average(subject) and (subject.step, subject.weights) in {(each.step, each.weights) for each in known}


def _is_average(subject: Subject) -> bool:
    return subject.folder.name.startswith("average-")


def _found(run: Path, choice: Choice, kinds: tuple[Weights, ...]) -> list[Subject]:
    """Of each step the checkpoint, or where that is gone the model of averaged weights that was kept of it."""
    chosen = []
    steps: dict[int, Path] = {}
    for kind in ("average", "step"):
        found = numbered(run / CHECKPOINTS, kind).items()
        steps |= {step: folder for step, folder in found if (folder / DESCRIPTION).is_file()}
    for step, folder in sorted(steps.items()):
        if step % choice.every == 0:
            here = kinds if folder.name.startswith("step-") else tuple(kind for kind in kinds if kind == "ema")
            chosen += [Subject(folder, kind, f"step-{step:08d}-{kind}", step) for kind in here]
    return chosen


def _step(folder: Path) -> int | None:
    found = re.fullmatch(r"(?:step|average)-([0-9]+)", folder.name)
    return int(found[1]) if found else None
