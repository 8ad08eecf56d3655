"""The noise schedule: a time t gives (alpha, sigma) with x_t = alpha x0 + sigma eps and alpha^2 + sigma^2 = 1.

Time here runs 0..N: t = 0 is clean data, t = N the noisiest state. Published tables begin with the first noisy step:
their index i is t = i + 1, and networks are fed t - 1.

Between the steps, for samplers that choose their own noise levels, log-SNR is linear in t. Where an end of such an
interval has none, the ratio that vanishes there is linear instead: sigma/alpha on (0, 1), since log-SNR is infinite at
t = 0; alpha/sigma on (N - 1, N), where zero terminal SNR makes it -infinity at t = N. So t and log-SNR map onto each
other one to one on the whole of [0, N], and alpha and sigma have no jump anywhere.
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
    snr_shift: every SNR is divided by it, alpha_bar / (s + (1 - s) alpha_bar), for larger pictures or longer clips,
    whose neighbouring positions show more of each other (Hoogeboom et al. 2301.11093; CogVideoX 2408.06072). It comes
    before zero_terminal_snr, as in CogVideoX: the last step is exactly 0, the first keeps its shifted value.
    """

    kind: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    num_steps: int = Field(1000, ge=2)
    beta_start: float = Field(8.5e-4, gt=0, lt=1)
    beta_end: float = Field(1.2e-2, gt=0, lt=1)
    zero_terminal_snr: bool = False
    snr_shift: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _noise_grows(self) -> "NoiseSchedule":
        if self.beta_start > self.beta_end:
            raise ValueError(
                f"beta_start {self.beta_start} is above beta_end {self.beta_end}: noise must grow with time; swap them"
            )
        fields = type(self).model_fields
        if self.kind == "cosine":  # a value that is the default may come from a saved description, which has all keys
            for key in ("beta_start", "beta_end"):
                if getattr(self, key) != fields[key].default:
                    raise ValueError(f"{key} {getattr(self, key)} does nothing with kind cosine; leave it out")
        table = self.alpha_bar
        if not bool((table.diff() < 0).all()) or (table[-1] == 0) != self.zero_terminal_snr:
            raise ValueError(
                f"betas {self.beta_start:g} to {self.beta_end:g} and snr_shift {self.snr_shift:g} over "
                f"{self.num_steps} steps take alpha_bar from {float(table[1]):.4g} to {float(table[-1]):.4g}, where "
                "float64 can't tell all steps apart; choose smaller betas, fewer steps, or an snr_shift nearer to 1"
            )
        return self

    @property
    def alpha_bar(self) -> Tensor:
        """float64 [N + 1] on the CPU, from 1 at t = 0 down to alpha_bar_N. Shared: do not write into it."""
        return _alpha_bar(self, "cpu")

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t = sqrt(alpha_bar_t), float64, shape and device of `t`: integers, or floats in [0, N] (see above).

        Whole floats give the table's entry exactly. Raises ValueError outside [0, N]; for integers on a GPU,
        a look at which would wait for it, that is an assertion on the GPU.
        """
        return self._squares(t)[0].sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t = sqrt(1 - alpha_bar_t), float64; `t` as in `alpha`."""
        return self._squares(t)[1].sqrt()

    def snr(self, t: Tensor) -> Tensor:
        """alpha_t^2 / sigma_t^2, float64; `t` as in `alpha`. Infinite at t = 0, exactly 0 at zero terminal SNR."""
        alpha_squared, sigma_squared = self._squares(t)
        return alpha_squared / sigma_squared

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha_t^2 / sigma_t^2), float64 (twice the lambda of DPM-Solver), shape and device of `t`.

        t: integers or floats in [0, N]; infinite at t = 0, -infinite at t = N with zero terminal SNR, and strictly
        decreasing between. Raises ValueError outside.
        """
        N, t = self.num_steps, t.to(torch.float64)
        self._check_within(t)
        table = _log_snr(self, str(t.device))
        i = t.floor().long().clamp(max=N - 1)
        above, below, fraction = table[i], table[i + 1], t - i
        value = above + fraction * (below - above)  # NaN next to an infinite entry, replaced below
        value = torch.where(i == 0, below - 2 * fraction.log(), value)
        if self.zero_terminal_snr:
            value = torch.where((i == N - 1) & (i > 0), above + 2 * (1 - fraction).log(), value)
        # `below - inf` and the like are no concern of whole times: these are in the table.
        return torch.where(fraction == 0, above, torch.where(fraction == 1, below, value))

    def time(self, log_snr: Tensor) -> Tensor:
        """The t in [0, N] of a log-SNR, float64: the inverse of `log_snr`, same shape and device.

        Raises ValueError for a log-SNR below that of the last step, which no time of the schedule has.
        """
        N, value = self.num_steps, log_snr.to(torch.float64)
        table = _log_snr(self, str(value.device))
        if not bool((value >= table[N]).all()):
            raise ValueError(
                f"log-SNR {float(value.min()):.6g} lies below {float(table[N]):.6g}, that of the schedule's last step; "
                "begin no noisier than the schedule ends, or use zero_terminal_snr"
            )
        i = (torch.searchsorted(-table, -value, right=True) - 1).clamp(max=N - 1)  # table[i] >= value > table[i + 1]
        above, below = table[i], table[i + 1]
        t = i + (above - value) / (above - below)
        t = torch.where(i == 0, ((below - value) / 2).exp(), t)
        if self.zero_terminal_snr:
            t = torch.where((i == N - 1) & (i > 0), N - ((value - above) / 2).exp(), t)
        return t

    def _squares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t^2, sigma_t^2)."""
        table = _alpha_bar(self, str(t.device))
        if not t.is_floating_point():
            try:  # unlike table[t], index_select knows no negative numbers
                entry = table.index_select(0, t.flatten()).view(t.shape)
            except IndexError:
                self._check_within(t)
                raise
            return entry, 1 - entry
        log_snr = self.log_snr(t)
        whole, entry = t == t.floor(), table[t.floor().long()]
        return torch.where(whole, entry, log_snr.sigmoid()), torch.where(whole, 1 - entry, (-log_snr).sigmoid())

    def _check_within(self, t: Tensor) -> None:
        if not bool(((t >= 0) & (t <= self.num_steps)).all()):
            given = t.flatten()[:4].tolist()
            raise ValueError(f"times {given} are not all within 0..{self.num_steps}, the steps of the schedule")

    def times(self, steps: int, spacing: Spacing = "trailing") -> list[int]:
        """`steps` times at which a sampler asks its denoiser, strictly decreasing, within 1..N, without the final 0.

        trailing: N, N - N/S, ...: begins at the noisiest state, the one choice that fits zero terminal SNR
        (Lin et al., table 2). leading: 1 + k floor(N/S), as in DDIM's code. linspace: evenly from N down to 1.
        Raises UserError when the schedule has fewer steps than asked for, and under zero terminal SNR for leading times
        that don't begin at N: only there is the state the pure noise that sampling starts from.
        """
        N, S = self.num_steps, steps
        if not 1 <= S <= N:
            raise UserError(f"sampler.steps is {S}, but the noise schedule has {N} steps: choose 1 to {N}")
        if spacing == "trailing":
            return [round(N - k * N / S) for k in range(S)]
        if spacing == "leading":
            times = [1 + k * (N // S) for k in reversed(range(S))]
            if self.zero_terminal_snr and times[0] < N:
                raise UserError(
                    f"sampler.spacing leading begins at {times[0]} of {N} steps, where a schedule with "
                    "zero_terminal_snr still holds data, and sampling starts from pure noise; set spacing: trailing"
                )
            return times
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
    alpha_bar = (1 - betas).cumprod(0)
    root = (alpha_bar / (schedule.snr_shift + (1 - schedule.snr_shift) * alpha_bar)).sqrt()
    if schedule.zero_terminal_snr:
        # Lin et al., algorithm 1: shift sqrt(alpha_bar) to 0 at the end, scale so that the first noisy step stays.
        first, last = root[0].clone(), root[-1].clone()
        root = (root - last) * (first / (first - last))
        root[0] = first  # exact where the product rounds
    return torch.cat([torch.ones(1, **like), root**2])


@lru_cache(maxsize=64)
def _log_snr(schedule: NoiseSchedule, device: str) -> Tensor:
    """float64 [N + 1], strictly decreasing from infinity."""
    if device != "cpu":
        return _log_snr(schedule, "cpu").to(device)
    alpha_bar = schedule.alpha_bar
    return alpha_bar.log() - (-alpha_bar).log1p()
