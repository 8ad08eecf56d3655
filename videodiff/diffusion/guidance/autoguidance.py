"""Autoguidance: away from what a weaker model says."""

from dataclasses import replace

from pydantic import Field
from torch import Tensor

from videodiff.config import Config
from videodiff.diffusion.prediction import Denoise, Estimate


class Autoguidance(Config):
    """Karras et al. 2406.02507, eq. 1 and section 4: D0 + w (D1 - D0) for a model D1 and a weaker version D0 of it.

    Both get the same condition, so what is amplified is what the weaker one can't do. w = 1 is D1 alone, w = 0 D0.
    """

    scale: float = Field(2.0, ge=0)

    def __call__(self, strong: Denoise, weak: Denoise) -> Denoise:
        """The guided denoiser. Learned variance and score shift are the strong one's. At scale 1 `weak` isn't asked."""
        if self.scale == 1:
            return strong

        def guided(x_t: Tensor, t: Tensor) -> Estimate:
            one, other = strong(x_t, t), weak(x_t, t)
            w = self.scale
            return replace(one, x0=w * one.x0 + (1 - w) * other.x0, eps=w * one.eps + (1 - w) * other.eps)

        return guided
