"""Autoencoder for single frames, with a Gaussian or a quantised latent, and the road of a clip through it.

Shapes: N frames, B clips, T frames of a clip, C latent channels, H W picture size, h w latent size (H / factor).
Frames are float in [-1,1] inside, uint8 [B,T,H,W,3] at `encode_clip` and `decode_clip`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from videodiff.config import Config
from videodiff.networks.layers import Attention, group_norm, to_map, to_tokens
from videodiff.networks.quantizer import Quantizer, QuantizerConfig, straight_through

# Bounds of the log variance, as wide as float32 exp() comfortably takes.
LOG_VARIANCE = (-30.0, 20.0)


class AutoencoderConfig(Config):
    """Each entry of `widths` is a level; each but the first halves the size: the factor is patch * 2**(levels - 1).

    With `patch` 2 the network sees squares of 2x2 pixels as channels, so that nothing runs at full size, where norms
    and activations cost more than the convolutions do.

    norm "rms" brings the channels of each position to a root mean square of 1 (Zhang & Sennrich 1910.07467). A group
    norm measures over the whole picture, so that before a busy ground a small object is hardly seen.

    layout "ldm" is the autoencoder of latent diffusion and Stable Diffusion (Rombach et al. 2022): a residual block on
    either side of the attention, one more in each level of the decoder, 1x1 convolutions around the latent, padding on
    one side only where the size is halved, and norms with eps 1e-6. Stable Diffusion's: latent_channels 4, patch 1,
    widths [128, 256, 512, 512], num_res_blocks 2, norm_groups 32.

    quantizer: None makes a latent a Gaussian (KL); with one it is a point, and the decoder sees the nearest code to it.
    """

    layout: Literal["light", "ldm"] = "light"

    latent_channels: int = Field(8, ge=1)
    patch: int = Field(2, ge=1, description="side of the squares of pixels that become channels at the input")
    widths: tuple[PositiveInt, ...] = Field((64, 128, 128), min_length=1)
    num_res_blocks: int = Field(1, ge=1, description="per level, in the encoder and in the decoder")
    chunk: int = Field(16, ge=1, description="frames of one clip that go through together: bounds memory")
    norm: Literal["group", "rms"] = "group"
    norm_groups: PositiveInt | None = Field(None, description="of every group norm; None: 32, or fewer if it is narrow")
    attention: bool = Field(True, description="one head over all positions at the smallest size")
    quantizer: QuantizerConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> "AutoencoderConfig":
        if self.norm == "rms" and (self.ldm or self.norm_groups is not None):
            what = "layout ldm" if self.ldm else "norm_groups"
            raise ValueError(f"norm rms has no groups, and {what} asks for them; use norm: group")
        if self.norm_groups is not None and (odd := [w for w in self.widths if w % self.norm_groups]):
            raise ValueError(
                f"norm_groups {self.norm_groups} does not divide the width {odd[0]}; choose a divisor of "
                f"{math.gcd(*self.widths)}, which divides all of them"
            )
        return self

    @property
    def factor(self) -> int:
        """Pixels of a side over latent positions of it."""
        return self.patch * 2 ** (len(self.widths) - 1)

    @property
    def ldm(self) -> bool:
        return self.layout == "ldm"

    def make_norm(self, channels: int) -> nn.Module:
        """A norm of this autoencoder, over maps [N,channels,h,w]."""
        if self.norm == "rms":
            return PositionNorm(channels)
        return group_norm(channels, self.norm_groups, 1e-6 if self.ldm else 1e-5)


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian of the latent, in normalised units: mean and std of one shape. A point where std is 0."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise; noise is standard normal of the same shape."""
        return self.mean + self.std * noise


