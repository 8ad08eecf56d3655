"""The diffusion stages' loss on real clips at fixed noise: by eighths of the time, and as a bound of the likelihood.

Training tells the loss of random times and noise; here they are the same for every checkpoint, so that two of them
differ by what they learned alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from stages.evaluation.questions import Prompt
from stages.pipeline import Pipeline
from videodiff.diffusion.likelihood import variational_bound
from videodiff.diffusion.prediction import add_noise, target
from videodiff.seeding import generator

EIGHTHS = 8
BOUND_STEPS = 24  # of the chain whose bound is told: a model of its own, the same for every checkpoint


@torch.no_grad()
def time_losses(
    road: Pipeline, stage: Literal["image", "video"], batch: Sequence[Prompt], real: np.ndarray, fps: float, seed: int
) -> list[dict[str, float | None]]:
    """ "loss_1" ... "loss_8" of each prompt: mean square error of what the stage's network predicts at t = N k/8 of its
    real clip, uint8 [B,T,S,S,3] at `fps`, of which the image stage sees the first frame. Of the image stage also the
    "bound" on the negative log likelihood, in nats a latent dimension.
    """
    part, denoiser = road.model.diffusion(stage), road.denoiser(stage)
    texts = [prompt.text for prompt in batch]
    x0 = road.encode(real if stage == "video" else real[:, :1])
    condition = road.video_condition(texts, x0[:, :, :1], fps) if stage == "video" else road.image_condition(texts)
    told: list[dict[str, float | None]] = [{} for _ in batch]
    for place in range(1, EIGHTHS + 1):
        t = torch.full((len(batch),), round(part.schedule.num_steps * place / EIGHTHS), device=x0.device)
        draws = [generator(seed, "loss", stage, prompt.split, prompt.number, place) for prompt in batch]
        eps = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in draws]).to(x0)
        wanted = target(part.prediction, x0, eps, part.schedule.alpha(t), part.schedule.sigma(t))
        predicted, _ = denoiser.output(add_noise(x0, eps, t, part.schedule), t, condition)
        errors = (predicted - wanted).square().flatten(1).mean(1)
        for i, error in enumerate(errors.tolist()):
            told[i][f"loss_{place}"] = error
    if stage == "image":
        draws = [generator(seed, "bound", prompt.split, prompt.number) for prompt in batch]
        steps = min(BOUND_STEPS, part.schedule.num_steps)
        times = [int(t) for t in part.schedule.times(steps, "trailing") if t >= 1]
        bound = variational_bound(denoiser.bind(condition), x0, part.schedule, draws, times=times)
        for i, value in enumerate(bound.nats_per_latent_dimension().tolist()):
            told[i]["bound"] = value
    return told
