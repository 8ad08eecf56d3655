"""ControlNet (Zhang et al. 2302.05543): a trained copy of the image network's encoder steers the frozen network.

Shapes: B images, C latent channels, H W picture size, h w latent size (H / factor), T = 1.
"""

import math
from collections.abc import Callable

from torch import Tensor, nn

from videodiff.batch import Condition
from videodiff.networks.autoencoder import outlines, to_float
from videodiff.networks.layers import zeroed
from videodiff.networks.unet import UNet, UNetConfig, encoder_of

# What a picture, uint8 [B,H,W,3], is followed by: its hint [B,1,H,W] in [0,1]; the same in training and at generation.
HINTS: dict[str, Callable[[Tensor], Tensor]] = {"edges": lambda pictures: outlines(to_float(pictures))}


class ControlNet(nn.Module):
    """control(x [B,C,1,h,w], time [B], condition with a hint) -> what to add to each skip of the U-Net and its middle.

    The hint enters the copied encoder beside x, from pixels to latents by one rearrangement and three convolutions. The
    last of them and the 1x1 convolutions at the way out are zero at the start, so that at first nothing is added.
    """

    def __init__(self, config: UNetConfig, factor: int) -> None:
        """config: the image network's. factor: pixels along a side of a latent."""
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor {factor}: a latent has at least one pixel along a side; give the autoencoder's")
        self.factor = factor
        self.encoder = encoder_of(config)
        width = config.model_channels
        self.hint = nn.Sequential(
            nn.PixelUnshuffle(factor),
            nn.Conv2d(factor**2, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            zeroed(nn.Conv2d(width, width, 3, padding=1)),
        )
        widths = [*config.skip_widths, width * config.channel_mult[-1]]
        self.leave = nn.ModuleList(zeroed(nn.Conv2d(width, width, 1)) for width in widths)

    @classmethod
    def copy_of(cls, network: UNet, factor: int) -> "ControlNet":
        """One whose encoder starts with the weights of `network`."""
        control = cls(network.config, factor)
        state = network.state_dict()
        control.encoder.load_state_dict({name: state[name] for name in control.encoder.state_dict()})
        return control

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> list[Tensor]:
        wanted = [x.shape[0], 1, x.shape[3] * self.factor, x.shape[4] * self.factor]
        given = None if condition.hint is None else list(condition.hint.shape)
        if condition.hint is None or given != wanted or x.shape[2] != 1:
            raise ValueError(f"the hint has shape {given} for x of {list(x.shape)}; give {wanted}, and one frame in x")
        entering = self.hint(condition.hint.to(x.dtype))
        hidden, skips, _ = self.encoder.encode(x, time, condition, entering)
        return [layer(features) for layer, features in zip(self.leave, [*skips, hidden], strict=True)]


class ControlledUNet(nn.Module):
    """The image network and the ControlNet that steers it, as one network: answers as UNet, told the hint as well.

    scale multiplies what the ControlNet adds; 0 gives the image network's own answer, bit for bit.
    """

    def __init__(self, base: UNet, control: ControlNet, scale: float = 1.0) -> None:
        super().__init__()
        if not math.isfinite(scale):
            raise ValueError(f"scale {scale} is no number; 1 is what was trained, 0 nothing")
        self.base, self.control, self.scale = base, control, scale
        self.config = base.config

    @property
    def checkpointing(self) -> bool:
        """As UNet's, of both."""
        return self.base.checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        self.base.checkpointing = self.control.encoder.checkpointing = value

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        added = self.control(x, time, condition)
        return self.base(x, time, condition, [self.scale * features for features in added])
