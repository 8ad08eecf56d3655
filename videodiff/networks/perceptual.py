"""Perceptual distance of pictures by a network from a local file: LPIPS on VGG16, or a TorchScript file.

Shapes: N pictures [N,3,H,W] in [-1,1].
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from videodiff.config import Config
from videodiff.errors import UserError
from videodiff.networks.features.files import checked_sha256, is_script, load_script, read_state

# The convolutions of VGG16's five blocks by their numbers in torchvision's `features`; a block ends with what LPIPS
# looks at, and a maximum over 2x2 lies between blocks (Simonyan and Zisserman 2015, configuration D).
BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
# LPIPS brings [-1,1] to ImageNet's mean and deviation.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class PerceptualConfig(Config):
    """A distance added to the reconstruction's error, times `weight`.

    path: VGG16 by torchvision's names (`features.0.weight`), as safetensors or as torch.save wrote it; or TorchScript,
        called as f(made, real) -> [N]. linear: LPIPS's weights of the channels (`lin0.model.1.weight`); None: they lie
        in the same file, or every channel counts 1.
    sha256: of `path`; TorchScript runs code and so needs it.
    """

    path: str
    sha256: str | None = Field(None, pattern="^[0-9a-fA-F]{64}$")
    linear: str | None = None
    weight: float = Field(1.0, gt=0)


class VGGDistance(nn.Module):
    """LPIPS (Zhang et al. 2018, eq. 1): (made, real) -> [N], 0 for equal pictures."""

    shift: Tensor
    scale: Tensor

    def __init__(self, state: dict[str, Tensor]) -> None:
        """state: float32 by the names above. Raises KeyError, ValueError: what is missing, what has an odd shape."""
        super().__init__()
        channels, weighted = 3, any(name.startswith("lin") for name in state)
        for block, numbers in enumerate(BLOCKS):
            for number in numbers:
                weight, bias = (state[f"features.{number}.{part}"] for part in ("weight", "bias"))
                if weight.shape[1:] != (channels, 3, 3) or bias.shape != weight.shape[:1]:
                    raise ValueError(f"features.{number}.weight is {list(weight.shape)}, not [..., {channels}, 3, 3]")
                channels = len(weight)
                self.register_buffer(f"weight{number}", weight)
                self.register_buffer(f"bias{number}", bias)
            linear = state[f"lin{block}.model.1.weight"] if weighted else torch.ones(1, channels, 1, 1)
            if linear.shape != (1, channels, 1, 1):
                raise ValueError(f"lin{block}.model.1.weight is {list(linear.shape)}, not [1, {channels}, 1, 1]")
            self.register_buffer(f"linear{block}", linear)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])

    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        x = (torch.cat([made, real]) - self.shift) / self.scale
        distance = x.new_zeros(len(made))
        for block, numbers in enumerate(BLOCKS):
            x = x if block == 0 else F.max_pool2d(x, 2)
            for number in numbers:
                weight, bias = self.get_buffer(f"weight{number}"), self.get_buffer(f"bias{number}")
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            # vector_norm has gradient 0 where a position's channels are all 0; a plain square root would give nan.
            one, other = (x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)).chunk(2)
            difference = (one - other).square() * self.get_buffer(f"linear{block}")
            distance = distance + difference.sum(dim=1).mean(dim=(1, 2))
        return distance


def load_perceptual(config: PerceptualConfig, size: int) -> nn.Module:
    """The frozen distance (made, real) -> [N] float32, tried out on pictures of `size`. UserError for other files."""
    path = Path(config.path)
    checked_sha256("perceptual", path, config.sha256)
    if config.linear is not None and not Path(config.linear).is_file():
        raise UserError(f"perceptual.linear: {config.linear} is no file; name local weights, or leave it out")
    scripted = is_script(path)
    network = load_script("perceptual", path, config.sha256, torch.device("cpu")) if scripted else _vgg(config)
    for parameter in network.parameters():  # TorchScript has no requires_grad_ of its own
        parameter.requires_grad_(False)
    network.eval()
    pictures = torch.linspace(-1, 1, 2 * 3 * size * size).view(2, 3, size, size)
    try:
        shape = tuple(network(pictures, pictures.flip(0)).shape)
    except (RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"perceptual.path: {path} can't compare pictures of {size}x{size}: {reason}") from None
    if shape != (2,):
        raise UserError(f"perceptual.path: {path} gives {list(shape)} for two pairs of pictures; it must give [2]")
    return network


def _vgg(config: PerceptualConfig) -> VGGDistance:
    state = read_state("perceptual", Path(config.path))
    if config.linear is not None:
        linear = read_state("perceptual", Path(config.linear))
        if "lin0.model.1.weight" not in linear:
            raise UserError(f"perceptual.linear: {config.linear} holds no lin0.model.1.weight; name LPIPS's own file")
        state |= linear
    try:
        return VGGDistance(state)
    except (KeyError, ValueError) as error:
        what = f"holds no {error.args[0]}" if isinstance(error, KeyError) else f"does not fit: {error}"
        raise UserError(
            f"perceptual.path: {config.path} {what}; it must be VGG16 by torchvision's names, or TorchScript"
        ) from None
