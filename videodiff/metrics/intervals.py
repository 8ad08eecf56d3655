"""How sure a figure is: intervals of means, shares and set metrics, and whether one model is better than another.

All intervals are of 95 %. Draws follow from a key of numbers and words, never from a generator's history.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from videodiff.errors import UserError
from videodiff.metrics.samples import Floats, draws, refuse_few

Z95 = 1.959963984540054  # the normal distribution's 97.5 % point
Z80 = 0.8416212335729143  # its 80 % point: the power that a comparison is planned for
RESAMPLES = 2000
LEAST_PAIRS = 6
FEW_HALVES = 100  # fewer have no percentiles worth the name: Student's interval is taken
_CELLS = 2**22  # indices drawn at a time

Values = Sequence[float] | npt.NDArray[np.floating]


@dataclass(frozen=True)
class Interval:
    """A figure of n samples with its 95 % interval. bias: see `set_interval`; 0 for means and shares."""

    value: float
    low: float
    high: float
    n: int
    bias: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """new - old over n pairs: mean, its interval, standard deviation of a pair's difference.

    more: further pairs with which a difference of this size and deviation would be told in 80 of 100 trials; 0 where
    it is told already, None where the mean difference is 0 and no number would do.
    """

    mean: float
    low: float
    high: float
    n: int
    deviation: float
    verdict: Literal["better", "worse", "can't tell"]
    more: int | None


def mean_interval(values: Values, *key: int | str) -> Interval:
    """Mean and percentile bootstrap interval (Efron 1979), expanded for few values (Hesterberg 2015).

    Raises UserError for fewer than two values, and not finite ones.
    """
    sample = _finite(values, "values")
    tail = _tail(len(sample))
    low, high = np.percentile(_means(sample, key), (tail, 100 - tail))
    return Interval(float(sample.mean()), float(low), float(high), len(sample))


def compare(
    new: Values, old: Values, *key: int | str, higher_is_better: bool = True, is_share: bool = False
) -> Comparison:
    """Whether new values are better than old ones of the same samples (prompts, seeds), in the same order.

    Pairs share what makes a prompt easy or hard, so their differences vary less than the values. Fewer than 6 pairs
    never tell. is_share: the values are 0 or 1, see `share_difference`. UserError for other numbers of values, fewer
    than two, and not finite ones.
    """
    a, b = _pairs(new, old)
    found = share_difference(a, b) if is_share else mean_interval(a - b, *key)
    deviation = float(np.std(a - b, ddof=1))
    # Up to five pairs all differ to one side by mere chance in more than 5 of 100 trials, and their interval with them;
    # pairs that are equal say nothing of the side.
    differing = int(np.count_nonzero(a - b))
    if found.low <= 0 <= found.high or differing < LEAST_PAIRS:
        needed = None if found.value == 0 else math.ceil(((Z95 + Z80) * deviation / found.value) ** 2)
        least = math.ceil(LEAST_PAIRS * len(a) / max(1, differing))
        more = None if needed is None else max(1, least - len(a), needed - len(a))
        return Comparison(found.value, found.low, found.high, len(a), deviation, "can't tell", more)
    verdict: Literal["better", "worse"] = "better" if (found.value > 0) == higher_is_better else "worse"
    return Comparison(found.value, found.low, found.high, len(a), deviation, verdict, 0)


def wilson(right: int, n: int) -> Interval:
    """The score interval of a share (Wilson 1927): honest also near 0 and 1, where the normal one is not."""
    if n < 1 or not 0 <= right <= n:
        raise UserError(f"share: {right} of {n}; give at least one sample and 0 to n right ones")
    return _score(right / n, n)


def share_difference(new: Values, old: Values) -> Interval:
    """The share of ones among `new` less that among `old`, of pairs of zeros and ones (Newcombe 1998b, method 10).

    Made of both shares' Wilson intervals and the pairs' correlation, it has a width also where no pair differs.
    UserError as `compare`, and for other values.
    """
    a, b = _pairs(new, old)
    if not np.isin([a, b], (0, 1)).all():
        raise UserError("share: values of pairs are 0 or 1; compare means of other ones")
    n, both = len(a), float((a * b).sum())
    first, second = _score(float(a.mean()), n), _score(float(b.mean()), n)
    ones, others = float(a.sum()), float(b.sum())
    alike = both * (n - ones - others + both) - (ones - both) * (others - both)
    if alike > 0:
        alike = max(alike - n / 2, 0.0)  # a correction for continuity
    marginal = ones * (n - ones) * others * (n - others)
    phi = alike / math.sqrt(marginal) if marginal else 0.0

    def reach(up: float, down: float) -> float:
        return math.sqrt(max(0.0, up * up - 2 * phi * up * down + down * down))

    value = first.value - second.value
    low = value - reach(first.value - first.low, second.high - second.value)
    high = value + reach(first.high - first.value, second.value - second.low)
    return Interval(value, low, high, n)


def set_interval(
    figure: Callable[..., float], sizes: Sequence[int], *key: int | str, resamples: int = 200, is_share: bool = False
) -> Interval:
    """The interval of a figure that sets have and samples have not: a Frechet distance, a recall.

    figure: takes an array of indices for each set, and gives the figure of those samples; sizes: how many each set
    has. A set that is not drawn again (published statistics) is left out of both. A difference of two models' figures
    is a figure too: hand the same indices to both. Costs `resamples` calls on half the samples.

    value and interval are of the figure at these sizes, which is what a table compares. bias: how far it lies, by
    estimate, above that of endless sets, right where the bias falls as 1 / N: value - bias is the extrapolated figure,
    not to be trusted for a Frechet distance of fewer samples than features. is_share: the figure is a share of samples;
    where all or none are right no half differs, so that the interval is at least Wilson's, and within 0 and 1. n: the
    smallest size. UserError for sets of fewer than 4 samples, and figures that are not finite.
    """
    if not sizes or min(sizes) < 4 or resamples < 20:
        raise UserError(f"sizes {list(sizes)}, {resamples} resamples: give sets of at least 4 samples, 20 resamples")
    # Why no bootstrap: drawn with replacement, a set holds each sample twice or not at all by turns. Duplicates shrink
    # its covariance's rank and the balls of its neighbours, so that the figure of a resample is biased once more than
    # the figure itself: of Gaussians (D = 8, N = 100) a 95 % percentile interval held the truth in 78 of 100 trials, of
    # equal ones in 3, and of a recall in 61. Halves drawn without replacement have no duplicates, and the variance of
    # a half's figure about the whole's is just that of the whole's about the truth (the delete-d jackknife with d =
    # N / 2: Shao and Wu 1989, also for figures that aren't smooth; Politis and Romano 1994). Only their centre is off,
    # by the bias of N / 2 samples against N: it is subtracted. The same trials: 95, 99 and 95.
    whole = _checked(figure(*(np.arange(size) for size in sizes)))
    halves = np.empty(resamples)
    for number in range(resamples):
        generator = draws(*key, "half", number)
        # Of an odd number the smaller and the larger half by turns: half the samples on average.
        parts = [np.sort(generator.permutation(size)[: (size + number % 2) // 2]) for size in sizes]
        halves[number] = _checked(figure(*parts))
    if resamples < FEW_HALVES:
        # The outermost of 20 halves lie at their 5th and 95th percentile: intervals held the truth in 87 of 100 trials.
        half = _student(resamples - 1) * float(halves.std(ddof=1))
        low, high = whole - half, whole + half
    else:
        low, high = (float(end) for end in whole + np.percentile(halves - halves.mean(), (2.5, 97.5)))
    if is_share:
        least = _score(whole, min(sizes))
        low, high = max(0.0, min(low, least.low)), min(1.0, max(high, least.high))
    return Interval(whole, low, high, min(sizes), float(halves.mean() - whole))


def compare_sets(
    new: Callable[..., float],
    old: Callable[..., float],
    count: int,
    *key: int | str,
    higher_is_better: bool = True,
    resamples: int = 200,
    is_share: bool = False,
) -> Comparison:
    """As `compare`, of a figure of sets: new and old give it of chosen ones of the same `count` samples. is_share: the
    figure is a share of them. UserError as `set_interval`."""
    found = set_interval(lambda i: new(i) - old(i), (count,), *key, resamples=resamples)
    if is_share and found.low == found.high:  # no half differs: what Wilson leaves to either side of so many samples
        room = _score(0.0, count).high
        found = replace(found, low=max(-1.0, found.low - room), high=min(1.0, found.high + room))
    half = (found.high - found.low) / 2
    deviation = half / Z95 * math.sqrt(count)  # as if of a mean of `count` differences
    if found.low <= 0 <= found.high:
        needed = None if found.value == 0 else math.ceil(((Z95 + Z80) * deviation / found.value) ** 2)
        more = None if needed is None else max(1, needed - count)
        return Comparison(found.value, found.low, found.high, count, deviation, "can't tell", more)
    verdict: Literal["better", "worse"] = "better" if (found.value > 0) == higher_is_better else "worse"
    return Comparison(found.value, found.low, found.high, count, deviation, verdict, 0)


def _means(sample: Floats, key: tuple[int | str, ...]) -> Floats:
    """Means of RESAMPLES bootstrap samples."""
    generator, n = draws(*key, "bootstrap"), len(sample)
    height = max(1, _CELLS // n)
    rows = [min(height, RESAMPLES - start) for start in range(0, RESAMPLES, height)]
    return np.concatenate([sample[generator.integers(n, size=(count, n))].mean(1) for count in rows])


def _tail(n: int) -> float:
    """Percent beyond each end of a percentile interval that is as wide as Student's: 2.5 for endless values.

    Resampled means of n values vary by (n - 1) / n too little, and know no t distribution.
    """
    return 50 * math.erfc(_student(n - 1) * math.sqrt(n / (n - 1) / 2))


def _student(v: int) -> float:
    """The 97.5 % point of Student's t of v degrees of freedom, by the expansion in 1 / v (Abramowitz and Stegun,
    26.7.5)."""
    z = Z95
    return z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)


def _score(share: float, n: int) -> Interval:
    """Wilson's interval of a share of n samples, which need be no whole number of them."""
    z2 = Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the formula gives 0 and 1 but for rounding.
    return Interval(share, 0.0 if share == 0 else middle - half, 1.0 if share == 1 else middle + half, n)


def _pairs(new: Values, old: Values) -> tuple[Floats, Floats]:
    a, b = _finite(new, "new"), _finite(old, "old")
    if len(a) != len(b):
        raise UserError(
            f"new and old: {len(a)} and {len(b)} values; a paired comparison needs the same samples of both"
        )
    return a, b


def _finite(values: Values, what: str) -> Floats:
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1:
        raise UserError(f"{what}: one number for each sample expected, not {list(sample.shape)}")
    refuse_few("mean", len(sample), what)
    if not np.isfinite(sample).all():
        bad = np.flatnonzero(~np.isfinite(sample))
        raise UserError(
            f"{what}: {len(bad)} of {len(sample)} are not finite, first number {bad[0]}; count those samples as "
            "failures and leave them out"
        )
    return sample


def _checked(value: float) -> float:
    if not math.isfinite(value):
        raise UserError(
            "figure: it is not finite on some of the samples; leave out those that have none, and count them"
        )
    return float(value)
