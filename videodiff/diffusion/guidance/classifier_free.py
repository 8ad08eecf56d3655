"""Classifier-free guidance: a denoiser made from several answers of another one."""

import torch
from pydantic import Field, model_validator
from torch import Tensor

from videodiff.batch import Condition
from videodiff.config import Config
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.prediction import Denoise, Estimate, split, spread, target


class ClassifierFree(Config):
    """Emu Video (2311.10709), eq. 1, with image scale w_i and text scale w_p:

        X(0) + w_i (X(I) - X(0)) + w_p (X(I,p) - X(I))

    (1, 1) is the plain denoiser, (0, 0) the unconditional one, and w_i = w_p = w the usual X(0) + w (X(I,p) - X(0)).
    These are code scales: 1 + w of Ho & Salimans 2207.12598. Without known frames only `text` counts, without text
    only `image`. The weights of the answers sum to one, so x_t = alpha x0 + sigma eps holds for the mixture too.

    rescale: phi of Lin et al. 2305.08891, eq. 15-16: the share by which the network's output (eps, x0 or v) is brought
    back to the standard deviation, over all of a sample, that it has with the full condition. 0.7 is the paper's.
    interval: [low, high] in sigma / alpha: the text is guided only at noise levels with low < sigma / alpha <= high
    (Kynkaanniemi et al. 2404.07724); high null: no upper end. Elsewhere w_p = w_i, or 1 without known frames: a scale
    of 1 costs one pass there, another two.
    """

    text: float = Field(7.5, ge=0)
    image: float = Field(1.0, ge=0)
    rescale: float = Field(0.0, ge=0, le=1)
    interval: tuple[float, float | None] | None = None

    @model_validator(mode="after")
    def _interval_rises(self) -> "ClassifierFree":
        if self.interval is not None:
            low, high = self.interval
            if low < 0 or (high is not None and high <= low):
                raise ValueError(
                    f"interval {[low, high]} holds no noise level: give [low, high] in sigma / alpha, 0 <= low < high"
                )
        return self

    def passes(self, condition: Condition) -> list[tuple[float, Condition]]:
        """(weight, condition) of each answer that counts, the full condition last; the others cost nothing."""
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
        # Rescaling measures the full condition's answer, whatever its weight.
        return [(weight, c) for weight, c in weighted if weight != 0 or (c is condition and self.rescale > 0)]

    def __call__(self, denoiser: Denoiser, condition: Condition) -> Denoise:
        """The guided denoiser; each call runs the network once, on 1 to 3 times B rows.

        A learned variance is that of the last pass, which is told most.
        """
        guided = self._everywhere(denoiser, condition)
        if self.interval is None:
            return guided
        outside = self.model_copy(update={"text": self.image if condition.has_image else 1.0})
        plain, (low, high) = outside._everywhere(denoiser, condition), self.interval

        def within(x_t: Tensor, t: Tensor) -> Estimate:
            noise = denoiser.schedule.snr(t) ** -0.5  # infinite at zero terminal SNR
            inside = (noise > low) & (noise <= (torch.inf if high is None else high))
            if bool(inside.all()):
                return guided(x_t, t)
            if not bool(inside.any()):
                return plain(x_t, t)
            return _choose(inside, guided(x_t, t), plain(x_t, t))

        return within

    def _everywhere(self, denoiser: Denoiser, condition: Condition) -> Denoise:
        weights, conditions = zip(*self.passes(condition), strict=True)
        if len(conditions) == 1:  # its weight is 1, since the weights sum to one
            return denoiser.bind(conditions[0])
        denoise, n = denoiser.bind(Condition.stack(conditions)), len(conditions)

        def mix(stacked: Tensor) -> Tensor:
            answers = stacked.chunk(n)
            return torch.stack([w * x for w, x in zip(weights, answers, strict=True)]).sum(0)

        def guided(x_t: Tensor, t: Tensor) -> Estimate:
            answers = denoise(torch.cat([x_t] * n), torch.cat([t] * n))
            fraction = None if answers.variance_fraction is None else answers.variance_fraction.chunk(n)[-1]
            mixed = Estimate(mix(answers.x0), mix(answers.eps), fraction)
            if self.rescale == 0:
                return mixed
            full = Estimate(answers.x0.chunk(n)[-1], answers.eps.chunk(n)[-1])
            return self._rescaled(mixed, full, x_t, t, denoiser)

        return guided

    def _rescaled(self, mixed: Estimate, full: Estimate, x_t: Tensor, t: Tensor, denoiser: Denoiser) -> Estimate:
        """Lin et al., eq. 15-16."""
        alpha, sigma, prediction = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t), denoiser.prediction
        output, wanted = (target(prediction, e.x0, e.eps, alpha, sigma) for e in (mixed, full))
        has, wants = (o.flatten(1).std(dim=1, correction=0) for o in (output, wanted))
        # Outputs that are equal everywhere, as at zero terminal SNR the mean of simple data, have nothing to scale.
        factor = torch.where(has > 0, wants / has, 1.0)
        output = spread(1 - self.rescale + self.rescale * factor, x_t) * output
        scaled = split(prediction, output, x_t, alpha, sigma)
        return Estimate(scaled.x0, scaled.eps, mixed.variance_fraction)


def _choose(first: Tensor, one: Estimate, other: Estimate) -> Estimate:
    """Rows of `one` where `first` [B] holds, of `other` elsewhere."""

    def rows(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(first.to(a.device).view(-1, *[1] * (a.dim() - 1)), a, b)

    fraction = None
    if one.variance_fraction is not None and other.variance_fraction is not None:
        fraction = rows(one.variance_fraction, other.variance_fraction)
    return Estimate(rows(one.x0, other.x0), rows(one.eps, other.eps), fraction)
