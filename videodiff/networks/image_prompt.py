"""A picture in place of a text: tokens and a pooled vector that an image network takes as it takes a text's.

After IP-Adapter (Ye et al. 2308.06721): the network stays as it is, and what makes the tokens is trained. Here tokens
stand for places of the picture and go through the text's own cross-attention, so that the text is replaced.

Shapes: B pictures, C latent channels, H W latent size, D width of a text encoder's tokens, E of its pooled text.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from videodiff.batch import Condition
from videodiff.config import Config
from videodiff.networks.layers import FeedForward, group_norm, to_tokens

CONVOLUTIONS, FEED_FORWARD_FACTOR = 4, 2.0


class ImagePromptConfig(Config):
    """width: channels of its layers; side: the picture becomes side x side tokens."""

    width: int = Field(128, ge=4)
    side: int = Field(4, ge=1)


def prompted(prompt: ImagePrompt, condition: Condition, dtype: torch.dtype) -> Condition:
    """The condition of an image that is told the first of the known frames in place of a text; `known` is not None."""
    known, mask = condition.known, condition.known_mask
    assert known is not None
    assert mask is not None
    slot = mask.amax(dim=(1, 3, 4)).argmax(dim=1)  # of no known frame the first one, which is zeros then
    tokens, pooled = prompt(known[torch.arange(len(known), device=known.device), :, slot].to(dtype))
    masks = tuple(part.new_ones(part.shape[:2], dtype=torch.bool) for part in tokens)
    return Condition(text=tokens, text_mask=masks, pooled=pooled, fps=condition.fps)


class ImagePrompt(nn.Module):
    """latents of pictures [B,C,H,W] -> (tokens [B,side*side,D] for each text encoder, pooled [B,E] or None).

    No picture is zeros, of which tokens are made as of any other: what they say is learned where pictures are dropped.
    """

    def __init__(
        self, config: ImagePromptConfig, channels: int, context_dims: tuple[int, ...], pooled_dim: int | None
    ) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.norms = nn.ModuleList(group_norm(width) for _ in range(CONVOLUTIONS))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(CONVOLUTIONS))
        self.norm_feed = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, FEED_FORWARD_FACTOR)
        self.norm = nn.LayerNorm(width)
        self.leave = nn.ModuleList(nn.Linear(width, dim) for dim in context_dims)
        self.pooled = None
        if pooled_dim:
            self.pooled = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, pooled_dim))

    def forward(self, picture: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        features = self.enter(picture)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features = features + conv(F.silu(norm(features)))
        tokens = to_tokens(F.adaptive_avg_pool2d(features, self.config.side))
        tokens = self.norm(tokens + self.feed_forward(self.norm_feed(tokens)))
        pooled = None
        if self.pooled is not None:
            places = features.flatten(2)
            pooled = self.pooled(torch.cat([places.mean(dim=2), places.amax(dim=2)], dim=1))
        return tuple(leave(tokens) for leave in self.leave), pooled
