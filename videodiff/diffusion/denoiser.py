"""From a network to a denoiser: the one place that knows precision, time convention and prediction."""

from collections.abc import Callable

import torch
from torch import Tensor

from videodiff.batch import Condition
from videodiff.diffusion.prediction import Denoise, Estimate, Prediction, check_pair, split
from videodiff.diffusion.schedule import NoiseSchedule

Network = Callable[[Tensor, Tensor, Condition], Tensor]  # (x [B,C,T,H,W], time float32 [B] in 0..N-1, condition) -> x


class Denoiser:
    """A network with the meaning of its output.

    The network runs in `dtype`; everything outside of it is at least float32. Raises UserError when `prediction`
    cannot be turned into clean data at every step of `schedule`.
    """

    def __init__(
        self,
        network: Network,
        schedule: NoiseSchedule,
        prediction: Prediction,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_pair(prediction, schedule)
        self.network = network
        self.schedule = schedule
        self.prediction: Prediction = prediction
        self.dtype = dtype

    def output(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The bare output of the network for x_t [B, C, T, H, W] at t [B] in (0, N]; at least float32."""
        # Networks count noise levels from 0, and none was trained below the first noisy step.
        time = (t - 1).to(x_t.device, torch.float32).clamp(min=0)
        output = self.network(x_t.to(self.dtype), time, condition.to(x_t.device, self.dtype))
        return output.to(torch.promote_types(x_t.dtype, torch.float32))

    def estimate(self, x_t: Tensor, t: Tensor, condition: Condition) -> Estimate:
        """Clean data and noise in x_t [B, C, T, H, W] at t [B] in (0, N], int64 or float."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return split(self.prediction, self.output(x_t, t, condition), x_t, alpha, sigma)

    def bind(self, condition: Condition) -> Denoise:
        """The denoiser of one condition, as samplers take it."""
        return lambda x_t, t: self.estimate(x_t, t, condition)
