"""What is told of a run from outside: which folder is meant, its checkpoints, whether they are sound."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

from videodiff.errors import UserError
from videodiff.model import numbered
from videodiff.model_folder import new_folder
from videodiff.training.checkpoint import MANIFEST, fault, seal
from videodiff.training.engine_config import FOLDER
from videodiff.training.fragments import Fragments
from videodiff.training.fragments import reshape as reshape_state
from videodiff.training.run_folder import CHECKPOINTS

CONFIG = "config.yaml"
STATE = "state.json"


def run_of(run: Path, overrides: Sequence[str]) -> tuple[Path, int, int]:
    """(folder, run.steps, run.max_fruitless) of a run's folder, or of the YAML and overrides that it trains with."""
    from stages.assemble import load_stage

    if run.is_dir():
        if overrides:
            raise UserError(f"{overrides[0]}: overrides go with a YAML, {run} is a run's folder; leave them out")
        if not (run / CONFIG).is_file():
            raise UserError(f"{run}: not a run (no {CONFIG}); name the folder that run.dir names in its YAML")
        config = load_stage(run / CONFIG)
        return run, config.run.steps, config.run.max_fruitless
    config = load_stage(run, overrides)
    return Path(config.run.dir), config.run.steps, config.run.max_fruitless


def checkpoint_lines(run: Path) -> list[str]:
    """A line for each checkpoint of a run; UserError when there is none."""
    return [_line(path) for path in _checkpoints(run)]


def verify(path: Path) -> Iterator[tuple[Path, str | None]]:
    """Each checkpoint of a run, or the one named, with what is wrong with it."""
    for checkpoint in [path] if (path / MANIFEST).is_file() else _checkpoints(path):
        yield checkpoint, fault(checkpoint)


def reshape(path: Path, ranks: int, out: Path) -> Path:
    """Write a checkpoint's training state as `ranks` files each into a new checkpoint; the rest is copied.

    Raises UserError when the source is broken or its frozen layers are not those that the run stands on, or `out` is
    there already or can't be written.
    """
    if not (path / MANIFEST).is_file():
        sound = [checkpoint for checkpoint in _checkpoints(path) if fault(checkpoint) is None]
        if not sound:
            raise UserError(f"{path}: no checkpoint is sound; `videodiff checkpoint verify` says why")
        path = sound[-1]
    if problem := fault(path):
        raise UserError(f"{path}: {problem}; take another checkpoint")
    if out.exists():
        raise UserError(f"{out}: exists already; name a new folder")
    _check_frozen(path)
    states = [folder.relative_to(path) for folder in sorted(path.rglob(FOLDER)) if folder.is_dir()]
    with new_folder(out) as draft:
        for source in sorted(path.rglob("*")):  # not shutil.copytree, whose error is a list of all that went wrong
            relative = source.relative_to(path)
            if source.is_file() and FOLDER not in relative.parts and source.name != MANIFEST:
                (draft / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, draft / relative)
        for state in states:
            reshape_state(path / state, draft / state, ranks)
        seal(draft)
    return out


def _check_frozen(checkpoint: Path) -> None:
    """Raise UserError where the run's copy of what it stands on has other frozen layers than the checkpoint's. One that
    lies apart from its run has nothing beside it to be held against: resuming from it checks."""
    from stages.assemble import BASE, load_stage, make_task
    from videodiff.training.engine import freeze, frozen_digest

    run = checkpoint.parent.parent
    if checkpoint.parent.name != CHECKPOINTS or not (run / BASE).is_dir():
        return
    config = load_stage(run / CONFIG)  # whose places are those of the machine and directory that it began in
    here = config.run.model_copy(update={"dir": str(run)})
    task = make_task(config.model_copy(update={"model": str(run / BASE), "run": here}))
    freeze(task.module, task.trains)
    if frozen_digest(task.module) != json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["frozen"]:
        raise UserError(
            f"{checkpoint}: its frozen layers are not those of {run / BASE}; put back the model that the run started "
            "from"
        )


def _checkpoints(run: Path) -> list[Path]:
    found = list(numbered(run / CHECKPOINTS).values())
    if not found:
        raise UserError(f"{run}: no checkpoint lies in {run / CHECKPOINTS}; name a run's folder")
    return found


def _line(path: Path) -> str:
    try:
        size = sum(
            entry["bytes"] for entry in json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"].values()
        )
        ranks = len(Fragments(path / FOLDER))
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        return (
            f"{path}: step {state['step']}, {size / 1e6:,.1f} MB, written by {ranks} rank{'s' * (ranks > 1)}, "
            f"{state['skipped']} steps skipped, {fault(path) or 'sound'}"
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return f"{path}: broken ({' '.join(str(error).split())})"
    except OSError as error:
        return f"{path}: can't be read now ({error.strerror or error})"
