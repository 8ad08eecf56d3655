"""Intervals are held to what they promise: they hold the truth in 95 of 100 simulated trials, or nearly."""

import math

import numpy as np
import pytest
import torch

from videodiff.errors import UserError
from videodiff.metrics.gaussian import frechet_distance
from videodiff.metrics.intervals import (
    Interval,
    compare,
    compare_sets,
    mean_interval,
    set_interval,
    share_difference,
    wilson,
)
from videodiff.metrics.manifold import support
from videodiff.metrics.samples import draws


@pytest.mark.parametrize("n", [6, 20, 100])
def test_the_interval_of_a_mean_holds_it_also_of_few_values(n: int) -> None:
    rng = np.random.default_rng(n)
    held = 0
    for trial in range(400):
        found = mean_interval(rng.standard_normal(n) + 3, "coverage", trial)
        held += found.low <= 3 <= found.high
    assert held / 400 == pytest.approx(0.95, abs=0.035)


def test_the_interval_of_a_mean_is_the_normal_one_of_many_values_and_follows_from_its_key() -> None:
    values = np.random.default_rng(0).standard_normal(3000)
    found = mean_interval(values, "psnr", 7)
    half = 1.96 * values.std() / math.sqrt(3000)
    assert (found.n, found.value, found.bias) == (3000, pytest.approx(values.mean()), 0)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert mean_interval(list(values), "psnr", 7) == found
    assert mean_interval(values, "psnr", 8) != found
    assert mean_interval([2.0, 2.0]) == Interval(2, 2, 2, 2)


def test_a_paired_comparison_sees_what_the_values_hide() -> None:
    rng = np.random.default_rng(0)
    hard = 10 * rng.standard_normal(50)  # how hard a prompt is: far more than the models differ
    old, new = hard + rng.standard_normal(50), hard + rng.standard_normal(50) + 1
    found = compare(new, old, "a")
    assert (found.verdict, found.more, found.n) == ("better", 0, 50)
    assert found.low < 1 < found.high
    assert compare(old, new, "a").verdict == "worse"
    assert compare(new, old, "a", higher_is_better=False).verdict == "worse"
    shuffled = compare(rng.permutation(new), old, "a")
    assert shuffled.verdict == "can't tell"
    assert shuffled.deviation > 5 * found.deviation


def test_the_further_pairs_that_it_asks_for_tell_in_four_of_five_trials() -> None:
    """The difference is a fifth of a pair's deviation: (1.96 + 0.84)^2 * 25 = 197 pairs in all."""
    signs = np.where(np.arange(20) % 2, 1.0, -1.0)
    few = 0.2 + signs * math.sqrt(19 / 20)  # mean 0.2 and deviation 1 exactly
    found = compare(few, np.zeros(20))
    assert (found.verdict, found.more) == ("can't tell", 197 - 20)
    assert (found.mean, found.deviation) == (pytest.approx(0.2), pytest.approx(1))
    rng = np.random.default_rng(1)
    told = [compare(0.2 + rng.standard_normal(197), np.zeros(197), trial).verdict for trial in range(200)]
    assert told.count("better") / 200 == pytest.approx(0.8, abs=0.09)
    assert told.count("worse") == 0


def test_equal_models_are_told_apart_by_chance_only() -> None:
    rng = np.random.default_rng(2)
    told = [compare(rng.standard_normal(30), rng.standard_normal(30), trial).verdict for trial in range(300)]
    assert 1 - told.count("can't tell") / 300 == pytest.approx(0.05, abs=0.035)
    same = compare(np.ones(30), np.ones(30))
    assert (same.verdict, same.more) == ("can't tell", None)


