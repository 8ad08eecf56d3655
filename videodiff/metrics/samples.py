"""What every metric asks of its input: finite features of one width, uint8 pictures, enough samples; seeded draws.

Shapes: N samples of D features [N,D]; pictures [N,H,W,3] uint8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from operator import index
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from videodiff.errors import UserError

Features = Tensor | npt.NDArray[Any]  # [N,D]
Pictures = npt.NDArray[np.uint8]  # [N,H,W,3], or a clip [T,H,W,3]
Floats = npt.NDArray[np.float64]
Metric = Literal["frechet", "kid", "cmmd", "precision_recall", "density_coverage", "inception", "retrieval", "mean"]

_CELLS = 2**21  # numbers of a block of a table of pairs: 16 MiB, which malloc keeps; larger ones fault in anew
_SIZES = {"kid": 1000, "precision_recall": 3, "density_coverage": 5, "inception": 10, "retrieval": 10}


@dataclass(frozen=True)
class Need:
    """How many samples a metric needs: fewer than `least` are refused, fewer than `enough` marked with `why`."""

    least: int
    enough: int
    why: str


def least_samples(metric: Metric, dimension: int = 1, size: int | None = None) -> Need:
    """What a metric needs of each set. dimension: features, or classes of the inception score.

    size: samples in a subset of KID, k of the neighbours, splits of the inception score, or the largest rank of
    retrieval; by default the published one. UserError for a metric that is not known.
    """
    n = _SIZES.get(metric, 1) if size is None else size
    wide = "the k-th neighbour of few samples is far off and its ball holds anything; compare at equal N only"
    needs = {
        "frechet": Need(2, dimension + 1, "biased: N <= D, so the covariance is singular; compare at equal N only"),
        # Unbiased at any N (Binkowski et al. 2018, Jayasumana et al. 2024): few samples widen the interval, no more.
        "kid": Need(max(2, n), max(2, n), "a subset is drawn without replacement"),
        "cmmd": Need(2, 2, "the estimator compares pairs of each set"),
        "precision_recall": Need(n + 1, max(n + 1, 1000), f"biased upward: {wide}"),
        "density_coverage": Need(n + 1, max(n + 1, 1000), f"unsteady: {wide}"),
        "inception": Need(n, n * dimension, "biased downward: a split can't show more classes than it has samples"),
        "retrieval": Need(n + 1, 10 * n, "easy: among few candidates a guess is often right; compare at equal N only"),
        "mean": Need(2, 20, "the percentile interval of few values is too narrow"),
    }
    if metric not in needs:
        raise UserError(f"metric {metric!r}: not known; choose one of {', '.join(needs)}")
    return needs[metric]


def caution(metric: Metric, count: int, dimension: int = 1, size: int | None = None) -> str | None:
    """The mark for a report beside a figure from `count` samples; None where there are enough."""
    need = least_samples(metric, dimension, size)
    return None if count >= need.enough else f"{need.why} (N = {count}, fewer than {need.enough})"


def refuse_few(metric: Metric, count: int, what: str, size: int | None = None) -> None:
    """UserError where a set has too few samples for the figure to be defined."""
    least = least_samples(metric, size=size).least
    if count < least:
        raise UserError(f"{what}: {count} samples, and {metric} needs at least {least}; give more samples")


def matrix(features: Features, what: str) -> Tensor:
    """Features [N,D] as a float32 or float64 tensor; UserError for another shape, no rows, or what is not finite."""
    # An array that is read-only, such as a file's, is copied: torch would warn of it.
    x = features if isinstance(features, Tensor) else torch.as_tensor(np.require(features, requirements="W"))
    if x.ndim != 2 or not x.numel():
        raise UserError(f"{what}: features are [N,D] with N, D > 0, not {list(x.shape)}; give one row for each sample")
    if x.is_complex():
        raise UserError(f"{what}: features are real numbers, not {x.dtype}; give the network's own output")
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float() if x.is_floating_point() else x.double()
    bad = ~torch.isfinite(x).all(1)
    if bool(bad.any()):
        raise UserError(
            f"{what}: {int(bad.sum())} of {len(x)} rows hold NaN or infinity, first row {int(bad.int().argmax())}; "
            "count those samples as failures and leave them out"
        )
    return x.detach()


def two(first: Features, second: Features, names: tuple[str, str] = ("real", "generated")) -> tuple[Tensor, Tensor]:
    """Two sets of features of one width, on the device of the first; UserError for other widths, or as `matrix`."""
    x, y = matrix(first, names[0]), matrix(second, names[1])
    if x.shape[1] != y.shape[1]:
        raise UserError(
            f"{names[1]}: {y.shape[1]} features a sample, but {names[0]} has {x.shape[1]}; take both from one network"
        )
    return x, y.to(x.device)


def pictures_of(pictures: Pictures, what: str, least: int = 1) -> Pictures:
    """Pictures or frames uint8 [N,H,W,3]; UserError for another type or shape, or fewer than `least` of them."""
    x = np.asarray(pictures)
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or not x.size:
        raise UserError(f"{what}: pictures are uint8 [N,H,W,3], not {x.dtype} {list(x.shape)}; convert them before")
    if len(x) < least:
        raise UserError(f"{what}: {len(x)} frames, and this figure needs at least {least}; give longer clips")
    return x


def blocks(rows: Tensor, columns: int, most: int = 2**30) -> Iterator[tuple[int, Tensor]]:
    """(first row, at most `most` rows) of such a height that a table of them by so many columns stays small."""
    height = max(1, min(most, _CELLS // columns))
    for start in range(0, len(rows), height):
        yield start, rows[start : start + height]


def draws(*key: int | str) -> np.random.Generator:
    """A generator that depends on `key` alone, the same on every machine; (1, "2"), (12,) and ("1", 2) differ."""
    # With its length before each text, no two keys run together; index() refuses a float, which int() would cut.
    text = "".join(f"s{len(part)}:{part}" if isinstance(part, str) else f"i{index(part)};" for part in key)
    words = np.frombuffer(sha256(text.encode(errors="surrogatepass")).digest(), "<u4")
    return np.random.default_rng(np.random.SeedSequence([int(word) for word in words]))
