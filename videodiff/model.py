"""Model: a folder for inference, `model.yaml` beside safetensors. The only thing that generate and evaluate read.

A folder is self-contained: each stage's weights lie in it and are named in `model.yaml` with their sha256. A
checkpoint of a run is such a folder too, so a run, a checkpoint or a model can be named wherever a model can.
The video and interpolation stages store only what they train; their frozen spatial half is the image stage's.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from videodiff import config as configs
from videodiff.config import Config
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.guidance import ClassifierFree
from videodiff.diffusion.prediction import Prediction
from videodiff.diffusion.samplers import DDIM, Sampler
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError
from videodiff.networks.autoencoder import Autoencoder, AutoencoderConfig
from videodiff.networks.classifier import ClassifierConfig, NoisyClassifier
from videodiff.networks.control import ControlNet
from videodiff.networks.t5 import T5Tower
from videodiff.networks.text import PretrainedText, TextConfig, TextTower
from videodiff.networks.towers import TextTowers
from videodiff.networks.unet import UNet, UNetConfig, is_temporal
from videodiff.tensor_files import save_file

DESCRIPTION = "model.yaml"
VOCABULARY, WORDS = "vocabulary.txt.gz", "words.txt"
STAGES = ("autoencoder", "text", "image", "video", "interpolation")
# What may stand beside the road: each is trained on a model with an image stage and changes none of its stages.
EXTRAS = ("classifier", "control", "upscale")
DiffusionStage = Literal["image", "video", "interpolation", "upscale"]
Weights = Literal["ema", "raw"]


class File(Config):
    """A file of a model folder: its name there and its sha256."""

    name: str
    sha256: str


class AutoencoderPart(Config):
    """The trained autoencoder."""

    network: AutoencoderConfig
    weights: File
    raw: File | None = None


class OpenClipPart(Config):
    """A public open_clip model as a further text tower: open_clip's name of its architecture."""

    kind: Literal["open_clip"] = "open_clip"
    name: str
    weights: File


class T5Part(Config):
    """A T5's encoder as a further text tower: its weights, config.json and tokenizer."""

    kind: Literal["t5"] = "t5"
    context_length: int
    weights: File
    settings: File
    tokenizer: File


FurtherPart: TypeAlias = Annotated[OpenClipPart | T5Part, Field(discriminator="kind")]


class TextPart(Config):
    """The text tower, its vocabulary and the words it was trained on; a public model brings its own (None).
    `further` towers stand beside it, each with a cross-attention of its own."""

    network: TextConfig
    weights: File
    raw: File | None = None
    vocabulary: File | None = None
    words: File | None = None
    further: tuple[FurtherPart, ...] = ()


class Sampling(Config):
    """How a stage is sampled unless the caller says otherwise."""

    sampler: Sampler = DDIM()
    guidance: ClassifierFree = ClassifierFree()


class DiffusionPart(Config):
    """A trained diffusion stage: `frames` x `size` x `size` at `fps`; `factor` is the gain in frame rate.

    Interpolation: `offset` frames lie before the first and after the last given one of a window, and what is given is
    noised to the time `known_time`. `deviation`: what the network makes in units of one is the difference, so large in
    latents, from the linear blend of what is given; None: it makes whole frames. Video: `first_image` tells whether it
    is given one.
    """

    network: UNetConfig
    schedule: NoiseSchedule
    prediction: Prediction
    size: int
    frames: int
    fps: float
    factor: int = 1
    offset: int = 0
    known_time: float = 0.0
    deviation: float | None = None
    first_image: bool = True
    sampling: Sampling = Sampling()
    weights: File
    raw: File | None = None


class ClassifierPart(Config):
    """A trained classifier of noisy latents: which attribute it tells, and the names of its classes in their order."""

    network: ClassifierConfig
    schedule: NoiseSchedule
    attribute: str
    classes: tuple[str, ...]
    size: int
    weights: File
    raw: File | None = None


class ControlPart(Config):
    """A trained ControlNet of the image stage: what its hint pictures are."""

    network: UNetConfig
    hint: Literal["edges"]
    size: int
    weights: File
    raw: File | None = None


class UpscalePart(DiffusionPart):
    """Trained super-resolution: `factor` is the gain in height and width. `deviation`: what the network makes in units
    of one is that large in pixels in [-1,1]."""

    deviation: float


