"""Samplers that choose their own noise levels: Heun's method with EDM's steps.

EDM writes noise as sigma / alpha of x / alpha: y = x0 + noise eps. Here that ratio is called noise. It is infinite at
t = N with zero terminal SNR.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from videodiff.diffusion.samplers.base import Ask, Draw, Levels, SamplerConfig, Time, folded
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError


class NoiseRange(SamplerConfig):
    """Steps between two noise levels sigma / alpha, each cut to what the schedule has.

    A schedule with zero terminal SNR begins at infinite noise: its first step is DDIM's, the limit of all these
    samplers, and leads from t = N to `noise_max`. Any other begins at noise_max itself.
    """

    steps: int = Field(18, ge=1)
    noise_min: float = Field(0.002, gt=0)
    noise_max: float = Field(80.0, gt=0)

    @model_validator(mode="after")
    def _range(self) -> "NoiseRange":
        if self.noise_min >= self.noise_max:
            raise ValueError(
                f"noise_min {self.noise_min} is not below noise_max {self.noise_max}: sampling goes from noise_max "
                "down; swap them"
            )
        return self

    def spaced(self, low: float, high: float, count: int) -> list[float]:
        """`count` noise levels from `high` down to `low`."""
        raise NotImplementedError

    def times(self, schedule: NoiseSchedule) -> Sequence[Time]:
        N = schedule.num_steps
        ends = schedule.log_snr(torch.tensor([1, N])).tolist()
        cleanest, noisiest = (math.exp(-end / 2) for end in ends)
        low, high = max(self.noise_min, cleanest), min(self.noise_max, noisiest)
        if low >= high:
            raise UserError(
                f"sampler.noise_min {self.noise_min} and noise_max {self.noise_max} leave nothing of the noise that "
                f"the schedule has (sigma / alpha from {cleanest:.4g} to {noisiest:.4g}); choose others"
            )
        first: list[Time] = [N] if math.isinf(noisiest) else []
        noise = self.spaced(low, high, self.steps - len(first)) if self.steps > len(first) else []
        # Rounding may lead past the ends, where no network was trained and no schedule is defined.
        log_snr = (-2 * torch.tensor(noise, dtype=torch.float64).log()).clamp(min=ends[1], max=ends[0])
        return [*first, *schedule.time(log_snr).tolist()]


class Heun(NoiseRange):
    """Karras et al. 2206.00364 (EDM), algorithm 1 without churn: Heun's method on dy/dnoise = eps.

    The levels are evenly spaced in noise^(1/rho) (eq. 5). Two evaluations a step, but one in the last, to 0, and in a
    step from infinite noise, where the correction has no limit: both are Euler's (DDIM's).
    """

    kind: Literal["heun"] = "heun"
    rho: float = Field(7.0, ge=1)

    @property
    def random(self) -> bool:
        return False

    def spaced(self, low: float, high: float, count: int) -> list[float]:
        first, last = high ** (1 / self.rho), low ** (1 / self.rho)
        return [(first + i / max(count - 1, 1) * (last - first)) ** self.rho for i in range(count)]

    def path(self, ask: Ask, x: Tensor, levels: Levels, draw: Draw) -> Iterator[Tensor]:
        for (t, alpha_t, sigma_t), (s, alpha_s, sigma_s) in itertools.pairwise(levels):
            estimate = folded(ask(x, t), x, alpha_t, sigma_t)
            euler = alpha_s * estimate.x0 + sigma_s * estimate.eps
            if alpha_t > 0 and s > 0:
                slope = (estimate.eps + folded(ask(euler, s), euler, alpha_s, sigma_s).eps) / 2
                euler = alpha_s / alpha_t * x + (sigma_s - alpha_s / alpha_t * sigma_t) * slope
            x = euler
            yield x
