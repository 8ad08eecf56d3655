"""What a model folder's `model.yaml` says: the parts that it may have, and their files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from videodiff.config import Config
from videodiff.diffusion.guidance import ClassifierFree
from videodiff.diffusion.prediction import Prediction
from videodiff.diffusion.samplers import DDIM, Sampler
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.networks.autoencoder import AutoencoderConfig
from videodiff.networks.classifier import ClassifierConfig
from videodiff.networks.image_prompt import ImagePromptConfig
from videodiff.networks.text import TextConfig
from videodiff.networks.unet import UNetConfig

DESCRIPTION = "model.yaml"
VOCABULARY, WORDS = "vocabulary.txt.gz", "words.txt"
STAGES = ("autoencoder", "text", "image", "video", "interpolation")
# What may stand beside the road: each is trained on a model with an image stage and changes none of its stages.
EXTRAS = ("classifier", "control", "image_prompt", "upscale")
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


class ImagePromptPart(Config):
    """Trained tokens of pictures that the image stage takes in place of a text's."""

    network: ImagePromptConfig
    size: int
    weights: File
    raw: File | None = None


class UpscalePart(DiffusionPart):
    """Trained super-resolution: `factor` is the gain in height and width. `deviation`: what the network makes in units
    of one is that large in pixels in [-1,1]."""

    deviation: float


Part: TypeAlias = AutoencoderPart | TextPart | DiffusionPart | ClassifierPart | ControlPart | ImagePromptPart


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
    image_prompt: ImagePromptPart | None = None
    upscale: UpscalePart | None = None

    def stages(self) -> list[str]:
        """Names of the stages that the model holds, in the order of the road, then of what stands beside it."""
        return [stage for stage in (*STAGES, *EXTRAS) if getattr(self, stage) is not None]


def files_of(part: Config) -> list[File]:
    """The files that a part names, not those of its further towers."""
    return [value for _, value in part if isinstance(value, File)]


def sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:  # type: ignore[no-untyped-def]  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
