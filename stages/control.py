"""Stage control: a ControlNet that makes the image stage follow a picture's outlines (Zhang et al. 2302.05543).

The image network stays frozen; its encoder's copy, the hint's convolutions and the zero convolutions are trained.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from stages import image as image_stage
from stages.base import DenoisingStageConfig, DiffusionTask, Dropout, write_part
from videodiff.batch import Condition, VideoBatch
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks.control import HINTS, ControlledUNet, ControlNet
from videodiff.parts import ControlPart

HINT: Literal["edges"] = "edges"
PREFIX = "control."  # of the trained parameters of a ControlledUNet


class ControlStage(DenoisingStageConfig):
    """`videodiff train configs/demo/control.yaml`; `model` names any run or model that holds an image stage.

    Half of the texts are dropped, as in the paper (section 3.3): what the text does not say, the outlines must.
    """

    stage: Literal["control"]
    dropout: Dropout = Dropout(text=0.5, image=0.0, both=0.0)


class ControlTask(DiffusionTask):
    """Denoises images with the image stage's network, told the outlines of the very picture that was noised."""

    def condition(self, batch: VideoBatch, latents: Tensor, seed: int = 0, sampling: bool = False) -> Condition:
        hint = HINTS[HINT](batch.frames[:, 0])
        return replace(super().condition(batch, latents, seed, sampling), hint=hint.to(latents.device))

    def export(self, state: dict[str, Tensor], folder: Path, file: str) -> None:
        own = {name.removeprefix(PREFIX): value for name, value in state.items()}
        network, size = self.part["network"], self.part["size"]
        write_part(
            self.stage,
            self.base,
            folder,
            file,
            own,
            lambda weights: ControlPart(network=network, hint=HINT, size=size, weights=weights),
        )


def task(config: ControlStage, base: Model) -> ControlTask:
    """The training task of the control stage, beside the image stage of `base`."""
    image = base.diffusion("image")
    for name, given, wanted in (("size", config.data.size, image.size), ("frames", config.data.frames, 1)):
        if given != wanted:
            raise UserError(f"data.{name}: {given}, but the image stage of {base.folder} makes {wanted}; use {wanted}")
    frozen = base.unet("image")
    network = ControlledUNet(frozen, ControlNet.copy_of(frozen, base.autoencoder.factor))
    part = {name: getattr(image, name) for name in ("network", "schedule", "prediction", "size", "sampling")}
    return ControlTask(
        "control", base, network, part, image_stage.known_slots, lambda name: name.startswith(PREFIX), config
    )
