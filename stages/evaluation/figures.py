"""Figures that sets of clips have and single clips have not: distances of what was made from what is real, by features.

N samples, K frames of each (1 for networks that see whole clips), D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from videodiff.errors import UserError
from videodiff.metrics.gaussian import frechet_distance
from videodiff.metrics.intervals import Interval, set_interval
from videodiff.metrics.kernels import cmmd, polynomial_mmd
from videodiff.metrics.manifold import support
from videodiff.metrics.samples import Metric, caution
from videodiff.metrics.scores import inception_score, retrieval_recall
from videodiff.networks.features import FeatureExtractor

LEAST = 16  # samples: of fewer no set is judged
WIDE = 512  # features beyond which resampling is dear
RANKS = (1, 5, 10)


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
    rows: Sequence[str], features: Mapping[str, Tensor], extractors: Sequence[FeatureExtractor], *key: int | str
) -> list[dict[str, Any]]:
    """Every figure of every row by every extractor that saw it, as JSON; [] for fewer than LEAST samples.

    features: by "extractor/row" [N,K,D] and "extractor/texts" [N,D], as `Gauge.features` gives them, of one split. key:
    what the resamples follow from. A figure that can't be had is told with the reason as its "refused".
    """
    found: list[dict[str, Any]] = []
    for number, extractor in enumerate(extractors):
        for row in rows:
            made, real = features.get(f"{number}/{row}"), features.get(f"{number}/{LIKE.get(row, '')}")
            if made is None or len(made) < LEAST:
                continue
            told = {"row": row, "features": extractor.name, "n": len(made)}
            if real is not None:
                real = real[:, : made.shape[1]]  # of a picture the first frame
                for name, value in _distances(real, made, extractor, key, row).items():
                    found.append({**told, "figure": name, **value})
            if (classes := features.get(f"{number}/{row}/classes")) is not None:
                value = _figure(
                    "inception", partial(_inception, classes), (len(classes),), classes.shape[1], (*key, row)
                )
                found.append({**told, "figure": "inception", **value})
            if row == "real" and extractor.has_texts:
                for name, value in _retrieval(made.mean(1), features[f"{number}/texts"], (*key, row)).items():
                    found.append({**told, "figure": name, **value})
    return found


def _distances(
    real: Tensor, made: Tensor, extractor: FeatureExtractor, key: tuple[int | str, ...], row: str
) -> dict[str, dict[str, Any]]:
    def of(function: Callable[[Tensor, Tensor], float]) -> Callable[..., float]:
        # All frames of the chosen samples: those of one clip are much alike, so clips are drawn, not frames.
        return lambda i, j: function(real[torch.from_numpy(i)].flatten(0, 1), made[torch.from_numpy(j)].flatten(0, 1))

    sizes, source = (len(real), len(made)), (extractor.kind, extractor.takes)
    return {name: _figure(name, of(function), sizes, made.shape[2], (*key, row, *source, name))
            for name, function in distances(extractor.has_texts).items()}  # fmt: skip


def distances(of_clip: bool) -> dict[str, Callable[[Tensor, Tensor], float]]:
    """Every figure of (real, made) features [N,D], by name. of_clip: the features are embeddings of a CLIP."""
    return {
        "frechet": frechet_distance, "kernel": polynomial_mmd, **({"cmmd": cmmd} if of_clip else {}),
        **{name: partial(_support, name) for name in ("precision", "recall", "density", "coverage")},
    }  # fmt: skip


def _inception(classes: Tensor, chosen: Any) -> float:
    return inception_score(classes[torch.from_numpy(chosen)], splits=1)[0]


def _support(name: str, real: Tensor, made: Tensor) -> float:
    return float(getattr(support(real, made), name))


def _figure(
    name: str, figure: Callable[..., float], sizes: Sequence[int], dimension: int, key: tuple[int | str, ...]
) -> dict[str, Any]:
    try:
        interval = set_interval(figure, sizes, *key, resamples=100 if dimension <= WIDE else 20)
    except UserError as error:
        return {"refused": str(error)}
    warned = caution(FIGURES[name].metric, min(sizes), dimension, None if name != "kernel" else 2)
    return {**as_json(interval), **({"caution": warned} if warned else {})}


def _retrieval(pictures: Tensor, texts: Tensor, key: tuple[int | str, ...]) -> dict[str, dict[str, Any]]:
    """Recalls of the real clips and their captions, both ways: what the text tower knows."""
    sizes = (len(texts),)

    def of(name: str, rank: int) -> Callable[..., float]:
        return lambda i: retrieval_recall(pictures[torch.from_numpy(i)], texts[torch.from_numpy(i)], ranks=(rank,))[
            name
        ]

    names = {f"{way}_r{rank}": rank for rank in RANKS for way in ("text_to_image", "image_to_text")}
    return {name: _figure(name, of(name, rank), sizes, pictures.shape[1], key) for name, rank in names.items()}


def as_json(interval: Interval) -> dict[str, Any]:
    """value, interval, and where it is estimated how far the value lies above that of endless sets."""
    told = {"value": interval.value, "interval": [interval.low, interval.high]}
    return {**told, "bias": interval.bias} if interval.bias else told
