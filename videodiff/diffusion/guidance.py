"""Classifier-free guidance: a denoiser made from several answers of another one."""

import torch
from pydantic import Field
from torch import Tensor

from videodiff.batch import Condition
from videodiff.config import Config
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.prediction import Denoise, Estimate


class ClassifierFree(Config):
    """Emu Video (2311.10709), eq. 1, with image scale w_i and text scale w_p:

        X(0) + w_i (X(I) - X(0)) + w_p (X(I,p) - X(I))

    (1, 1) is the plain denoiser, (0, 0) the unconditional one, and w_i = w_p = w the usual X(0) + w (X(I,p) - X(0)).
    These are code scales: 1 + w of Ho & Salimans 2207.12598. Without known frames only `text` counts, without text
    only `image`. The weights of the answers sum to one, so x_t = alpha x0 + sigma eps holds for the mixture too.
    """

    text: float = Field(7.5, ge=0)
    image: float = Field(1.0, ge=0)

    def passes(self, condition: Condition) -> list[tuple[float, Condition]]:
        """(weight, condition) of each answer that counts; the others, and equal ones, cost nothing."""
        has_text, has_image = condition.has_text, condition.has_image
        if has_text and has_image:
            weighted = [
                (1 - self.image, condition.without("text", "image")),
                (self.image - self.text, condition.without("text")),
                (self.text, condition),
            ]
        elif has_text:
            weighted = [(1 - self.text, condition.without("text")), (self.text, condition)]
        elif has_image:
            weighted = [(1 - self.image, condition.without("image")), (self.image, condition)]
        else:
            weighted = [(1.0, condition)]
        return [(weight, c) for weight, c in weighted if weight != 0]

    def __call__(self, denoiser: Denoiser, condition: Condition) -> Denoise:
        """The guided denoiser; each call runs the network once, on 1 to 3 times B rows."""
        weights, conditions = zip(*self.passes(condition), strict=True)
        if len(conditions) == 1:  # its weight is 1, since the weights sum to one
            return denoiser.bind(conditions[0])
        denoise, n = denoiser.bind(Condition.stack(conditions)), len(conditions)

        def mix(stacked: Tensor) -> Tensor:
            answers = stacked.chunk(n)
            return torch.stack([w * x for w, x in zip(weights, answers, strict=True)]).sum(0)

        def guided(x_t: Tensor, t: Tensor) -> Estimate:
            estimate = denoise(torch.cat([x_t] * n), torch.cat([t] * n))
            return Estimate(mix(estimate.x0), mix(estimate.eps))

        return guided
