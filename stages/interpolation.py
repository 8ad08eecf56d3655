"""Stage interpolation: the video network told every k-th frame fills in the frames between (Emu Video, 2023).

(T-1)k+1 frames come out of T. It starts from the video stage's temporal layers and trains on short windows; a longer
clip is made window by window, the windows sharing their border frames, as Emu Video joins its groups of eight.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field

from stages.base import DiffusionStageConfig, DiffusionTask
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks.unet import UNet, temporal_parameter_names


class InterpolationStage(DiffusionStageConfig):
    """`videodiff train configs/demo/interpolation.yaml`; `factor` is the gain in frame rate."""

    stage: Literal["interpolation"]
    factor: int = Field(2, ge=2)


def known_slots(frames: int, factor: int) -> tuple[int, ...]:
    """Every `factor`-th frame is given, the first and the last among them."""
    return tuple(range(0, frames, factor))


def windows(keys: int, window_frames: int, factor: int) -> list[int]:
    """First key frame of each window that covers `keys` key frames, neighbours sharing at least their border frame.

    A window has (window_frames - 1) / factor + 1 keys; the last one is moved back to end at the last key.
    """
    per_window = (window_frames - 1) // factor
    if keys <= per_window:
        return [0]
    starts = list(range(0, keys - 1 - per_window, per_window))
    return [*starts, keys - 1 - per_window]


def task(config: InterpolationStage, base: Model) -> DiffusionTask:
    """The training task of the interpolation stage, started from the video stage of `base`."""
    frames, factor = config.data.frames, config.factor
    if (frames - 1) % factor or frames <= factor:
        raise UserError(
            f"data.frames: {frames} frames are not (T-1)*{factor}+1 with a factor of {factor}; "
            f"use {max((frames - 1) // factor, 1) * factor + 1}"
        )
    video = base.diffusion("video")
    network = UNet(video.network)
    network.load_state_dict(base.unet("video").state_dict())
    trainable = temporal_parameter_names(network)
    part = {
        "network": video.network,
        "schedule": video.schedule,
        "prediction": video.prediction,
        "size": config.data.size,
        "frames": frames,
        "fps": config.data.fps,
        "factor": factor,
        "sampling": config.sampling,
    }
    return DiffusionTask(
        "interpolation",
        base,
        network,
        part,
        partial(known_slots, factor=factor),
        lambda name: name in trainable,
        config,
    )
