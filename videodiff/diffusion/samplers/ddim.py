"""DDIM, and its way back from data to noise."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from videodiff.diffusion.prediction import Denoise
from videodiff.diffusion.samplers.base import Ask, Draw, Levels, OnStep, SamplerConfig, Time, asker, at_times, folded
from videodiff.diffusion.schedule import NoiseSchedule, Spacing


class DDIM(SamplerConfig):
    """Song et al. 2010.02502, eq. 12 and 16; eta 0 is deterministic, eta 1 with all steps is DDPM.

    Nothing is divided by alpha_t, so alpha_t = 0 needs no special case: the first step is
    alpha_s x0 + sigma_s eps with eps = x_t.
    """

    kind: Literal["ddim"] = "ddim"
    steps: int = Field(50, ge=1)
    eta: float = Field(0.0, ge=0, le=1)
    spacing: Spacing = "trailing"

    @property
    def random(self) -> bool:
        return self.eta > 0

    def times(self, schedule: NoiseSchedule) -> Sequence[Time]:
        return schedule.times(self.steps, self.spacing)

    def path(self, ask: Ask, x: Tensor, levels: Levels, draw: Draw) -> Iterator[Tensor]:
        for (t, alpha_t, sigma_t), (_, alpha_s, sigma_s) in itertools.pairwise(levels):
            estimate = folded(ask(x, t), x, alpha_t, sigma_t)
            variance = self.eta**2 * posterior_variance(alpha_t, sigma_t, alpha_s, sigma_s)  # eq. 16
            direction = max(sigma_s**2 - variance, 0.0) ** 0.5  # at eta 1 rounding can take it below 0
            x = alpha_s * estimate.x0 + direction * estimate.eps
            if variance > 0:
                x = x + variance**0.5 * draw(x)
            yield x


@torch.no_grad()
def invert(
    denoise: Denoise,
    data: Tensor,
    schedule: NoiseSchedule,
    steps: int = 50,
    spacing: Spacing = "trailing",
    on_step: OnStep = None,
) -> Tensor:
    """The noise [B, ...] from which DDIM(steps, eta=0, spacing) makes `data` [B, ...], approximately (DDIM, eq. 13).

    The reversed step s -> t uses the noise found at s in place of that at t, so that the round trip's error falls as
    the steps grow. No network knows t = 0: the first step asks at the first noisy time, and takes the data as its x0.
    on_step as for samplers. Raises UserError when the schedule has fewer steps than asked for.
    """
    x = data.to(torch.promote_types(data.dtype, torch.float32))
    ask, rising = asker(denoise), at_times(schedule, schedule.times(steps, spacing)[::-1])
    t, alpha, sigma = rising[0]
    x = alpha * x + sigma * folded(ask(x, t), x, alpha, sigma).eps
    for done, ((s, alpha_s, sigma_s), (_, alpha_t, sigma_t)) in enumerate(itertools.pairwise(rising), start=1):
        if on_step is not None:
            on_step(done, len(rising))
        estimate = folded(ask(x, s), x, alpha_s, sigma_s)
        x = alpha_t * estimate.x0 + sigma_t * estimate.eps
    if on_step is not None:
        on_step(len(rising), len(rising))
    return x


def posterior_variance(alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float) -> float:
    """beta-tilde, the variance of q(x_s | x_t, x0): DDPM eq. 7, DDIM eq. 16."""
    return (sigma_s / sigma_t) ** 2 * (1 - (alpha_t / alpha_s) ** 2)
