"""Which times are trained: evenly, leaning to the noisy ones, or in proportion to how large their losses are."""

import math

import torch
from pydantic import Field
from torch import Tensor

from videodiff.config import Config
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.seeding import uniforms


def sample_times(schedule: NoiseSchedule, seed: int, numbers: Tensor, shift: float = 1.0) -> Tensor:
    """Training times, int64 [B] in 1..N on the CPU: entry i depends on (seed, numbers[i]) alone.

    u uniform in [0, 1) becomes shift u / (1 + (shift - 1) u) (Esser et al. 2403.03206, eq. 23): 1 leaves times
    uniform, s > 1 makes the noisiest of them s times as frequent. What frames of a clip share, such as a motion, shows
    through far more noise than what a single picture shows, so that it is decided at the noisiest times.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"shift {shift} orders no times; it is above 0, and 1 for even ones")
    u = uniforms(seed, "time", numbers)
    return (shift * u / (1 + (shift - 1) * u) * schedule.num_steps).long().clamp(max=schedule.num_steps - 1) + 1


class LossSecondMoment(Config):
    """Importance sampling (improved DDPM, eq. 18): p_t proportional to sqrt(E[L_t^2]), each loss weighted 1 / (N p_t).

    E is the mean over the last `history` losses at t; until every t has as many, times are uniform. A share
    `uniform_prob` of all draws stays uniform.
    """

    history: int = Field(10, ge=1)
    uniform_prob: float = Field(0.001, gt=0, le=1)


class LossHistory:
    """The last losses at each time. Equal on all ranks, and not a function of progress: a run has to store it."""

    def __init__(self, config: LossSecondMoment, num_steps: int) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps {num_steps}: there are no times to remember losses of; give the schedule's")
        self.config = config
        self.losses = torch.zeros(num_steps, config.history, dtype=torch.float64)  # oldest first
        self.counts = torch.zeros(num_steps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """p_t of t = 1..N, float64 [N]."""
        N = len(self.counts)
        uniform = torch.full((N,), 1 / N, dtype=torch.float64)
        moments = self.losses.square().mean(1).sqrt()
        if bool((self.counts < self.config.history).any()) or not moments.sum() > 0:
            return uniform
        return (1 - self.config.uniform_prob) * moments / moments.sum() + self.config.uniform_prob * uniform

    def draw(self, seed: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(t int64 [B] in 1..N, weight float64 [B] of its loss): entry i depends on seed, numbers[i] and the history.

        The mean of weight * L_t is that of uniform times, whatever the history.
        """
        p = self.probabilities()
        # A time of probability 0 can't be hit: side right steps over the empty intervals.
        index = torch.searchsorted(p.cumsum(0), uniforms(seed, "time", numbers), right=True).clamp(max=len(p) - 1)
        return index + 1, 1 / (len(p) * p[index])

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take in unweighted losses [B] at t [B] in 1..N, in this order; those that are not finite are left out."""
        for step, loss in zip((t.long() - 1).tolist(), losses.double().tolist(), strict=True):
            if loss - loss != 0:  # NaN or infinite
                continue
            row, count = self.losses[step], int(self.counts[step])
            if count == len(row):
                row[:-1] = row[1:].clone()
                row[-1] = loss
            else:
                row[count] = loss
                self.counts[step] += 1

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"loss_history": self.losses.clone(), "loss_counts": self.counts.clone()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`; ValueError when it is that of another schedule or history."""
        losses, counts = state["loss_history"], state["loss_counts"]
        if losses.shape != self.losses.shape or counts.shape != self.counts.shape:
            raise ValueError(f"loss history of shape {list(losses.shape)}, this run keeps {list(self.losses.shape)}")
        self.losses, self.counts = losses.clone(), counts.clone()
