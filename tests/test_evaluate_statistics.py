"""Intervals, PSNR and losses of the evaluation, against published numbers and closed forms."""

import numpy as np
import pytest

from stages.evaluation.road import blend
from stages.evaluation.sheets import in_words as in_cells
from stages.evaluation.statistics import in_words, losses, mean_interval, pooled_deviation, right, share, sick_in_words
from videodiff.metrics.intervals import wilson
from videodiff.metrics.pictures import EQUAL_DB, clip_psnr


def test_a_share_and_a_mean_of_one_have_intervals() -> None:
    told = share([True] * 15 + [False] * 133)  # Newcombe (1998), table I
    assert (told["right"], told["n"]) == (15, 148)
    assert told["interval"] == pytest.approx([0.0624, 0.1605], abs=5e-5)
    assert mean_interval([3.0], "a") == {"n": 1, "mean": 3.0, "interval": None}
    assert in_cells("flicker", mean_interval([3.0], "a"))[1:] == ("3.00", "1 sample, no interval")
    moving = mean_interval([1.0] * 20, "a", is_share=True)  # all of 20 clips move: the 21st need not
    assert moving["interval"] == pytest.approx([1 - 0.1611, 1.0], abs=5e-5)


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


def told(count: int, split: str = "train", **shares: float) -> dict:
    """Losses of `count` prompts of which such shares are right in each row, the same first ones."""

    def row(hit: bool) -> dict:
        return {"read": {"colour": "red" if hit else None}, "consistent": True}

    rows = [{name: row(i < share * count) for name, share in shares.items()} for i in range(count)]
    samples = [{"split": split, "truth": {"colour": "red"}, "rows": each} for each in rows]
    return losses(samples, "seen" if split == "train" else split)


def test_the_stage_that_loses_most_is_named() -> None:
    found = told(100, autoencoder=1.0, image=0.9, video_real=0.8, video_generated=0.65, whole=0.6)
    assert found["steps"] == {"autoencoder": 0, "image": 10, "video": 25, "interpolation": 5}
    assert (found["most"], found["video_alone"], found["first_images"]) == ("video", 20, 15)
    low, high = found["intervals"]["video"]
    assert 15 < low < 25 < high < 35
    words = in_words(found, "seen combinations")
    assert words is not None
    assert words.startswith("Stage video loses most: all attributes fall from 90.0 % to 65.0 % on seen combinations")
    assert f"video 25.0 ({low:.1f} to {high:.1f})" in words
    alone, first = (f"{a:.1f} to {b:.1f}" for a, b in (found["intervals"][n] for n in ("video_alone", "first_images")))
    assert words.endswith(
        f"From real first images the video stage loses 20.0 ({alone}); generated ones cost it 15.0 ({first}) more."
    )
    assert in_words(told(9, autoencoder=1.0), "the data") is None
    assert told(40, image=0.9, autoencoder=1.0, video_generated=0.5)["intervals"]["autoencoder"] == pytest.approx(
        [0.0, 100 * wilson(0, 40).high]
    )


@pytest.mark.parametrize(
    ("stage", "shares"),
    [
        ("autoencoder", {"autoencoder": 0.4, "image": 0.4, "video_generated": 0.35, "whole": 0.35}),
        ("interpolation", {"autoencoder": 1.0, "image": 0.95, "video_generated": 0.95, "whole": 0.3}),
    ],
)
def test_a_broken_autoencoder_and_a_broken_interpolation_are_named(stage: str, shares: dict[str, float]) -> None:
    found = told(60, **shares)
    assert found["most"] == stage
    words = in_words(found, "seen combinations") or ""
    assert words.startswith(f"Stage {stage} loses most: all attributes fall from ")


def test_what_chance_may_have_done_is_said() -> None:
    """One prompt, fewer than six, and two stages that lose about as much: none is accused."""
    for count in (1, 5):
        found = told(count, "data", autoencoder=1.0, image=1.0, video_generated=0.0)
        assert found["most"] is None
        words = in_words(found, "the data")
        assert words is not None
        assert words.startswith(f"{count} prompt{'s' * (count > 1)} can't tell which stage loses most on the data (")
    near = told(60, autoencoder=1.0, image=0.75, video_generated=0.45)
    assert near["steps"] == {"autoencoder": 0, "image": 25, "video": 30}
    assert near["intervals"]["video"][0] > 0
    assert near["most"] is None
    assert f"about {near['more']} more would." in (in_words(near, "the data") or "")
    even = told(60, autoencoder=1.0, image=1.0, video_generated=1.0)
    assert even["most"] is None
    assert (in_words(even, "the data") or "").startswith("No stage loses any of all attributes on the data")
    assert "can't tell" in (in_words(told(2, autoencoder=1.0, image=1.0), "the data") or "")


def test_the_deviation_of_latents_is_that_of_all_clips_together() -> None:
    clips = np.random.default_rng(1).normal(np.linspace(-2, 2, 40)[:, None], 0.5, (40, 500))
    told = pooled_deviation(clips.mean(1).tolist(), clips.std(1).tolist(), "a")
    assert told["mean"] == pytest.approx(clips.std(), rel=1e-9)
    assert told["mean"] > 2 * clips.std(1).mean()  # the clips' own deviations miss most of it
    low, high = told["interval"]
    assert low < told["mean"] < high < 1.3 * told["mean"]
    assert pooled_deviation([1.0], [2.0])["interval"] is None


def test_sick_clips_are_told_in_words() -> None:
    entry = {"split": "data", "n": 20, "symptoms": {"static": 3}}
    made = {"row": "video_real", "split": "data", "n": 10, "symptoms": {"black": 1, "not finite": 2, "static": 1}}
    lines = sick_in_words([{**entry, "row": "real"}, made])
    assert lines == [
        "video, real first image, data prompts: 1 of 10 are black (of the real clips 0 of 20); 2 of 10 are not finite "
        "(of the real clips 0 of 20)."
    ]
    assert sick_in_words([{**made, "symptoms": {"static": 10}}]) == [
        "video, real first image, data prompts: 10 of 10 stand still."
    ]
