"""Distances of two sets of features by kernels: KID (Binkowski et al. 2018) and CMMD (Jayasumana et al. 2024).

Shapes: N samples of D features [N,D]. Memory grows with N, not with its square.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from videodiff.errors import UserError
from videodiff.metrics.samples import Features, blocks, draws, refuse_few, two

Kernel = Callable[[Tensor], Tensor]  # of inner products, which it may overwrite
SIGMA = 10.0  # the width of CMMD's kernel
SCALE = 1000.0  # CMMD is told in thousandths
_ROWS = 256  # of a table of one set with itself, of which each block leaves out what came before


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over `subsets` of `subset_size` samples. The deviation is of one subset's figure."""

    mean: float
    deviation: float
    subsets: int
    subset_size: int


def kid(
    real: Features, generated: Features, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """KID: the unbiased squared MMD of the kernel (x.y / D + 1)^3, over subsets drawn without replacement from `seed`.

    Unbiased, so small sets are comparable with large ones; it may be negative near 0. Raises UserError for fewer
    samples than a subset, other numbers of features, and what is not finite.
    """
    if subsets < 1 or subset_size < 2:
        raise UserError(f"kid: {subsets} subsets of {subset_size} samples; give at least 1 of at least 2")
    x, y = two(real, generated)
    for part, what in ((x, "real"), (y, "generated")):
        if len(part) < subset_size:
            raise UserError(
                f"{what}: {len(part)} samples, fewer than kid's subset_size {subset_size}; give more samples or a "
                f"subset_size of at most {min(len(x), len(y))}"
            )
    found = []
    for subset in range(subsets):
        generator = draws(seed, "kid", subset)
        chosen = [torch.from_numpy(generator.permutation(len(part))[:subset_size]) for part in (x, y)]
        a, b = (part[numbers.to(part.device)] for part, numbers in zip((x, y), chosen, strict=True))
        found.append(_mmd(a, b, _cubic(x.shape[1])))
    return KernelDistance(float(np.mean(found)), float(np.std(found)), subsets, subset_size)


def polynomial_mmd(real: Features, generated: Features, of_one: int = 0) -> float:
    """KID's distance of whole sets of any two sizes: what its mean over subsets estimates. UserError as `kid`.

    of_one: both sets have so many rows in a row for each prompt (frames of its clip), in the same order. Then no row is
    compared with those of its own prompt, of either set: frames of a clip are alike, and what was made for a prompt is
    like its real clip, so that those pairs say nothing of how two drawn at random differ, and bias the distance, the
    former upward, the latter downward. Without them it is unbiased again. UserError too for other numbers of rows.
    """
    x, y = two(real, generated)
    for part, what in ((x, "real"), (y, "generated")):
        refuse_few("cmmd", len(part), what)
    return _mmd(x, y, _cubic(x.shape[1]), of_one=of_one)


def cmmd(
    real: Features,
    generated: Features,
    estimator: Literal["unbiased", "published"] = "unbiased",
    of_one: int = 0,
) -> float:
    """1000 times the squared MMD of exp(-|x - y|^2 / (2 * 10^2)) between CLIP embeddings, brought to unit length here.

    unbiased: the paper's own estimator. published: that of its published code, whose means take in each sample's
    pair with itself, which adds about 10 (1 - mean cosine) (1 / N1 + 1 / N2): to compare with others' figures.
    of_one: as of `polynomial_mmd`, for the unbiased one. Raises UserError for fewer than two samples, embeddings of
    length 0, other widths, and what is not finite.
    """
    if estimator not in ("unbiased", "published"):
        raise UserError(f"cmmd: estimator {estimator!r} is not known; choose unbiased or published")
    x, y = (part.double() for part in two(real, generated))
    for part, what in ((x, "real"), (y, "generated")):
        refuse_few("cmmd", len(part), what)
        if not bool(part.any(1).all()):
            raise UserError(f"{what}: an embedding of zeros has no direction; leave such samples out and count them")
    a, b = (torch.nn.functional.normalize(part, dim=1) for part in (x, y))
    # exp(...) - 1 rather than exp(...): all kernels lie near 1, and the ones cancel in the sum of the three means.
    return SCALE * _mmd(a, b, lambda product: product.sub_(1).div_(SIGMA**2).expm1_(), estimator == "unbiased", of_one)


def _cubic(dimension: int) -> Kernel:
    return lambda product: product.div_(dimension).add_(1).pow_(3)  # in place: the table is the kernel's own


def _mmd(x: Tensor, y: Tensor, kernel: Kernel, unbiased: bool = True, of_one: int = 0) -> float:
    """Squared MMD (Gretton et al. 2012, eq. 3, or 5 if not unbiased). Products in the features' precision, sums in
    float64: rounding of products is random and vanishes in means of N^2 of them.
    """
    m, n = len(x), len(y)
    if of_one and (of_one < 0 or m != n or m % of_one or m == of_one):
        raise UserError(
            f"generated: {n} rows, real has {m}; with {of_one} of each prompt give as many of both, of two prompts or "
            "more"
        )
    between = sum(_total(kernel(rows @ y.T.to(x.dtype))) for _, rows in blocks(x, n))
    if of_one:
        between -= _of_one_prompt(x, y, kernel, of_one)
    apart = (of_one or 1) if unbiased else 0  # rows that are not compared with one another
    within = [_within(part, kernel, apart) for part in (x, y)]
    return within[0] / (m * (m - apart)) + within[1] / (n * (n - apart)) - 2 * between / (m * (n - of_one))


def _within(x: Tensor, kernel: Kernel, apart: int) -> float:
    """The kernel's sum over all pairs of one set, without those among each `apart` rows (1: a sample with itself)."""
    total = 0.0
    for start, rows in blocks(x, len(x), most=_ROWS):  # only from the diagonal on: the rest is its mirror image
        table = kernel(rows @ x[start:].T)
        total += _total(table[:, : len(rows)]) + 2 * _total(table[:, len(rows) :])
        if apart == 1:
            total -= _total(table.diagonal())
    return total - _of_one_prompt(x, x, kernel, apart) if apart > 1 else total


def _of_one_prompt(x: Tensor, y: Tensor, kernel: Kernel, count: int) -> float:
    """The kernel's sum over pairs of which both are among the same `count` rows."""
    a, b = (part.unflatten(0, (-1, count)) for part in (x, y.to(x.dtype)))
    return _total(kernel(a @ b.mT))


def _total(table: Tensor) -> float:
    return float(table.sum(dtype=torch.float64))
