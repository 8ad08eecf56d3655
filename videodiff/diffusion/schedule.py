"""The noise schedule: a time t gives (alpha, sigma) with x_t = alpha x0 + sigma eps and alpha^2 + sigma^2 = 1.

Time here runs 0..N: t = 0 is clean data, t = N the noisiest state. Published tables begin with the first noisy step:
their index i is t = i + 1, and networks are fed t - 1.
"""

import math
from functools import lru_cache
from typing import Literal, TypedDict

import torch
from pydantic import Field, model_validator
from torch import Tensor

from videodiff.config import Config
from videodiff.errors import UserError

Spacing = Literal["trailing", "leading", "linspace"]


class NoiseSchedule(Config):
    """Betas of N steps, kept as a float64 table of alpha_bar_t = prod_{s<=t} (1 - beta_s).

    linear: DDPM (Ho et al. 2020, section 4). scaled_linear: sqrt(beta) is linear (Stable Diffusion; Emu's "quad").
    cosine: improved DDPM (Nichol & Dhariwal 2021, eq. 17), betas clipped at 0.999; it has no beta_start and beta_end.
    zero_terminal_snr: rescaled so that alpha_bar_N is exactly 0 (Lin et al. 2305.08891, algorithm 1). Without it the
    default leaks sqrt(alpha_bar_N) = 0.068 of the data into what sampling takes for pure noise.
    """

    kind: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    num_steps: int = Field(1000, ge=2)
    beta_start: float = Field(8.5e-4, gt=0, lt=1)
    beta_end: float = Field(1.2e-2, gt=0, lt=1)
    zero_terminal_snr: bool = False

    @model_validator(mode="after")
    def _betas_rise(self) -> "NoiseSchedule":
        if self.beta_start > self.beta_end:
            raise ValueError(
                f"beta_start {self.beta_start} is above beta_end {self.beta_end}: noise must grow with time; swap them"
            )
        return self

    @property
    def alpha_bar(self) -> Tensor:
        """float64 [N + 1] on the CPU, from 1 at t = 0 down to alpha_bar_N. Shared: do not write into it."""
        return _alpha_bar(self, "cpu")

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t = sqrt(alpha_bar_t), float64, shape and device of the integer tensor `t`."""
        return _alpha_bar(self, str(t.device))[t].sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t = sqrt(1 - alpha_bar_t), float64, shape and device of the integer tensor `t`."""
        return (1 - _alpha_bar(self, str(t.device))[t]).sqrt()

    def snr(self, t: Tensor) -> Tensor:
        """alpha_t^2 / sigma_t^2, float64: infinite at t = 0, exactly 0 at t = N with zero terminal SNR."""
        alpha_bar = _alpha_bar(self, str(t.device))[t]
        return alpha_bar / (1 - alpha_bar)

    def times(self, steps: int, spacing: Spacing = "trailing") -> list[int]:
        """`steps` times at which a sampler asks its denoiser, strictly decreasing, within 1..N, without the final 0.

        trailing: N, N - N/S, ...: begins at the noisiest state, the one choice that fits zero terminal SNR
        (Lin et al., table 2). leading: 1 + k floor(N/S), as in DDIM's code. linspace: evenly from N down to 1.
        Raises UserError when the schedule has fewer steps than asked for.
        """
        N, S = self.num_steps, steps
        if not 1 <= S <= N:
            raise UserError(f"sampler.steps is {S}, but the noise schedule has {N} steps: choose 1 to {N}")
        if spacing == "trailing":
            return [round(N - k * N / S) for k in range(S)]
        if spacing == "leading":
            return [1 + k * (N // S) for k in reversed(range(S))]
        if spacing == "linspace":
            return [1 + round((N - 1) * k / (S - 1)) for k in reversed(range(S))] if S > 1 else [N]
        raise UserError(f"spacing is {spacing!r}: choose trailing, leading or linspace")


class _Like(TypedDict):
    dtype: torch.dtype
    device: str


@lru_cache(maxsize=64)
def _alpha_bar(schedule: NoiseSchedule, device: str) -> Tensor:
    if device != "cpu":
        return schedule.alpha_bar.to(device)
    # Said outright, or a caller's `with torch.device(...)` would decide where a table lies that all share.
    like: _Like = {"dtype": torch.float64, "device": "cpu"}
    N = schedule.num_steps
    if schedule.kind == "linear":
        betas = torch.linspace(schedule.beta_start, schedule.beta_end, N, **like)
    elif schedule.kind == "scaled_linear":
        betas = torch.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, N, **like) ** 2
    else:
        f = torch.cos((torch.arange(N + 1, **like) / N + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    root = (1 - betas).cumprod(0).sqrt()
    if schedule.zero_terminal_snr:
        # Lin et al., algorithm 1: shift sqrt(alpha_bar) to 0 at the end, scale so that the first noisy step stays.
        first, last = root[0].clone(), root[-1].clone()
        root = (root - last) * (first / (first - last))
        root[0] = first  # exact where the product rounds
    return torch.cat([torch.ones(1, **like), root**2])
