"""Stage interpolation: the video network told every k-th frame fills in the frames between (Emu Video, 2023).

(T-1)k+1 frames come out of T. It starts from the video stage's temporal layers and trains on short windows; a longer
clip is made window by window, the windows sharing their border frames. As published a window has some frames before its
first given one and after its last (`offset`; 8 frames become 37 with k = 4 and 4 on either side), and what is given is
noised, as in cascades (Ho et al. 2022).

Not as published, with `deviation`: what is made is the difference from the linear blend of the given frames. It is zero
wherever nothing moves, where a network that makes whole frames copies what it was told with an error of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stages.base import DiffusionStageConfig, DiffusionTask, known_mask, with_known
from stages.fits import told_text
from videodiff.batch import Condition, VideoBatch
from videodiff.config import Config
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks.unet import UNet, UNetConfig, temporal_parameter_names
from videodiff.seeding import normals, uniforms


class KnownNoise(Config):
    """Noise on the given frames: in training of times drawn uniformly up to `max_time`, when sampled of `time`."""

    max_time: float = Field(250, gt=0)
    time: float = Field(100, ge=0)

    @model_validator(mode="after")
    def _within(self) -> KnownNoise:
        if self.time > self.max_time:
            raise ValueError(f"time {self.time:g} is beyond max_time {self.max_time:g}; lower it")
        return self


class InterpolationStage(DiffusionStageConfig):
    """`videodiff train configs/demo/interpolation.yaml`; `factor` is the gain in frame rate, `offset` how many frames
    of a window lie before the first and after the last given one.

    network: one of its own, trained whole; None starts from the video stage, whose spatial layers stay as they are.
    deviation: of the difference from the blend in latents, which the network makes in units of one; None: whole frames.
    """

    stage: Literal["interpolation"]
    factor: int = Field(2, ge=2)
    offset: int = Field(0, ge=0)
    known_noise: KnownNoise | None = None
    network: UNetConfig | None = None
    deviation: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _a_difference_from_something(self) -> InterpolationStage:
        if self.network is not None and self.network.temporal is None:
            raise ValueError("network.temporal: frames between others are made by temporal layers; set temporal: {}")
        if self.deviation is not None and self.known_noise is not None:
            raise ValueError("deviation and known_noise: the blend is of clean frames; leave one of them out")
        if self.deviation is not None and (self.dropout.image or self.dropout.both):
            raise ValueError("deviation: without the given frames there is no blend; set dropout.image and .both to 0")
        return self


def known_slots(frames: int, factor: int, offset: int = 0) -> tuple[int, ...]:
    """Every `factor`-th frame is given, from `offset` on and as far from the end."""
    return tuple(range(offset, frames - offset, factor))


def noised(latents: Tensor, noise: Tensor, times: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Latents [B,C,T,H,W] at the times [B] of the schedule."""
    alpha, sigma = (level(times).to(latents).view(-1, 1, 1, 1, 1) for level in (schedule.alpha, schedule.sigma))
    return alpha * latents + sigma * noise


def windows(keys: int, window_frames: int, factor: int, offset: int = 0) -> list[int]:
    """First key frame of each window that covers `keys` key frames, neighbours sharing at least their border frame.

    A window has (window_frames - 1 - 2 offset) / factor + 1 keys; the last one is moved back to end at the last key.
    """
    per_window = (window_frames - 1 - 2 * offset) // factor
    if keys <= per_window:
        return [0]
    starts = list(range(0, keys - 1 - per_window, per_window))
    return [*starts, keys - 1 - per_window]


def blended(given: Tensor, frames: int, factor: int, offset: int = 0) -> Tensor:
    """A window of `frames` frames [B,C,T,H,W] whose given ones are [B,C,K,H,W], by linear mixing of neighbours; beyond
    the first and the last there is that one."""
    place = ((torch.arange(frames, device=given.device) - offset) / factor).clamp(0, given.shape[2] - 1)
    before = place.floor().long().clamp(max=given.shape[2] - 2)
    weight = (place - before).to(given).view(-1, 1, 1)
    return torch.lerp(given[:, :, before], given[:, :, before + 1], weight)


