"""Inception v3 (Szegedy et al. 2016), from a local file: its pooled features [N,2048] and class probabilities.

Two variants with the same weights' names. "fid" is the network of 2015-12-05 that the Fréchet Inception distance means
(Heusel et al. 2017), with three quirks: its averages over 3x3 leave padding out, its last block takes a maximum where
all others take an average, and it has 1008 classes. "torchvision" has the paper's averages and 1000 classes.
"""

import re
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Variant: TypeAlias = Literal["fid", "torchvision"]
SIZE, WIDTH = 299, 2048
CLASSES: dict[str, int] = {"fid": 1008, "torchvision": 1000}
# What files hold besides, for training alone: a second classifier, and how many batches were seen.
TRAINING_ALONE = re.compile(r"AuxLogits\..*|.*\.num_batches_tracked")

# The blocks. A branch is its convolutions in order, `name channels kernel`, with /2 for one that halves the picture;
# what | separates looks at the same and stands side by side. `branch_pool` looks at the block's pooled input.
Branches: TypeAlias = tuple[str, ...]


def _small(pool: int) -> Branches:
    return (
        "branch1x1 64 1x1",
        "branch5x5_1 48 1x1 > branch5x5_2 64 5x5",
        "branch3x3dbl_1 64 1x1 > branch3x3dbl_2 96 3x3 > branch3x3dbl_3 96 3x3",
        f"branch_pool {pool} 1x1",
    )


def _long(width: int) -> Branches:
    return (
        "branch1x1 192 1x1",
        f"branch7x7_1 {width} 1x1 > branch7x7_2 {width} 1x7 > branch7x7_3 192 7x1",
        f"branch7x7dbl_1 {width} 1x1 > branch7x7dbl_2 {width} 7x1 > branch7x7dbl_3 {width} 1x7 > "
        f"branch7x7dbl_4 {width} 7x1 > branch7x7dbl_5 192 1x7",
        "branch_pool 192 1x1",
    )


_HALVE_35: Branches = (
    "branch3x3 384 3x3/2",
    "branch3x3dbl_1 64 1x1 > branch3x3dbl_2 96 3x3 > branch3x3dbl_3 96 3x3/2",
)
_HALVE_17: Branches = (
    "branch3x3_1 192 1x1 > branch3x3_2 320 3x3/2",
    "branch7x7x3_1 192 1x1 > branch7x7x3_2 192 1x7 > branch7x7x3_3 192 7x1 > branch7x7x3_4 192 3x3/2",
)
_WIDE: Branches = (
    "branch1x1 320 1x1",
    "branch3x3_1 384 1x1 > branch3x3_2a 384 1x3 | branch3x3_2b 384 3x1",
    "branch3x3dbl_1 448 1x1 > branch3x3dbl_2 384 3x3 > branch3x3dbl_3a 384 1x3 | branch3x3dbl_3b 384 3x1",
    "branch_pool 192 1x1",
)
BLOCKS: dict[str, Branches] = {
    "Mixed_5b": _small(32),
    "Mixed_5c": _small(64),
    "Mixed_5d": _small(64),
    "Mixed_6a": _HALVE_35,
    "Mixed_6b": _long(128),
    "Mixed_6c": _long(160),
    "Mixed_6d": _long(160),
    "Mixed_6e": _long(192),
    "Mixed_7a": _HALVE_17,
    "Mixed_7b": _WIDE,
    "Mixed_7c": _WIDE,
}


class Normalisation(nn.Module):
    """By the statistics of training (Ioffe and Szegedy 2015): batch normalisation that has done with training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance, weight, bias = map(self.get_buffer, ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, variance, weight, bias, eps=1e-3)


class Convolution(nn.Module):
    """Convolution, normalisation, ReLU. kernel: "1x7", "3x3/2"; a halving one and one
    that is not `padded` lose the edge."""

    def __init__(self, entering: int, leaving: int, kernel: str, padded: bool = True) -> None:
        super().__init__()
        sides, _, stride = kernel.partition("/")
        height, width = (int(side) for side in sides.split("x"))
        padding = (height // 2, width // 2) if padded and not stride else 0
        self.conv = nn.Conv2d(entering, leaving, (height, width), int(stride or 1), padding, bias=False)
        self.bn = Normalisation(leaving)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """A block: its branches side by side [N,C,H,W] -> [N,C',H',W']; one that halves has the maximum beside them."""

    def __init__(self, entering: int, branches: Branches, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.halves = any("/2" in branch for branch in branches)
        self.leaving = entering if self.halves else 0
        self.branches: list[list[list[str]]] = []
        for branch in branches:
            width, steps = entering, []
            for step in branch.split(" > "):
                told = [convolution.split() for convolution in step.split(" | ")]
                for name, channels, kernel in told:
                    self.add_module(name, Convolution(width, int(channels), kernel))
                width = sum(int(channels) for _, channels, _ in told)
                steps.append([name for name, _, _ in told])
            self.branches.append(steps)
            self.leaving += width

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for steps in self.branches:
            y = self.pool(x) if steps[0] == ["branch_pool"] else x
            for names in steps:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            found.append(y)
        return torch.cat([*found, F.max_pool2d(x, 3, stride=2)] if self.halves else found, dim=1)


class Inception(nn.Module):
    """Pictures [N,3,299,299] -> features [N,2048]; `probabilities` of those where the file has a last layer.

    Pictures are what training saw: (x - 128) / 128 of bytes for "fid", [-1,1] for "torchvision".
    """

    def __init__(self, variant: Variant, classes: int | None) -> None:
        super().__init__()
        self.variant: Variant = variant

        def average(x: Tensor) -> Tensor:
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=variant == "torchvision")

        def maximum(x: Tensor) -> Tensor:
            return F.max_pool2d(x, 3, stride=1, padding=1)

        self.Conv2d_1a_3x3 = Convolution(3, 32, "3x3/2")
        self.Conv2d_2a_3x3 = Convolution(32, 32, "3x3", padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, "3x3")
        self.Conv2d_3b_1x1 = Convolution(64, 80, "1x1")
        self.Conv2d_4a_3x3 = Convolution(80, 192, "3x3", padded=False)
        width = 192
        for name, branches in BLOCKS.items():
            block = Mixed(width, branches, maximum if variant == "fid" and name == "Mixed_7c" else average)
            self.add_module(name, block)
            width = block.leaving
        self.fc = None if classes is None else nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))

    def probabilities(self, features: Tensor) -> Tensor:
        """[N,2048] -> [N,K]. "fid" leaves the bias out, as the Inception score's code does (Salimans et al. 2016)."""
        assert self.fc is not None
        return F.linear(features, self.fc.weight, None if self.variant == "fid" else self.fc.bias).softmax(dim=1)


def make_inception(state: dict[str, Tensor], variant: Variant | None) -> tuple[Inception, dict[str, Tensor]]:
    """The network that a file's weights are of, on the meta device, and those of the weights that it uses.

    variant None: 1008 classes are "fid", others torchvision's. Raises ValueError where the file leaves it open.
    """
    used = {name: value for name, value in state.items() if not TRAINING_ALONE.fullmatch(name)}
    last = used.get("fc.weight")
    classes = None if last is None else len(last)
    if variant is None:
        if classes not in CLASSES.values():
            told = "no last layer" if classes is None else f"{classes} classes"
            raise ValueError(f"has {told}, so it may be either variant")
        variant = "fid" if classes == CLASSES["fid"] else "torchvision"
    with torch.device("meta"):
        return Inception(variant, classes), used
