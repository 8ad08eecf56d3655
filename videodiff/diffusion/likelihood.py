"""The variational bound on the negative log likelihood, term by term, and progressive decoding (DDPM, section 4.3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from videodiff.diffusion.prediction import Denoise, add_noise
from videodiff.diffusion.reverse import bound_term, log_variance
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError

Variance = Literal["small", "large"]


@dataclass(frozen=True)
class Bound:
    """-log p(x0) <= prior + the sum of steps, in nats per sample: an estimate by one draw of x_t for each time.

    prior: KL(q(x_N | x0) || N(0, 1)) [B]. steps: [S, B], what the step that leaves times[k] costs; the last one is
    -log p(x0 | x_t). squared_errors: [S, B], mean square of x0 minus its estimate from x_t, t = times[k].
    dimensions: numbers in a sample. levels: grey levels of the data, None for latents, whose bound is of a density and
    may be negative. All float64.
    """

    prior: Tensor
    steps: Tensor
    squared_errors: Tensor
    times: tuple[int, ...]
    dimensions: int
    levels: int | None

    @property
    def nats(self) -> Tensor:
        """The bound [B] in nats per sample."""
        return self.prior + self.steps.sum(0)

    def bits_per_dimension(self) -> Tensor:
        """The bound [B] of data with grey levels; UserError for latents, which have no bits to count."""
        if self.levels is None:
            raise UserError(
                "bits per dimension of latents: their density says nothing of the bits of a pixel; report "
                "nats_per_latent_dimension, or give levels for a model that works on pixels"
            )
        return self.nats / (self.dimensions * math.log(2))

    def nats_per_latent_dimension(self) -> Tensor:
        """The bound [B] on a latent's density: comparable between models on the same latents only.

        UserError for data with grey levels.
        """
        if self.levels is not None:
            raise UserError(
                f"nats per latent dimension of data with {self.levels} grey levels: this model works on pixels; report "
                "bits_per_dimension, or leave levels out for latents"
            )
        return self.nats / self.dimensions

    def rate_distortion(self) -> tuple[Tensor, Tensor]:
        """(rate [S], distortion [S]) of decoding progressively: DDPM, algorithm 4 and figure 5, means over samples.

        rate[k]: received when x_t, t = times[k], is known; bits per dimension of data with grey levels, nats per
        dimension of latents. distortion[k]: root mean square error of the x0 guessed from it, in the data's units.
        """
        sent = torch.cat([self.prior[None], self.steps[:-1]]).cumsum(0)
        unit = 1.0 if self.levels is None else math.log(2)
        return sent.mean(1) / (self.dimensions * unit), self.squared_errors.mean(1).sqrt()


@torch.no_grad()
def variational_bound(
    denoise: Denoise,
    x0: Tensor,
    schedule: NoiseSchedule,
    generators: Sequence[torch.Generator],
    levels: int | None = None,
    variance: Variance = "small",
    times: Sequence[int] | None = None,
) -> Bound:
    """The bound on -log p(x0) of clean data x0 [B, ...]; one call of `denoise` for each time, all of them by default.

    levels: x0 takes this many values, evenly from -1 to 1 (8 bits: 256; the digits: 17); None for latents.
    variance: of a denoiser that has not learned one, beta_tilde ("small") or beta ("large"). On the last step "small"
    is clipped as in `log_variance_bounds`; "large" is the one under which the bound becomes exact with growing N.
    times: strictly decreasing within 1..N: the bound of the chain that takes these steps alone, a model of its own.
    Sample i takes its noise from generators[i], on the CPU. Raises UserError for data that is not on the grid of
    `levels`, for times that don't decrease, for guided denoisers; ValueError for another number of generators than B.
    """
    if len(generators) != len(x0):
        raise ValueError(f"{len(generators)} generators for {len(x0)} samples: give one per sample")
    if levels is not None:
        _check_levels(x0, levels)
    chain = list(range(schedule.num_steps, 0, -1)) if times is None else list(times)
    _check_times(chain, schedule)
    clean = x0.double()
    steps, errors = [], []
    for time, earlier in zip(chain, [*chain[1:], 0], strict=True):
        t, s = (torch.full((len(x0),), step, device=x0.device) for step in (time, earlier))
        eps = torch.stack([torch.randn(x0.shape[1:], generator=g, dtype=torch.float32) for g in generators])
        estimate = denoise(add_noise(x0, eps.to(x0), t, schedule), t)
        if estimate.shift is not None:
            raise UserError("the likelihood of a guided denoiser is not defined; pass the denoiser without guidance")
        fraction = estimate.variance_fraction
        if fraction is None:
            fraction = torch.full_like(clean, float(variance == "large"))
        log_sigma = log_variance(fraction.double(), schedule, t, s)
        guess = estimate.x0.double()
        steps.append(bound_term(clean, guess, log_sigma, schedule, t, s, levels))
        errors.append((clean - guess).square().flatten(1).mean(1))
    prior = _prior(clean, schedule, chain[0])
    dimensions = x0[0].numel()
    return Bound(prior, torch.stack(steps), torch.stack(errors), tuple(chain), dimensions, levels)


def _prior(x0: Tensor, schedule: NoiseSchedule, t: int) -> Tensor:
    """KL(q(x_t | x0) || N(0, 1)) [B] in nats."""
    alpha_bar = schedule.alpha_bar[t].item()
    kl = 0.5 * (alpha_bar * x0**2 - alpha_bar - math.log1p(-alpha_bar))
    return kl.flatten(1).sum(1)


def _check_levels(x0: Tensor, levels: int) -> None:
    if levels < 2:
        raise UserError(f"levels={levels}: data has at least 2 grey levels; give the data's own number, or None")
    steps = (x0.double() + 1) * (levels - 1) / 2
    off_grid = ((steps - steps.round()).abs() > 1e-2) | (steps < -0.5) | (steps > levels - 0.5)
    if bool(off_grid.any()):
        raise UserError(
            f"levels={levels}: x0 holds {float(x0[off_grid][0]):.6g}, which is not one of {levels} values evenly from "
            "-1 to 1; give the data's own number of grey levels, or None for latents"
        )


def _check_times(times: list[int], schedule: NoiseSchedule) -> None:
    N = schedule.num_steps
    falling = all(a > b for a, b in pairwise(times))
    if not times or not falling or not (times[0] <= N and times[-1] >= 1):
        raise UserError(f"times {times[:4]}...: give strictly decreasing steps within 1..{N}, as schedule.times does")
