"""Precision, recall, density and coverage by nearest neighbours, and the training samples nearest to generated ones.

Shapes: N samples of D features [N,D]. Distances are Euclidean, in float64; memory grows with N, not with its square.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from videodiff.errors import UserError
from videodiff.metrics.samples import Features, blocks, refuse_few, two


@dataclass(frozen=True)
class Support:
    """How two sets cover one another. Precision, recall and coverage are shares; density has no upper bound."""

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True)
class Neighbours:
    """The training samples nearest to each generated one, nearest first: indices int64 [N,k], distances [N,k]."""

    indices: Tensor
    distances: Tensor


def support(real: Features, generated: Features, k: int = 3, k_density: int = 5) -> Support:
    """Improved precision and recall with balls to the k-th neighbour; density and coverage with `k_density`.

    precision: share of generated samples within the ball of some real one; recall: the other way round
    (Kynkaanniemi et al. 2019, eq. 2, k = 3). density: real balls that hold a generated sample, over k_density, on
    average; coverage: share of real balls that hold a generated sample (Naeem et al. 2020, k = 5). Balls are closed.
    Raises UserError for at most k samples, other numbers of features, and what is not finite.
    """
    if min(k, k_density) < 1:
        raise UserError(f"support: k={k}, k_density={k_density}; a neighbour's number is at least 1")
    x, y = (part.double() for part in two(real, generated))
    for part, what in ((x, "real"), (y, "generated")):
        refuse_few("precision_recall", len(part), what, k)
    refuse_few("density_coverage", len(x), "real", k_density)
    most = max(k, k_density)
    radii = _squared_radii(x, min(most, len(x) - 1))
    ball, wide = radii[:, k - 1], radii[:, k_density - 1]
    ball_y = _squared_radii(y, k)[:, k - 1]
    precise, held = 0, 0
    recalled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    covered = torch.zeros_like(recalled)
    for start, rows in blocks(y, len(x)):
        squares = _squares(rows, x)
        precise += int((squares <= ball).any(1).sum())
        recalled |= (squares <= ball_y[start : start + len(rows), None]).any(0)
        within = squares <= wide
        held += int(within.sum())
        covered |= within.any(0)
    recall, coverage = (float(found.double().mean()) for found in (recalled, covered))
    return Support(precise / len(y), recall, held / (k_density * len(y)), coverage)


def nearest(generated: Features, training: Features, k: int = 1) -> Neighbours:
    """The k training samples nearest to each generated one: what a model has memorised lies unusually near.

    Near is told by comparison: with the distances of held-out samples to the same training set. Raises UserError for
    fewer than k training samples, other numbers of features, and what is not finite.
    """
    x, y = (part.double() for part in two(generated, training, ("generated", "training")))
    if not 1 <= k <= len(y):
        raise UserError(f"nearest: k={k} of {len(y)} training samples; give a k of 1 to {len(y)}")
    indices, distances = [], []
    for _, rows in blocks(x, max(len(y), k * x.shape[1])):
        found = _squares(rows, y).topk(k, dim=1, largest=False).indices
        # Again by differences: squares of sums lose half the digits, and a copy must lie at 0.
        exact, order = (rows[:, None] - y[found]).norm(dim=2).sort(dim=1)
        indices.append(found.gather(1, order))
        distances.append(exact)
    return Neighbours(torch.cat(indices), torch.cat(distances))


def _squared_radii(x: Tensor, k: int) -> Tensor:
    """Squared distances [N,k] of each sample to the nearest k others."""
    found = []
    for start, rows in blocks(x, len(x)):
        squares = _squares(rows, x)
        squares.diagonal(start).fill_(torch.inf)  # a sample is no neighbour of itself, but an equal one is
        found.append(squares.topk(k, dim=1, largest=False).values)
    return torch.cat(found)


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances [N,M]. What float64 can't tell from 0 is 0, so that equal samples lie in balls of radius 0."""
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = torch.addmm(lengths, x, y.T, alpha=-2)
    return squares.masked_fill_(squares <= lengths.mul_(1e-13), 0.0)
