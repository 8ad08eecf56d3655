"""Langevin dynamics on the denoiser's score, -eps / sigma: annealed, and as the corrector of a predictor."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from videodiff.diffusion.samplers.base import Ask, Draw, Levels, SamplerConfig, Time, folded
from videodiff.diffusion.samplers.ddim import posterior_variance
from videodiff.diffusion.samplers.edm import NoiseRange
from videodiff.diffusion.schedule import NoiseSchedule, Spacing


class Langevin(NoiseRange):
    """Annealed Langevin dynamics (Song & Ermon 1907.05600, algorithm 1), `corrections` steps at each noise level.

    The levels are a geometric sequence. Between two of them y = x / alpha stays as it is, and the next level's steps
    take out the noise that is too much; at the end the rest of it is removed at once (Jolicoeur-Martineau et al.
    2009.05475, section 3.1). From alpha = 0 there is no such y: the first level is reached by DDIM's step, its limit.
    """

    kind: Literal["langevin"] = "langevin"
    steps: int = Field(100, ge=1)
    corrections: int = Field(5, ge=1)
    snr: float = Field(0.16, gt=0, lt=1)

    @property
    def random(self) -> bool:
        return True

    def spaced(self, low: float, high: float, count: int) -> list[float]:
        return [high * (low / high) ** (i / max(count - 1, 1)) for i in range(count)]

    def path(self, ask: Ask, x: Tensor, levels: Levels, draw: Draw) -> Iterator[Tensor]:
        for (t, alpha_t, sigma_t), (s, alpha_s, sigma_s) in itertools.pairwise(levels):
            if alpha_t > 0:
                for _ in range(self.corrections):
                    x = langevin_step(ask, x, (t, alpha_t, sigma_t), self.snr, draw)
            if alpha_t == 0 or s == 0:
                estimate = folded(ask(x, t), x, alpha_t, sigma_t)
                x = alpha_s * estimate.x0 + sigma_s * estimate.eps
            else:
                x = alpha_s / alpha_t * x
            yield x


class PredictorCorrector(SamplerConfig):
    """Song et al. 2011.13456, algorithm 1: DDPM's step to the next time, then `corrections` Langevin steps there.

    Data itself (s = 0) has no score to correct by. The predictor's step from alpha = 0 is finite, and nothing is
    corrected there.
    """

    kind: Literal["predictor_corrector"] = "predictor_corrector"
    steps: int = Field(100, ge=1)
    spacing: Spacing = "trailing"
    corrections: int = Field(1, ge=1)
    snr: float = Field(0.16, gt=0, lt=1)

    @property
    def random(self) -> bool:
        return True

    def times(self, schedule: NoiseSchedule) -> Sequence[Time]:
        return schedule.times(self.steps, self.spacing)

    def path(self, ask: Ask, x: Tensor, levels: Levels, draw: Draw) -> Iterator[Tensor]:
        for (t, alpha_t, sigma_t), (s, alpha_s, sigma_s) in itertools.pairwise(levels):
            estimate = folded(ask(x, t), x, alpha_t, sigma_t)
            variance = posterior_variance(alpha_t, sigma_t, alpha_s, sigma_s)
            x = alpha_s * estimate.x0 + max(sigma_s**2 - variance, 0.0) ** 0.5 * estimate.eps
            if s > 0:
                x = x + variance**0.5 * draw(x)
                for _ in range(self.corrections):
                    x = langevin_step(ask, x, (s, alpha_s, sigma_s), self.snr, draw)
            yield x


def langevin_step(ask: Ask, x: Tensor, level: tuple[Time, float, float], snr: float, draw: Draw) -> Tensor:
    """x + delta / 2 score + sqrt(delta) z with delta = (2 snr sigma)^2.

    `snr` is the ratio of drift to noise where the score is that of the noise alone, |score| = sqrt(d) / sigma. This is
    the rule of both papers (1907.05600, section 4.3; 2011.13456, algorithm 5) without a norm over the state, so that a
    sample's step depends neither on it nor on its batch. The chain's variance is too wide by up to 1 / (1 - snr^2).
    """
    t, alpha, sigma = level
    estimate = folded(ask(x, t), x, alpha, sigma)
    return x - 2 * snr**2 * sigma * estimate.eps + 2 * snr * sigma * draw(x)
