"""Vector quantisation: each position of a latent becomes the nearest of a table of learned codes.

Shapes: N pictures, C latent channels, h w latent size, K codes.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from videodiff.config import Config

# Distances held at once: 2^24 are 64 MB in float32. Pictures by the dozen against 16,384 codes would take gigabytes.
DISTANCES = 2**24


class QuantizerConfig(Config):
    """codebook_size: K. commitment: beta of van den Oord et al. 2017, eq. 3: how strongly latents are held to codes."""

    codebook_size: int = Field(ge=2)
    commitment: float = Field(0.25, ge=0)


class Quantizer(nn.Module):
    """A codebook [K,C] (van den Oord et al. 2017, "Neural discrete representation learning")."""

    def __init__(self, config: QuantizerConfig, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels {channels}: a code has at least one; give latent_channels")
        self.config = config
        # Wide apart. The paper's uniform numbers within 1 / K of 0 lie in one heap, of which few are ever nearest: a
        # perplexity of 2.7 among 64 codes after 60 steps on the built-in world, against 12.6, and a larger error.
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, channels))

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """[N,C,h,w] -> the nearest codes [N,C,h,w] and their numbers [N,h,w]. Only the codes get gradients."""
        indices = self.nearest(latent)
        return F.embedding(indices, self.codebook).permute(0, 3, 1, 2), indices

    @torch.no_grad()
    def nearest(self, latent: Tensor) -> Tensor:
        """[N,C,h,w] -> int64 [N,h,w]: the code at the least Euclidean distance, the first of equals."""
        # In float32 whatever the network computes in: bf16 would not tell neighbouring codes apart.
        rows, codes = latent.permute(0, 2, 3, 1).flatten(0, 2).float(), self.codebook.float()
        lengths = codes.square().sum(1)
        # |z - e|^2 = |z|^2 + |e|^2 - 2 z.e, and |z|^2 is the same for all codes.
        pieces = [torch.addmm(lengths, piece, codes.T, alpha=-2).argmin(1) for piece in rows.split(self._rows())]
        return torch.cat(pieces).view(len(latent), *latent.shape[2:])

    def loss(self, latent: Tensor, code: Tensor) -> Tensor:
        """[N,C,h,w] twice -> float32 [N]: codes go to their latents, and `commitment` times latents to their codes."""
        latent, code = latent.float(), code.float()
        towards_latents = (latent.detach() - code).square().mean(dim=(1, 2, 3))
        towards_codes = (latent - code.detach()).square().mean(dim=(1, 2, 3))
        return towards_latents + self.config.commitment * towards_codes

    def _rows(self) -> int:
        return max(1, DISTANCES // self.config.codebook_size)


def straight_through(latent: Tensor, code: Tensor) -> Tensor:
    """`code` to the last bit, with the gradient of `latent`: what the decoder sees of a quantised latent."""
    return code.detach() + (latent - latent.detach())


def codebook_use(counts: Tensor) -> tuple[Tensor, Tensor]:
    """How often each code was chosen [K] -> perplexity (1 to K: as many codes, used evenly), share of codes used."""
    share = counts.double() / counts.sum().clamp(min=1)
    return torch.special.entr(share).sum().exp(), (counts > 0).double().mean()
