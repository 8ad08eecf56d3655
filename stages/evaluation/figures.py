"""Figures that sets of clips have and single clips have not: distances of what was made from what is real, by features.

N samples, K frames of each (1 for networks that see whole clips), D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from videodiff.errors import UserError
from videodiff.metrics.gaussian import frechet_distance
from videodiff.metrics.intervals import Interval, set_interval, wilson
from videodiff.metrics.kernels import cmmd, polynomial_mmd
from videodiff.metrics.manifold import Support, support
from videodiff.metrics.samples import Metric, caution
from videodiff.metrics.scores import inception_score, retrieval_recall
from videodiff.networks.features import FeatureExtractor
from videodiff.networks.features.extractor import told_apart

LEAST = 16  # samples: of fewer no set is judged
WIDE = 512  # features beyond which resampling is dear
FALSE = 0.05  # the share of its own value by which few samples may change an inception score before it is marked
RANKS = (1, 5, 10)
SUPPORT = ("precision", "recall", "density", "coverage")
Figures = Callable[[Tensor, Tensor], float]  # of real and made features [N,K,D]


@dataclass(frozen=True)
class Figure:
    """How a figure is told. better: which way. metric: whose number of samples `caution` judges. is_share: it is the
    share of samples of which something is right."""

    label: str
    better: Literal["more", "less"]
    metric: Metric
    digits: int = 3
    is_share: bool = False


FIGURES: dict[str, Figure] = {
    "frechet": Figure("Frechet distance", "less", "frechet"),
    "kernel": Figure("kernel distance (KID, unlike prompts)", "less", "kid", 5),
    "cmmd": Figure("CMMD", "less", "cmmd"),
    "precision": Figure("precision", "more", "precision_recall", is_share=True),
    "recall": Figure("recall", "more", "precision_recall", is_share=True),
    "density": Figure("density", "more", "density_coverage"),
    "coverage": Figure("coverage", "more", "density_coverage", is_share=True),
    "inception": Figure("inception score, first frames", "more", "inception", 2),
    "inception_clips": Figure("inception score, clips", "more", "inception", 2),
    **{f"{way}_r{rank}": Figure(f"{words}, R@{rank}", "more", "retrieval", is_share=True)
       for way, words in (("text_to_image", "clips found by their texts"), ("image_to_text", "texts by their clips"))
       for rank in RANKS},
}  # fmt: skip
# Row -> the real row that it should be like. Those of one frame are compared with first frames.
LIKE = {
    "autoencoder": "real", "image": "real", "video_real": "real", "video_generated": "real",
    "interpolation": "real_smooth", "whole": "real_smooth",
}  # fmt: skip


def set_figures(
    rows: Sequence[str],
    features: Mapping[str, Tensor],
    texts: Sequence[str],
    extractors: Sequence[FeatureExtractor],
    *key: int | str,
) -> list[dict[str, Any]]:
    """Every figure of every row by every extractor that saw it, as JSON.

    features: by "extractor/row" [N,K,D], "extractor/texts" [N,D] and "finite/row" [N], as they are kept, of one split.
    texts: the captions of those N. key: what the resamples follow from. Samples that are not finite are left out and
    counted. A figure that can't be had is told with the reason as its "refused".
    """
    found: list[dict[str, Any]] = []
    names = told_apart([extractor.name for extractor in extractors])
    for number, extractor in enumerate(extractors):
        for row in rows:
            if (every := features.get(f"{number}/{row}")) is None:
                continue
            finite = features[f"finite/{row}"].bool()
            made = every[finite]
            told = {"row": row, "features": names[number], "n": len(made), "not_finite": int((~finite).sum())}
            if len(made) < LEAST:
                reason = f"{len(made)} samples, fewer than {LEAST}; ask for more prompts"
                found.append({**told, "figure": "frechet", "refused": reason})
                continue
            real = features.get(f"{number}/{LIKE.get(row, '')}")
            if real is not None:
                near = real[finite][:, : made.shape[1]]  # of a picture the first frame
                source = (*key, row, extractor.kind, extractor.takes)
                for name, value in _distances(near, made, extractor, source):
                    found.append({**told, "figure": name, **value})
            if (classes := features.get(f"{number}/{row}/classes")) is not None:
                score = inception_of(classes[finite])
                name = "inception" if extractor.takes == "pictures" else "inception_clips"
                value = _figure(name, score, len(made), classes.shape[1], (*key, row))
                found.append({**told, "figure": name, **value})
            if row == "real" and extractor.has_texts:
                captions, said = features[f"{number}/texts"], alike(texts)
                for name, recall in recalls(made.mean(1), captions, said).items():
                    value = _figure(name, recall, len(made), made.shape[2], (*key, row))
                    found.append({**told, "figure": name, **value})
    return found


def _distances(
    real: Tensor, made: Tensor, extractor: FeatureExtractor, key: tuple[int | str, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, function in distances(extractor.has_texts).items():
        # The four figures of support are drawn alike: each of their tables of neighbours is made once.
        source = (*key, "support" if name in SUPPORT else name)
        yield name, _figure(name, of_samples(function, real, made), len(made), made.shape[2], source)


def of_samples(function: Figures, real: Tensor, made: Tensor) -> Callable[..., float]:
    """The figure of chosen samples: all frames of theirs, as those of one clip are much alike; and the made ones with
    the real ones of the same prompts, since each was made like one of them."""

    def figure(i: Any) -> float:
        chosen = torch.from_numpy(i)
        return function(real[chosen], made[chosen])

    return figure


def distances(of_clip: bool) -> dict[str, Figures]:
    """Every figure of (real, made) features [N,K,D] of the same prompts, by name. of_clip: the features are embeddings
    of a CLIP. The kernel distances leave out pairs of one prompt, which would bias them."""
    once = _Once()
    kernels = {"kernel": polynomial_mmd, **({"cmmd": cmmd} if of_clip else {})}
    return {
        "frechet": lambda real, made: frechet_distance(real.flatten(0, 1), made.flatten(0, 1)),
        **{name: partial(_apart, distance) for name, distance in kernels.items()},
        **{name: partial(once.support, name) for name in SUPPORT},
    }


def _apart(distance: Callable[..., float], real: Tensor, made: Tensor) -> float:
    return distance(real.flatten(0, 1), made.flatten(0, 1), of_one=made.shape[1])


class _Once:
    """Precision, recall, density and coverage of the same sets come from one table."""

    def __init__(self) -> None:
        self._known: dict[bytes, Support] = {}

    def support(self, name: str, real: Tensor, made: Tensor) -> float:
        key = hashlib.sha256(real.numpy().tobytes() + made.numpy().tobytes()).digest()
        if key not in self._known:
            self._known[key] = support(real.flatten(0, 1), made.flatten(0, 1))
        return float(getattr(self._known[key], name))


def inception_of(classes: Tensor) -> Callable[..., float]:
    """The inception score of chosen ones of probabilities [N,C], over all of them in one."""
    return lambda chosen: inception_score(classes[torch.from_numpy(chosen)], splits=1)[0]


def resamples_for(dimension: int) -> int:
    """How many halves a figure of so many features is drawn again from."""
    return 100 if dimension <= WIDE else 20


def _figure(
    name: str, figure: Callable[..., float], count: int, dimension: int, key: tuple[int | str, ...]
) -> dict[str, Any]:
    is_share, metric = FIGURES[name].is_share, FIGURES[name].metric
    warned = None
    try:
        interval = set_interval(figure, (count,), *key, resamples=resamples_for(dimension), is_share=is_share)
    except UserError as error:
        if metric != "retrieval":
            return {"refused": str(error)}
        try:  # half the samples are fewer than the rank, all of them are not
            value = figure(np.arange(count))
        except UserError:
            return {"refused": str(error)}
        interval = wilson(round(value * count), count)
        warned = "half the samples are too few for this rank: the interval is Wilson's, as of queries that are apart"
    if metric == "inception":
        few = _false_by_few(interval, count)
    else:
        few = caution(metric, count, dimension, None if name != "kernel" else 2)
    told = "; ".join(filter(None, (few, warned)))
    return {**as_json(interval), **({"caution": told} if told else {})}


def _false_by_few(score: Interval, count: int) -> str | None:
    """The mark of an inception score that so few samples make too small by more than a twentieth, as its halves tell.

    The logarithm of the score falls short by about sum(var p_c / mean p_c) / 2 N of the classes c (Miller 1955, for the
    entropy of p(y)), at most (C - 1) / 2 N: 5 % at N = 10 C. A set that shows few classes, or shows them unsurely,
    needs far fewer, so that the number of classes alone would mark nearly every score.
    """
    short = -score.bias / score.value
    return None if short < FALSE else f"biased downward: by about {100 * short:.0f} % of itself (N = {count})"


def recalls(pictures: Tensor, captions: Tensor, said: Sequence[int]) -> dict[str, Callable[..., float]]:
    """Recalls of chosen ones of real clips [N,D] and their captions [N,D], both ways: what a text tower knows.
    said: see `alike`."""

    def of(name: str, rank: int) -> Callable[..., float]:
        def recall(i: Any) -> float:
            chosen = torch.from_numpy(i)
            same = torch.tensor(said)[chosen].tolist()
            return retrieval_recall(pictures[chosen], captions[chosen], ranks=(rank,), alike=same)[name]

        return recall

    return {name: of(name, rank) for rank in RANKS for name in (f"text_to_image_r{rank}", f"image_to_text_r{rank}")}


def alike(texts: Sequence[str]) -> list[int]:
    """Of each text the number of its words' first appearance: equal texts have equal numbers."""
    first: dict[str, int] = {}
    return [first.setdefault(text, len(first)) for text in texts]


def as_json(interval: Interval) -> dict[str, Any]:
    """value, interval, and where it is estimated how far the value lies above that of endless sets."""
    told = {"value": interval.value, "interval": [interval.low, interval.high]}
    return {**told, "bias": interval.bias} if interval.bias else told
