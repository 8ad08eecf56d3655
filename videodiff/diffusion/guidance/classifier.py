"""Classifier guidance: the gradient of a classifier that reads noisy data, as a shift of the score."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from videodiff.config import Config
from videodiff.diffusion.prediction import Denoise, Estimate, add_noise
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.diffusion.times import sample_times
from videodiff.seeding import normals

LogProb: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (x_t [B, ...], t [B]) -> log p(y | x_t) [B]
Classifier: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (x_t [B, ...], time float32 [B]) -> logits [B, K]


class ClassifierGuidance(Config):
    """Dhariwal & Nichol 2105.05233: samples of p(x) p(y | x)^scale, by the gradient of log p(y | x_t) at each level.

    The wrapper sets `Estimate.shift`; each sampler uses it as its own algorithm says: DDPM moves the mean by
    Sigma shift (algorithm 1), the others take it into eps (algorithm 2).
    """

    scale: float = Field(1.0, ge=0)

    def __call__(self, denoise: Denoise, log_prob: LogProb) -> Denoise:
        """`denoise` with scale times the gradient of `log_prob` as its shift, beside one that it may have already.

        The gradient is computed also where sampling runs under no_grad or inference_mode. Raises ValueError when
        log_prob gives anything but [B]. Row i of it must depend on row i of x_t alone.
        """
        if self.scale == 0:
            return denoise

        def guided(x_t: Tensor, t: Tensor) -> Estimate:
            estimate = denoise(x_t, t)
            shift = self.scale * _gradient(log_prob, x_t, t)
            return replace(estimate, shift=shift if estimate.shift is None else estimate.shift + shift)

        return guided


def _gradient(log_prob: LogProb, x_t: Tensor, t: Tensor) -> Tensor:
    # A tensor made under inference_mode can't take part in autograd; its clone outside of it can.
    with torch.inference_mode(False), torch.enable_grad():
        x = x_t.detach().clone().requires_grad_()
        value = log_prob(x, t.clone())
        if value.shape != (len(x),):
            raise ValueError(f"log_prob gave {list(value.shape)} for {len(x)} samples: give one number per sample, [B]")
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return gradient


def class_log_prob(classifier: Classifier, labels: Tensor | Sequence[int]) -> LogProb:
    """log p(labels | x_t) of a classifier that gives logits [B, K]; labels: a class 0..K-1 for each sample.

    Raises ValueError when there is not one label per sample, or one is none of the classes.
    """
    labels = torch.as_tensor(labels)

    def log_prob(x_t: Tensor, t: Tensor) -> Tensor:
        logits = class_logits(classifier, x_t, t)
        _check_labels(labels, logits)
        return logits.log_softmax(1).gather(1, labels.to(logits.device)[:, None])[:, 0]

    return log_prob


def classifier_loss(
    classifier: Classifier, x0: Tensor, labels: Tensor, schedule: NoiseSchedule, seed: int, numbers: Tensor
) -> Tensor:
    """Cross-entropy [B] of a classifier on noised data x0 [B, ...] with labels int64 [B] (2105.05233, section 4).

    Time and noise of sample i follow from (seed, numbers[i]) alone, by the keys of a denoiser's training.
    Raises ValueError as `class_log_prob`.
    """
    t = sample_times(schedule, seed, numbers).to(x0.device)
    eps = normals(tuple(x0.shape[1:]), seed, "noise", numbers).to(x0.device)
    x_t = add_noise(x0, eps, t, schedule)
    logits = class_logits(classifier, x_t, t)
    _check_labels(labels, logits)
    return F.cross_entropy(logits, labels, reduction="none")


def class_logits(classifier: Classifier, x_t: Tensor, t: Tensor) -> Tensor:
    """Logits [B, K] of x_t [B, ...] at t [B] in [0, N], int64 or float: float32, or float64 where they are so."""
    # As Denoiser: networks count noise levels from 0.
    logits = classifier(x_t, (t - 1).to(x_t.device, torch.float32).clamp(min=0))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels have shape {list(labels.shape)} for {len(logits)} samples: give one per sample, [B]")
    classes = logits.shape[1]
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(f"labels {labels.tolist()[:8]} are not all within 0..{classes - 1}, the classifier's classes")
