"""What the tests of metrics share: torchmetrics where it is installed, normal features, and clips of moving discs."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from videodiff.networks.tokenizer import declare_torchvision_ops


def peer(module: str) -> Any:
    """A module of torchmetrics, or the test is skipped."""
    declare_torchvision_ops()
    return pytest.importorskip(f"torchmetrics.{module}")


class Same(nn.Module):
    """A feature extractor for torchmetrics that hands on what it gets."""

    num_features = 16

    def forward(self, x: Tensor) -> Tensor:
        return x


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def disc(
    x: float,
    y: float,
    size: int = 64,
    radius: float = 11.0,
    colour: tuple[int, ...] = (220, 90, 40),
    phase: float = 0.0,
) -> np.ndarray:
    """A picture uint8 [size,size,3]: a disc with a pattern and a soft edge of a pixel, before a waved background."""
    rows, columns = np.mgrid[:size, :size]
    across, down = columns - x, rows - y
    inside = np.clip(radius - np.hypot(across, down) + 0.5, 0, 1)[..., None]
    pattern = 1 + 0.25 * np.sin(0.9 * across + phase) * np.sin(0.8 * down)
    waves = 110 + 25 * np.sin(columns / 5.0) + 25 * np.cos(rows / 6.0)
    ground = waves[..., None] * (0.9, 1.0, 1.1)
    return np.rint(inside * pattern[..., None] * colour + (1 - inside) * ground).clip(0, 255).astype(np.uint8)


def moving(
    frames: int = 9, speed: float = 2.0, start: float = 20.0, height: float = 32.0, size: int = 64
) -> np.ndarray:
    """A clip uint8 [T,size,size,3] of a disc that moves right by so many pixels a frame."""
    return np.stack([disc(start + speed * t, height, size) for t in range(frames)])
