"""The Frechet distance of two sets of features, each seen as a Gaussian: FID, FVD (Heusel et al. 2017).

Shapes: N samples of D features [N,D]. Everything is float64.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from videodiff.errors import UserError
from videodiff.metrics.samples import Features, matrix, refuse_few, two

_ROWS = 4096  # rows that are turned to float64 at a time


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean [D] and scatter [D,D] of `count` samples; `a + b` is that of both sets together, whatever the order.

    scatter: the sum of outer products of deviations from the mean, from which the covariance follows. Batches and ranks
    each make their own and add them (Chan, Golub and LeVeque 1983), so that no squares of large means cancel.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Features, what: str = "features") -> Gaussian:
        """The Gaussian of features [N,D]; UserError as `samples.matrix`."""

        def one(part: Tensor) -> Gaussian:
            mean = part.double().mean(0)
            deviations = part.double() - mean
            return cls(len(part), mean, deviations.T @ deviations)

        return functools.reduce(operator.add, (one(part) for part in matrix(features, what).split(_ROWS)))

    def __add__(self, other: Gaussian) -> Gaussian:
        if self.mean.shape != other.mean.shape:
            raise UserError(
                f"features: {len(self.mean)} and {len(other.mean)} a sample can't be merged; take both from one network"
            )
        count = self.count + other.count
        step = other.mean - self.mean
        apart = torch.outer(step, step) * (self.count * other.count / count)
        return Gaussian(count, self.mean + step * (other.count / count), self.scatter + other.scatter + apart)

    @property
    def covariance(self) -> Tensor:
        """[D,D] with divisor N - 1; of one sample it is not defined."""
        return self.scatter / (self.count - 1)


def frechet_distance(real: Gaussian | Features, generated: Gaussian | Features) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2) >= 0, squared as FID is (Dowson and Landau 1982).

    Takes features [N,D] or their Gaussians, also of fewer samples than features. Its expectation falls with N as
    c / N + the distance of endless sets: compare figures of equal N, and mark those that `samples.caution` marks.
    Raises UserError for fewer than two samples, other numbers of features, and what is not finite.
    """
    if not isinstance(real, Gaussian) and not isinstance(generated, Gaussian):
        x, y = two(real, generated)
        if max(len(x), len(y)) <= x.shape[1]:
            return _by_samples(x.double(), y.double())
    a = real if isinstance(real, Gaussian) else Gaussian.of(real, "real")
    b = generated if isinstance(generated, Gaussian) else Gaussian.of(generated, "generated")
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"generated: {len(b.mean)} features a sample, but real has {len(a.mean)}; take both from one network"
        )
    for part, what in ((a, "real"), (b, "generated")):
        refuse_few("frechet", part.count, what)
    S1, S2 = a.covariance, b.covariance.to(a.mean.device)
    # The trace of (S1^1/2 S2 S1^1/2)^1/2 is the sum of singular values of R1 R2^T for any R^T R = S. Singular values
    # are exact to rounding; roots of eigenvalues are not: of the zeros of a singular S, rounding makes 1e-16, and
    # their roots, 1e-8 each, would add up.
    between = torch.linalg.svdvals(_root(S1) @ _root(S2).T).sum()
    return _distance((a.mean - b.mean.to(a.mean.device)).square().sum(), S1.trace() + S2.trace(), between)


def _by_samples(x: Tensor, y: Tensor) -> float:
    """The same from at most D samples each: deviations / (N - 1)^1/2 are such an R, and R1 R2^T is only [N1,N2]."""
    for part, what in ((x, "real"), (y, "generated")):
        refuse_few("frechet", len(part), what)
    R1, R2 = ((part - part.mean(0)) / math.sqrt(len(part) - 1) for part in (x, y))
    spread = R1.square().sum() + R2.square().sum()
    return _distance((x.mean(0) - y.mean(0)).square().sum(), spread, torch.linalg.svdvals(R1 @ R2.T).sum())


def _root(covariance: Tensor) -> Tensor:
    """R [r,D] with R^T R = covariance: the Cholesky factor, or by eigenvectors where the rank r is less than D."""
    noise = len(covariance) * torch.finfo(covariance.dtype).eps * covariance.diagonal().max()
    L, failed = torch.linalg.cholesky_ex(covariance)
    if not failed and L.diagonal().square().min() > noise:
        return L.T
    values, vectors = torch.linalg.eigh(covariance)
    real = values > noise
    return (vectors[:, real] * values[real].sqrt()).T


def _distance(apart: Tensor, spread: Tensor, between: Tensor) -> float:
    return max(0.0, float(apart + spread - 2 * between))  # rounding may fall below 0 for equal sets
