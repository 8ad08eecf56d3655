"""Stage upscale: super-resolution, told the small picture on extra channels (Dhariwal & Nichol 2105.05233: ADM-U).

In pixels, as ADM-U: the autoencoder loses more at a larger size than interpolation does. What is made is the difference
from the bilinearly enlarged picture (SRDiff, 2104.14951), which in turn is given as `known` at every frame; so plain
areas are right from the start. Squares of p x p pixels are channels. The network sees each frame by itself.
B clips, T frames, S side of the small pictures, k the gain, K = k S, h w = K / p.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from stages import image as image_stage
from stages.base import DiffusionStageConfig, DiffusionTask, Dropout, with_known
from stages.fits import check_size, check_text, told_text
from videodiff.batch import Condition, VideoBatch
from videodiff.diffusion.prediction import Prediction
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks.autoencoder import to_float
from videodiff.networks.unet import UNet, UNetConfig
from videodiff.parts import UpscalePart
from videodiff.seeding import uniforms
from videodiff.training.distributed import device


class UpscaleStage(DiffusionStageConfig):
    """`videodiff train configs/demo/upscale.yaml`, on shards of the large size; `model` holds an image stage.

    network: `channels` is 3 x p x p. `context_dims` and `pooled_dim` may be left out: they are the text tower's then.
    deviation: about that of the difference from the enlarged picture, in [-1,1]; noise is measured against it.
    rebuilt: share of the samples whose small picture first goes through the autoencoder and back. What is enlarged
    later was decoded, with the autoencoder's flaws, and a network that saw none of them would sharpen them too: the
    place of the noise that cascades add to their conditions (Ho et al. 2106.15282, section 4).
    """

    stage: Literal["upscale"]
    network: UNetConfig
    schedule: NoiseSchedule = NoiseSchedule(zero_terminal_snr=True)
    prediction: Prediction = "v"
    dropout: Dropout = Dropout(text=0.1, image=0.0, both=0.0)
    deviation: float = Field(0.06, gt=0)
    rebuilt: float = Field(0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _channels_are_squares(self) -> UpscaleStage:
        side = square_side(self.network)
        if 3 * side**2 != self.network.channels:
            raise ValueError(
                f"network.channels {self.network.channels} is not 3 x p x p for squares of p x p pixels; use 48"
            )
        return self


class UpscaleTask(DiffusionTask):
    """Denoises the difference of large pictures from their small ones enlarged, told the latter."""

    part_class = UpscalePart

    def __init__(self, base: Model, network: UNet, part: dict[str, Any], config: UpscaleStage) -> None:
        self.rebuilt, self.seed = config.rebuilt, config.run.seed
        self._last: tuple[VideoBatch, Tensor] | None = None
        super().__init__("upscale", base, network, part, image_stage.known_slots, lambda name: True, config)

    def check(self) -> None:
        network = self.module.config
        check_text(self.base, network)
        side = square_side(network)
        check_size(self.part["size"], side * network.divisor, f"squares of {side} x the network's {network.divisor}")

    def latents(self, batch: VideoBatch, seed: int) -> Tensor:
        """What the enlarged pictures lack, in units of the deviation: [B,3pp,T,h,w] float32."""
        given = self.enlarged(batch)
        return (to_squares(batch.frames, square_side(self.module.config)).to(given) - given) / self.part["deviation"]

    def condition(self, batch: VideoBatch, latents: Tensor, seed: int = 0, sampling: bool = False) -> Condition:
        return with_known(
            super().condition(batch, latents, seed, sampling), self.enlarged(batch), range(latents.shape[2])
        )

    def frames(self, latents: Tensor, batch: VideoBatch) -> Tensor:
        return with_difference(self.enlarged(batch), latents, self.part["deviation"])

    def enlarged(self, batch: VideoBatch) -> Tensor:
        """The small pictures of large clips, enlarged, as squares [B,3pp,T,h,w]."""
        if self._last is None or self._last[0] is not batch:  # asked for the same batch several times in a row
            factor = self.part["factor"]
            small = self._flawed(shrink(batch.frames, factor), batch.numbers)
            self._last = batch, to_squares(enlarge(small, factor), square_side(self.module.config)).to(device())
        return self._last[1]

    def _flawed(self, small: Tensor, numbers: Tensor) -> Tensor:
        """Small clips uint8 [B,T,S,S,3], the share `rebuilt` of them as the autoencoder gives them back."""
        chosen = uniforms(self.seed, "upscale-rebuilt", numbers) < self.rebuilt
        if chosen.any():
            small = small.clone()
            small[chosen] = self.autoencoder.decode_clip(self.posteriors(small[chosen])[0]).cpu()
        return small


def task(config: UpscaleStage, base: Model) -> UpscaleTask:
    """The training task of the upscale stage, from the size of the image stage of `base` to that of the data."""
    small, large = base.diffusion("image").size, config.data.size
    if large % small or large == small:
        raise UserError(
            f"data.size: {large} is no multiple of {small}, the size of the images of {base.folder}; use {2 * small}"
        )
    network = UNet(told_text(config.network, base).model_copy(update={"known_channels": True}))
    part = {
        "network": network.config,
        "schedule": config.schedule,
        "prediction": config.prediction,
        "size": large,
        "frames": 1,
        "fps": config.data.fps,
        "factor": large // small,
        "deviation": config.deviation,
        "sampling": config.sampling,
    }
    return UpscaleTask(base, network, part, config)


# --- pictures and squares ---------------------------------------------------------------------------------------------


def square_side(network: UNetConfig) -> int:
    """p of a network whose channels are squares of p x p pixels."""
    return isqrt(network.channels // 3)


def to_squares(frames: Tensor, side: int) -> Tensor:
    """uint8 [B,T,K,K,3] -> float32 [B,3pp,T,h,w] in [-1,1]: each square of p x p pixels becomes one position."""
    flat = F.pixel_unshuffle(to_float(frames), side)
    return flat.unflatten(0, frames.shape[:2]).transpose(1, 2)


def with_difference(given: Tensor, difference: Tensor, deviation: float) -> Tensor:
    """The enlarged pictures with what they lack, both [B,3pp,T,h,w], as uint8 [B,T,K,K,3]."""
    flat = (given + deviation * difference.to(given)).transpose(1, 2)
    pictures = F.pixel_shuffle(flat.flatten(0, 1), isqrt(given.shape[1] // 3)).permute(0, 2, 3, 1)
    return ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).unflatten(0, flat.shape[:2])


def shrink(frames: Tensor, factor: int) -> Tensor:
    """uint8 [...,K,K,3] -> [...,S,S,3]: the mean of each k x k square."""
    return _resized(frames, lambda x: F.avg_pool2d(x, factor))


def enlarge(frames: Tensor, factor: int, mode: Literal["bilinear", "bicubic"] = "bilinear") -> Tensor:
    """uint8 [...,S,S,3] -> [...,K,K,3] by interpolation."""
    return _resized(frames, lambda x: F.interpolate(x, scale_factor=float(factor), mode=mode, align_corners=False))


def _resized(frames: Tensor, resize: Callable[[Tensor], Tensor]) -> Tensor:
    """uint8 [...,H,W,3] through `resize`, which takes and gives float32 [N,3,H,W]."""
    flat = resize(frames.flatten(0, -4).permute(0, 3, 1, 2).float())
    return flat.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, frames.shape[:-3])