class PositionNorm(nn.RMSNorm):
    """RMSNorm over the channels of [N,C,h,w], each position by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    def __init__(self, config: AutoencoderConfig, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm_in = config.make_norm(channels_in)
        self.conv_in = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm_out = config.make_norm(channels_out)
        self.conv_out = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv_in(F.silu(self.norm_in(x)))
        return self.skip(x) + self.conv_out(F.silu(self.norm_out(hidden)))


class AttentionBlock(nn.Module):
    """One head over all positions, at the smallest size only."""

    def __init__(self, config: AutoencoderConfig, channels: int) -> None:
        super().__init__()
        self.norm = config.make_norm(channels)
        self.attention = Attention(channels, channels, bias=config.ldm)

    def forward(self, x: Tensor) -> Tensor:
        return x + to_map(self.attention(to_tokens(self.norm(x))), x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def make_encoder(config: AutoencoderConfig) -> nn.Sequential:
    """[N,3,H,W] -> [N,2C,h,w], mean and log variance; [N,C,h,w] where they will be quantised."""
    channels_out = config.latent_channels * (2 if config.quantizer is None else 1)
    layers: list[nn.Module] = [
        nn.PixelUnshuffle(config.patch),
        nn.Conv2d(3 * config.patch**2, config.widths[0], 3, padding=1),
    ]
    channels = config.widths[0]
    for level, width in enumerate(config.widths):
        if level > 0 and config.ldm:
            layers += [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)]
        elif level > 0:
            layers.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
        for _ in range(config.num_res_blocks):
            layers.append(ResBlock(config, channels, width))
            channels = width
    if config.ldm:
        layers.append(ResBlock(config, channels, channels))
    if config.attention:
        layers.append(AttentionBlock(config, channels))
    layers.append(ResBlock(config, channels, channels))
    layers += [config.make_norm(channels), nn.SiLU(), nn.Conv2d(channels, channels_out, 3, padding=1)]
    if config.ldm:
        layers.append(nn.Conv2d(channels_out, channels_out, 1))
    return nn.Sequential(*layers)


def make_decoder(config: AutoencoderConfig) -> nn.Sequential:
    """[N,C,h,w] -> [N,3,H,W]."""
    channels = config.widths[-1]
    layers: list[nn.Module] = []
    if config.ldm:
        layers.append(nn.Conv2d(config.latent_channels, config.latent_channels, 1))
    layers.append(nn.Conv2d(config.latent_channels, channels, 3, padding=1))
    layers.append(ResBlock(config, channels, channels))
    if config.attention:
        layers.append(AttentionBlock(config, channels))
    if config.ldm:
        layers.append(ResBlock(config, channels, channels))
    for level, width in reversed(list(enumerate(config.widths))):
        for _ in range(config.num_res_blocks + config.ldm):
            layers.append(ResBlock(config, channels, width))
            channels = width
        if level > 0:
            layers.append(Upsample(channels))
    layers += [config.make_norm(channels), nn.SiLU(), nn.Conv2d(channels, 3 * config.patch**2, 3, padding=1)]
    layers += [nn.PixelShuffle(config.patch)]
    return nn.Sequential(*layers)


class Autoencoder(nn.Module):
    """A picture is a Gaussian over `latent_channels` x h x w, or a point there (Rombach et al. 2022, section 3.1).

    A quantised latent is so only for the decoder: outside, latents are what the encoder says, before quantisation.

    Latents outside are normalised, (raw - latent_mean) / latent_std per channel: buffers that are 0 and 1 until
    `set_latent_statistics` gets what was measured on data, and are stored with the weights.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = config.factor
        self.encoder = make_encoder(config)
        self.decoder = make_decoder(config)
        self.quantizer = None if config.quantizer is None else Quantizer(config.quantizer, config.latent_channels)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    @torch.no_grad()
    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """mean, std: [C], of raw latents over data. Raises ValueError where a channel has no spread."""
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError("latent statistics must be finite with std > 0 in each channel: was the encoder trained?")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def forward(self, frames: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """For training: frames [N,3,H,W] in [-1,1] -> reconstruction, and what the latent's own loss is made of.

        A Gaussian latent needs noise [N,C,h,w] and gives raw mean and raw log variance [N,C,h,w]; a quantised one gives
        raw latent [N,C,h,w], codes [N,C,h,w] and their numbers [N,h,w].
        """
        if self.quantizer is not None:
            latent = self._encoded(frames)
            code, indices = self.quantizer(latent)
            return self.decoder(_channels_last(straight_through(latent, code))), latent, code, indices
        assert noise is not None
        mean, log_variance = self._moments(frames)
        latent = mean + (0.5 * log_variance).exp() * noise.to(mean.dtype)
        return self.decoder(_channels_last(latent)), mean, log_variance

    def encode(self, frames: Tensor) -> Posterior:
        """[N,3,H,W] in [-1,1] -> Posterior of [N,C,h,w] in normalised units, all N at once."""
        if self.quantizer is not None:
            mean = self._encoded(frames)
            std = torch.zeros_like(mean)
        else:
            mean, log_variance = self._moments(frames)
            std = (0.5 * log_variance).exp()
        shift, scale = (buffer[:, None, None].to(mean.dtype) for buffer in (self.latent_mean, self.latent_std))
        return Posterior((mean - shift) / scale, std / scale)

    def decode(self, latent: Tensor, chunk: int | None = None) -> Tensor:
        """[N,C,h,w] in normalised units -> [N,3,H,W], about [-1,1]; `chunk` frames at a time, None for all."""
        self._check(latent, "[N,C,h,w]")
        shift, scale = (buffer[:, None, None].to(latent.dtype) for buffer in (self.latent_mean, self.latent_std))
        pieces = (latent * scale + shift).split(chunk or len(latent))
        if self.quantizer is not None:
            pieces = tuple(self.quantizer(piece)[0] for piece in pieces)
        return torch.cat([self.decoder(_channels_last(piece)) for piece in pieces])

    @torch.no_grad()
    def encode_clip(self, frames: Tensor) -> Posterior:
        """uint8 [B,T,H,W,3] -> Posterior of float32 [B,C,T,h,w].

        Clip by clip, `config.chunk` frames at a time: a clip's latent depends on no other clip of its batch.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
            raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}, not uint8 [B,T,H,W,3]")
        dtype = next(self.parameters()).dtype
        clips = []
        for clip in frames:
            parts = [self.encode(to_float(piece).to(dtype)) for piece in clip.split(self.config.chunk)]
            clips.append((torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])))
        mean, std = (torch.stack(column).float().transpose(1, 2) for column in zip(*clips, strict=True))
        return Posterior(mean, std)

    @torch.no_grad()
    def decode_clip(self, latent: Tensor) -> Tensor:
        """[B,C,T,h,w] in normalised units -> uint8 [B,T,H,W,3]; clip by clip, as `encode_clip`."""
        return self.decode_checked(latent)[0]

    @torch.no_grad()
    def decode_checked(self, latent: Tensor) -> tuple[Tensor, list[bool]]:
        """As `decode_clip`; and whether each clip was finite before it became bytes, which can't tell."""
        self._check(latent, "[B,C,T,h,w]")
        clips, finite = [], []
        for clip in latent.to(next(self.parameters()).dtype).transpose(1, 2):
            pictures = self.decode(clip, self.config.chunk).float().permute(0, 2, 3, 1)
            clips.append(((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
            finite.append(bool(torch.isfinite(pictures).all()))
        return torch.stack(clips), finite

    def _check(self, latent: Tensor, legend: str) -> None:
        channels = self.config.latent_channels
        if latent.ndim != legend.count(",") + 1 or latent.shape[1] != channels:
            raise ValueError(f"the latent has shape {list(latent.shape)}, not {legend} with C = {channels}")

    def _moments(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self._encoded(frames).chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def _encoded(self, frames: Tensor) -> Tensor:
        if frames.ndim != 4 or frames.shape[1] != 3:
            raise ValueError(f"frames have shape {list(frames.shape)}, not [N,3,H,W]")
        height, width = frames.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"frames of {height}x{width} are no multiple of {self.factor}: resize or crop them")
        return self.encoder(_channels_last(frames))


class AutoencoderLoss(Config):
    """Latent diffusion's (Rombach et al. 2022, appendix G) over the number 3HW of a frame's values: the mean of the
    absolute error, plus `kl_weight` / (3HW) times the KL divergence of a Gaussian latent from N(0, 1), summed over a
    frame's latent.

    edge_weight: pixels near edges of the target count up to so many times. An object's outline, a small share of its
    pixels, is else learned last. square_weight: the squared error counts so much besides the absolute one. What is far
    off then counts more than what is nearly right, and the first thousand steps are shorter.
    """

    edge_weight: float = Field(1.0, ge=1)
    square_weight: float = Field(0.0, ge=0)
    kl_weight: float = Field(1e-6, ge=0)

    def divergence(self, kl: Tensor, frames: Tensor) -> Tensor:
        """The weighted share of a divergence [N] in the loss of frames [N,3,H,W]."""
        return self.kl_weight / frames[0].numel() * kl

    def error(self, reconstruction: Tensor, frames: Tensor) -> Tensor:
        """[N,3,H,W] twice -> float32 [N], one value a frame: the weighted absolute error."""
        weight = 1 + (self.edge_weight - 1) * edges(frames)
        error = (reconstruction.float() - frames.float()).abs()
        error = (error + self.square_weight * error.square()).mean(dim=1, keepdim=True)
        # Divided by the weights' sum: a frame with many edges counts no more than a plain one.
        return (error * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Of N(mean, exp(log_variance)) from N(0, 1), [N,C,h,w] twice -> float32 [N], summed over a frame's latent."""
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3))


def edges(frames: Tensor) -> Tensor:
    """[N,3,H,W] in [-1,1] -> [N,1,H,W] in [0,1]: how near an edge, from the outlines widened by two pixels."""
    return F.max_pool2d(outlines(frames), kernel_size=5, stride=1, padding=2)


def outlines(frames: Tensor) -> Tensor:
    """[N,3,H,W] in [-1,1] -> [N,1,H,W] in [0,1]: the gradient, largest over colours and the two directions."""
    frames = frames.float()
    down = F.pad((frames[..., 1:, :] - frames[..., :-1, :]).abs().amax(dim=1, keepdim=True), (0, 0, 0, 1))
    across = F.pad((frames[..., 1:] - frames[..., :-1]).abs().amax(dim=1, keepdim=True), (0, 1))
    # A step of half the range is a full edge; noise of compression (a few 1/255) stays near 0.
    return (2 * torch.maximum(down, across)).clamp(max=1)


def _changes(frames: Tensor, clip: int) -> Tensor:
    """[N,1,H,W] in [0,1]: how far a pixel or a neighbour is from its mean over the clip; half the range is 1."""
    clips = frames.float().unflatten(0, (-1, clip))
    apart = (clips - clips.mean(dim=1, keepdim=True)).abs().amax(dim=2, keepdim=True).flatten(0, 1)
    return F.max_pool2d(apart.clamp(max=1), kernel_size=3, stride=1, padding=1)


def to_float(frames: Tensor) -> Tensor:
    """uint8 [...,H,W,3] -> float32 [N,3,H,W] in [-1,1], channels-last, leading axes folded into N."""
    return (frames.flatten(0, -4).float() / 127.5 - 1).permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def crops(frames: Tensor, size: int, step: int, uniform: Tensor, clip: int = 1) -> Tensor:
    """Pieces [N,3,size,size] of frames [N,3,H,W] in [-1,1], each with a place near an edge, drawn by uniform [N,3].

    Places are as likely as `edges` is great there, and up to 50 times likelier where the frame differs from the mean of
    its clip, of which each `clip` frames are one: before a ground full of edges it is the moving object that is hard. A
    frame without any edge is cut anywhere. Corners are multiples of `step`, which divides `size`, H and W: a piece
    consists of the frame's own cells.
    """
    count, _, height, width = frames.shape
    mass = (edges(frames) * (0.02 + _changes(frames, clip).square()) + 2e-5).flatten(1).cumsum(1)
    uniform = uniform.to(mass)
    place = torch.searchsorted(mass, uniform[:, :1] * mass[:, -1:]).clamp(max=height * width - 1)[:, 0]
    shift = (uniform[:, 1:] * (size - step + 1)).long()  # with it the place is in the piece after rounding down
    top = (place // width - shift[:, 0]).clamp(0, height - size) // step * step
    left = (place % width - shift[:, 1]).clamp(0, width - size) // step * step
    offset, number = torch.arange(size, device=frames.device), torch.arange(count, device=frames.device)
    rows, columns = (top[:, None] + offset)[:, :, None], (left[:, None] + offset)[:, None]
    return frames.permute(0, 2, 3, 1)[number[:, None, None], rows, columns].permute(0, 3, 1, 2)
