"""Differences of what two sides made of the same prompts: two models of one row, or two rows of one model.

A side is a list of results, one for each prompt, in the same order. Features are [N,K,D]: N samples, K frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from stages.evaluation.figures import FIGURES, LEAST, distances, inception_of, of_samples, resamples_for
from stages.evaluation.measures import MEASURES, labelled
from stages.evaluation.statistics import right, truth_of
from stages.evaluation.worlds import attribute_label
from videodiff.metrics.intervals import Comparison, compare, compare_sets

SICK = "videos that are not finite, %"
Line = dict[str, Any]  # a figure of both sides, their difference, its interval and the verdict on the second


@dataclass(frozen=True)
class Result:
    """What one side made of a prompt: the row of its sample, and what it should show, where that is known."""

    row: dict[str, Any]
    truth: dict[str, str] | None = None

    @property
    def right(self) -> dict[str, bool]:
        return {} if self.truth is None else right(self.row, self.truth)

    def value(self, name: str) -> float | None:
        """A measure; NaN where there is none because the video is not finite, None where it was not asked for."""
        value = self.row["measures"].get(name)
        if value is not None:
            return float(value)
        return float("nan") if name in self.row["measures"] or not self.row["finite"] else None


def result_of(sample: dict[str, Any], row: str) -> Result:
    """What a row made of a finished sample."""
    return Result(sample["rows"][row], truth_of(sample, row))


def sample_lines(
    first: Sequence[Result],
    second: Sequence[Result],
    like: Sequence[Result | None],
    names: Sequence[str],
    by: dict[str, str],
    *key: str,
) -> Iterator[Line]:
    """Shares read right, videos that are not finite, and the measures `names`, by differences of the same prompts.

    A video that is not finite counts as the worst value that either side has: left out, it would hide that it failed.
    like: the real clips of the prompts. by: measure -> the network that it is of.
    """
    sick = [[float(not result.row["finite"]) for result in side] for side in (first, second)]
    failed = {"not_finite": [int(sum(side)) for side in sick]} if any(map(any, sick)) else {}
    known = [(a.right, b.right) for a, b in zip(first, second, strict=True) if a.right and b.right]
    for name in known[0][0] if len(known) > 1 else ():
        sides = [np.array([float(pair[side][name]) for pair in known]) for side in (0, 1)]
        yield _line(f"{attribute_label(name)} right, %", sides, 100.0, True, *key, "share", is_share=True) | failed
    if failed:
        sides = [*map(np.array, sick)]
        yield _line(SICK, sides, 100.0, False, *key, "sick", is_share=True) | failed
    for name in names:
        unit, label = MEASURES[name], labelled(name, by.get(name))
        wanted = [None if result is None else result.value(name) for result in like]
        told = [
            each
            for each in zip((a.value(name) for a in first), (b.value(name) for b in second), wanted, strict=True)
            if None not in each[: 3 if unit.better == "real" else 2]
        ]
        values = np.array([each[:2] for each in told], np.float64).reshape(-1, 2)
        if len(told) < 2 or not np.isfinite(values).any():
            continue
        if unit.better == "real":
            real = np.array([each[2] for each in told], np.float64)
            if len(told) >= LEAST and np.isfinite(real).all():
                yield _towards_real(label, unit.scale * values, unit.scale * real, *key, name) | failed
        else:
            sides = [*_worst_for_missing(values, unit.better == "more").T]
            yield _line(label, sides, unit.scale, unit.better == "more", *key, name, is_share=unit.is_share) | failed


def set_lines(
    real: Tensor,
    first: Tensor,
    second: Tensor,
    finite: tuple[Tensor, Tensor],
    classes: tuple[Tensor, Tensor] | None,
    is_clip: bool,
    by: str,
    takes: str,
    key: tuple[str, ...],
) -> Iterator[Line]:
    """Distances from the same real clips and inception scores, by halves of the same prompts.

    Features of videos that are not finite say nothing: their prompts are left out of both sides, are counted, and the
    side that has more of them is not called better. finite: bool [N] of either side; classes: probabilities [N,C].
    """
    both = finite[0] & finite[1]
    if (count := int(both.sum())) < LEAST:
        return
    lost = [int((~side).sum()) for side in finite]
    made = (first[both], second[both])
    near = real[both][:, : first.shape[1]]
    sides: dict[str, list[Callable[..., float]]] = {
        name: [of_samples(function, near, part) for part in made] for name, function in distances(is_clip).items()
    }
    if classes is not None:
        name = "inception" if takes == "pictures" else "inception_clips"
        sides[name] = [inception_of(part[both]) for part in classes]
    for name, (before, after) in sides.items():
        figure = FIGURES[name]
        wide = classes[0].shape[1] if classes is not None and figure.metric == "inception" else real.shape[2]
        line = set_line(
            before, after, count, figure.better == "more", *key, name,
            resamples=resamples_for(wide), is_share=figure.is_share,
        )  # fmt: skip
        line |= {"not_finite": lost} if any(lost) else {}
        favoured = {"better": 1, "worse": 0}.get(line["verdict"])
        if favoured is not None and lost[favoured] > lost[1 - favoured]:
            line |= {"verdict": "can't tell", "more": None}
        yield {"figure": f"{figure.label}, {by}", **line}


def set_line(
    before: Callable[..., float],
    after: Callable[..., float],
    count: int,
    more_is_better: bool,
    *key: str,
    resamples: int = 200,
    is_share: bool = False,
) -> Line:
    """A figure of chosen ones of `count` samples, of the first and of the second side."""
    every = np.arange(count)
    found = compare_sets(
        after, before, count, *key, higher_is_better=more_is_better, resamples=resamples, is_share=is_share
    )
    return _told(found, before(every), after(every))


def _line(
    label: str, sides: list[np.ndarray], scale: float, more_is_better: bool, *key: str, is_share: bool = False
) -> Line:
    first, second = sides
    found = compare(second, first, *key, label, higher_is_better=more_is_better, is_share=is_share)
    return {"figure": label, **_told(found, float(first.mean()), float(second.mean()), scale)}


def _towards_real(label: str, values: np.ndarray, real: np.ndarray, *key: str) -> Line:
    """A measure that should be what it is of the real clips, by how far its mean is from theirs. Of single clips that
    would be wrong: to always give the middle one is near to each, and nothing like them all."""
    known = values[np.isfinite(values)]
    filled = np.where(np.isfinite(values), values, known[np.argmax(np.abs(known - real.mean()))])

    def off(side: int) -> Callable[..., float]:
        return lambda i: float(abs(np.mean(filled[i, side] - real[i])))

    return {"figure": f"{label}, off the real clips'", **set_line(off(0), off(1), len(values), False, *key)}


def _worst_for_missing(values: np.ndarray, more_is_better: bool) -> np.ndarray:
    worst = np.nanmin(values) if more_is_better else np.nanmax(values)
    return np.where(np.isnan(values), worst, values)


def _told(found: Comparison, first: float, second: float, scale: float = 1.0) -> Line:
    return {
        "n": found.n, "first": scale * first, "second": scale * second, "difference": scale * found.mean,
        "interval": [scale * found.low, scale * found.high], "verdict": found.verdict, "more": found.more,
    }  # fmt: skip


def verdict_in_words(line: Line) -> str:
    """The verdict, how many more samples would tell, and how many videos of either side failed."""
    text = line["verdict"]
    if text == "can't tell":
        more, equal = line["more"], line["difference"] == 0
        text += ", equal so far" if equal else "" if more is None else f", {more} more samples would"
    if "not_finite" in line:
        text += f" (not finite: {line['not_finite'][0]} and {line['not_finite'][1]})"
    return text
