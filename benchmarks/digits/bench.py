"""What the sections share: data, judge, trained networks, samples; each made when first asked for, and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.digits import data
from benchmarks.digits.cache import Cache, digest
from benchmarks.digits.judge import FeatureNet, Judge
from benchmarks.digits.settings import Settings
from benchmarks.digits.train import (
    LossAt,
    clean_classifier_loss,
    denoiser_loss,
    digit_classifier,
    digit_condition,
    digit_denoiser,
    fit,
    noisy_classifier_loss,
    recipes,
    seeded,
)
from videodiff.batch import Condition
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.likelihood import Bound, variational_bound
from videodiff.diffusion.prediction import Denoise, Estimate
from videodiff.diffusion.samplers import SamplerConfig
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.networks.classifier import NoisyClassifier
from videodiff.seeding import generator, normals

BATCH = 250  # samples that are drawn at once; no result depends on it

DenoiseOf = Callable[[slice], Denoise]  # the denoiser of some of the samples


@dataclass(frozen=True)
class Trained:
    """A denoiser, what it depends on, and what it cost: seconds of processor time per training step."""

    name: str
    denoiser: Denoiser
    key: str
    seconds: float

    def plain(self, chosen: slice) -> Denoise:
        """Of a network without labels."""
        return self.denoiser.bind(Condition())


class Counted:
    """A denoiser that counts how often it is asked."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise, self.evaluations = denoise, 0

    def __call__(self, x_t: Tensor, t: Tensor) -> Estimate:
        self.evaluations += 1
        return self.denoise(x_t, t)


class Bench:
    """A run of the benchmark: pictures go to `pictures`, everything computed to `cache`."""

    def __init__(self, settings: Settings, cache: Cache, pictures: Path) -> None:
        self.settings, self.cache, self.pictures = settings, cache, pictures
        self.recipes = recipes(settings)
        pictures.mkdir(parents=True, exist_ok=True)

    @cached_property
    def digits(self) -> data.Digits:
        return data.load()

    @cached_property
    def judge(self) -> Judge:
        network = seeded(FeatureNet)
        loss = clean_classifier_loss(network, self.digits.train, self.digits.train_labels)
        self.trained("features", "features", network, loss, self.settings.feature_steps)
        return Judge(network, self.digits, self.settings.resamples)

    def denoiser(self, name: str) -> Trained:
        """The trained network of a recipe."""
        recipe = self.recipes[name]
        denoiser = digit_denoiser(recipe, self.settings)
        assert isinstance(denoiser.network, nn.Module)
        condition = digit_condition(recipe, self.digits.train_labels)
        loss = denoiser_loss(denoiser, recipe.loss, self.digits.train, condition)
        key = (recipe, self.settings.width)
        seconds = self.trained(name, key, denoiser.network, loss, self.settings.train_steps)
        return Trained(name, denoiser, digest((key, self.settings.train_steps, *self._training)), seconds)

    def classifier(self, schedule: NoiseSchedule) -> NoisyClassifier:
        """The classifier of noisy digits that guides."""
        network = digit_classifier(self.settings)
        loss = noisy_classifier_loss(network, self.digits.train, self.digits.train_labels, schedule)
        key = (schedule, self.settings.width)
        self.trained("noisy-classifier", key, network, loss, self.settings.feature_steps)
        return network

    def trained(self, name: str, key: object, network: nn.Module, loss_at: LossAt, steps: int) -> float:
        """Train `network` in place, or load what was trained; seconds of processor time per step."""
        settings = self.settings

        def make() -> dict[str, Tensor]:
            seconds = fit(network, loss_at, steps, settings.batch, settings.learning_rate)
            return {**network.state_dict(), "seconds": torch.tensor(seconds)}

        state = self.cache.tensors(name, (key, steps, *self._training), make)
        seconds = float(state.pop("seconds"))
        network.load_state_dict(state)
        network.eval().requires_grad_(False)
        return seconds

    @property
    def _training(self) -> tuple[object, ...]:
        return self.settings.batch, self.settings.learning_rate

    def samples(
        self, trained: Trained, sampler: SamplerConfig, how: DenoiseOf | None = None, key: object = ""
    ) -> Tensor:
        """Pictures [N, 1, 1, 8, 8] on the data's grey levels; `how` by what is not plain, with a key that names it.

        Everyone starts from the same noise, sample by sample.
        """
        N, of = self.settings.num_samples, how or trained.plain

        def make() -> dict[str, Tensor]:
            made = []
            for first in range(0, N, BATCH):
                numbers = range(first, min(first + BATCH, N))
                noise = normals(self.digits.test.shape[1:], 0, "start", numbers)
                generators = [generator("steps", i) for i in numbers]
                chosen = slice(numbers.start, numbers.stop)
                made.append(sampler(of(chosen), noise, trained.denoiser.schedule, generators))
            return {"pictures": data.to_grid(torch.cat(made))}

        name = f"samples-{trained.name}-{sampler.kind}"
        return self.cache.tensors(name, (trained.key, sampler, N, key), make)["pictures"]

    def bound(self, trained: Trained, pictures: Tensor, split: str, variance: str = "small") -> Bound:
        """The variational bound of pictures [N, ...] with the data's bin width; all networks meet the same noise."""

        def make() -> dict[str, Tensor]:
            generators = [generator("bound", i) for i in range(len(pictures))]
            denoise = trained.denoiser.bind(Condition())
            schedule = trained.denoiser.schedule
            found = variational_bound(denoise, pictures, schedule, generators, data.LEVELS, variance)  # type: ignore[arg-type]
            return {"prior": found.prior, "steps": found.steps, "squared_errors": found.squared_errors}

        key = (trained.key, len(pictures), split, variance)
        parts = self.cache.tensors(f"bound-{trained.name}-{split}", key, make)
        times = tuple(range(trained.denoiser.schedule.num_steps, 0, -1))
        return Bound(**parts, times=times, dimensions=pictures[0].numel(), levels=data.LEVELS)
