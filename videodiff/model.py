"""Model: a folder for inference, `model.yaml` beside safetensors. The only thing that generate and evaluate read.

A folder is self-contained: each stage's weights lie in it and are named in `model.yaml` with their sha256. A
checkpoint of a run is such a folder too, so a run, a checkpoint or a model can be named wherever a model can.
The video and interpolation stages store only what they train; their frozen spatial half is the image stage's.
"""

from __future__ import annotations

import os
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from videodiff import config as configs
from videodiff.diffusion.denoiser import Denoiser
from videodiff.errors import UserError
from videodiff.networks.autoencoder import Autoencoder
from videodiff.networks.classifier import NoisyClassifier
from videodiff.networks.control import ControlNet
from videodiff.networks.image_prompt import ImagePrompt
from videodiff.networks.t5 import T5Tower
from videodiff.networks.text import PretrainedText, TextConfig, TextTower
from videodiff.networks.towers import TextTowers
from videodiff.networks.unet import UNet, is_temporal
from videodiff.parts import (
    DESCRIPTION,
    AutoencoderPart,
    ClassifierPart,
    ControlPart,
    DiffusionPart,
    DiffusionStage,
    File,
    FurtherPart,
    ImagePromptPart,
    ModelConfig,
    OpenClipPart,
    Part,
    TextPart,
    Weights,
    files_of,
    sha256,
)


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

    def part(self, stage: str) -> Part:
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

    @cached_property
    def image_prompt(self) -> ImagePrompt:
        """Tokens of a picture in place of a text's, for the image stage."""
        part, image = self.part("image_prompt"), self.diffusion("image").network
        assert isinstance(part, ImagePromptPart)
        network = ImagePrompt(part.network, image.channels, image.context_dims, image.pooled_dim)
        self._fill(network, self.state("image_prompt"), "image_prompt")
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


def numbered(checkpoints: Path, kind: Literal["step", "average"] = "step") -> dict[int, Path]:
    """The finished folders of a run's `checkpoints/` by their steps, in order; drafts and copies are none of them."""
    found = {path.name.removeprefix(f"{kind}-"): path for path in checkpoints.glob(f"{kind}-*")}
    return {int(step): found[step] for step in sorted(filter(str.isdecimal, found), key=int)}


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
    whole = [path for path in numbered(folder / "checkpoints").values() if (path / DESCRIPTION).is_file()]
    if whole:
        return whole[-1]
    raise UserError(f"{folder}: neither a model (no {DESCRIPTION}) nor a run with a finished checkpoint")
