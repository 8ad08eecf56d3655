"""Stage video: the image network with temporal layers, told the first image and the text (Emu Video, 2023).

The spatial half is the image stage's, frozen: only the temporal layers, the convolution that brings in the given image
and its mask, and an image prompt, where the spatial layers hear one, are trained.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

from pydantic import model_validator

from stages.base import DiffusionStageConfig, DiffusionTask
from videodiff.diffusion.prediction import Prediction
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks.unet import TemporalConfig, UNet, temporal_parameter_names
from videodiff.parts import ImagePromptPart


class VideoStage(DiffusionStageConfig):
    """`videodiff train configs/demo/video.yaml`; `model` names the run or model that holds the image stage.

    schedule, prediction: the image stage's when left out. Others are the temporal layers' to learn: the published
    recipe changes both between its sizes although the spatial layers stay. first_image: False trains the naive way to
    compare with, from text to video, by the same layers without the convolution that brings in an image.
    """

    takes_buckets: ClassVar[bool] = True
    stage: Literal["video"]
    temporal: TemporalConfig = TemporalConfig()
    freeze_spatial: bool = True
    first_image: bool = True
    schedule: NoiseSchedule | None = None
    prediction: Prediction | None = None

    @model_validator(mode="after")
    def _an_image_is_heard_where_there_is_one(self) -> VideoStage:
        if not self.first_image and self.temporal.image_prompt is not None:
            raise ValueError("temporal.image_prompt: there is no first image where first_image is false; leave it out")
        return self


def known_slots(frames: int, first_image: bool = True) -> tuple[int, ...]:
    """The first frame is given, or none."""
    return (0,) if first_image else ()


def task(config: VideoStage, base: Model) -> DiffusionTask:
    """The training task of the video stage, its spatial half loaded from the image stage of `base`."""
    image = base.diffusion("image")
    network_config = image.network.model_copy(
        update={"temporal": config.temporal, "known_channels": config.first_image}
    )
    network = UNet(network_config)
    trainable = temporal_parameter_names(network)
    loaded = network.load_state_dict(base.state("image"), strict=False)
    if odd := sorted((set(loaded.missing_keys) ^ trainable) | set(loaded.unexpected_keys)):
        raise UserError(
            f"{base.folder}: the weights of stage image do not fit its network at {odd[0]!r} ({len(odd)} such names); "
            "copy or train the model again"
        )
    if config.temporal.image_prompt is not None:
        prompt = base.part("image_prompt")
        assert isinstance(prompt, ImagePromptPart)
        if prompt.network != config.temporal.image_prompt:
            raise UserError(
                f"temporal.image_prompt: {config.temporal.image_prompt}, but that of {base.folder} was trained with "
                f"{prompt.network}; use its values"
            )
        assert network.temporal_image_prompt is not None
        network.temporal_image_prompt.load_state_dict(base.state("image_prompt"))
    part = {
        "network": network_config,
        "schedule": config.schedule or image.schedule,
        "prediction": config.prediction or image.prediction,
        "size": config.data.size,
        "frames": config.data.frames,
        "fps": config.data.fps,
        "first_image": config.first_image,
        "sampling": config.sampling,
    }
    return DiffusionTask(
        "video",
        base,
        network,
        part,
        partial(known_slots, first_image=config.first_image),
        lambda name: not config.freeze_spatial or name in trainable,
        config,
    )
