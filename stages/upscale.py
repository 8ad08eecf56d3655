"""Stage upscale: super-resolution, told the small picture on extra channels (Dhariwal & Nichol 2105.05233: ADM-U).

The small picture is enlarged bilinearly, encoded, and given as `known` at every frame: the network sees each frame by
itself, noise and small picture side by side. S side of the small pictures, k the gain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from stages import image as image_stage
from stages.base import DiffusionStageConfig, DiffusionTask, Dropout, told_text, with_known
from videodiff.batch import Condition, VideoBatch
from videodiff.diffusion.prediction import Prediction
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks.unet import UNet, UNetConfig
from videodiff.seeding import uniforms


class UpscaleStage(DiffusionStageConfig):
    """`videodiff train configs/demo/upscale.yaml`, on shards of the large size; `model` holds an image stage.

    rebuilt: share of the samples whose small picture first goes through the autoencoder and back. What is enlarged
    later was decoded, with the autoencoder's flaws, and a network that saw none of them would sharpen them too: the
    place of the noise that cascades add to their conditions (Ho et al. 2106.15282, section 4).
    The network's `context_dims` and `pooled_dim` may be left out: they are the text tower's then.
    """

    stage: Literal["upscale"]
    network: UNetConfig
    schedule: NoiseSchedule = NoiseSchedule(zero_terminal_snr=True)
    prediction: Prediction = "v"
    dropout: Dropout = Dropout(text=0.1, image=0.0, both=0.0)
    rebuilt: float = Field(0.5, ge=0, le=1)


def shrink(frames: Tensor, factor: int) -> Tensor:
    """uint8 [...,kS,kS,3] -> [...,S,S,3]: the mean of each k x k square."""
    return _resized(frames, lambda x: F.avg_pool2d(x, factor))


def enlarge(frames: Tensor, factor: int, mode: Literal["bilinear", "bicubic"] = "bilinear") -> Tensor:
    """uint8 [...,S,S,3] -> [...,kS,kS,3] by interpolation."""
    return _resized(frames, lambda x: F.interpolate(x, scale_factor=float(factor), mode=mode, align_corners=False))


class UpscaleTask(DiffusionTask):
    """Denoises large pictures, told the small ones."""

    def __init__(self, base: Model, network: UNet, part: dict[str, Any], config: UpscaleStage) -> None:
        super().__init__("upscale", base, network, part, image_stage.known_slots, lambda name: True, config)
        self.rebuilt, self.seed = config.rebuilt, config.run.seed

    def condition(self, batch: VideoBatch, latents: Tensor) -> Condition:
        factor = self.part["factor"]
        small = self._flawed(shrink(batch.frames, factor), batch.numbers)
        known, _ = self.posteriors(enlarge(small, factor))
        return with_known(super().condition(batch, latents), known, range(known.shape[2]))

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
        "sampling": config.sampling,
    }
    return UpscaleTask(base, network, part, config)


def _resized(frames: Tensor, resize: Callable[[Tensor], Tensor]) -> Tensor:
    """uint8 [...,H,W,3] through `resize`, which takes and gives float32 [N,3,H,W]."""
    flat = resize(frames.flatten(0, -4).permute(0, 3, 1, 2).float())
    return flat.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, frames.shape[:-3])
