"""From a network to a denoiser: the one place that knows precision, time convention and prediction."""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from videodiff.batch import Condition
from videodiff.diffusion.prediction import Denoise, Estimate, Prediction, Variance, check_pair, split
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError
from videodiff.shapes import check_shape

Network = Callable[[Tensor, Tensor, Condition], Tensor]  # (x [B,C,T,H,W], time float32 [B] in 0..N-1, condition) -> x


class Denoiser:
    """A network with the meaning of its output.

    The network runs in `dtype`; everything outside of it is at least float32. With a `learned_range` variance it gives
    2C channels, the prediction and then the variance. Raises UserError for a `prediction` that there isn't or that
    cannot be turned into clean data at every step of `schedule`, and likewise for the others.
    """

    def __init__(
        self,
        network: Network,
        schedule: NoiseSchedule,
        prediction: Prediction,
        dtype: torch.dtype = torch.float32,
        variance: Variance = "fixed",
    ) -> None:
        for name, given, known in (("prediction", prediction, Prediction), ("variance", variance, Variance)):
            if given not in get_args(known):
                raise UserError(f"{name} {given!r} is none of {', '.join(get_args(known))}")
        if not dtype.is_floating_point:
            raise UserError(f"dtype {dtype} can't hold noise; use torch.float32, torch.bfloat16 or torch.float16")
        check_pair(prediction, schedule)
        self.network = network
        self.schedule = schedule
        self.prediction: Prediction = prediction
        self.dtype = dtype
        self.variance: Variance = variance

    def output(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """What the network predicts for x_t [B, C, T, H, W] at t [B] in (0, N], and its variance fraction, both as x_t.

        At least float32. The fraction is (v + 1) / 2 of the network's v, not held within [0, 1] here, so that training
        has a gradient everywhere; None with a fixed variance. Raises ValueError when t or the network's output has
        another shape, such as the number of channels that the other `variance` has.
        """
        check_shape("t", t, "[B]", x_t.shape[:1])
        # Networks count noise levels from 0, and none was trained below the first noisy step.
        time = (t - 1).to(x_t.device, torch.float32).clamp(min=0)
        output = self.network(x_t.to(self.dtype), time, condition.to(x_t.device, self.dtype))
        output = output.to(torch.promote_types(x_t.dtype, torch.float32))
        channels = x_t.shape[1] * (2 if self.variance == "learned_range" else 1)
        if output.shape[1] != channels:
            raise ValueError(
                f"the network gives {output.shape[1]} channels for x_t with {x_t.shape[1]}; variance {self.variance} "
                f"takes {channels}: set network.learn_variance to match"
            )
        check_shape("the network's output", output, "[B,C,T,H,W]", (len(x_t), channels, *x_t.shape[2:]))
        if self.variance == "fixed":
            return output, None
        predicted, v = output.chunk(2, dim=1)
        return predicted, (v + 1) / 2

    def estimate(self, x_t: Tensor, t: Tensor, condition: Condition) -> Estimate:
        """Clean data and noise in x_t [B, C, T, H, W] at t [B] in (0, N], int64 or float."""
        output, fraction = self.output(x_t, t, condition)
        estimate = split(self.prediction, output, x_t, self.schedule.alpha(t), self.schedule.sigma(t))
        return estimate if fraction is None else replace(estimate, variance_fraction=fraction.clamp(0, 1))

    def bind(self, condition: Condition) -> Denoise:
        """The denoiser of one condition, as samplers take it."""
        return lambda x_t, t: self.estimate(x_t, t, condition)
