"""Precision, recall, density and coverage against sets drawn by hand, sums written out, and duplicates."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.metric_peers import normals
from videodiff.errors import UserError
from videodiff.metrics import samples
from videodiff.metrics.manifold import nearest, support


def line(*places: float) -> Tensor:
    return torch.tensor(places, dtype=torch.float64)[:, None]


def test_balls_on_a_line() -> None:
    """Real 0, 1, 2, 10: with k = 1 the radii are 1, 1, 1, 8. Generated 1.5, 9, 30: radii 7.5, 7.5, 21."""
    found = support(line(0, 1, 2, 10), line(1.5, 9, 30), k=1, k_density=1)
    assert found.precision == pytest.approx(2 / 3)  # 30 lies 20 away from 10
    assert found.recall == 1  # 0, 1, 2 lie within 7.5 of 1.5, 10 of 9
    assert found.density == pytest.approx((2 + 1) / 3)  # 1.5 in the balls of 1 and 2; 9 in that of 10
    assert found.coverage == pytest.approx(3 / 4)  # not that of 0
    wider = support(line(0, 1, 2, 10), line(1.5, 9, 30), k=2, k_density=2)
    # Radii 2, 1, 2, 9: 1.5 lies in the balls of 0, 1, 2 and 10, and 9 in that of 10.
    assert (wider.precision, wider.density, wider.coverage) == pytest.approx((2 / 3, 5 / 6, 1))


def written_out(x: np.ndarray, y: np.ndarray, k: int) -> list[float]:
    """All four from full tables."""

    def radii(z: np.ndarray) -> np.ndarray:
        return np.sort(np.linalg.norm(z[:, None] - z, axis=2), axis=1)[:, k]

    near = np.linalg.norm(x[:, None] - y, axis=2)
    real, generated = near <= radii(x)[:, None], near <= radii(y)
    return [real.any(0).mean(), generated.any(1).mean(), real.sum() / (k * len(y)), real.any(1).mean()]


@pytest.mark.parametrize("cells", [2**24, 50])
def test_it_is_the_tables_written_out_in_any_blocks(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_CELLS", cells)
    x, y = normals(70, 5), 0.8 * normals(45, 5, seed=1) + 0.4
    found = [support(x, y, k, k) for k in (1, 3, 5)]
    for k, one in zip((1, 3, 5), found, strict=True):
        assert [one.precision, one.recall, one.density, one.coverage] == pytest.approx(
            written_out(x.numpy(), y.numpy(), k)
        )
    mixed = support(x, y, 3, 5)
    assert (mixed.precision, mixed.recall) == (found[1].precision, found[1].recall)
    assert (mixed.density, mixed.coverage) == (found[2].density, found[2].coverage)


def test_precision_and_recall_change_places_with_the_sets() -> None:
    x, y = normals(60, 3), 0.5 * normals(80, 3, seed=1)
    there, back = support(x, y), support(y, x)
    assert (there.precision, there.recall) == (back.recall, back.precision)
    assert there.precision > there.recall  # the narrow set lies within the wide one
    moved = support(x.flip(0) * 3 - 7, y * 3 - 7)
    assert moved == there


def test_a_set_covers_itself_and_not_a_far_one_also_of_duplicates() -> None:
    x = normals(50, 6)
    same, far = support(x, x), support(x, x + 100)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert far.precision == far.recall == far.density == far.coverage == 0
    # Ten times the same picture: balls of radius 0, in which only it lies, far from the origin too.
    twice = x.repeat(10, 1) + 1000
    assert support(twice, x + 1000).precision == 1
    assert support(twice, x + 1000 + 1e-3).precision == 0
    assert support(x, x[:1].repeat(50, 1)).recall == pytest.approx(1 / 50)


def test_density_and_coverage_of_equal_distributions_have_the_paper_s_expectation() -> None:
    """Naeem et al., section 3.3: density 1, coverage 1 - (N-1)...(N-k) / ((2N-1)...(2N-k))."""
    N, k = 200, 5
    found = [support(normals(N, 2, seed=2 * n), normals(N, 2, seed=2 * n + 1)) for n in range(20)]
    expected = 1 - np.prod([(N - i) / (2 * N - i) for i in range(1, k + 1)])
    assert np.mean([f.coverage for f in found]) == pytest.approx(expected, abs=0.01)
    assert np.mean([f.density for f in found]) == pytest.approx(1, abs=0.03)


def test_the_nearest_training_sample_of_a_copy_is_its_original() -> None:
    training = normals(40, 16) + 1000
    shift = torch.zeros(16, dtype=torch.float64)
    shift[0] = 1e-3
    found = nearest(torch.stack([training[7], training[23] + shift]), training, k=3)
    assert found.indices[:, 0].tolist() == [7, 23]
    assert found.distances[0, 0] == 0
    assert float(found.distances[1, 0]) == pytest.approx(1e-3, rel=1e-9)
    near = (training[7] - training).norm(dim=1).sort()
    assert found.indices[0].tolist() == near.indices[:3].tolist()
    torch.testing.assert_close(found.distances[0], near.values[:3], rtol=1e-12, atol=0)


def test_too_few_samples_and_impossible_neighbours_are_refused() -> None:
    x = normals(20, 3)
    with pytest.raises(UserError, match="generated: 3 samples, and precision_recall needs at least 4"):
        support(x, x[:3])
    with pytest.raises(UserError, match="real: 5 samples, and density_coverage needs at least 6"):
        support(x[:5], x)
    with pytest.raises(UserError, match="k=0, k_density=5; a neighbour's number is at least 1"):
        support(x, x, k=0)
    with pytest.raises(UserError, match="k=21 of 20 training samples"):
        nearest(x, x, 21)
    with pytest.raises(UserError, match="training: 2 features a sample, but generated has 3"):
        nearest(x, x[:, :2])
