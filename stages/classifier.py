"""Stage classifier: which class a noisy clip shows, so that its gradient can guide (Dhariwal & Nichol, 2021).

It stands beside the road: trained on the latents of a model, it changes none of its stages. Without a model it reads
pixels. Shapes: B batch, C channels of latents or pixels, T frames, H W their size, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipeline.loader import DataConfig
from data_pipeline.shards import all_labels
from stages.base import StageConfig, write_part
from stages.fits import check_size
from stages.posteriors import PosteriorCache
from videodiff import config as configs
from videodiff.batch import VideoBatch
from videodiff.config import operational
from videodiff.diffusion.guidance import classifier_loss
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks.classifier import ClassifierConfig, NoisyClassifier
from videodiff.networks.unet import UNetConfig
from videodiff.parts import ClassifierPart
from videodiff.seeding import normals
from videodiff.training.distributed import device
from videodiff.training.trainer import LossOutput

THIRDS = ("low", "middle", "high")  # of the noise levels, for the metrics


class ClassifierStage(StageConfig):
    """`videodiff train configs/demo/classifier.yaml`.

    `data.label` names the field of the samples' JSON that is told, e.g. scene.shape; its last word is the attribute.
    `network` is the U-Net whose first half reads; its `channels` may be left out: they are those of what it reads.
    `model` is the one whose latents it reads; null: pixels in [-1, 1].
    """

    stage: Literal["classifier"]
    network: UNetConfig
    pooling: Literal["attention", "mean"] = "attention"
    classes: tuple[str, ...] | None = Field(None, description="null: all that the shards hold, in alphabetical order")
    schedule: NoiseSchedule | None = Field(None, description="null: that of the model's image stage, to guide it")
    latent_cache_gib: float = operational(1.0, ge=0, description="encoded clips kept in the memory of each rank")

    @model_validator(mode="after")
    def _knows_what_to_tell(self) -> ClassifierStage:
        if self.data.label is None:
            raise ValueError("data.label: the classifier learns a field of the samples' JSON; name one: scene.shape")
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes {list(self.classes)} name one twice; name each once")
        return self


def _labels(config: DataConfig) -> set[str]:
    assert config.label is not None
    return set().union(*(all_labels(data_set.shards, config.label) for data_set in config.data_sets()))


class ClassifierTask:
    """Cross-entropy on noised clips at uniform times; a bad clip, which has no label, counts for nothing."""

    def __init__(self, config: ClassifierStage, base: Model | None) -> None:
        assert config.data.label is not None
        self.base, self.attribute = base, config.data.label.rpartition(".")[2]
        self.classes = config.classes or tuple(sorted(_labels(config.data)))
        if len(self.classes) < 2:
            raise UserError(
                f"data.label={config.data.label}: of {list(self.classes)} there is nothing to tell apart; name another"
            )
        self.schedule, self.size = _schedule(config, base), config.data.size
        told = {
            "encoder": configs.to_dict(_network(config, base)),
            "num_classes": len(self.classes),
            "pooling": config.pooling,
        }
        self.network = configs.build(ClassifierConfig, told, "network")
        self.module: nn.Module = NoisyClassifier(self.network)
        self.posteriors = None
        if base is not None:
            self.posteriors = PosteriorCache(base.autoencoder.to(device()), int(config.latent_cache_gib * 2**30))

    def trains(self, name: str) -> bool:
        return True

    def data(self, batch: VideoBatch, seed: int) -> Tensor:
        """What is noised, [B,C,T,H,W] float32: a posterior sample of each clip's latents, or its pixels in [-1,1]."""
        if self.posteriors is None:
            return batch.frames.to(device()).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        mean, std = self.posteriors(batch.frames)
        return mean + std * normals(tuple(mean.shape[1:]), seed, "posterior", batch.numbers).to(mean.device)

    def labels(self, batch: VideoBatch) -> Tensor:
        """The class of each clip, int64 [B]; 0 for a bad one. UserError for a label that is none of the classes."""
        known = {name: index for index, name in enumerate(self.classes)}
        usable = [bool(weight) for weight in batch.weight.tolist()]
        for key, label, good in zip(batch.keys, batch.labels, usable, strict=True):
            if good and label not in known:
                raise UserError(
                    f"data.label: sample {key} says {label!r}, which is none of the classes {', '.join(self.classes)}; "
                    "add it to them, or leave classes out"
                )
        return torch.tensor([known.get(label, 0) for label in batch.labels])

    def loss(self, module: Callable[..., Tensor], batch: VideoBatch, seed: int) -> LossOutput:
        x0, labels = self.data(batch, seed), self.labels(batch)
        heard: list[tuple[Tensor, Tensor]] = []

        def overheard(x_t: Tensor, time: Tensor) -> Tensor:
            logits = module(x_t, time)
            heard.append((logits.detach().argmax(1).cpu(), time.cpu()))
            return logits

        losses = classifier_loss(overheard, x0, labels.to(x0.device), self.schedule, seed, batch.numbers)
        ((found, time),) = heard
        return LossOutput(per_sample=losses, tallies=self._tallies(found == labels, time, batch.weight > 0))

    def _tallies(self, hits: Tensor, time: Tensor, usable: Tensor) -> dict[str, Tensor]:
        """How many clips are told right, and of how many, of all and of each third of the noise levels."""
        third = (time * len(THIRDS) / self.schedule.num_steps).long()
        chosen = {"accuracy": usable}
        chosen |= {f"accuracy_{name}": usable & (third == index) for index, name in enumerate(THIRDS)}
        return {name: torch.stack([hits[rows].sum(), rows.sum()]).double() for name, rows in chosen.items()}

    def sample(self, module: nn.Module, batch: VideoBatch, folder: Path, step: int) -> None:
        """Nothing to look at: the accuracies in metrics.jsonl say how the classifier does."""

    def export(self, state: dict[str, Tensor], folder: Path, file: str) -> None:
        told: dict[str, Any] = {
            "network": self.network,
            "schedule": self.schedule,
            "attribute": self.attribute,
            "classes": self.classes,
            "size": self.size,
        }
        write_part("classifier", self.base, folder, file, state, lambda w: ClassifierPart(**told, weights=w))


def _schedule(config: ClassifierStage, base: Model | None) -> NoiseSchedule:
    guided = base.config.image.schedule if base is not None and base.config.image is not None else None
    if config.schedule is None and guided is None:
        raise UserError(
            "schedule: there is no image stage (model=RUN) to take it from; name one, e.g. schedule={kind: cosine}"
        )
    if config.schedule is not None and guided is not None and config.schedule != guided:
        raise UserError(
            f"schedule: differs from that of the image stage of {config.model}, so it could not guide it; leave it out"
        )
    schedule = config.schedule or guided
    assert schedule is not None
    return schedule


def _network(config: ClassifierStage, base: Model | None) -> UNetConfig:
    """The network with the channels of what it reads; UserError where it is told others, or does not fit the size."""
    autoencoder = base.autoencoder if base is not None else None
    channels, factor = (3, 1) if autoencoder is None else (autoencoder.config.latent_channels, autoencoder.factor)
    if "channels" in config.network.model_fields_set and config.network.channels != channels:
        what = "pixels have" if autoencoder is None else f"the latents of {config.model} have"
        raise UserError(f"network.channels: {config.network.channels}, but {what} {channels}; set {channels}")
    why = f"autoencoder's factor {factor} x the network's {config.network.divisor}"
    check_size(config.data.size, factor * config.network.divisor, why)
    return config.network.model_copy(update={"channels": channels})
