"""The Frechet distance against closed forms, scipy's matrix root and torchmetrics' FID."""

import functools
import operator

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.metric_peers import Same, normals, peer
from videodiff.errors import UserError
from videodiff.metrics.gaussian import Gaussian, frechet_distance


def spread(D: int, rank: int, seed: int) -> Tensor:
    """A covariance [D,D] of a rank, with eigenvalues over five orders of magnitude."""
    A = normals(D, rank, seed=seed) * torch.logspace(0, -2.5, rank, dtype=torch.float64)
    return A @ A.T


def gaussian(mean: Tensor, covariance: Tensor) -> Gaussian:
    return Gaussian(1000, mean.double(), covariance.double() * 999)


@pytest.mark.parametrize("ranks", [(12, 12), (12, 5), (4, 12), (3, 6), (0, 12), (0, 0)])
def test_of_covariances_that_commute_it_is_the_distance_of_means_and_deviations(ranks: tuple[int, int]) -> None:
    D = 12
    basis = torch.linalg.qr(normals(D, D)).Q
    deviations = [torch.zeros(D, dtype=torch.float64) for _ in ranks]
    for number, rank in enumerate(ranks):
        deviations[number][:rank] = 0.3 + normals(rank, seed=number).abs()
    means = [normals(D, seed=10), normals(D, seed=11)]
    a, b = (gaussian(m, basis * s**2 @ basis.T) for m, s in zip(means, deviations, strict=True))
    truth = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(truth), abs=1e-6)
    assert frechet_distance(b, a) == pytest.approx(float(truth), abs=1e-6)


def test_in_one_dimension_and_in_two_it_is_the_formula_of_text_books() -> None:
    one = [gaussian(torch.tensor([m]), torch.tensor([[v]])) for m, v in ((1.0, 4.0), (3.0, 0.25))]
    assert frechet_distance(*one) == pytest.approx(4 + 1.5**2, abs=1e-12)
    # tr (S1 S2)^1/2 of 2x2 matrices is (tr S1 S2 + 2 (det S1 S2)^1/2)^1/2 (Cayley and Hamilton).
    S1, S2 = torch.tensor([[2.0, 0.7], [0.7, 1.0]]).double(), torch.tensor([[0.5, -0.2], [-0.2, 3.0]]).double()
    root = ((S1 @ S2).trace() + 2 * (S1.det() * S2.det()).sqrt()).sqrt()
    two = frechet_distance(gaussian(torch.zeros(2), S1), gaussian(torch.zeros(2), S2))
    assert two == pytest.approx(float(S1.trace() + S2.trace() - 2 * root), abs=1e-10)


@pytest.mark.parametrize("rank", [20, 7])
def test_it_is_scipy_s_matrix_root(rank: int) -> None:
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    S1, S2 = spread(20, 20, 0), spread(20, rank, 1)
    root = sqrtm(S1.numpy()).real
    truth = float(S1.trace() + S2.trace()) - 2 * np.trace(sqrtm(root @ S2.numpy() @ root).real)
    found = frechet_distance(gaussian(torch.zeros(20), S1), gaussian(torch.zeros(20), S2))
    assert found == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize("samples", [(300, 200), (9, 12)])
def test_it_is_torchmetrics_fid(samples: tuple[int, int]) -> None:
    x, y = normals(samples[0], 16) @ normals(16, 16, seed=5), 0.7 * normals(samples[1], 16, seed=1) + 0.2
    theirs = peer("image.fid").FrechetInceptionDistance(feature=Same())
    theirs.set_dtype(torch.float64)
    for part, real in ((x, True), (y, False)):
        theirs.update(part, real=real)
    assert frechet_distance(x, y) == pytest.approx(float(theirs.compute()), rel=1e-6)


@pytest.mark.parametrize("samples", [(5, 7), (20, 7), (7, 20), (16, 16)])
def test_by_few_samples_and_by_covariances_it_is_one_figure(samples: tuple[int, int]) -> None:
    x, y = normals(samples[0], 16), 1.5 * normals(samples[1], 16, seed=1) - 0.3
    whole = frechet_distance(Gaussian.of(x), Gaussian.of(y))
    assert frechet_distance(x, y) == pytest.approx(whole, rel=1e-9)
    assert frechet_distance(x, Gaussian.of(y)) == whole


def test_batches_and_ranks_merge_to_the_whole_also_far_from_zero() -> None:
    x = normals(9000, 6) @ normals(6, 6, seed=1) + 1e5
    whole, torch_s = Gaussian.of(x), torch.cov(x.T)
    parts = [Gaussian.of(part) for part in x.split([1, 8, 3000, 5991])]
    for found in (whole, functools.reduce(operator.add, parts), functools.reduce(operator.add, parts[::-1])):
        assert found.count == 9000
        torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(found.covariance, torch_s, rtol=1e-9, atol=1e-9)


def test_equal_sets_lie_at_zero_and_order_and_rotation_change_nothing() -> None:
    x, y = normals(60, 8), normals(50, 8, seed=1) * torch.linspace(0.5, 2, 8)
    turn = torch.linalg.qr(normals(8, 8, seed=2)).Q
    found = frechet_distance(x, y)
    assert 0 <= frechet_distance(x, x.flip(0)) < 1e-10
    assert frechet_distance(y, x) == pytest.approx(found, rel=1e-10)
    assert frechet_distance(x.flip(0), y) == pytest.approx(found, rel=1e-10)
    assert frechet_distance(x @ turn + 3, y @ turn + 3) == pytest.approx(found, rel=1e-9)
    assert frechet_distance(2 * x, 2 * y) == pytest.approx(4 * found, rel=1e-10)
    assert frechet_distance(x.numpy(), y.float()) == pytest.approx(found, rel=1e-5)


def test_its_bias_of_equal_gaussians_is_the_one_of_theory() -> None:
    """To first order (D + D (D + 1) / 4) (1 / N1 + 1 / N2): why figures of other N can't be compared."""
    D, N = 4, 200
    found = np.mean([frechet_distance(normals(N, D, seed=2 * n), normals(N, D, seed=2 * n + 1)) for n in range(200)])
    assert found == pytest.approx((D + D * (D + 1) / 4) * 2 / N, rel=0.1)


def test_what_makes_no_distance_is_refused() -> None:
    x = normals(20, 4)
    broken = x.clone()
    broken[3, 1] = torch.nan
    with pytest.raises(UserError, match=r"generated: 1 samples, and frechet needs at least 2"):
        frechet_distance(x, x[:1])
    with pytest.raises(UserError, match=r"generated: 3 features a sample, but real has 4; take both from one network"):
        frechet_distance(x, x[:, :3])
    with pytest.raises(UserError, match="generated: 3 features a sample, but real has 4"):
        frechet_distance(Gaussian.of(x), x[:, :3])
    with pytest.raises(UserError, match=r"generated: 1 of 20 rows hold NaN or infinity, first row 3; count those"):
        frechet_distance(x, broken)
    with pytest.raises(UserError, match=r"real: features are \[N,D\] with N, D > 0, not \[4\]"):
        frechet_distance(x[0], x)
    with pytest.raises(UserError, match="4 and 3 a sample can't be merged"):
        Gaussian.of(x) + Gaussian.of(x[:, :3])
