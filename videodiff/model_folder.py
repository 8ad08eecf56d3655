"""Model folders are written: whole or not at all, with the sha256 of every file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from videodiff import config as configs
from videodiff.config import Config
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.parts import DESCRIPTION, VOCABULARY, WORDS, File, FurtherPart, ModelConfig, TextPart, files_of, sha256
from videodiff.tensor_files import save_file


def write_weights(folder: Path, name: str, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> File:
    """Write a stage's weights into a model folder as safetensors; returns what `model.yaml` says of the file.

    Raises OSError when it can't be written.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    if dtype is not None:
        tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    save_file(tensors, folder / name)
    return File(name=name, sha256=sha256(folder / name))


def place(source: Path, folder: Path, name: str) -> File:
    """Put a finished file into a model folder, as a hard link where the disk allows it, else as a copy."""
    target = folder / name
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return File(name=name, sha256=sha256(target))


def carry(model: Model, folder: Path) -> ModelConfig:
    """Place all stages of `model` in `folder` under their stages' names; returns the description of what is there."""
    parts: dict[str, Config] = {}
    for stage in model.config.stages():
        part = model.part(stage)
        update: dict[str, File | None] = {"raw": None}
        update["weights"] = place(model.path(part.weights), folder, f"{stage}{Path(part.weights.name).suffix}")
        if isinstance(part, TextPart):
            for field, name in (("vocabulary", VOCABULARY), ("words", WORDS)):
                if (file := getattr(part, field)) is not None:
                    update[field] = place(model.path(file), folder, name)
            for file in (file for tower in part.further for file in files_of(tower)):
                place(model.path(file), folder, file.name)
        parts[stage] = part.model_copy(update=update)
    return ModelConfig(**parts)


def export(model: Model, folder: Path, half: bool = False) -> None:
    """Write the chosen weights of every stage into a new folder that stands alone; `half` stores them in float16.

    Raises UserError when the folder can't be written.
    """
    with new_folder(folder) as draft:
        _fill_folder(model, draft, half)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill under another name, which is renamed to `folder` when all went well: it is whole, or not there.

    Raises UserError when `folder` holds something already or can't be written.
    """
    folder = folder.resolve()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        what = "a model" if (folder / DESCRIPTION).exists() else "something else"
        raise UserError(f"{folder}: holds {what} already; name a new folder")
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        draft.mkdir(parents=True)
        yield draft
        draft.replace(folder)
    except OSError as error:
        where = Path(error.filename2 or error.filename or folder).name
        raise UserError(
            f"{folder}: cannot be written ({where}: {error.strerror or error}); make room or name another folder"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fill_folder(model: Model, folder: Path, half: bool) -> None:
    description = carry(model, folder)
    for stage in model.config.stages():
        part = getattr(description, stage)
        if part.weights.name.endswith(".safetensors"):
            (folder / part.weights.name).unlink()  # a hard link: writing through it would change the original
            weights = write_weights(folder, part.weights.name, model.state(stage), torch.float16 if half else None)
            description = description.model_copy(update={stage: part.model_copy(update={"weights": weights})})
    if half and description.text is not None:
        further = tuple(_halved(model, tower, folder) for tower in description.text.further)
        text = description.text.model_copy(update={"further": further})
        description = description.model_copy(update={"text": text})
    configs.save(description, folder / DESCRIPTION)


def _halved(model: Model, tower: FurtherPart, folder: Path) -> FurtherPart:
    name = tower.weights.name
    if not name.endswith(".safetensors"):
        return tower
    (folder / name).unlink()
    weights = write_weights(folder, name, model._read(tower.weights), torch.float16)
    return tower.model_copy(update={"weights": weights})
