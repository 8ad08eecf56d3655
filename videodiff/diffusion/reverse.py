"""One step t -> s of the reverse chain as a Gaussian, and what it costs to send x_s with it: the terms of the bound.

p(x_s | x_t) = N(mean(x0 estimate, x_t), Sigma) against q(x_s | x_t, x0), whose mean has the clean data in its place:
the two means differ by a multiple of the error of x0 alone. Times are int64 [B], 0 <= s < t <= N; logarithms natural.
"""

import math

import torch
from torch import Tensor

from videodiff.diffusion.prediction import spread
from videodiff.diffusion.schedule import NoiseSchedule


def log_variance_bounds(schedule: NoiseSchedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(log beta_tilde, log beta), float64 [B]: the ends between which a learned variance lies, and the fixed ones.

    beta = 1 - alpha_bar_t / alpha_bar_s, beta_tilde = (1 - alpha_bar_s) / (1 - alpha_bar_t) beta (DDPM, eq. 7). At
    s = 0 beta_tilde is 0: its logarithm there is that of the step 2t -> t, which is improved DDPM's clipping for
    t = 1 and its like for strided chains; log beta where 2t > N.
    """
    alpha_bar = schedule.alpha_bar.to(t.device)
    last, beyond = s == 0, 2 * t > schedule.num_steps
    upper = (-alpha_bar[t] / alpha_bar[s]).log1p()
    t_clipped = torch.where(last & ~beyond, 2 * t, t)
    s_clipped = torch.where(last, torch.where(beyond, 0, t), s)
    beta = (-alpha_bar[t_clipped] / alpha_bar[s_clipped]).log1p()
    lower = beta + (-alpha_bar[s_clipped]).log1p() - (-alpha_bar[t_clipped]).log1p()
    return torch.where(last & beyond, upper, lower), upper


def log_variance(fraction: Tensor, schedule: NoiseSchedule, t: Tensor, s: Tensor) -> Tensor:
    """log Sigma [B, ...] for a fraction [B, ...] of the way from log beta_tilde to log beta (improved DDPM, eq. 15)."""
    lower, upper = log_variance_bounds(schedule, t, s)
    return spread(lower, fraction) + fraction * spread(upper - lower, fraction)


def bound_term(
    x0: Tensor,
    estimate: Tensor,
    log_sigma: Tensor,
    schedule: NoiseSchedule,
    t: Tensor,
    s: Tensor,
    levels: int | None,
) -> Tensor:
    """Nats [B] of the step t -> s: clean data x0, its estimate from x_t, and log Sigma, each [B, ...].

    s > 0: KL(q(x_s | x_t, x0) || p(x_s | x_t)), DDPM eq. 5. s = 0: -log p(x0 | x_t), of the bin that x0 lies in when
    the data has `levels` (DDPM, eq. 13), else as a density.
    """
    alpha_bar = schedule.alpha_bar.to(t.device)
    a, b = alpha_bar[t], alpha_bar[s]
    lower, _ = log_variance_bounds(schedule, t, s)
    q = spread(lower, x0) - log_sigma
    error = spread((b.sqrt() * (1 - a / b) / (1 - a)) ** 2, x0) * (x0 - estimate) ** 2  # of the means: DDPM, eq. 7
    kl = 0.5 * (q.exp() - 1 - q + error * (-log_sigma).exp())
    is_last = (s == 0).view(-1, *[1] * (x0.dim() - 1))
    # Harmless values where another term is taken: far from the data a bin's mass is no number, and neither would be the
    # gradient, which `where` multiplies with 0.
    estimate, log_sigma = torch.where(is_last, estimate, x0), torch.where(is_last, log_sigma, 0)
    if levels is None:
        last = 0.5 * (math.log(2 * math.pi) + log_sigma + (x0 - estimate) ** 2 * (-log_sigma).exp())
    else:
        last = -log_bin_probability(x0, estimate, (0.5 * log_sigma).exp(), levels)
    return torch.where(is_last, last, kl).flatten(1).sum(1)


def log_bin_probability(x: Tensor, mean: Tensor, deviation: Tensor, levels: int) -> Tensor:
    """log of the mass of N(mean, deviation^2) on the bin around x, all of one shape (DDPM, eq. 13).

    x is one of `levels` values evenly from -1 to 1; the outermost bins reach to infinity, so that masses sum to 1.
    Differences of logarithms keep it exact far out in the tails, where the masses themselves are 0.
    """
    half = 1 / (levels - 1)
    below, above = (x - half - mean) / deviation, (x + half - mean) / deviation
    flip = below + above > 0  # the right tail, seen in the mirror, where log_ndtr is exact
    low, high = torch.where(flip, -above, below), torch.where(flip, -below, above)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    # Very far out both logarithms round to one value, or past one another: the bin has next to nothing of that mass.
    share = -(log_low - log_high).clamp(max=-torch.finfo(x.dtype).eps).expm1()
    inside = log_high + share.log()
    left, right = torch.special.log_ndtr(above), torch.special.log_ndtr(-below)
    return torch.where(x < -1 + half, left, torch.where(x > 1 - half, right, inside))
