"""Kernel distances against sums written out, torchmetrics' KID and closed forms of Gaussians."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.metric_peers import normals, peer
from videodiff.errors import UserError
from videodiff.metrics import samples
from videodiff.metrics.kernels import cmmd, kid, polynomial_mmd


def test_kid_of_whole_sets_is_torchmetrics() -> None:
    x, y = normals(40, 12), 1.2 * normals(40, 12, seed=1) + 0.3
    found = kid(x, y, subsets=2, subset_size=40)
    assert found.mean == pytest.approx(float(peer("image.kid").poly_mmd(x, y)), rel=1e-12)
    assert found.deviation == pytest.approx(0, abs=1e-12)
    assert polynomial_mmd(x, y) == pytest.approx(found.mean, rel=1e-12)


def test_kid_over_subsets_is_the_figure_of_the_whole_and_varies_as_torchmetrics_does() -> None:
    x, y = normals(200, 4), 1.2 * normals(150, 4, seed=1) + 0.3
    found = kid(x, y, subsets=100, subset_size=50)
    generator = torch.Generator().manual_seed(0)
    theirs = []
    for _ in range(100):
        a, b = (part[torch.randperm(len(part), generator=generator)[:50]] for part in (x, y))
        theirs.append(float(peer("image.kid").poly_mmd(a, b)))
    assert found.mean == pytest.approx(polynomial_mmd(x, y), abs=4 * found.deviation / 10)
    assert found.mean == pytest.approx(np.mean(theirs), abs=5 * found.deviation / 10)
    assert found.deviation == pytest.approx(np.std(theirs), rel=0.35)
    assert kid(x, y, subsets=100, subset_size=50) == found
    assert kid(x, y, subsets=100, subset_size=50, seed=1) != found


def test_kid_is_unbiased_at_any_size() -> None:
    """Of equal Gaussians the mean is 0 within its error, of 10 samples as of 40; so it is negative at times."""
    for size in (10, 40):
        found = np.array(
            [polynomial_mmd(normals(size, 5, seed=2 * n), normals(size, 5, seed=2 * n + 1)) for n in range(200)]
        )
        assert abs(found.mean()) < 4 * found.std() / math.sqrt(200)
        assert (found < 0).any()


def test_kid_in_one_dimension_is_the_distance_of_three_moments() -> None:
    """(xy + 1)^3 = 1 + 3 xy + 3 x^2 y^2 + x^3 y^3: the squared differences of moments, 3, 3 and 1 times."""
    x, y = normals(2000, 1), 0.8 * normals(2000, 1, seed=1) + 0.5
    moments = [np.array([float((z**k).mean()) for k in (1, 2, 3)]) for z in (x, y)]
    assert polynomial_mmd(x, y) == pytest.approx(float(((moments[0] - moments[1]) ** 2) @ (3, 3, 1)), abs=2e-2)


def written_out(x: Tensor, y: Tensor, unbiased: bool) -> float:
    """CMMD from differences, all pairs at once."""
    a, b = (z / z.norm(dim=1, keepdim=True) for z in (x, y))

    def mean(p: Tensor, q: Tensor, apart: bool) -> Tensor:
        k = torch.exp(-(p[:, None] - q).square().sum(2) / 200)
        return (k.sum() - k.trace()) / (len(p) * (len(p) - 1)) if apart else k.mean()

    return 1000 * float(mean(a, a, unbiased) + mean(b, b, unbiased) - 2 * mean(a, b, False))


def test_cmmd_is_the_sum_written_out_by_either_estimator() -> None:
    x, y = normals(60, 8) + 1, 3 * normals(45, 8, seed=1)
    assert cmmd(x, y) == pytest.approx(written_out(x, y, True), abs=1e-9)
    assert cmmd(x, y, "published") == pytest.approx(written_out(x, y, False), abs=1e-9)
    cosines = [
        float((z @ z.T).sum() - len(z)) / (len(z) * (len(z) - 1))
        for z in (x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True))
    ]
    added = sum(10 * (1 - c) / n for c, n in zip(cosines, (60, 45), strict=True))
    assert cmmd(x, y, "published") - cmmd(x, y) == pytest.approx(added, rel=0.02)
    assert cmmd(x, x, "published") == pytest.approx(0, abs=1e-9)
    assert cmmd(y, x) == pytest.approx(cmmd(x, y), abs=1e-9)
    assert cmmd(5 * x, y) == pytest.approx(cmmd(x, y), abs=1e-9)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("distance", [polynomial_mmd, cmmd])
def test_sets_that_answer_the_same_prompts_are_compared_without_bias(distance, frames: int) -> None:  # type: ignore[no-untyped-def]
    """Both sets are of one distribution, each pair of clips and the frames of each clip alike: the distance is 0."""
    found: dict[str, list[float]] = {"apart": [], "all": []}
    for seed in range(200):
        prompt, spread = normals(12, 4, seed=3 * seed).repeat_interleave(frames, 0), 0.3
        x, y = (prompt + spread * normals(12 * frames, 4, seed=3 * seed + i) for i in (1, 2))
        found["apart"].append(distance(x, y, of_one=frames))
        found["all"].append(distance(x, y))
    error = np.std(found["apart"]) / math.sqrt(200)
    assert abs(np.mean(found["apart"])) < 4 * error
    assert np.mean(found["all"]) < -10 * np.std(found["all"]) / math.sqrt(200)


def test_what_is_left_out_of_a_kernel_distance_is_the_sum_written_out() -> None:
    x, y = normals(12, 5), normals(12, 5, seed=1) + 0.4
    clip = torch.arange(12) // 3
    apart = (clip[:, None] != clip).double()

    def mean(a: Tensor, b: Tensor) -> float:
        return float((((a @ b.T / 5 + 1) ** 3) * apart).sum() / apart.sum())

    assert polynomial_mmd(x, y, of_one=3) == pytest.approx(mean(x, x) + mean(y, y) - 2 * mean(x, y), rel=1e-12)
    for other in (y[:9], y[:11]):
        with pytest.raises(UserError, match="with 3 of each prompt give as many of both"):
            polynomial_mmd(x, other, of_one=3)
    with pytest.raises(UserError, match="of two prompts or more"):
        polynomial_mmd(x[:3], y[:3], of_one=3)


def test_small_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normals(53, 6), normals(31, 6, seed=1) + 0.2
    whole = polynomial_mmd(x, y), cmmd(x, y)
    monkeypatch.setattr(samples, "_CELLS", 100)
    assert (polynomial_mmd(x, y), cmmd(x, y)) == pytest.approx(whole, rel=1e-10)


def test_float32_loses_nothing_that_shows() -> None:
    x, y = normals(300, 64).abs(), normals(300, 64, seed=1).abs() * 1.05
    found = kid(x.float(), y.float(), 5, 200).mean
    assert found == pytest.approx(kid(x, y, 5, 200).mean, abs=1e-7)


def test_what_makes_no_distance_is_refused() -> None:
    x = normals(30, 4)
    with pytest.raises(UserError, match=r"real: 30 samples, fewer than kid's subset_size 1000; .* of at most 30"):
        kid(x, x)
    with pytest.raises(UserError, match="0 subsets of 10 samples"):
        kid(x, x, 0, 10)
    with pytest.raises(UserError, match="3 features a sample, but real has 4"):
        kid(x, x[:, :3], 1, 10)
    with pytest.raises(UserError, match="generated: an embedding of zeros has no direction"):
        cmmd(x, torch.zeros(5, 4))
    with pytest.raises(UserError, match="generated: 1 samples, and cmmd needs at least 2"):
        cmmd(x, x[:1])
    with pytest.raises(UserError, match="choose unbiased or published"):
        cmmd(x, x, "biased")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="generated: 30 of 30 rows hold NaN"):
        cmmd(x, x * math.nan)