def told_blend(condition: Condition, blend: Tensor, slots: Sequence[int]) -> Condition:
    """The condition with a window's blend shown at all frames, and the mask at the given ones `slots`."""
    mask = known_mask(slots, blend).expand(-1, -1, -1, *blend.shape[3:])
    return replace(condition, known=blend, known_mask=mask)


class InterpolationTask(DiffusionTask):
    """Trains to fill in the frames between given ones, which may be noised."""

    known_noise: KnownNoise | None = None
    _last: tuple[VideoBatch, Tensor] | None = None  # the batch whose latents were asked for, and its blend

    def latents(self, batch: VideoBatch, seed: int) -> Tensor:
        """As everywhere; with a deviation the difference from the blend, in units of it."""
        whole = super().latents(batch, seed)
        if (deviation := self.part["deviation"]) is None:
            return whole
        slots = list(self.known_slots(whole.shape[2]))
        blend = blended(whole[:, :, slots], whole.shape[2], self.part["factor"], self.part["offset"])
        self._last = batch, blend
        return (whole - blend) / deviation

    def frames(self, latents: Tensor, batch: VideoBatch) -> Tensor:
        if self.part["deviation"] is not None:
            latents = self._blend(batch) + self.part["deviation"] * latents
        return super().frames(latents, batch)

    def _blend(self, batch: VideoBatch) -> Tensor:
        assert self._last is not None
        assert self._last[0] is batch  # its latents come first
        return self._last[1]

    def condition(self, batch: VideoBatch, latents: Tensor, seed: int = 0, sampling: bool = False) -> Condition:
        if self.part["deviation"] is not None:
            return told_blend(self._told(batch), self._blend(batch), self.known_slots(latents.shape[2]))
        if self.known_noise is None:
            return super().condition(batch, latents, seed, sampling)
        times = uniforms(seed, "known-noise-time", batch.numbers) * self.known_noise.max_time
        if sampling:
            times = torch.full_like(times, self.known_noise.time)
        noise = normals(tuple(latents.shape[1:]), seed, "known-noise", batch.numbers).to(latents.device)
        given = noised(latents, noise, times, self.schedule)
        return with_known(self._told(batch), given, self.known_slots(latents.shape[2]))


def task(config: InterpolationStage, base: Model) -> InterpolationTask:
    """The training task of the interpolation stage, started from the video stage of `base` or anew."""
    frames, factor, offset = config.data.frames, config.factor, config.offset
    inner = frames - 2 * offset
    if (inner - 1) % factor or inner <= factor:
        aside = f"+2*{offset}" if offset else ""
        raise UserError(
            f"data.frames: {frames} frames are not (T-1)*{factor}+1{aside} with a factor of {factor}; "
            f"use {max((inner - 1) // factor, 1) * factor + 1 + 2 * offset}"
        )
    video = base.diffusion("video")
    steps, noise = video.schedule.num_steps, config.known_noise
    if noise is not None and noise.max_time > steps:
        raise UserError(f"known_noise.max_time: {noise.max_time:g} is beyond the schedule's {steps} steps; lower it")
    if config.network is None:
        if not video.first_image:
            raise UserError(
                f"{base.folder}: its video stage is given no frames, so interpolation can't start from it; give "
                "`network`, which starts anew"
            )
        network = UNet(video.network)
        network.load_state_dict(base.unet("video").state_dict())
        trainable = temporal_parameter_names(network)
    else:
        network = UNet(told_text(config.network, base).model_copy(update={"known_channels": True}))
        trainable = {name for name, _ in network.named_parameters()}
    part = {
        "network": network.config,
        "schedule": video.schedule,
        "prediction": video.prediction,
        "size": config.data.size,
        "frames": frames,
        "fps": config.data.fps,
        "factor": factor,
        "offset": offset,
        "known_time": config.known_noise.time if config.known_noise is not None else 0.0,
        "deviation": config.deviation,
        "sampling": config.sampling,
    }
    made = InterpolationTask(
        "interpolation",
        base,
        network,
        part,
        partial(known_slots, factor=factor, offset=offset),
        lambda name: name in trainable,
        config,
    )
    made.known_noise = config.known_noise
    return made
