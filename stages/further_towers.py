"""Text towers beside the first: public ones, taken over from local files into a model folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from stages.public_weights import read_weights
from videodiff import config as configs
from videodiff.config import Config
from videodiff.errors import UserError
from videodiff.model import find
from videodiff.model_folder import place, write_weights
from videodiff.networks.t5 import ENCODER, T5Tower, encoder_state
from videodiff.networks.text import PretrainedText, TextConfig, TextTower
from videodiff.parts import DESCRIPTION, File, FurtherPart, ModelConfig, OpenClipPart, T5Part, sha256
from videodiff.training.checkpoint import Checkpoints
from videodiff.training.distributed import raise_from_first, rank
from videodiff.training.run_folder import CHECKPOINTS


class OpenClipTower(PretrainedText):
    """The text half of a public open_clip model."""

    kind: Literal["open_clip"] = "open_clip"


class T5TowerSource(Config):
    """The encoder of a T5, T5 v1.1 or Flan-T5: a folder in transformers' format. Nothing is ever downloaded."""

    kind: Literal["t5"] = "t5"
    path: str = Field(
        description="folder: config.json, model.safetensors or its shards, tokenizer.json or spiece.model"
    )
    context_length: int = Field(77, ge=2, description="tokens of a caption, its end among them; the rest is cut")


FurtherTower: TypeAlias = Annotated[OpenClipTower | T5TowerSource, Field(discriminator="kind")]
# Writes an opened tower into a folder, its files' names starting with the given one.
Writer: TypeAlias = Callable[[Path, str], FurtherPart]


def open_towers(towers: Sequence[FurtherTower], folder: Path) -> list[Writer]:
    """Load the towers, to see that they can be, and return what writes each; on rank 0 alone, the others get none.

    Raises UserError, on every rank, for files that are missing, pickled or no tower's, and where `folder`, into which
    they are to be written, is the one that they lie in.
    """
    problem = None
    writers: list[Writer] = []
    if rank() == 0:
        try:
            writers = [_opened(tower, folder) for tower in towers]
        except UserError as error:
            problem = str(error)
    raise_from_first(problem)
    return writers


def place_in_run(towers: Sequence[FurtherTower], folder: Path) -> tuple[FurtherPart, ...]:
    """Write the towers into the folder of a run, unless it has a checkpoint and so its own; on rank 0 alone, the others
    get none. Raises UserError on every rank, as `open_towers` does."""
    problem = None
    parts: tuple[FurtherPart, ...] = ()
    if rank() == 0 and towers:
        try:
            if Checkpoints(folder / CHECKPOINTS, 1).exist():
                text = configs.load(ModelConfig, find(folder) / DESCRIPTION).text
                parts = text.further if text is not None else ()
            else:
                writers = [_opened(tower, folder) for tower in towers]
                folder.mkdir(parents=True, exist_ok=True)
                parts = write_towers(writers, folder)
        except (UserError, OSError) as error:
            problem = str(error)
    raise_from_first(problem)
    return parts


def write_towers(writers: Sequence[Writer], folder: Path) -> tuple[FurtherPart, ...]:
    """Write the towers into a model folder; returns what its description says of them."""
    return tuple(write(folder, f"text-{number}") for number, write in enumerate(writers, start=2))


def _opened(tower: FurtherTower, folder: Path) -> Writer:
    source = Path(tower.path).resolve()  # a link to a link may point nowhere
    if folder.resolve() == (source.parent if isinstance(tower, OpenClipTower) else source):
        raise UserError(f"run.dir={folder}: holds the tower {tower.path} that is taken over; name a new folder")
    return _open_clip(tower, source) if isinstance(tower, OpenClipTower) else _t5(tower, source)


def _open_clip(tower: OpenClipTower, source: Path) -> Writer:
    TextTower(TextConfig(pretrained=PretrainedText(name=tower.name, path=tower.path)))

    def write(folder: Path, name: str) -> FurtherPart:
        return OpenClipPart(name=tower.name, weights=place(source, folder, f"{name}{Path(tower.path).suffix}"))

    return write


def _t5(tower: T5TowerSource, source: Path) -> Writer:
    if not source.is_dir():
        raise UserError(f"further: {tower.path}: no such folder; put a T5 there first, nothing is downloaded")
    settings = source / "config.json"
    found = [source / name for name in ("tokenizer.json", "spiece.model") if (source / name).is_file()]
    if not found:
        raise UserError(f"{source}: neither tokenizer.json nor spiece.model; copy the T5's tokenizer there")
    # Only the encoder: a T5 with its decoder is more than twice as large.
    state = encoder_state(read_weights(source, "model", ENCODER))
    T5Tower(settings, found[0], state, tower.context_length)

    def write(folder: Path, name: str) -> FurtherPart:
        return T5Part(
            context_length=tower.context_length,
            weights=write_weights(folder, _free(folder, f"{name}.safetensors"), state),
            settings=_copy(settings, folder, f"{name}.{settings.name}"),
            tokenizer=_copy(found[0], folder, f"{name}.{found[0].name}"),
        )

    return write


def _copy(source: Path, folder: Path, name: str) -> File:
    # Not a link: these are small, and edited by hand.
    shutil.copyfile(source, folder / _free(folder, name))
    return File(name=name, sha256=sha256(folder / name))


def _free(folder: Path, name: str) -> str:
    """The name, with no file there: models that stand on this one link to it, and would change with it."""
    (folder / name).unlink(missing_ok=True)
    return name
