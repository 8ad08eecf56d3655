"""A classifier of noisy data: the encoder half of the U-Net, pooled over positions and frames.

Shapes: B clips, T frames, C channels of latents or pixels, H W size, D width of the last level, K classes.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from videodiff.batch import Condition
from videodiff.config import Config
from videodiff.networks.layers import Attention, group_norm, to_tokens, zeroed
from videodiff.networks.unet import UNetConfig, encoder_of


class ClassifierConfig(Config):
    """Dhariwal & Nichol 2105.05233, section 4: `encoder` describes the U-Net whose first half is taken.

    pooling: attention looks from the mean of all positions and frames at each of them (as CLIP, 2103.00020); mean is
    that mean alone. The classifier sees noisy data and its time, nothing else.
    """

    encoder: UNetConfig
    num_classes: int = Field(ge=2)
    pooling: Literal["attention", "mean"] = "attention"

    @model_validator(mode="after")
    def _sees_the_data_alone(self) -> "ClassifierConfig":
        given = [
            name
            for name in ("context_dims", "pooled_dim", "known_channels", "learn_variance")
            if getattr(self.encoder, name)
        ]
        if self.encoder.temporal is not None and self.encoder.temporal.fps:
            given.append("temporal.fps")
        if given:
            raise ValueError(f"encoder.{given[0]} is set, of which a classifier of noisy data has no use; leave it out")
        width = self.encoder.model_channels * self.encoder.channel_mult[-1]
        if self.pooling == "attention" and width % self.encoder.head_channels:
            raise ValueError(
                f"encoder.head_channels {self.encoder.head_channels} does not divide the last level's width {width}, "
                "over which pooling attends; choose one that does, or pooling: mean"
            )
        return self


class NoisyClassifier(nn.Module):
    """classifier(x [B,C,T,H,W], time [B]) -> logits [B,K], at least float32.

    time: 0..N-1, as the U-Net's. At the start all classes are equally likely. Without `temporal` in the encoder the
    order of the frames makes no difference.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder_of(config.encoder)
        width = config.encoder.model_channels * config.encoder.channel_mult[-1]
        self.norm = group_norm(width)
        self.pool = Attention(width, config.encoder.head_channels) if config.pooling == "attention" else None
        self.leave = nn.Linear(width, config.num_classes)
        zeroed(self.leave)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = x.to(self.leave.weight.dtype)
        clips, _, frames = x.shape[:3]
        hidden, _, _ = self.encoder.encode(x, time, Condition())
        tokens = to_tokens(F.silu(self.norm(hidden))).unflatten(0, (clips, frames)).flatten(1, 2)
        pooled = tokens.mean(dim=1, keepdim=True)
        if self.pool is not None:
            pooled = pooled + self.pool(pooled, tokens)
        logits = self.leave(pooled[:, 0])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
