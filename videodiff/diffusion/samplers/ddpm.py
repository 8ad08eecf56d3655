"""DDPM: ancestral sampling."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from videodiff.diffusion.prediction import Estimate, Variance
from videodiff.diffusion.samplers.base import Ask, Draw, Levels, SamplerConfig, Time
from videodiff.diffusion.samplers.ddim import posterior_variance
from videodiff.diffusion.schedule import NoiseSchedule, Spacing
from videodiff.errors import UserError

NOT_LEARNED = (
    "sampler.variance is learned, but this model has learned no variance (network.learn_variance is false); "
    "use variance: beta_tilde (or beta), or a model trained with a learned variance"
)


class DDPM(SamplerConfig):
    """Ho et al. 2006.11239, eq. 7. Fewer steps than the schedule has use the same posterior between the times that
    remain (improved DDPM 2102.09672, eq. 19).

    variance: beta_tilde ("fixed small", right for data at one point), beta ("fixed large", right for data that is
    white noise), or learned: exp(f log beta + (1 - f) log beta_tilde) (improved DDPM, eq. 15) with beta, beta_tilde of
    the step from t to s and f = `Estimate.variance_fraction`. The last step adds no noise.
    A score shift moves the mean by Sigma shift (Dhariwal & Nichol 2105.05233, algorithm 1); with beta_tilde the last
    step has no variance, and so no shift. From alpha = 0 nothing is moved, see `folded`.
    """

    kind: Literal["ddpm"] = "ddpm"
    steps: int = Field(1000, ge=1)
    spacing: Spacing = "trailing"
    variance: Literal["beta_tilde", "beta", "learned"] = "beta_tilde"

    @property
    def random(self) -> bool:
        return True

    def times(self, schedule: NoiseSchedule) -> Sequence[Time]:
        return schedule.times(self.steps, self.spacing)

    def check(self, schedule: NoiseSchedule, variance: Variance) -> None:
        super().check(schedule, variance)
        if self.variance == "learned" and variance == "fixed":
            raise UserError(NOT_LEARNED)

    def path(self, ask: Ask, x: Tensor, levels: Levels, draw: Draw) -> Iterator[Tensor]:
        for (t, alpha_t, sigma_t), (s, alpha_s, sigma_s) in itertools.pairwise(levels):
            estimate = ask(x, t)
            a = alpha_t / alpha_s
            beta = 1 - a**2
            variance = self._variance(estimate, beta, posterior_variance(alpha_t, sigma_t, alpha_s, sigma_s))
            x = alpha_s * beta / sigma_t**2 * estimate.x0 + a * (sigma_s / sigma_t) ** 2 * x
            if estimate.shift is not None and alpha_t > 0:
                x = x + variance * estimate.shift
            if s > 0:
                x = x + variance**0.5 * draw(x)
            yield x

    def _variance(self, estimate: Estimate, beta: float, beta_tilde: float) -> Tensor | float:
        if self.variance == "beta":
            return beta
        if self.variance == "beta_tilde":
            return beta_tilde
        if estimate.variance_fraction is None:
            raise UserError(NOT_LEARNED)
        fraction = estimate.variance_fraction
        # As powers: beta_tilde is 0 at the last step, and its logarithm not a number to compute with.
        return beta**fraction * beta_tilde ** (1 - fraction)
