"""DPM-Solver++(2M)."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from videodiff.diffusion.samplers.base import Ask, Draw, Levels, SamplerConfig, Time, folded
from videodiff.diffusion.schedule import NoiseSchedule, Spacing


class DPMSolver(SamplerConfig):
    """DPM-Solver++(2M) (Lu et al. 2211.01095, algorithm 2): second order, one evaluation a step, on predictions of x0.

    With lambda = log(alpha / sigma) and h = lambda_s - lambda_t the step is exact for an x0 that is linear in lambda.
    The slope comes from the step before, so the first step is of first order. So is a step of infinite h: to t = 0,
    whose limit is x0 itself, and from alpha = 0, whose limit is DDIM's step; the step after that one finds a
    slope over an infinite distance, which is 0.
    """

    kind: Literal["dpm_solver"] = "dpm_solver"
    steps: int = Field(20, ge=1)
    spacing: Spacing = "trailing"

    @property
    def random(self) -> bool:
        return False

    def times(self, schedule: NoiseSchedule) -> Sequence[Time]:
        return schedule.times(self.steps, self.spacing)

    def path(self, ask: Ask, x: Tensor, levels: Levels, draw: Draw) -> Iterator[Tensor]:
        former: Tensor | None = None  # x0 at the time before
        former_h = math.inf
        for (t, alpha_t, sigma_t), (_, alpha_s, sigma_s) in itertools.pairwise(levels):
            x0 = folded(ask(x, t), x, alpha_t, sigma_t).x0
            h = math.inf if alpha_t == 0 or sigma_s == 0 else math.log(alpha_s / sigma_s * sigma_t / alpha_t)
            aim = x0
            if former is not None and math.isfinite(h):
                aim = x0 + 0.5 * h / former_h * (x0 - former)
            # alpha_s (1 - exp(-h)), written without the h that may be infinite.
            x = sigma_s / sigma_t * x + (alpha_s - alpha_t * sigma_s / sigma_t) * aim
            former, former_h = x0, h
            yield x
