"""Rendered clips as batches, and short runs of a stage on a toy model, for the tests of stages."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.world import render_clip
from videodiff import config as configs
from videodiff.batch import VideoBatch
from videodiff.diffusion.samplers import DDIM
from videodiff.model import Model
from videodiff.model_folder import write_weights
from videodiff.networks.control import ControlNet
from videodiff.networks.image_prompt import ImagePrompt, ImagePromptConfig
from videodiff.networks.unet import UNet
from videodiff.parts import DESCRIPTION, ControlPart, ImagePromptPart, Sampling, UpscalePart
from videodiff.training.trainer import train

ENGINE = {"precision": "fp32", "learning_rate": 3e-3, "weight_decay": 0.0}


@dataclass
class Clips:
    """Rendered clips as batches, in memory."""

    frames: int
    fps: float
    size: int = 32
    fingerprint: str = "clips"

    def batch(self, numbers: list[int]) -> VideoBatch:
        clips = [render_clip(0, number % 6, self.size, self.frames, self.fps) for number in numbers]
        return VideoBatch(
            frames=torch.from_numpy(np.stack([clip.frames for clip in clips])),
            captions=tuple(clip.captions[0] for clip in clips),
            fps=torch.full((len(clips),), self.fps),
            numbers=torch.tensor(numbers),
            keys=tuple(clip.key for clip in clips),
            weight=torch.ones(len(clips)),
        )

    def batches(self, start_sample: int, rank: int, world: int, micro_batch: int) -> Iterator[VideoBatch]:
        while True:
            yield self.batch([start_sample + rank + world * i for i in range(micro_batch)])
            start_sample += world * micro_batch


def stage_config(schema: type, tmp_path: Path, frames: int, fps: float = 8.0, **more: Any) -> Any:
    tree = {
        "stage": schema.__name__.removesuffix("Stage").lower(),
        "run": {"dir": str(tmp_path / "run"), "steps": 20, "save_every": 20, "sample_every": 0},
        "data": {"shards": "none", "batch_size": 4, "frames": frames, "fps": fps, "size": 32},
        "engine": ENGINE,
        **more,
    }
    return configs.build(schema, tree, "the test")


def trained(config: Any, task: Any, source: Clips) -> Model:
    train(config.run, config.engine, config.data.batch_size, lambda: (task, source), config)
    return Model.load(config.run.dir)


def with_extras(model: Path, folder: Path) -> Path:
    """A copy of a toy model with control, image prompt and upscale stages of random weights: 32x32 become 64x64."""
    shutil.copytree(model, folder)
    base = Model.load(folder)
    image = base.diffusion("image")
    larger = image.network.model_copy(update={"channels": 48, "known_channels": True})
    prompt = ImagePromptConfig(width=8, side=2)
    networks: dict[str, torch.nn.Module] = {
        "control": ControlNet.copy_of(base.unet("image"), base.autoencoder.factor),
        "image_prompt": ImagePrompt(
            prompt, image.network.channels, image.network.context_dims, image.network.pooled_dim
        ),
        "upscale": UNet(larger),
    }
    files = {}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, network in networks.items():
            for parameter in network.parameters():  # what starts at zero would leave nothing to compare
                parameter.data += 0.1 * torch.randn_like(parameter)
            files[name] = write_weights(folder, f"{name}.safetensors", network.state_dict())
    parts = {
        "control": ControlPart(network=image.network, hint="edges", size=image.size, weights=files["control"]),
        "image_prompt": ImagePromptPart(network=prompt, size=image.size, weights=files["image_prompt"]),
        "upscale": UpscalePart(
            network=larger,
            schedule=image.schedule,
            prediction=image.prediction,
            size=2 * image.size,
            frames=1,
            fps=8.0,
            factor=2,
            deviation=0.1,
            sampling=Sampling(sampler=DDIM(steps=2)),
            weights=files["upscale"],
        ),
    }
    configs.save(base.config.model_copy(update=parts), folder / DESCRIPTION)
    return folder
