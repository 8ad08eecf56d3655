"""Data whose best denoiser is known in closed form: one Gaussian, and mixtures of Gaussians of one deviation."""

import torch
from torch import Tensor

from videodiff.diffusion.prediction import Denoise, Estimate, spread
from videodiff.diffusion.samplers import DDIM, DDPM, DPMSolver, Heun, Langevin, PredictorCorrector
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.seeding import generator

PLAIN, ZERO = NoiseSchedule(), NoiseSchedule(zero_terminal_snr=True)
M, S = 0.7, 0.3  # mean and deviation of the data

AnySampler = DDIM | DDPM | DPMSolver | Heun | Langevin | PredictorCorrector


def coefficients(schedule: NoiseSchedule, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma [B, 1, ...] beside x."""
    return spread(schedule.alpha(t), x), spread(schedule.sigma(t), x)


def oracle(schedule: NoiseSchedule, m: float | Tensor = M, s: float = S) -> Denoise:
    """E[x0 | x_t] for x0 ~ N(m, s^2): regression of x0 on x_t = alpha x0 + sigma eps."""

    def denoise(x_t: Tensor, t: Tensor) -> Estimate:
        alpha, sigma = coefficients(schedule, t, x_t)
        x0 = m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x_t - alpha * m)
        return Estimate(x0, (x_t - alpha * x0) / sigma)

    return denoise


def generators(n: int, first: int = 0) -> list[torch.Generator]:
    return [generator(0, "steps", i) for i in range(first, first + n)]


def affine(sampler: AnySampler, schedule: NoiseSchedule) -> tuple[float, float]:
    """Mean and deviation of what a sampler without randomness makes of N(0, 1): its map is affine for Gaussian data,
    so that two points tell it."""
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    at_0, at_1 = sampler(oracle(schedule), points, schedule).flatten().tolist()
    return at_0, at_1 - at_0


def at(schedule: NoiseSchedule, t: float) -> tuple[float, float]:
    """(alpha, sigma) at a time."""
    time = torch.tensor(float(t), dtype=torch.float64)
    return schedule.alpha(time).item(), schedule.sigma(time).item()


class Mixture:
    """Classes k of equal weight, x0 | k ~ N(means[k], s^2) in D dimensions: all densities at each noise level."""

    def __init__(self, schedule: NoiseSchedule, means: Tensor, s: float = S) -> None:
        self.schedule, self.means, self.s = schedule, means, s  # means [K, D]

    def log_joint(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p(x_t, k), [B, K]."""
        alpha, sigma = coefficients(self.schedule, t, x_t)
        variance = alpha**2 * self.s**2 + sigma**2
        squares = ((x_t[:, None] - alpha[..., None] * self.means) ** 2).sum(-1)
        normal = -squares / (2 * variance) - x_t.shape[1] / 2 * (2 * torch.pi * variance).log()
        return normal - torch.tensor(float(len(self.means))).log()

    def conditional(self, k: int) -> Denoise:
        """The best denoiser of class k."""
        return oracle(self.schedule, self.means[k], self.s)

    def unconditional(self, x_t: Tensor, t: Tensor) -> Estimate:
        """The best denoiser of all of it: those of the classes, weighted by p(k | x_t)."""
        alpha, sigma = coefficients(self.schedule, t, x_t)
        weights = self.log_joint(x_t, t).softmax(1)
        x0 = sum(weights[:, [k]] * self.conditional(k)(x_t, t).x0 for k in range(len(self.means)))
        return Estimate(x0, (x_t - alpha * x0) / sigma)  # type: ignore[arg-type,operator]
