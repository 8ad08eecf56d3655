"""Stage image: text becomes the latents of one image."""

from __future__ import annotations

from typing import ClassVar, Literal

from stages.base import DiffusionStageConfig, DiffusionTask, Dropout
from stages.fits import told_text
from videodiff.diffusion.prediction import Prediction
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.model import Model
from videodiff.networks.unet import UNet, UNetConfig


class ImageStage(DiffusionStageConfig):
    """`videodiff train configs/demo/image.yaml`. Its schedule and prediction are the video stage's too:

    a frozen spatial network can't change what it predicts. The network's `context_dims` and `pooled_dim` may be left
    out: they are the text towers' then.
    """

    takes_buckets: ClassVar[bool] = True
    stage: Literal["image"]
    network: UNetConfig
    schedule: NoiseSchedule = NoiseSchedule(zero_terminal_snr=True)
    prediction: Prediction = "v"
    dropout: Dropout = Dropout(text=0.1, image=0.0, both=0.0)


def known_slots(frames: int) -> tuple[int, ...]:
    """No frame is given."""
    return ()


def task(config: ImageStage, base: Model) -> DiffusionTask:
    """The training task of the image stage."""
    network = UNet(told_text(config.network, base))
    part = {
        "network": network.config,
        "schedule": config.schedule,
        "prediction": config.prediction,
        "size": config.data.size,
        "frames": 1,
        "fps": config.data.fps,
        "sampling": config.sampling,
    }
    return DiffusionTask("image", base, network, part, known_slots, lambda name: True, config)
