"""Stage image_prompt: tokens of a picture that the image stage takes in place of a text's (Ye et al. 2308.06721).

The image network stays frozen. It is told one frame of a clip and makes a later one, in which things have moved: so the
tokens say what is seen, and where only as far as it can be known. The video stage's spatial layers may hear them.
For a share of the samples a picture that the image stage makes of their caption is told, and made, in the clip's place:
text puts together what no clip shows, and first images are generated ones when a video is.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stages import image as image_stage
from stages.base import DenoisingStageConfig, DiffusionTask, Dropout, write_part
from videodiff.batch import Condition, VideoBatch
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks.image_prompt import ImagePrompt, ImagePromptConfig
from videodiff.networks.prompted import PromptedUNet
from videodiff.networks.unet import UNet
from videodiff.parts import ImagePromptPart
from videodiff.seeding import generator, uniforms
from videodiff.training.distributed import device

PREFIX = "prompt."  # of the trained parameters of a PromptedUNet


class ImagePromptStage(DenoisingStageConfig):
    """`videodiff train configs/demo/image_prompt.yaml`; `model` names any run or model that holds an image stage.

    imagined: the share of the samples that learn from a picture that the image stage makes of their caption, by its own
    sampler; with a quarter of them a step takes about three times as long. A second image network is in memory then.
    """

    stage: Literal["image_prompt"]
    network: ImagePromptConfig = ImagePromptConfig()
    imagined: float = Field(0.0, ge=0, le=1)
    dropout: Dropout = Dropout(text=0.0, image=0.05, both=0.0)


class ImagePromptTask(DiffusionTask):
    """Denoises the last frame of each clip with the image stage's network, told the first one. Where samples are
    imagined, the sheets of `sample` show what they learn from as "real" too."""

    imagined = 0.0
    # The batch whose latents were asked for, what it is told of its texts, and its first frames.
    _last: tuple[VideoBatch, Condition, Tensor] | None = None

    def latents(self, batch: VideoBatch, seed: int) -> Tensor:
        both, told = super().latents(_ends(batch), seed), self._told(batch)
        first, last = both[:, :, :1], both[:, :, 1:]
        chosen = torch.nonzero(uniforms(seed, "imagined", batch.numbers) < self.imagined).flatten()
        if len(chosen):
            by = [generator(seed, "imagined picture", int(number)) for number in batch.numbers[chosen]]
            with torch.no_grad():
                made = self._made(self._image_network, told.select(chosen), first.shape[1:], by)
            first, last = (frames.index_copy(0, chosen.to(frames.device), made) for frames in (first, last))
        self._last = batch, told, first
        return last

    @cached_property
    def _image_network(self) -> UNet:
        """Apart from the one in training, whose parameters ZeRO 3 may have spread over ranks."""
        dtype = next(self.module.parameters()).dtype
        return self.base.unet("image").to(device(), dtype).eval().requires_grad_(False)

    def condition(self, batch: VideoBatch, latents: Tensor, seed: int = 0, sampling: bool = False) -> Condition:
        assert self._last is not None
        of, told, first = self._last
        assert of is batch  # its latents come first
        return replace(told, known=first, known_mask=torch.ones_like(first[:, :1]))

    def export(self, state: dict[str, Tensor], folder: Path, file: str) -> None:
        own = {name.removeprefix(PREFIX): value for name, value in state.items()}
        assert isinstance(self.module, PromptedUNet)
        network, size = self.module.prompt.config, self.part["size"]
        write_part(
            self.stage, self.base, folder, file, own,
            lambda weights: ImagePromptPart(network=network, size=size, weights=weights),
        )  # fmt: skip


def _ends(batch: VideoBatch) -> VideoBatch:
    """The batch with the first and the last frame of each clip alone: nothing else is encoded."""
    if batch.encoded is None:
        return replace(batch, frames=batch.frames[:, [0, -1]])
    mean, std = (latents[:, :, [0, -1]] for latents in (batch.encoded.mean, batch.encoded.std))
    return replace(batch, encoded=replace(batch.encoded, mean=mean, std=std))


def task(config: ImagePromptStage, base: Model) -> ImagePromptTask:
    """The training task of the image prompt, beside the image stage of `base`."""
    image = base.diffusion("image")
    if config.data.size != image.size:
        raise UserError(
            f"data.size: {config.data.size}, but the image stage of {base.folder} makes {image.size}; use {image.size}"
        )
    if config.data.frames < 2:
        raise UserError("data.frames: 1; a prompt is learned from two frames of a clip or more: the first is told")
    frozen = base.unet("image")
    prompt = ImagePrompt(config.network, frozen.config.channels, frozen.config.context_dims, frozen.config.pooled_dim)
    part = {name: getattr(image, name) for name in ("network", "schedule", "prediction", "size", "sampling")}
    made = ImagePromptTask(
        "image_prompt", base, PromptedUNet(frozen, prompt), part, image_stage.known_slots,
        lambda name: name.startswith(PREFIX), config,
    )  # fmt: skip
    made.imagined = config.imagined
    return made
