"""The training loss of a denoiser, one number per sample, and the noise it is trained with."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from videodiff.batch import Condition
from videodiff.config import Config
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.prediction import Prediction, add_noise, split, target
from videodiff.diffusion.reverse import bound_term, log_variance
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.diffusion.times import LossHistory, LossSecondMoment, sample_times
from videodiff.seeding import normals


class DiffusionLoss(Config):
    """Mean squared error of what the network predicts, weighted by noise level; or the variational bound.

    simple: weight 1 (DDPM, eq. 14). min_snr: the error of x0 weighted with min(SNR, gamma) (Hang et al. 2303.09556,
    eq. 8), written for the predicted quantity. vlb: N L_t in bits per dimension, whose mean over uniform times is the
    bound without its prior (improved DDPM, eq. 4); a fixed variance is beta_tilde. Bits are this loss's
    unit for latents too, only a factor there; what is reported of them is `Bound`'s, in nats.
    A network that learns its variance is trained with `variance_weight` times the same N L_t besides simple or
    min_snr, in which the mean is held fixed: the hybrid loss (improved DDPM, eq. 16; in bits, as in its code).
    levels: grey levels of data in pixels, for the last term of the bound; None for latents.
    time_shift: how much more often noisy times are trained than clean ones, see `sample_times`.
    importance: draw times by the second moment of their losses instead.
    offset_noise: deviation of one further draw for each channel of a clip, added to the noise at all its positions
    (Guttenberg 2023), so that the network learns to choose a channel's mean; zero terminal SNR teaches that without it.
    """

    weighting: Literal["simple", "min_snr", "vlb"] = "simple"
    gamma: float = Field(5.0, gt=0)
    variance_weight: float = Field(1e-3, gt=0)
    levels: int | None = Field(None, ge=2)
    time_shift: float = Field(1.0, gt=0)
    importance: LossSecondMoment | None = None
    offset_noise: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _fits_together(self) -> "DiffusionLoss":
        if self.importance is not None and self.time_shift != 1:
            raise ValueError(
                f"time_shift {self.time_shift} and importance both say which times are trained; take time_shift out, "
                "or set importance: null"
            )
        if self.weighting != "min_snr" and self.gamma != type(self).model_fields["gamma"].default:
            raise ValueError(f"gamma {self.gamma:g} is of weighting min_snr alone; leave it out, or choose that")
        return self

    def weight(self, snr: Tensor, prediction: Prediction) -> Tensor:
        """Weight [B] of the error of `prediction` at signal-to-noise ratio `snr` [B]; 1 under vlb, which has its own.

        At SNR = 0 (the last step with zero terminal SNR) min-SNR would give 0 for x0 and v, and the step at which
        sampling starts would never be trained: it gets weight 1.
        """
        if self.weighting != "min_snr":
            return torch.ones_like(snr)
        per_x0 = {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[prediction]  # error of x0 -> of the prediction
        return torch.where(snr == 0, torch.ones_like(snr), snr.clamp(max=self.gamma) / per_x0)

    def __call__(self, denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Loss per sample [B]: clean latents x0 and noise eps [B, C, T, H, W], t int64 [B] in 1..N."""
        schedule, prediction = denoiser.schedule, denoiser.prediction
        x_t = add_noise(x0, eps, t, schedule)
        output, fraction = denoiser.output(x_t, t, condition)
        if self.weighting == "vlb":
            return self._bound(denoiser, x0, x_t, t, output, fraction)
        error = (output - target(prediction, x0, eps, schedule.alpha(t), schedule.sigma(t))) ** 2
        loss = self.weight(schedule.snr(t), prediction).to(error) * error.flatten(1).mean(1)
        if fraction is None:
            return loss
        return loss + self.variance_weight * self._bound(denoiser, x0, x_t, t, output.detach(), fraction)

    def draw_times(
        self, schedule: NoiseSchedule, seed: int, numbers: Tensor, history: LossHistory | None = None
    ) -> tuple[Tensor, Tensor]:
        """(t int64 [B] in 1..N, weight float64 [B] of each loss) on the CPU, by (seed, numbers[i]) and the history."""
        if history is not None:
            return history.draw(seed, numbers)
        return sample_times(schedule, seed, numbers, self.time_shift), torch.ones(len(numbers), dtype=torch.float64)

    def draw_noise(self, shape_one: Sequence[int], seed: int, numbers: Tensor) -> Tensor:
        """eps float32 [B, C, ...] on the CPU for samples of `shape_one` (C, ...): row i by (seed, numbers[i]) alone."""
        eps = normals(shape_one, seed, "noise", numbers)
        if self.offset_noise == 0:
            return eps
        shared = (shape_one[0], *[1] * (len(shape_one) - 1))
        return eps + self.offset_noise * normals(shared, seed, "noise-offset", numbers)

    def _bound(
        self, denoiser: Denoiser, x0: Tensor, x_t: Tensor, t: Tensor, output: Tensor, fraction: Tensor | None
    ) -> Tensor:
        """N L_t [B] in bits per dimension."""
        schedule = denoiser.schedule
        estimate = split(denoiser.prediction, output, x_t, schedule.alpha(t), schedule.sigma(t)).x0
        log_sigma = log_variance(torch.zeros_like(estimate) if fraction is None else fraction, schedule, t, t - 1)
        nats = bound_term(x0.to(estimate), estimate, log_sigma, schedule, t, t - 1, self.levels)
        return nats * (schedule.num_steps / (x0[0].numel() * math.log(2)))
