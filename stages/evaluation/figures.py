"""Figures that sets of clips have and single clips have not: distances of what was made from what is real, by features.

N samples, K frames of each (1 for networks that see whole clips), D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from videodiff.errors import UserError
from videodiff.metrics.gaussian import frechet_distance
from videodiff.metrics.intervals import Interval, set_interval
from videodiff.metrics.kernels import cmmd, polynomial_mmd
from videodiff.metrics.manifold import Support, support
from videodiff.metrics.samples import Metric, caution
from videodiff.metrics.scores import inception_score, retrieval_recall
from videodiff.networks.features import FeatureExtractor

LEAST = 16  # samples: of fewer no set is judged
WIDE = 512  # features beyond which resampling is dear
RANKS = (1, 5, 10)
SUPPORT = ("precision", "recall", "density", "coverage")
Figures = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Figure:
    """How a figure is told. better: which way. metric: whose number of samples `caution` judges."""

    label: str
    better: Literal["more", "less"]
    metric: Metric
    digits: int = 3


FIGURES: dict[str, Figure] = {
    "frechet": Figure("Frechet distance", "less", "frechet"),
    "kernel": Figure("kernel distance (KID, all samples)", "less", "kid", 5),
    "cmmd": Figure("CMMD", "less", "cmmd"),
    "precision": Figure("precision", "more", "precision_recall"),
    "recall": Figure("recall", "more", "precision_recall"),
    "density": Figure("density", "more", "density_coverage"),
    "coverage": Figure("coverage", "more", "density_coverage"),
    "inception": Figure("inception score, first frames", "more", "inception", 2),
    "inception_clips": Figure("inception score, clips", "more", "inception", 2),
    **{f"{way}_r{rank}": Figure(f"{words}, R@{rank}", "more", "retrieval")
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
                score = partial(_inception, classes[finite])
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
        return function(real[chosen].flatten(0, 1), made[chosen].flatten(0, 1))

    return figure


def distances(of_clip: bool) -> dict[str, Figures]:
    """Every figure of (real, made) features [N,D], by name. of_clip: the features are embeddings of a CLIP."""
    once = _Once()
    return {
        "frechet": frechet_distance, "kernel": polynomial_mmd, **({"cmmd": cmmd} if of_clip else {}),
        **{name: partial(once.support, name) for name in SUPPORT},
    }  # fmt: skip


class _Once:
    """Precision, recall, density and coverage of the same sets come from one table."""

    def __init__(self) -> None:
        self._known: dict[bytes, Support] = {}

    def support(self, name: str, real: Tensor, made: Tensor) -> float:
        key = hashlib.sha256(real.numpy().tobytes() + made.numpy().tobytes()).digest()
        if key not in self._known:
            self._known[key] = support(real, made)
        return float(getattr(self._known[key], name))


def _inception(classes: Tensor, chosen: Any) -> float:
    return inception_score(classes[torch.from_numpy(chosen)], splits=1)[0]


def _figure(
    name: str, figure: Callable[..., float], count: int, dimension: int, key: tuple[int | str, ...]
) -> dict[str, Any]:
    try:
        interval = set_interval(figure, (count,), *key, resamples=100 if dimension <= WIDE else 20)
    except UserError as error:
        return {"refused": str(error)}
    warned = caution(FIGURES[name].metric, count, dimension, None if name != "kernel" else 2)
    return {**as_json(interval), **({"caution": warned} if warned else {})}


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


def told_apart(names: Sequence[str]) -> list[str]:
    """The names of networks, numbered where several have the same one."""
    return [
        name if names.count(name) == 1 else f"{name} ({names[: place + 1].count(name)})"
        for place, name in enumerate(names)
    ]


def as_json(interval: Interval) -> dict[str, Any]:
    """value, interval, and where it is estimated how far the value lies above that of endless sets."""
    told = {"value": interval.value, "interval": [interval.low, interval.high]}
    return {**told, "bias": interval.bias} if interval.bias else told
