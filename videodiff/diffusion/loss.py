"""The training loss of a denoiser, one number per sample."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from videodiff.batch import Condition
from videodiff.config import Config
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.prediction import Prediction, add_noise, target
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.seeding import uniforms


class DiffusionLoss(Config):
    """Mean squared error of what the network predicts, weighted by noise level.

    simple: weight 1 (DDPM, eq. 14). min_snr: the error of x0 weighted with min(SNR, gamma) (Hang et al. 2303.09556,
    eq. 8), written for the predicted quantity. gamma is read by min_snr only.
    time_shift: how much more often noisy times are trained than clean ones, see `sample_times`.
    """

    weighting: Literal["simple", "min_snr"] = "simple"
    gamma: float = Field(5.0, gt=0)
    time_shift: float = Field(1.0, gt=0)

    def weight(self, snr: Tensor, prediction: Prediction) -> Tensor:
        """Weight [B] of the error of `prediction` at signal-to-noise ratio `snr` [B].

        At SNR = 0 (the last step with zero terminal SNR) min-SNR would give 0 for x0 and v, and the step at which
        sampling starts would never be trained: it gets weight 1.
        """
        if self.weighting == "simple":
            return torch.ones_like(snr)
        per_x0 = {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[prediction]  # error of x0 -> of the prediction
        return torch.where(snr == 0, torch.ones_like(snr), snr.clamp(max=self.gamma) / per_x0)

    def __call__(self, denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Loss per sample [B]: clean latents x0 and noise eps [B, C, T, H, W], t int64 [B] in 1..N."""
        schedule, prediction = denoiser.schedule, denoiser.prediction
        output = denoiser.output(add_noise(x0, eps, t, schedule), t, condition)
        error = (output - target(prediction, x0, eps, schedule.alpha(t), schedule.sigma(t))) ** 2
        return self.weight(schedule.snr(t), prediction).to(error) * error.flatten(1).mean(1)


def sample_times(schedule: NoiseSchedule, seed: int, numbers: Tensor, shift: float = 1.0) -> Tensor:
    """Training times, int64 [B] in 1..N on the CPU: entry i depends on (seed, numbers[i]) alone.

    u uniform in [0, 1) becomes shift u / (1 + (shift - 1) u) (Esser et al. 2403.03206, eq. 23): 1 leaves times
    uniform, s > 1 makes the noisiest of them s times as frequent. What frames of a clip share, such as a motion, shows
    through far more noise than what a single picture shows, so that it is decided at the noisiest times.
    """
    u = uniforms(seed, "time", numbers)
    return (shift * u / (1 + (shift - 1) * u) * schedule.num_steps).long().clamp(max=schedule.num_steps - 1) + 1
