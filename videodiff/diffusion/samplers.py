"""Samplers: pure functions from (denoise, noise, schedule) to clean data.

Written in ab_t = alpha_bar_t, with a step from time t to an earlier time s. Neither divides by alpha_t, so that both
start from ab_t = 0 (zero terminal SNR) by the limit of their formulas, without a special case.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from videodiff.config import Config
from videodiff.diffusion.prediction import Denoise, Estimate
from videodiff.diffusion.schedule import NoiseSchedule, Spacing
from videodiff.errors import UserError

Generators = Sequence[torch.Generator] | None
OnStep = Callable[[int, int], None] | None
# (estimate, x_t, ab_t, ab_s) -> mean of x_s and its standard deviation
_Rule = Callable[[Estimate, Tensor, float, float], tuple[Tensor, float]]


class DDIM(Config):
    """Song et al. 2010.02502, eq. 12 and 16; eta 0 is deterministic, eta 1 with all steps is DDPM."""

    kind: Literal["ddim"] = "ddim"
    steps: int = Field(50, ge=1)
    eta: float = Field(0.0, ge=0, le=1)
    spacing: Spacing = "trailing"

    def __call__(
        self,
        denoise: Denoise,
        noise: Tensor,
        schedule: NoiseSchedule,
        generators: Generators = None,
        on_step: OnStep = None,
    ) -> Tensor:
        """Clean data [B, ...] from standard normal noise [B, ...]; see `_walk` for the rest."""

        def rule(estimate: Estimate, x_t: Tensor, ab_t: float, ab_s: float) -> tuple[Tensor, float]:
            variance = self.eta**2 * _posterior_variance(ab_t, ab_s)  # eq. 16
            direction = max(1 - ab_s - variance, 0.0) ** 0.5  # at eta 1 rounding can take it below 0
            return ab_s**0.5 * estimate.x0 + direction * estimate.eps, variance**0.5

        times = schedule.times(self.steps, self.spacing)
        return _walk(rule, times, denoise, noise, schedule, generators, on_step, random=self.eta > 0)


class DDPM(Config):
    """Ho et al. 2006.11239, eq. 7, with the smaller of its two fixed variances, beta-tilde ("fixed small").

    Fewer steps than the schedule has use the same posterior between the times that remain (improved DDPM, eq. 19).
    """

    kind: Literal["ddpm"] = "ddpm"
    steps: int = Field(1000, ge=1)
    spacing: Spacing = "trailing"

    def __call__(
        self,
        denoise: Denoise,
        noise: Tensor,
        schedule: NoiseSchedule,
        generators: Generators = None,
        on_step: OnStep = None,
    ) -> Tensor:
        """Clean data [B, ...] from standard normal noise [B, ...]; see `_walk` for the rest."""

        def rule(estimate: Estimate, x_t: Tensor, ab_t: float, ab_s: float) -> tuple[Tensor, float]:
            a = ab_t / ab_s
            mean = ab_s**0.5 * (1 - a) / (1 - ab_t) * estimate.x0 + a**0.5 * (1 - ab_s) / (1 - ab_t) * x_t
            return mean, _posterior_variance(ab_t, ab_s) ** 0.5

        times = schedule.times(self.steps, self.spacing)
        return _walk(rule, times, denoise, noise, schedule, generators, on_step, random=True)


Sampler: TypeAlias = Annotated[DDIM | DDPM, Field(discriminator="kind")]


def _posterior_variance(ab_t: float, ab_s: float) -> float:
    """beta-tilde, the variance of q(x_s | x_t, x0): DDPM eq. 7, DDIM eq. 16."""
    return (1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)


@torch.no_grad()
def _walk(
    rule: _Rule,
    times: list[int],
    denoise: Denoise,
    noise: Tensor,
    schedule: NoiseSchedule,
    generators: Generators,
    on_step: OnStep,
    random: bool,
) -> Tensor:
    """From `noise` at times[0] down to 0.

    The state is at least float32. Sample i takes its random numbers from generators[i] (on the CPU), so that they do
    not depend on the batch it is in. on_step(done, total) is called after each step. Raises UserError when a random
    sampler gets no generators, ValueError when their number is not B.
    """
    if random and generators is None:
        raise UserError("this sampler draws noise at each step: give one generator per sample, or use ddim with eta 0")
    if generators is not None and len(generators) != len(noise):
        raise ValueError(f"{len(generators)} generators for {len(noise)} samples: give one per sample")
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    ab = schedule.alpha_bar.tolist()
    for done, (t, s) in enumerate(zip(times, [*times[1:], 0], strict=True), start=1):
        estimate = denoise(x, torch.full((len(x),), t, device=x.device))
        x, deviation = rule(estimate, x, ab[t], ab[s])
        if random and generators is not None and deviation > 0:
            z = torch.stack([torch.randn(x.shape[1:], generator=g, dtype=x.dtype) for g in generators])
            x = x + deviation * z.to(x.device)
        if on_step is not None:
            on_step(done, len(times))
    return x
