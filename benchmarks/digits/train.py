"""Training: one plain loop, and the losses it is handed. The core is on trial here, not the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.digits.data import CLASSES, LEVELS, told
from benchmarks.digits.settings import Settings
from videodiff.batch import Condition
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.guidance import classifier_loss
from videodiff.diffusion.loss import DiffusionLoss
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.diffusion.times import LossHistory
from videodiff.networks.classifier import ClassifierConfig, NoisyClassifier
from videodiff.networks.unet import UNet, UNetConfig
from videodiff.seeding import generator, uniforms
from videodiff.training.ema import EMA

WARMUP, DECAY, CLIP, DROPPED = 100, 0.999, 1.0, 0.1

LossAt = Callable[[Tensor], Tensor]  # numbers of the samples of a step, int64 [B] -> scalar


@dataclass(frozen=True)
class Recipe:
    """A denoiser of digits, but for its schedule's length and its width, which are the benchmark's."""

    name: str
    schedule: NoiseSchedule
    loss: DiffusionLoss
    learn_variance: bool = False
    labelled: bool = False


def recipes(settings: Settings) -> dict[str, Recipe]:
    """All denoisers of digits by name; DDPM's betas are for T = 1000 and scaled where T is another."""
    T = settings.num_steps
    linear = NoiseSchedule(kind="linear", num_steps=T, beta_start=0.1 / T, beta_end=20 / T if T > 20 else 0.9)
    cosine = NoiseSchedule(kind="cosine", num_steps=T)
    simple = DiffusionLoss(levels=LEVELS)
    importance = {"importance": {"history": 10}}
    made = [
        Recipe("linear-simple", linear, simple),
        Recipe("cosine-simple", cosine, simple),
        Recipe("cosine-hybrid", cosine, simple, learn_variance=True),
        Recipe("cosine-hybrid-importance", cosine, DiffusionLoss(levels=LEVELS, **importance), learn_variance=True),
        Recipe("cosine-bound-importance", cosine, DiffusionLoss(weighting="vlb", levels=LEVELS, **importance), True),
        Recipe("linear-labelled", linear, simple, labelled=True),
    ]
    return {recipe.name: recipe for recipe in made}


def small_unet(width: int, **further: object) -> UNetConfig:
    """Two levels, attention on the lower one: 4x4 of the digits' 8x8."""
    shape = {"channel_mult": (1, 2), "num_res_blocks": 1, "attention_levels": (False, True)}
    given = {"channels": 1, "head_channels": width, "feed_forward_factor": 2.0, **shape, **further}
    return UNetConfig(model_channels=width, **given)


def digit_denoiser(recipe: Recipe, settings: Settings) -> Denoiser:
    pooled = CLASSES if recipe.labelled else None
    config = small_unet(settings.width, pooled_dim=pooled, learn_variance=recipe.learn_variance)
    return Denoiser(seeded(lambda: UNet(config)), recipe.schedule, "eps", variance=config.variance)


def digit_classifier(settings: Settings) -> NoisyClassifier:
    """Of noisy digits, for guidance."""
    return seeded(lambda: NoisyClassifier(ClassifierConfig(encoder=small_unet(settings.width), num_classes=CLASSES)))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:  # type: ignore[type-arg]
    """A network whose first weights are always the same, and which leaves torch's own generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def fit(network: nn.Module, loss_at: LossAt, steps: int, batch: int, learning_rate: float) -> float:
    """Adam with warm-up, clipping and an average of the weights, which the network holds at the end.

    Returns seconds of processor time per step.
    """
    parameters = list(network.parameters())
    # One by one its 180 small tensors would take a fifth of a step.
    optimizer = torch.optim.Adam(parameters, learning_rate, fused=True)
    average = EMA(parameters)
    network.train()
    start = time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / WARMUP)
        loss = loss_at(torch.arange(step * batch, (step + 1) * batch))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP, error_if_nonfinite=True)
        optimizer.step()
        average.update(parameters, step, DECAY)
    seconds = (time.process_time() - start) / steps
    with torch.no_grad():
        for parameter, value in zip(parameters, average.values, strict=True):
            parameter.copy_(value)
    network.eval().requires_grad_(False)
    return seconds


def rows(numbers: Tensor, size: int) -> Tensor:
    """Which of `size` data each sample number meets: every epoch in another order, each datum once."""
    epochs = torch.div(numbers, size, rounding_mode="floor")
    orders = {int(e): torch.randperm(size, generator=generator("order", int(e))) for e in epochs.unique()}
    return torch.stack([orders[int(e)][n % size] for e, n in zip(epochs, numbers, strict=True)])


def denoiser_loss(denoiser: Denoiser, loss: DiffusionLoss, data: Tensor, condition: Condition | None = None) -> LossAt:
    """The core's loss on data [N, ...]; a condition of all N loses its text in a tenth of the draws."""
    schedule = denoiser.schedule
    history = None if loss.importance is None else LossHistory(loss.importance, schedule.num_steps)

    def loss_at(numbers: Tensor) -> Tensor:
        chosen = rows(numbers, len(data))
        now = Condition()
        if condition is not None:
            dropped = uniforms(0, "dropped", numbers) < DROPPED
            now = condition.select(chosen).drop(dropped, torch.zeros_like(dropped))
        t, weight = loss.draw_times(schedule, 0, numbers, history)
        eps = loss.draw_noise(data.shape[1:], 0, numbers)
        losses = loss(denoiser, data[chosen], eps, t, now)
        if history is not None:
            history.update(t, losses.detach())
        return (weight * losses).mean().float()

    return loss_at


def noisy_classifier_loss(classifier: nn.Module, data: Tensor, labels: Tensor, schedule: NoiseSchedule) -> LossAt:
    def loss_at(numbers: Tensor) -> Tensor:
        chosen = rows(numbers, len(data))
        return classifier_loss(classifier, data[chosen], labels[chosen], schedule, 0, numbers).mean()

    return loss_at


def clean_classifier_loss(classifier: nn.Module, data: Tensor, labels: Tensor) -> LossAt:
    def loss_at(numbers: Tensor) -> Tensor:
        chosen = rows(numbers, len(data))
        return F.cross_entropy(classifier(data[chosen]), labels[chosen])

    return loss_at


def digit_condition(recipe: Recipe, labels: Tensor) -> Condition | None:
    return told(labels) if recipe.labelled else None
