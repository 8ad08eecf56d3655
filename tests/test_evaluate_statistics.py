"""Intervals, PSNR and losses of the evaluation, against published numbers and closed forms."""

import numpy as np
import pytest

from stages.evaluation.road import blend
from stages.evaluation.statistics import in_words, losses, mean_interval, right, share, step_intervals
from videodiff.metrics.pictures import EQUAL_DB, clip_psnr


def test_a_share_and_a_mean_of_one_have_intervals() -> None:
    told = share([True] * 15 + [False] * 133)  # Newcombe (1998), table I
    assert (told["right"], told["n"]) == (15, 148)
    assert told["interval"] == pytest.approx([0.0624, 0.1605], abs=5e-5)
    assert mean_interval([3.0], "a") == {"n": 1, "mean": 3.0, "interval": [3.0, 3.0]}


def test_the_mean_and_its_interval_follow_statistics() -> None:
    values = np.random.default_rng(0).normal(30, 2, 400).tolist()
    told = mean_interval(values, "a")
    assert told["mean"] == pytest.approx(np.mean(values))
    error = 1.96 * np.std(values) / 20
    assert told["interval"] == pytest.approx([told["mean"] - error, told["mean"] + error], abs=0.03)
    assert told == mean_interval(values, "a")


def test_psnr_and_blending_in_closed_form() -> None:
    grey = np.full((4, 8, 8, 3), 100, np.uint8)
    assert clip_psnr(grey, grey + 1) == pytest.approx(20 * np.log10(255))
    assert clip_psnr(grey, grey) == EQUAL_DB
    steps = np.arange(0, 60, 20, dtype=np.uint8)[:, None, None, None] + np.zeros((3, 2, 2, 3), np.uint8)
    assert blend(steps, 4)[:, 0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 35, 40]


def test_nothing_read_is_wrong() -> None:
    truth = {"colour": "red", "shape": "cross"}
    assert right({"read": {"colour": None, "shape": "cross"}, "consistent": True}, truth) == {
        "colour": False,
        "shape": True,
        "all": False,
    }


def test_what_chance_may_have_done_is_said() -> None:
    def sample(right_ones: dict[str, bool]) -> dict:
        rows = {
            row: {"read": {"colour": "red" if hit else None}, "consistent": True} for row, hit in right_ones.items()
        }
        return {"split": "train", "truth": {"colour": "red"}, "rows": rows}

    rows = ("autoencoder", "image", "video_generated")
    samples = [sample({"autoencoder": True, "image": i % 10 > 0, "video_generated": i % 2 > 0}) for i in range(40)]
    found = step_intervals(samples, "seen")
    assert found["autoencoder"] == [0.0, 0.0]
    assert 0 <= found["image"][0] < 10 < found["image"][1]
    assert 20 < found["video"][0] < 40 < found["video"][1]
    assert "interpolation" not in found
    got = dict(zip(rows, (1.0, 0.9, 0.5), strict=True))
    entries = [{"row": row, "split": "seen", "shares": {"all": {"share": value}}} for row, value in got.items()]
    words = in_words({**losses(entries, "seen"), "intervals": found})
    assert words is not None
    assert "chance" not in words
    assert f"video 40.0 ({found['video'][0]:.1f} to {found['video'][1]:.1f})" in words
    few = in_words({**losses(entries, "seen"), "intervals": {"video": [-3.0, 80.0]}})
    assert few is not None
    assert "can't tell that from chance" in few


def test_the_stage_that_loses_most_is_named() -> None:
    got = {"autoencoder": 1.0, "image": 0.9, "video_real": 0.8, "video_generated": 0.65, "whole": 0.6}
    entries = [{"row": row, "split": "seen", "shares": {"all": {"share": value}}} for row, value in got.items()]
    told = losses(entries, "seen")
    assert told["steps"] == {"autoencoder": 0, "image": 10, "video": 25, "interpolation": 5}
    assert (told["most"], told["video_alone"], told["first_images"]) == ("video", 20, 15)
    words = in_words(told)
    assert words is not None
    assert words.startswith("Stage video loses most: all attributes fall from 90.0 % to 65.0 %")
    assert in_words(losses(entries[:1], "seen")) is None
    even = [{**entry, "shares": {"all": {"share": 1.0}}} for entry in entries]
    assert losses(even, "seen")["most"] is None