def test_five_pairs_never_tell() -> None:
    found = compare([1.0, 1.1, 1.2, 1.3, 1.4], [0.0] * 5)
    assert (found.verdict, found.more) == ("can't tell", 1)
    assert found.low > 0
    assert compare([1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [0.0] * 6).verdict == "better"


def test_wilson_s_interval() -> None:
    """Values of Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson(right, n)
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
        mirrored = wilson(n - right, n)
        assert (mirrored.low, mirrored.high) == pytest.approx((1 - high, 1 - low), abs=5e-5)
    assert (wilson(0, 20).low, wilson(20, 20).high) == (0, 1)


def test_the_difference_of_paired_shares() -> None:
    """Newcombe (1998b), table II, method 10: 36 right in both, 12 and 2 in one alone, none in neither."""
    first, second = [1.0] * 48 + [0.0] * 2, [1.0] * 36 + [0.0] * 12 + [1.0] * 2
    found = share_difference(first, second)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)
    back = share_difference(second, first)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    equal = share_difference([1.0] * 40, [1.0] * 40)
    assert (equal.low, equal.high) == pytest.approx((wilson(40, 40).low - 1, 1 - wilson(40, 40).low))
    with pytest.raises(UserError, match="values of pairs are 0 or 1"):
        share_difference([0.5, 1.0], [1.0, 1.0])
    assert compare([1.0] * 40, [1.0] * 40, is_share=True).verdict == "can't tell"
    assert compare([1.0] * 40, [0.0] * 40, is_share=True).verdict == "better"


@pytest.mark.parametrize(("p", "q"), [(0.97, 0.97), (0.98, 0.9), (0.6, 0.5)])
def test_the_interval_of_paired_shares_holds_their_difference(p: float, q: float) -> None:
    rng, held = np.random.default_rng(3), 0
    for _ in range(400):
        hard = rng.random(60)  # of each prompt, for both models
        found = share_difference(
            (hard < p).astype(float), (np.where(rng.random(60) < 0.5, hard, rng.random(60)) < q) * 1.0
        )
        held += found.low <= p - q <= found.high
    assert held / 400 >= 0.93


def test_a_share_of_a_set_that_is_all_right_keeps_its_doubt() -> None:
    """Where 97 of 100 are right, 30 are often all right: an interval of no width would miss the truth each time."""
    rng, held = np.random.default_rng(4), 0
    for trial in range(300):
        right = (rng.random(30) < 0.97).astype(float)
        found = set_interval(lambda i, right=right: right[i].mean(), (30,), trial, resamples=100, is_share=True)
        assert 0 <= found.low < found.high <= 1
        held += found.low <= 0.97 <= found.high
    assert held / 300 >= 0.93
    ones = np.ones(30)
    found = set_interval(lambda i: ones[i].mean(), (30,), resamples=20, is_share=True)
    assert (found.low, found.high) == (wilson(30, 30).low, 1.0)
    same = compare_sets(lambda i: ones[i].mean(), lambda i: ones[i].mean(), 30, is_share=True)
    assert (same.verdict, same.low, same.high) == ("can't tell", -wilson(0, 30).high, wilson(0, 30).high)


def test_twenty_halves_of_wide_features_hold_the_truth() -> None:
    """D = 600, as of Inception and I3D: more halves are dear, and their percentiles held it in 87 of 100 trials."""
    N, D, trials = 24, 600, 120

    def sets(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        spread = torch.linspace(3, 0.01, D)  # a few directions hold most, as in a network's features
        x, y = torch.randn(2, N, D, generator=generator) * spread
        return x, y + 0.2

    truth = float(np.mean([distance(*sets(seed)) for seed in range(10_000, 10_300)]))
    held = {"student": 0, "percentiles": 0}
    for seed in range(trials):
        x, y = sets(seed)
        halves: list[float] = []

        def of(i: np.ndarray, x: torch.Tensor = x, y: torch.Tensor = y, halves: list[float] = halves) -> float:
            halves.append(distance(x[torch.from_numpy(i)], y[torch.from_numpy(i)]))
            return halves[-1]

        found = set_interval(of, (N,), "wide", seed, resamples=20)
        held["student"] += found.low <= truth <= found.high
        low, high = halves[0] + np.percentile(np.array(halves[1:]) - np.mean(halves[1:]), (2.5, 97.5))
        held["percentiles"] += low <= truth <= high
    assert held["student"] / trials >= 0.9
    assert held["student"] > held["percentiles"]


def two_sets(seed: int, N: int, D: int, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, N, D, generator=generator, dtype=torch.float64)
    return x, shift + (1.3 if shift else 1.0) * y


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return frechet_distance(x, y)


def recall(x: torch.Tensor, y: torch.Tensor) -> float:
    return support(y, x, k_density=3).recall  # of the wider set by the narrower one


@pytest.mark.parametrize(
    ("figure", "N", "D", "shift"),
    [(distance, 60, 3, 0.5), (distance, 60, 3, 0.0), (distance, 20, 30, 0.5), (recall, 60, 2, 0.5)],
    ids=["differ", "equal", "fewer than features", "recall"],
)
def test_the_interval_of_a_set_figure_holds_it_where_a_bootstrap_does_not(figure, N: int, D: int, shift: float) -> None:  # type: ignore[no-untyped-def]
    truth = np.mean([figure(*two_sets(seed, N, D, shift)) for seed in range(10_000, 10_200)])
    held, held_by_bootstrap, trials = 0, 0, 40
    for seed in range(trials):
        x, y = two_sets(seed, N, D, shift)

        def of(i: np.ndarray, j: np.ndarray, x: torch.Tensor = x, y: torch.Tensor = y) -> float:
            return figure(x[torch.from_numpy(i)], y[torch.from_numpy(j)])

        found = set_interval(of, (N, N), "coverage", seed, resamples=60)
        held += found.low <= truth <= found.high
        rng = draws("bootstrap", seed)
        low, high = np.percentile([of(*rng.integers(N, size=(2, N))) for _ in range(20)], (2.5, 97.5))
        held_by_bootstrap += low <= truth <= high
    assert held / trials >= 0.87
    assert held_by_bootstrap / trials <= 0.85


def test_the_bias_of_a_distance_is_estimated_and_endless_sets_extrapolated() -> None:
    biases, extrapolated, plain = [], [], []
    for seed in range(60):
        x, y = two_sets(seed, 100, 3, 0.5)
        found = set_interval(lambda i, j, x=x, y=y: distance(x[i], y[j]), (100, 100), seed, resamples=20)
        biases.append(found.bias)
        extrapolated.append(found.value - found.bias)
        plain.append(found.value)
    endless = 3 * 0.5**2 + 3 * 0.3**2
    assert np.mean(plain) - endless > 0.1
    assert np.mean(extrapolated) == pytest.approx(endless, abs=0.06)
    assert np.mean(biases) == pytest.approx(np.mean(plain) - endless, abs=0.06)


def test_the_interval_of_a_mean_as_a_set_figure_is_the_usual_one() -> None:
    values = np.random.default_rng(0).standard_normal(101)
    found = set_interval(lambda i: float(values[i].mean()), (101,), resamples=1000)
    usual = 1.96 * values.std(ddof=1) / math.sqrt(101)
    assert (found.value, found.n) == (pytest.approx(values.mean()), 101)
    assert found.high - found.low == pytest.approx(2 * usual, rel=0.1)
    assert found.bias == pytest.approx(0, abs=0.02)
    assert set_interval(lambda i: float(values[i].mean()), (101,), resamples=1000) == found
    assert set_interval(lambda i: float(values[i].mean()), (101,), "other", resamples=1000) != found


def test_a_half_holds_no_sample_twice_and_all_alike() -> None:
    seen = np.zeros(9)

    def figure(first: np.ndarray, second: np.ndarray) -> float:
        assert len(np.unique(first)) == len(first)
        assert len(first) in (4, 5, 9)
        assert len(second) in (3, 6)
        if len(first) < 9:
            seen[first] += 1
        return 0.0

    set_interval(figure, (9, 6), resamples=400)
    assert seen.sum() == 400 * 4.5
    assert seen.min() > 160


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: mean_interval([1.0]), "values: 1 samples, and mean needs at least 2"),
        (
            lambda: mean_interval([1.0, math.nan, math.inf]),
            "values: 2 of 3 are not finite, first number 1; count those",
        ),
        (lambda: mean_interval(np.ones((3, 2))), r"values: one number for each sample expected, not \[3, 2\]"),
        (lambda: compare([1.0, 2.0], [1.0, 2.0, 3.0]), "2 and 3 values; a paired comparison needs the same samples"),
        (lambda: wilson(1, 0), "share: 1 of 0"),
        (lambda: wilson(4, 3), "share: 4 of 3"),
        (lambda: set_interval(lambda i: 1.0, (3,)), r"sizes \[3\], 200 resamples: give sets of at least 4"),
        (lambda: set_interval(lambda i: 1.0, (9,), resamples=3), "3 resamples"),
        (lambda: set_interval(lambda i: math.nan, (9,)), "figure: it is not finite on some of the samples"),
    ],
)
def test_what_has_no_interval_is_refused(call, problem: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=problem):
        call()
