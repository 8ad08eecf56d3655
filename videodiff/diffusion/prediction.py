"""What the output of a network means: a linear mix of clean data x0 and noise eps.

With x_t = alpha x0 + sigma eps and output = a x0 + b eps, two equations give two unknowns: every conversion is one
2x2 inverse. Coefficients are float64 [B]; states are at least float32, [B, ...].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError
from videodiff.shapes import check_shape

Prediction = Literal["eps", "x0", "v"]
# fixed: the caller's choice of beta or beta_tilde. learned_range: the network says where between them, with as many
# output channels again (improved DDPM, eq. 15).
Variance = Literal["fixed", "learned_range"]

# (a, b) of output = a x0 + b eps. v is Salimans & Ho 2202.00512, appendix D.
_MIX: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "eps": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "x0": lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha)),
    "v": lambda alpha, sigma: (-sigma, alpha),
}


@dataclass(frozen=True)
class Estimate:
    """A denoiser's answer for x_t: the clean data and the noise, both [B, ...], with x_t = alpha x0 + sigma eps.

    variance_fraction: v in [0, 1], [B, ...], where the network learned it (improved DDPM, eq. 15): the variance of x_s
    given x_t is exp(v log beta + (1 - v) log beta_tilde), with the beta and beta_tilde of whichever step t -> s is
    taken. 1 is the upper bound beta, 0 the lower one.
    shift: gradient [B, ...] of a log probability in x_t, to be added to the score (classifier guidance).
    """

    x0: Tensor
    eps: Tensor
    variance_fraction: Tensor | None = None
    shift: Tensor | None = None


Denoise = Callable[[Tensor, Tensor], Estimate]  # (x_t [B, ...], t [B] in (0, N], int64 or float) -> Estimate


def check_pair(prediction: Prediction, schedule: NoiseSchedule) -> None:
    """Refuse (UserError) a prediction from which the clean data cannot be recovered at every step of the schedule."""
    if prediction == "eps" and schedule.zero_terminal_snr:
        raise UserError(
            "prediction eps with schedule.zero_terminal_snr: the last step is pure noise, and its eps says nothing "
            "about the clean data (x0 = (x_t - sigma eps) / 0); set prediction: v (or x0), or zero_terminal_snr: false"
        )


def add_noise(x0: Tensor, eps: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps (DDPM, eq. 4): x0, eps [B, ...], t int64 [B] in 0..N; at least float32.

    Raises ValueError for other shapes, which would be stretched to fit.
    """
    check_shape("eps", eps, "[B,...] as x0", x0.shape)
    check_shape("t", t, "[B]", x0.shape[:1])
    return spread(schedule.alpha(t), x0) * x0 + spread(schedule.sigma(t), x0) * eps


def target(prediction: Prediction, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network shall output for clean data x0 and noise eps [B, ...] at alpha, sigma [B]."""
    a, b = _MIX[prediction](alpha, sigma)
    return spread(a, x0) * x0 + spread(b, x0) * eps


def split(prediction: Prediction, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Estimate:
    """Solve  alpha x0 + sigma eps = x_t,  a x0 + b eps = output.  output, x_t [B, ...]; alpha, sigma [B].

    Singular, and so infinite or NaN, only for eps at alpha = 0 (see `check_pair`) and for x0 at sigma = 0, where there
    is nothing to denoise.
    """
    a, b = _MIX[prediction](alpha, sigma)
    det = alpha * b - sigma * a
    x0 = spread(b / det, x_t) * x_t - spread(sigma / det, x_t) * output
    eps = spread(alpha / det, x_t) * output - spread(a / det, x_t) * x_t
    return Estimate(x0, eps)


def spread(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient per sample [B] as [B, 1, ...] beside `x` [B, ...], in the dtype of `x` but at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return coefficient.to(x.device, dtype).view(-1, *[1] * (x.dim() - 1))
