"""What all samplers share: one loop from noise to clean data, random numbers per sample, coefficients of a time.

B samples; a state x is [B, ...], at least float32. t and s are times of the schedule, a step goes from t to an earlier
s; alpha, sigma are Python floats, computed in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from videodiff.config import Config
from videodiff.diffusion.prediction import Denoise, Estimate, Variance
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError

Generators: TypeAlias = Sequence[torch.Generator] | None
OnStep: TypeAlias = Callable[[int, int], None] | None
Time: TypeAlias = int | float  # a step of the table, or a time between two of them
Ask: TypeAlias = Callable[[Tensor, Time], Estimate]  # (x_t, t) -> Estimate, one time for the whole batch
Draw: TypeAlias = Callable[[Tensor], Tensor]  # standard normals of the shape of x
Levels: TypeAlias = list[tuple[Time, float, float]]  # (t, alpha_t, sigma_t)


class SamplerConfig(Config):
    """A sampler: a pure function from (denoise, noise, schedule) to clean data. Members say their times and their path.

    `steps` counts noise levels; how often the network is asked at each differs between members.
    """

    kind: str
    steps: int = Field(ge=1)

    @property
    def random(self) -> bool:
        """Whether it draws random numbers on its way."""
        raise NotImplementedError

    def times(self, schedule: NoiseSchedule) -> Sequence[Time]:
        """The times at which the denoiser is asked, strictly decreasing, without the final 0.

        Raises UserError when the sampler doesn't fit the schedule, before anything is computed.
        """
        raise NotImplementedError

    def check(self, schedule: NoiseSchedule, variance: Variance) -> None:
        """Refuse (UserError) a schedule that doesn't fit, or a network whose variance is not what this one needs."""
        self.times(schedule)

    def path(self, ask: Ask, x: Tensor, levels: Levels, draw: Draw) -> Iterator[Tensor]:
        """From x at levels[0], yields the state after each step; the last one is clean. levels ends with (0, 1, 0)."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self,
        denoise: Denoise,
        noise: Tensor,
        schedule: NoiseSchedule,
        generators: Generators = None,
        on_step: OnStep = None,
    ) -> Tensor:
        """Clean data [B, ...] from standard normal noise [B, ...]; at least float32.

        Sample i takes its random numbers from generators[i] (on the CPU), so that they do not depend on the batch it
        is in. on_step(done, total) is called after each step. Raises UserError when a random sampler gets no
        generators or the schedule doesn't fit, ValueError when there is not one generator per sample.
        """
        if self.random and generators is None:
            raise UserError(
                "this sampler draws noise at each step: give one generator per sample, or use ddim with eta 0"
            )
        if generators is not None and len(generators) != len(noise):
            raise ValueError(f"{len(generators)} generators for {len(noise)} samples: give one per sample")
        times = self.times(schedule)
        x = noise.to(torch.promote_types(noise.dtype, torch.float32))

        def draw(x: Tensor) -> Tensor:
            assert generators is not None, "a sampler that is not random drew"
            z = torch.stack([torch.randn(x.shape[1:], generator=g, dtype=x.dtype) for g in generators])
            return z.to(x.device)

        for done, state in enumerate(self.path(asker(denoise), x, at_times(schedule, [*times, 0]), draw), start=1):
            x = state
            if on_step is not None:
                on_step(done, len(times))
        return x


def asker(denoise: Denoise) -> Ask:
    """`denoise` asked at one time for the whole batch: int64 at steps of the table, float64 between them."""

    def ask(x: Tensor, t: Time) -> Estimate:
        dtype = torch.int64 if isinstance(t, int) else torch.float64
        return denoise(x, torch.full((len(x),), t, dtype=dtype, device=x.device))

    return ask


def at_times(schedule: NoiseSchedule, times: Sequence[Time]) -> Levels:
    """(t, alpha_t, sigma_t) of each time, in one look at the table."""
    whole = torch.tensor(times, dtype=torch.int64 if all(isinstance(t, int) for t in times) else torch.float64)
    return list(zip(times, schedule.alpha(whole).tolist(), schedule.sigma(whole).tolist(), strict=True))


def folded(estimate: Estimate, x_t: Tensor, alpha: float, sigma: float) -> Estimate:
    """The estimate with its shift taken into eps (Dhariwal & Nichol 2105.05233, algorithm 2) and so into x0.

    Noise is the score times -sigma, so eps - sigma shift; x0 follows from x_t = alpha x0 + sigma eps:
    x0 + sigma^2 / alpha shift. At alpha = 0 x_t says nothing of x0, the gradient of any log p(y | x_t) is 0, and what a
    classifier claims there is left out: both parts of the estimate stay. That is not the limit of the guided sampler:
    as alpha falls, sigma^2 / alpha shift goes to E[x0 | y] - E[x0] (Tweedie), and at 0 itself it is 0 / 0. So the first
    step, to s, misses alpha_s times that difference, which vanishes as alpha_s does.
    """
    if estimate.shift is None:
        return estimate
    if alpha == 0:
        return Estimate(estimate.x0, estimate.eps, estimate.variance_fraction)
    eps = estimate.eps - sigma * estimate.shift
    x0 = estimate.x0 + sigma**2 / alpha * estimate.shift
    return Estimate(x0, eps, estimate.variance_fraction)
