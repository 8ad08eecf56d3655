"""Patch discriminator, its hinge losses, and the weight that balances it against the reconstruction.

Shapes: N pictures [N,3,H,W] in [-1,1], P x Q patches.
"""

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from videodiff.config import Config
from videodiff.networks.layers import group_norm

# Bounds of Esser et al. 2021, section 3.3 and their code: where the decoder is as good as certain of its pictures the
# quotient of the gradients would grow without end.
TINY_GRADIENT, LARGEST_WEIGHT = 1e-4, 1e4


class DiscriminatorConfig(Config):
    """The defaults are those of latent diffusion's autoencoders (Rombach et al. 2022).

    width: channels of the first layer. num_layers: how often the size is halved.
    start: steps before it joins; until then it neither learns nor is heard.
    weight: how strongly it pulls at the decoder's last layer, as a share of what the reconstruction does.
    learning_rate: in place of the engine's, whose other settings it shares.
    """

    width: PositiveInt = 64
    num_layers: int = Field(3, ge=1, le=8)
    start: int = Field(50_001, ge=0)
    weight: float = Field(0.5, gt=0)
    learning_rate: float | None = Field(None, gt=0)

    def patches(self, size: int) -> int:
        """P of pictures of this size; below 1 there are none."""
        for _ in range(self.num_layers):
            size //= 2
        return size - 2


class PatchDiscriminator(nn.Module):
    """[N,3,H,W] -> [N,1,P,Q]: how real each overlapping patch looks (Isola et al. 2017, section 3.2.2).

    Group norms in place of pix2pix's batch norms: what it says of a picture then depends on no other, so that the loss
    is the same however the batch is cut over ranks and micro-batches, and a bad clip spoils none of its neighbours.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        channels = config.width
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, config.num_layers + 1):
            wider, stride = config.width * min(2**layer, 8), 2 if layer < config.num_layers else 1
            layers += [nn.Conv2d(channels, wider, 4, stride=stride, padding=1, bias=False), group_norm(wider)]
            layers += [nn.LeakyReLU(0.2)]
            channels = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures)


def discriminator_loss(real: Tensor, made: Tensor) -> Tensor:
    """Hinge: logits [N,1,P,Q] of real and of made pictures -> float32 [N] (Lim and Ye 2017, eq. 4)."""
    return 0.5 * (F.relu(1 - real.float()) + F.relu(1 + made.float())).mean(dim=(1, 2, 3))


def generator_loss(made: Tensor) -> Tensor:
    """Logits [N,1,P,Q] of made pictures -> float32 [N]: low where they pass for real."""
    return -made.float().mean(dim=(1, 2, 3))


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """Quotient of the lengths of two losses' gradients at the decoder's last layer (any shape) -> [].

    With it the discriminator pulls as strongly as the reconstruction, whatever its logits (Esser et al. 2021, eq. 7).
    """
    lengths = [torch.linalg.vector_norm(gradient.float()) for gradient in (reconstruction, adversarial)]
    return (lengths[0] / (lengths[1] + TINY_GRADIENT)).clamp(max=LARGEST_WEIGHT)
