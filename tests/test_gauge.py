"""What the gauge makes of features and of looks: one network for every row's CLIP score, faults that pictures show."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.evaluation.measures import LOOKS, Gauge
from tests.metric_peers import moving


def network(takes: str, has_texts: bool) -> SimpleNamespace:
    return SimpleNamespace(takes=takes, has_texts=has_texts, frames=None)


def test_the_clip_score_is_the_mean_over_frames_by_one_network() -> None:
    gauge = Gauge([network("clips", True), network("pictures", False), network("pictures", True)])  # type: ignore[list-item]
    angles = torch.tensor([0.0, 0.5, 2.5])
    frames = torch.stack([angles.cos(), angles.sin()], 1)[None]
    text = torch.tensor([[1.0, 0.0]])
    features = {"0/video_real": -frames, "0/texts": text, "2/video_real": frames, "2/texts": text}
    (told,) = gauge.from_features("video_real", features, 1)
    # A frame that has nothing of the text counts as 0; of the mean of all features it would take from the others.
    assert told["text_likeness"] == pytest.approx(100 * (1 + np.cos(0.5)) / 3)
    assert gauge.from_features("image", {"1/image": frames, "0/texts": text, "2/texts": text}, 1)[0] == {
        "consistency": pytest.approx((np.cos(0.5) + 0 + np.cos(0.5) + 0) / 4)
    }


def test_blur_and_a_colour_cast_are_seen() -> None:
    sound = moving()
    blurred = sound.astype(float)
    for axis in (1, 2):
        blurred = sum(np.roll(blurred, step, axis) for step in range(-2, 3)) / 5
    cast = (sound * np.array([1.2, 1.0, 0.7])).clip(0, 255)
    first, soft, tinted = (Gauge().measures(np.asarray(c, np.uint8), 8) for c in (sound, blurred, cast))
    assert set(LOOKS) < set(first)
    assert soft["sharpness"] < 0.3 * first["sharpness"]
    assert soft["blue"] == pytest.approx(first["blue"], rel=0.1)
    assert tinted["blue"] == pytest.approx(0.7 * first["blue"], rel=0.05)
    assert tinted["green"] == first["green"]
    assert set(Gauge().measures(sound[:1], 8)) == set(LOOKS)  # of a picture nothing else
