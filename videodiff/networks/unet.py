"""One U-Net for images and clips: an image is a clip with one frame, and an image call skips the temporal layers.

Shapes: B clips, T frames, N = B*T, C latent channels, H W latent size, L text tokens, D width, E embedding width.
Architecture after Emu Video (Girdhar et al. 2023, section 3.2 and tables 1-2 of its appendix). By configuration also
that of Stable Diffusion 1 and 2 (Rombach et al. 2022) and of ADM (Dhariwal & Nichol 2021), each with or without the
temporal layers.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from videodiff.batch import Condition
from videodiff.config import Config
from videodiff.networks.image_prompt import ImagePrompt, ImagePromptConfig, prompted
from videodiff.networks.layers import (
    ResBlock,
    Signals,
    SpaceTimeConv,
    SpatialAttention,
    SpatialTransformer,
    TemporalTransformer,
    group_norm,
    sinusoid,
)
from videodiff.shapes import check_shape


class TemporalConfig(Config):
    """What a video network has beyond an image network."""

    kernel: int = Field(3, ge=1, description="frames that a temporal convolution sees; odd")
    num_layers: int = Field(1, ge=1, description="layers in each temporal attention block")
    feed_forward_factor: float = Field(4.0, gt=0)
    text_attention: bool = True
    image_prompt: ImagePromptConfig | None = Field(
        None,
        description="the spatial layers of a video hear tokens of the first image in place of the text, so that what "
        "is seen comes from the image and the motion from the text; None: they hear the text, as published",
    )
    first_frame_attention: bool = True
    fps: bool = Field(False, description="take condition.fps, frames per second")

    @model_validator(mode="after")
    def _check(self) -> "TemporalConfig":
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} is even, so no frame is its middle; use {self.kernel + 1}")
        if self.image_prompt is not None and not self.text_attention:
            raise ValueError("image_prompt without text_attention: no layer would hear the text; set text_attention")
        return self


class UNetConfig(Config):
    """Shape of the network. Attention follows every residual block of the levels marked, and stands in the middle.

    Stable Diffusion: time_embedding add, norm_groups 32, transformer_norm_eps 1e-6, no pooled text; 1.x has eight heads
    everywhere and conv projections, 2.x 64 channels a head and linear ones. ADM: attention plain, resample residual.
    """

    channels: int = Field(8, ge=1, description="latent channels in, and out unless learn_variance")
    model_channels: int = Field(ge=4)
    channel_mult: tuple[PositiveInt, ...] = Field((1, 2, 4, 4), min_length=1)
    num_res_blocks: PositiveInt | tuple[PositiveInt, ...] = 2
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    head_channels: int = Field(64, ge=1)
    num_heads: PositiveInt | tuple[PositiveInt, ...] | None = Field(
        None, description="heads of each attention, or of those of each level, in place of head_channels"
    )
    attention: Literal["transformer", "plain"] = Field("transformer", description="plain: self-attention alone")
    projection: Literal["linear", "conv"] = Field("linear", description="shape of the weights around a transformer")
    transformer_norm_eps: float = Field(1e-5, gt=0)
    norm_groups: PositiveInt | None = Field(None, description="of every group norm; None: 32, or fewer if it is narrow")
    time_embedding: Literal["scale_shift", "add"] = "scale_shift"
    resample: Literal["conv", "residual"] = Field("conv", description="residual: blocks halve and double the size")
    num_transformer_layers: int = Field(1, ge=1)
    feed_forward_factor: float = Field(4.0, gt=0)
    context_dims: tuple[PositiveInt, ...] = Field((), description="width of the tokens of each text encoder")
    pooled_dim: PositiveInt | None = Field(None, description="width of the pooled text that joins the time embedding")
    known_channels: bool = Field(False, description="take condition.known and its mask on C+1 further channels")
    learn_variance: bool = Field(False, description="give 2C channels: what is predicted, then its variance")
    temporal: TemporalConfig | None = None

    @property
    def variance(self) -> Literal["fixed", "learned_range"]:
        """What a Denoiser makes of the output."""
        return "learned_range" if self.learn_variance else "fixed"

    @property
    def out_channels(self) -> int:
        return 2 * self.channels if self.learn_variance else self.channels

    @property
    def res_blocks(self) -> tuple[int, ...]:
        if isinstance(self.num_res_blocks, int):
            return (self.num_res_blocks,) * len(self.channel_mult)
        return self.num_res_blocks

    def head_width(self, level: int) -> int:
        """Channels of a head at a level; the middle is at the last one."""
        if self.num_heads is None:
            return self.head_channels
        heads = self.num_heads if isinstance(self.num_heads, int) else self.num_heads[level]
        return self.model_channels * self.channel_mult[level] // heads

    @property
    def skip_widths(self) -> tuple[int, ...]:
        """Channels of the feature maps that the encoder hands to the decoder, in the order in which it makes them."""
        widths = [self.model_channels]
        for level, mult in enumerate(self.channel_mult):
            resized = level < len(self.channel_mult) - 1
            widths += [self.model_channels * mult] * (self.res_blocks[level] + resized)
        return tuple(widths)

    @property
    def divisor(self) -> int:
        """Latent height and width must be a multiple of this."""
        return 2 ** (len(self.channel_mult) - 1)

    @model_validator(mode="after")
    def _check(self) -> "UNetConfig":
        levels = len(self.channel_mult)
        sizes = {"num_res_blocks": len(self.res_blocks), "attention_levels": len(self.attention_levels)}
        if isinstance(self.num_heads, tuple):
            sizes["num_heads"] = len(self.num_heads)
        for name, given in sizes.items():
            if given != levels:
                raise ValueError(f"{name} has {given} entries, channel_mult has {levels}; give one for each level")
        heads = (
            self.num_heads if isinstance(self.num_heads, tuple) else (self.num_heads or self.head_channels,) * levels
        )
        name = "head_channels" if self.num_heads is None else "num_heads"
        for level, attention in enumerate((*self.attention_levels[:-1], True)):
            width = self.model_channels * self.channel_mult[level]
            if attention and width % heads[level]:
                raise ValueError(
                    f"{name} {heads[level]} does not divide model_channels x mult {width}; choose one that divides "
                    "every level with attention"
                )
            if self.norm_groups is not None and width % self.norm_groups:
                common = math.gcd(*(self.model_channels * mult for mult in self.channel_mult))
                raise ValueError(
                    f"norm_groups {self.norm_groups} does not divide model_channels x mult {width}; choose a divisor "
                    f"of {common}, which divides every level"
                )
        if self.attention == "plain":
            self._check_plain()
        narrowest = self.model_channels * min(self.channel_mult)
        factors = {"feed_forward_factor": self.feed_forward_factor}
        if self.temporal is not None:
            factors["temporal.feed_forward_factor"] = self.temporal.feed_forward_factor
        for name, factor in factors.items():
            if int(narrowest * factor) < 1:
                raise ValueError(f"{name} {factor:g} leaves no hidden channel at width {narrowest}; 4 is usual")
        return self

    def _check_plain(self) -> None:
        if self.context_dims:
            raise ValueError(
                "attention plain sees no text, but context_dims names some; use transformer, or leave it out"
            )
        for name in ("num_transformer_layers", "projection", "feed_forward_factor"):
            if (given := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(f"{name} {given} is of transformers, and attention plain has none; leave it out")


def res_block(
    config: UNetConfig, channels_in: int, channels_out: int, resample: Literal["down", "up"] | None = None
) -> ResBlock:
    kernel = config.temporal.kernel if config.temporal else None
    return ResBlock(
        channels_in,
        channels_out,
        4 * config.model_channels,
        kernel,
        config.norm_groups,
        config.time_embedding,
        resample,
    )


class Block(nn.Module):
    """A residual block with the spatial and the temporal attention that follow it: what is checkpointed as one."""

    def __init__(self, config: UNetConfig, channels_in: int, level: int, attention: bool) -> None:
        super().__init__()
        temporal = config.temporal
        embedding_dim = 4 * config.model_channels
        channels, head_channels = config.model_channels * config.channel_mult[level], config.head_width(level)
        self.res = res_block(config, channels_in, channels)
        self.attention: nn.Module | None = None
        self.temporal = None
        if attention and config.attention == "plain":
            self.attention = SpatialAttention(channels, head_channels, config.norm_groups)
        elif attention:
            self.attention = SpatialTransformer(
                channels,
                head_channels,
                config.context_dims,
                config.num_transformer_layers,
                config.feed_forward_factor,
                config.norm_groups,
                config.transformer_norm_eps,
                config.projection,
            )
        if attention and temporal:
            self.temporal = TemporalTransformer(
                channels,
                head_channels,
                embedding_dim,
                config.context_dims,
                temporal.num_layers,
                temporal.feed_forward_factor,
                temporal.text_attention,
                temporal.first_frame_attention,
            )

    def forward(self, x: Tensor, signals: Signals) -> Tensor:
        x = self.res(x, signals)
        if self.attention is not None:
            x = self.attention(x, signals)
        if self.temporal is not None and signals.video_embedding is not None:
            x = self.temporal(x, signals)
        return x


class Level(nn.Module):
    """The blocks at one resolution, and what leads to the next: a convolution, or a residual block that resamples."""

    def __init__(self, blocks: list[Block], resize: SpaceTimeConv | ResBlock | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resize = resize


def embedding_mlp(dim_in: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim_in, dim), nn.SiLU(), nn.Linear(dim, dim))


class UNet(nn.Module):
    """network(x [B,C,T,H,W], time [B], condition) -> [B,C,T,H,W], [B,2C,T,H,W] with learn_variance.

    time: 0..N-1, float32; its sines are taken in float32 whatever the dtype of the weights.
    An image call (T == 1 and condition.known is None) runs the spatial layers alone: the result is that of an
    image-only network with the same spatial weights, bit for bit. Without `temporal` the frames are independent.
    `checkpointing` may be set at any time: activations are computed again in the backward pass instead of kept.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        temporal = config.temporal
        kernel = temporal.kernel if temporal else None
        base = config.model_channels
        dim = 4 * base

        self.time_embedding = embedding_mlp(base, dim)
        self.pooled_norm = nn.LayerNorm(config.pooled_dim) if config.pooled_dim else None
        self.pooled_embedding = embedding_mlp(config.pooled_dim, dim) if config.pooled_dim else None
        self.temporal_fps = embedding_mlp(base, dim) if temporal and temporal.fps else None

        self.conv_in = SpaceTimeConv(config.channels, base, kernel)
        self.known_conv = None
        if config.known_channels:
            # Without a bias: no known frames and known frames that are all 0 are the same thing.
            self.known_conv = nn.Conv2d(config.channels + 1, base, 3, padding=1, bias=False)
            nn.init.zeros_(self.known_conv.weight)

        self.temporal_image_prompt = None
        if temporal is not None and temporal.image_prompt is not None:
            self.temporal_image_prompt = ImagePrompt(
                temporal.image_prompt, config.channels, config.context_dims, config.pooled_dim
            )

        residual = config.resample == "residual"
        widths = [base * mult for mult in config.channel_mult]
        last = len(widths) - 1
        channels = base
        resize: SpaceTimeConv | ResBlock | None
        down = []
        for level, width in enumerate(widths):
            blocks = []
            for _ in range(config.res_blocks[level]):
                blocks.append(Block(config, channels, level, config.attention_levels[level]))
                channels = width
            resize = None
            if level < last:
                resize = (
                    res_block(config, width, width, "down")
                    if residual
                    else SpaceTimeConv(width, width, kernel, stride=2)
                )
            down.append(Level(blocks, resize))
        self.down = nn.ModuleList(down)
        self.middle = nn.ModuleList([Block(config, channels, last, True), Block(config, channels, last, False)])
        up, skips = [], list(config.skip_widths)
        for level in reversed(range(len(widths))):
            blocks = []
            for _ in range(config.res_blocks[level] + 1):
                blocks.append(Block(config, channels + skips.pop(), level, config.attention_levels[level]))
                channels = widths[level]
            resize = None
            if level:
                resize = (
                    res_block(config, channels, channels, "up")
                    if residual
                    else SpaceTimeConv(channels, channels, kernel)
                )
            up.append(Level(blocks, resize))
        self.up = nn.ModuleList(up)
        self.norm_out = group_norm(channels, config.norm_groups)
        self.conv_out = SpaceTimeConv(channels, config.out_channels, kernel, zero=True)

    def forward(self, x: Tensor, time: Tensor, condition: Condition, control: Sequence[Tensor] = ()) -> Tensor:
        """control: what a ControlNet adds to each skip of the encoder and then to the middle, [N,C,h,w] each."""
        hidden, skips, signals = self.encode(x, time, condition)
        if control:
            self._check_control(control, [*skips, hidden])
            *onto_skips, onto_middle = control
            skips = [skip + more for skip, more in zip(skips, onto_skips, strict=True)]
            hidden = hidden + onto_middle
        for level in self._levels(self.up):
            for block in level.blocks:
                hidden = self._run(block, torch.cat([hidden, skips.pop()], dim=1), signals)
            if level.resize is not None:
                if self.config.resample == "conv":
                    hidden = F.interpolate(hidden, scale_factor=2.0, mode="nearest")
                hidden = level.resize(hidden, signals)
        out = self.conv_out(F.silu(self.norm_out(hidden)), signals)
        return out.unflatten(0, (len(x), signals.frames)).transpose(1, 2)

    def encode(
        self, x: Tensor, time: Tensor, condition: Condition, hint: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Signals]:
        """The encoder and the middle: the middle's feature map [N,C,h,w], the skips on the way to it as `skip_widths`
        lists them, and what the blocks were told. hint [N,C,H,W] is added where x enters."""
        self._check(x, time, condition)
        frames = x.shape[2]
        video = self.config.temporal is not None and not (frames == 1 and condition.known is None)
        signals = self._signals(x, time, condition, video)

        hidden = self.conv_in(self._flatten(x), signals)
        if self.known_conv is not None and condition.known is not None and condition.known_mask is not None:
            known = torch.cat([condition.known, condition.known_mask.to(condition.known.dtype)], dim=1).to(x.dtype)
            hidden = hidden + self.known_conv(self._flatten(known))
        if hint is not None:
            hidden = hidden + hint

        skips = [hidden]
        for level in self._levels(self.down):
            for block in level.blocks:
                hidden = self._run(block, hidden, signals)
                skips.append(hidden)
            if level.resize is not None:
                hidden = level.resize(hidden, signals)
                skips.append(hidden)
        for block in self.middle:
            hidden = self._run(block, hidden, signals)
        return hidden, skips, signals

    def spatial_state(self) -> dict[str, Tensor]:
        """The state of the image network inside: loads into a UNet without `temporal` and `known_channels`."""
        return {name: value for name, value in self.state_dict().items() if not is_temporal(name)}

    def num_parameters(self) -> tuple[int, int]:
        """(spatial, temporal) numbers of parameters."""
        sizes = {True: 0, False: 0}
        for name, parameter in self.named_parameters():
            sizes[is_temporal(name)] += parameter.numel()
        return sizes[False], sizes[True]

    def _levels(self, levels: nn.ModuleList) -> Iterator[Level]:
        for level in levels:
            assert isinstance(level, Level)
            yield level

    def _run(self, block: nn.Module, x: Tensor, signals: Signals) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, signals, use_reentrant=False)
        return block(x, signals)

    @staticmethod
    def _flatten(x: Tensor) -> Tensor:
        """[B,C,T,H,W] -> [B*T,C,H,W] channels-last: one copy here, none further in."""
        return x.permute(0, 2, 3, 4, 1).flatten(0, 1).contiguous().permute(0, 3, 1, 2)

    def _signals(self, x: Tensor, time: Tensor, condition: Condition, video: bool) -> Signals:
        base, dtype, temporal = self.config.model_channels, x.dtype, self.config.temporal
        step = self.time_embedding(sinusoid(time, base).to(dtype))

        def told(heard: Condition) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
            """The embedding before its activation, the tokens and their masks."""
            embedding = step
            if self.pooled_embedding is not None and self.pooled_norm is not None and heard.pooled is not None:
                embedding = step + self.pooled_embedding(self.pooled_norm(heard.pooled.to(dtype)))
            tokens = tuple(text.to(dtype) for text in heard.text)
            return embedding, tokens, tuple(mask[:, None, None] for mask in heard.text_mask)

        embedding, text, text_mask = told(condition)
        if not video or temporal is None:
            return Signals(F.silu(embedding), None, text, text_mask, x.shape[2])
        video_embedding, video_text, video_text_mask = embedding, text, text_mask
        if self.temporal_fps is not None and condition.fps is not None:
            video_embedding = video_embedding + self.temporal_fps(sinusoid(condition.fps, base).to(dtype))
        if self.temporal_image_prompt is not None:
            embedding, text, text_mask = told(prompted(self.temporal_image_prompt, condition, dtype))
        return Signals(
            F.silu(embedding), F.silu(video_embedding), text, text_mask, x.shape[2], video_text, video_text_mask
        )

    def _check(self, x: Tensor, time: Tensor, condition: Condition) -> None:
        config = self.config
        if x.ndim != 5 or x.shape[1] != config.channels:
            raise ValueError(f"x has shape {list(x.shape)}, the network takes [B,{config.channels},T,H,W]")
        if x.shape[3] % config.divisor or x.shape[4] % config.divisor:
            raise ValueError(
                f"latent size {x.shape[3]}x{x.shape[4]} is no multiple of {config.divisor}, which the "
                f"{len(config.channel_mult)} levels of the network halve it by; choose another picture size"
            )
        given = tuple(text.shape[-1] for text in condition.text)
        if given != config.context_dims:
            raise ValueError(f"text tokens have widths {given}, the network takes {config.context_dims}")
        if len(condition.text_mask) != len(given):
            raise ValueError(f"the condition has {len(given)} texts and text_mask for {len(condition.text_mask)}")
        if (condition.pooled is None) != (config.pooled_dim is None):
            raise ValueError(
                "the network takes pooled text and the condition has none"
                if condition.pooled is None
                else "the condition has pooled text and the network takes none; set pooled_dim"
            )
        if condition.known is not None and self.known_conv is None:
            raise ValueError("known frames are given to a network without known_channels; use a video model")
        if condition.known is None and self.temporal_image_prompt is not None and x.shape[2] > 1:
            raise ValueError("the spatial layers of the network hear a first image, and the condition has none")
        if (condition.known is None) != (condition.known_mask is None):
            raise ValueError("of the condition's known and known_mask one is None; known frames need both")
        if config.temporal and config.temporal.fps and x.shape[2] > 1 and condition.fps is None:
            raise ValueError("the network takes condition.fps, and it is None")

        B, _, T, H, W = x.shape
        table: list[tuple[str, Tensor | None, str, tuple[int, ...]]] = [
            ("time", time, "[B]", (B,)),
            ("pooled", condition.pooled, "[B,E]", (B, config.pooled_dim or 0)),
            ("known", condition.known, "[B,C,T,H,W]", tuple(x.shape)),
            ("known_mask", condition.known_mask, "[B,1,T,H,W]", (B, 1, T, H, W)),
            ("fps", condition.fps, "[B]", (B,)),
        ]
        for number, (text, mask) in enumerate(zip(condition.text, condition.text_mask, strict=True)):
            length = text.shape[1:2]
            table.append((f"text[{number}]", text, "[B,L,D]", (B, *length, given[number])))
            table.append((f"text_mask[{number}]", mask, "[B,L]", (B, *length)))
            if mask.dtype != torch.bool:
                raise ValueError(f"text_mask[{number}] is {mask.dtype}; give bool, True for tokens to attend to")
        for name, tensor, legend, wanted in table:
            if tensor is not None:
                check_shape(name, tensor, legend, wanted)

    @staticmethod
    def _check_control(control: Sequence[Tensor], onto: Sequence[Tensor]) -> None:
        if len(control) != len(onto):
            raise ValueError(
                f"control has {len(control)} feature maps, not {len(onto)}: one for each skip, and one for the middle"
            )
        for number, (more, features) in enumerate(zip(control, onto, strict=True)):
            check_shape(f"control[{number}]", more, "[N,C,h,w]", features.shape)


def encoder_of(config: UNetConfig) -> UNet:
    """A UNet without its decoder: of it `encode` alone works, and its state holds nothing that is never used."""
    network = UNet(config)
    for decoder_part in ("up", "norm_out", "conv_out"):
        delattr(network, decoder_part)
    return network


def is_temporal(name: str) -> bool:
    """Whether a parameter of a UNet belongs to the video network alone, told from its name."""
    return any(part == "known_conv" or part.startswith("temporal") for part in name.split("."))


def temporal_parameter_names(network: UNet) -> set[str]:
    """Names of the parameters that an image network has not: temporal layers and the convolution of the known frames.
    They are what the video stage trains."""
    return {name for name, _ in network.named_parameters() if is_temporal(name)}
