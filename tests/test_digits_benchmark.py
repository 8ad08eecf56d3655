"""The benchmark on digits: what it judges by, against closed forms; and all of its lines once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.digits.__main__ import main
from benchmarks.digits.cache import Cache
from benchmarks.digits.data import LEVELS, NUM_TEST, load, to_grid
from benchmarks.digits.ddim import spherical
from benchmarks.digits.judge import Score, among, frechet_distance, share
from benchmarks.digits.report import claim, wrapped
from benchmarks.digits.sections import SECTIONS
from benchmarks.digits.train import rows


def test_frechet_distance_of_moments_that_are_known() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 5))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(5 * 4, rel=1e-9)
    trace = np.trace(np.cov(x, rowvar=False))
    centred = x - x.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx((3 - 1) ** 2 * trace, rel=1e-9)
    y = generator.normal(size=(300, 5)) @ generator.normal(size=(5, 5))
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)


def test_recall_counts_what_lies_near() -> None:
    line = torch.arange(10, dtype=torch.float64)[:, None]
    assert among(line, line).all()
    # The third neighbour of 0 is 3 away, that of 5 is 2 away.
    assert among(torch.tensor([[-3.0], [-3.1], [5.5], [12.0], [12.1]]).double(), line).tolist() == [1, 0, 1, 1, 0]


def test_an_effect_needs_two_deviations() -> None:
    assert Score(1, 0.1).below(Score(1.3, 0.1)) is True
    assert Score(1.3, 0.1).below(Score(1, 0.1)) is False
    assert Score(1, 0.1).below(Score(1.28, 0.1)) is None
    paired = [Score(value, 0.1, tuple(value + np.linspace(-0.1, 0.1, 9))) for value in (1, 1.05)]
    assert paired[0].below(paired[1]) is True
    assert share(torch.ones(50, dtype=torch.bool)).deviation > 0
    assert str(Score(12.3456, 0.0321)) == "12.346 ± 0.032"
    assert "**no**" in claim("A.", False, "1", "B.")
    assert "B." not in claim("A.", True, "1", "B.")


def test_the_split_is_fixed_and_on_the_grid() -> None:
    digits = load()
    assert len(digits.test) == NUM_TEST
    assert len(digits.train) + NUM_TEST == 1797
    assert torch.equal(to_grid(digits.test), digits.test)
    assert len(digits.train.unique()) == LEVELS
    assert torch.equal(load().test, digits.test)
    assert digits.test_labels.bincount(minlength=10).min() > 30


def test_an_epoch_meets_each_datum_once() -> None:
    met = torch.cat([rows(torch.arange(first, first + 4), 10) for first in range(0, 20, 4)])
    assert sorted(met[:10].tolist()) == sorted(met[10:].tolist()) == list(range(10))
    assert met[:10].tolist() != met[10:].tolist()


def test_interpolation_keeps_the_length() -> None:
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    path = spherical(a, b, 5)
    torch.testing.assert_close(path[[0, -1]], torch.stack([a, b]), atol=1e-6, rtol=0)
    torch.testing.assert_close(path.norm(dim=1), torch.full((5,), 3.0))


def test_what_was_computed_is_not_computed_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    first = cache.tensors("x", (1, "a"), lambda: {"x": torch.ones(2)})
    assert torch.equal(cache.tensors("x", (1, "a"), lambda: {"x": torch.zeros(2)})["x"], first["x"])
    assert torch.equal(cache.tensors("x", (1, "b"), lambda: {"x": torch.zeros(2)})["x"], torch.zeros(2))


def test_tables_are_not_broken_into_lines() -> None:
    text = "| " + "cell | " * 40 + "\n- " + "word " * 40
    first, *others = wrapped(text).split("\n")
    assert first == text.split("\n")[0]
    assert len(others) == 2
    assert all(len(line) <= 120 for line in others)


@pytest.mark.slow
def test_every_section_runs_and_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--runs", str(tmp_path)])
    report = tmp_path / "docs" / "core-results.md"
    text = report.read_text(encoding="utf-8")
    for title, _ in SECTIONS.values():
        assert f"## {title}" in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (report.parent / line.partition("(")[2].rstrip(")")).is_file()
    capfd.readouterr()
    main(["--quick", "--runs", str(tmp_path), "--only", "ddim"])
    assert "samples-" not in capfd.readouterr().out  # nothing was drawn again
    assert report.read_text(encoding="utf-8") == text