class ModelConfig(Config):
    """The content of `model.yaml`."""

    format: Literal[1] = 1
    autoencoder: AutoencoderPart | None = None
    text: TextPart | None = None
    image: DiffusionPart | None = None
    video: DiffusionPart | None = None
    interpolation: DiffusionPart | None = None
    classifier: ClassifierPart | None = None
    control: ControlPart | None = None
    upscale: UpscalePart | None = None

    def stages(self) -> list[str]:
        """Names of the stages that the model holds, in the order of the road, then of what stands beside it."""
        return [stage for stage in (*STAGES, *EXTRAS) if getattr(self, stage) is not None]


class Model:
    """An opened model folder; networks are built and loaded when first asked for, frozen and in eval mode.

    `weights` chooses the averaged ("ema") or the "raw" weights of the newest stage; the stages it stands on are
    always their averaged weights.
    """

    def __init__(self, folder: Path, config: ModelConfig, weights: Weights = "ema") -> None:
        self.folder, self.config, self.weights = folder, config, weights

    @classmethod
    def load(cls, name: str | os.PathLike[str], weights: Weights = "ema") -> Model:
        """Open "demo", a model folder, a run folder (its newest checkpoint) or a checkpoint.

        Raises UserError when there is none, a file is missing, or a file is not the one that `model.yaml` names.
        """
        folder = find(name)
        description = configs.load(ModelConfig, folder / DESCRIPTION)
        model = cls(folder, description, weights)
        for file in model.files():
            model.path(file)
        return model

    def files(self) -> list[File]:
        """Every file that the description names."""
        parts = [getattr(self.config, stage) for stage in self.config.stages()]
        further = self.config.text.further if self.config.text is not None else ()
        return [file for part in (*parts, *further) for file in files_of(part)]

    def path(self, file: File) -> Path:
        """The verified path of a file of this model."""
        if Path(file.name).name != file.name:
            raise UserError(f"{self.folder / DESCRIPTION}: {file.name!r} points out of the folder; name a file in it")
        path = self.folder / file.name
        if not path.is_file():
            raise UserError(f"{path}: missing, but {DESCRIPTION} names it; copy the whole model folder again")
        if sha256(path) != file.sha256:
            raise UserError(f"{path}: not the file that {DESCRIPTION} was written with (sha256 differs); copy it again")
        return path

    def part(self, stage: str) -> AutoencoderPart | TextPart | DiffusionPart | ClassifierPart | ControlPart:
        """The description of a stage; UserError when the model has no such stage."""
        part = getattr(self.config, stage, None)
        if part is None:
            has = ", ".join(self.config.stages()) or "none"
            raise UserError(f"{self.folder}: holds no {stage} stage (it has: {has}); train it or name another model")
        return part

    def diffusion(self, stage: DiffusionStage) -> DiffusionPart:
        """The description of one of the diffusion stages."""
        part = self.part(stage)
        assert isinstance(part, DiffusionPart)
        return part

    def state(self, stage: str) -> dict[str, Tensor]:
        """The weights of a stage, by parameter name, in float32."""
        state = self._read(self.chosen(stage))
        return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}

    def chosen(self, stage: str) -> File:
        """The file of a stage's chosen weights."""
        part = self.part(stage)
        file = part.raw if self.weights == "raw" and stage == self._newest() else part.weights
        if file is None:
            raise UserError(f"{self.folder}: holds no raw weights, only averaged ones; leave out the choice of raw")
        return file

    def _read(self, file: File) -> dict[str, Tensor]:
        path = self.path(file)
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file ({error}); copy it again") from None

    def _newest(self) -> str:
        """The stage that was trained last: it alone has raw weights; those it stands on were carried without theirs."""
        stages = self.config.stages()
        return next((stage for stage in stages if self.part(stage).raw is not None), stages[-1])

    @cached_property
    def autoencoder(self) -> Autoencoder:
        part = self.part("autoencoder")
        assert isinstance(part, AutoencoderPart)
        network = Autoencoder(part.network)
        self._fill(network, self.state("autoencoder"), "autoencoder")
        return network.requires_grad_(False).eval()

    @cached_property
    def text(self) -> TextTower | TextTowers:
        """The text tower, or where there are several, all of them in one."""
        part = self.part("text")
        assert isinstance(part, TextPart)
        first = self._first_tower(part)
        return TextTowers([first, *map(self._further_tower, part.further)]) if part.further else first

    def _first_tower(self, part: TextPart) -> TextTower:
        if part.network.pretrained is not None:
            public = PretrainedText(name=part.network.pretrained.name, path=str(self.path(part.weights)))
            return TextTower(part.network.model_copy(update={"pretrained": public}))
        files = {name: getattr(part, name) for name in ("vocabulary", "words")}
        paths = {name: None if file is None else str(self.path(file)) for name, file in files.items()}
        return TextTower(part.network.model_copy(update=paths), self.state("text"))

    def _further_tower(self, part: FurtherPart) -> TextTower | T5Tower:
        if isinstance(part, OpenClipPart):
            public = PretrainedText(name=part.name, path=str(self.path(part.weights)))
            return TextTower(TextConfig(pretrained=public))
        files = self.path(part.settings), self.path(part.tokenizer)
        return T5Tower(*files, self._read(part.weights), part.context_length)

    def unet(self, stage: DiffusionStage) -> UNet:
        """The network of a diffusion stage.

        The spatial half of video and interpolation is the image stage's, unless the video stage trained its own, or
        interpolation has a network of its own; upscale has.
        """
        part = self.diffusion(stage)
        network = UNet(part.network)
        state = self.state(stage)
        shares = stage in ("video", "interpolation") and state.keys() != network.state_dict().keys()
        if shares and stage == "interpolation" and self.config.video is not None:
            state = {**{name: value for name, value in self.state("video").items() if not is_temporal(name)}, **state}
        if shares:
            state = {**self.state("image"), **state}
        self._fill(network, state, stage)
        return network.requires_grad_(False).eval()

    @cached_property
    def classifier(self) -> NoisyClassifier:
        part = self.part("classifier")
        assert isinstance(part, ClassifierPart)
        network = NoisyClassifier(part.network)
        self._fill(network, self.state("classifier"), "classifier")
        return network.requires_grad_(False).eval()

    @cached_property
    def control(self) -> ControlNet:
        """The ControlNet of the image stage."""
        part = self.part("control")
        assert isinstance(part, ControlPart)
        network = ControlNet(part.network, self.autoencoder.factor)
        self._fill(network, self.state("control"), "control")
        return network.requires_grad_(False).eval()

    def denoiser(self, stage: DiffusionStage, dtype: torch.dtype = torch.float32) -> Denoiser:
        """The stage's network behind the one door that samplers know."""
        part = self.diffusion(stage)
        network = self.unet(stage).to(dtype)
        return Denoiser(network, part.schedule, part.prediction, dtype, part.network.variance)

    def _fill(self, network: torch.nn.Module, state: dict[str, Tensor], stage: str) -> None:
        wanted = network.state_dict()
        odd = sorted(set(wanted) ^ set(state)) or sorted(n for n in wanted if wanted[n].shape != state[n].shape)
        if odd:
            raise UserError(
                f"{self.folder}: the weights of stage {stage} do not fit its network at {odd[0]!r} "
                f"({len(odd)} such names); {DESCRIPTION} and the weights belong to different models"
            )
        network.load_state_dict(state)


def files_of(part: Config) -> list[File]:
    """The files that a part names, not those of its further towers."""
    return [value for _, value in part if isinstance(value, File)]


def find(name: str | os.PathLike[str]) -> Path:
    """The folder that `name` means: "demo", a model, a run or a checkpoint; UserError when it is none of them."""
    if str(name) == "demo":
        folder = Path(str(resources.files("videodiff") / "assets" / "demo"))
        if not (folder / DESCRIPTION).is_file():
            raise UserError(f"{folder}: this installation carries no bundled model; name a model folder with --model")
        return folder
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a model folder, a run, a checkpoint or 'demo'")
    if (folder / DESCRIPTION).is_file():
        return folder
    checkpoints = sorted((folder / "checkpoints").glob(f"step-*[0-9]/{DESCRIPTION}"))
    if checkpoints:
        return checkpoints[-1].parent
    raise UserError(f"{folder}: neither a model (no {DESCRIPTION}) nor a run with a finished checkpoint")


def sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:  # type: ignore[no-untyped-def]  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


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
