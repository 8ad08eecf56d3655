"""Motion, flicker and interpolation of clips that were drawn with known motion."""

import builtins
import math

import numpy as np
import pytest
import torch

from tests.metric_peers import disc, moving
from videodiff.errors import UserError
from videodiff.metrics.flow import dense_flow, interpolate_by_flow
from videodiff.metrics.motion import (
    consistency,
    flicker,
    is_dynamic,
    motion_amount,
    still,
    strongest_motion,
    unsteadiness,
)
from videodiff.metrics.pictures import psnr


def texture(size: int = 96, seed: int = 0) -> np.ndarray:
    """A smooth random picture uint8 [size,2 size,3] with details of about 8 pixels."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, : 2 * size]
    waves = [rng.normal(0, 12) * np.sin(a * columns + b * rows + c) for a, b, c in rng.uniform(-0.6, 0.6, (20, 3))]
    return np.repeat((128 + np.sum(waves, 0)).clip(0, 255).astype(np.uint8)[..., None], 3, 2)


def pan(pixels: int, frames: int = 5, size: int = 96) -> np.ndarray:
    """The texture, moving left by so many pixels a frame."""
    return np.stack([texture(size)[:, pixels * t : pixels * t + size] for t in range(frames)])


def second_difference(clip: np.ndarray) -> float:
    return float(np.abs(np.diff(clip.astype(int), 2, axis=0)).mean())


def test_flicker_and_unsteadiness_of_known_changes() -> None:
    levels = np.array([100, 110, 100, 110, 100])
    flashing = np.repeat(levels, 16 * 16 * 3).reshape(5, 16, 16, 3).astype(np.uint8)
    fading = np.repeat(100 + 10 * np.arange(5), 16 * 16 * 3).reshape(5, 16, 16, 3).astype(np.uint8)
    assert (flicker(flashing), unsteadiness(flashing)) == (10, 20)
    assert (flicker(fading), unsteadiness(fading)) == (10, 0)
    extremes = np.repeat([0, 255, 0], 16 * 16 * 3).reshape(3, 16, 16, 3).astype(np.uint8)
    assert (flicker(extremes), unsteadiness(extremes)) == (255, 510)  # no byte runs over


def test_flow_and_motion_are_what_was_drawn() -> None:
    for pixels in (1, 2, 4):
        clip = pan(pixels)
        flow = dense_flow(clip[0], clip[1])[16:-16, 16:-16]
        assert flow[..., 0].mean() == pytest.approx(-pixels, rel=0.05)
        assert abs(flow[..., 1].mean()) < 0.05
        assert motion_amount(clip, 8) == pytest.approx(pixels * 8 / (96 * math.sqrt(2)), rel=0.12)
        assert strongest_motion(clip) == pytest.approx(np.full(4, pixels), rel=0.25)
    frozen = pan(0)
    assert motion_amount(frozen, 8) == pytest.approx(0, abs=1e-6)
    assert motion_amount(pan(2), 16) == pytest.approx(2 * motion_amount(pan(2), 8))


def test_a_clip_is_dynamic_beyond_vbench_s_threshold() -> None:
    """6 pixels per 256 at 8 frames a second: 2.25 of a frame of 96 pixels."""
    assert not is_dynamic(pan(2), 8)
    assert is_dynamic(pan(3), 8)
    assert not is_dynamic(pan(3), 4)  # seen half as often, it must move twice as far
    assert is_dynamic(pan(3, 9), 16)  # every second frame is seen: 6 pixels
    assert not is_dynamic(pan(1, 9), 16)
    # A quarter of the frames must move: a jolt in one of 16 is not enough, four are.
    for count, verdict in ((1, False), (4, True)):
        places = np.cumsum([0] + [4] * count + [0] * (15 - count))
        assert is_dynamic(np.stack([texture()[:, p : p + 96] for p in places]), 8) is verdict


def test_even_motion_is_steady_along_its_flow_alone() -> None:
    clip = pan(3)[:, 16:-16, 16:-16]
    assert flicker(clip) > 10
    assert second_difference(clip) > 5
    assert unsteadiness(clip) < 0.1 * second_difference(clip)
    frozen = pan(0)
    noise = np.random.default_rng(0).integers(-8, 9, frozen.shape)
    boiling = (frozen.astype(int) + noise).clip(0, 255).astype(np.uint8)
    assert unsteadiness(boiling) == pytest.approx(second_difference(boiling), rel=0.3)


def test_stillness_is_told_frame_by_frame() -> None:
    clip = moving()
    assert not still(clip).any()
    assert still(clip[[0] * 5]).all()
    assert still(clip[[0, 0, 1, 1, 2]]).tolist() == [True, False, True, False]
    noise = np.random.default_rng(0).integers(-2, 3, clip.shape)
    assert still((clip[[0] * 9] + noise).clip(0, 255).astype(np.uint8)).all()
    small = np.full((2, 20, 20, 3), 90, np.uint8)  # 4x4 pixels that change, in a block that the edge cuts
    small[1, 16:, 16:] = 150
    assert not still(small).any()


def test_consistency_is_that_of_vbench() -> None:
    angles = torch.tensor([0.0, 0.1, 0.2, 2.0])
    features = 3 * torch.stack([angles.cos(), angles.sin()], 1)
    found = consistency(features)
    assert found.neighbours == pytest.approx((2 * math.cos(0.1) + 0) / 3)  # a negative cosine counts as 0
    assert found.first == pytest.approx((math.cos(0.1) + math.cos(0.2)) / 3)
    assert found.both == pytest.approx((found.neighbours + found.first) / 2)
    assert consistency(torch.ones(4, 3)).both == pytest.approx(1)
    for bad in (torch.ones(1, 3), torch.zeros(3, 3)):
        with pytest.raises(UserError, match="give at least two, none of them all zeros"):
            consistency(bad)


def test_interpolation_follows_what_moves() -> None:
    clip = pan(4, 2)
    for share, place in ((0.25, 1), (0.5, 2), (0.75, 3)):
        truth = texture()[None, :, place : place + 96]  # with the edges, where one frame shows what the other does not
        blend = np.rint((1 - share) * clip[0] + share * clip[1]).astype(np.uint8)[None]
        warped = interpolate_by_flow(clip[0], clip[1], share)[None]
        assert psnr(warped, truth)[0] > psnr(blend, truth)[0] + 8
    discs = [disc(22, 32), disc(26, 32)]
    warped, truth = interpolate_by_flow(*discs, 0.5)[None], disc(24, 32)[None]
    blend = np.rint((discs[0].astype(float) + discs[1]) / 2).astype(np.uint8)[None]
    assert psnr(warped, truth)[0] > psnr(blend, truth)[0] + 10
    np.testing.assert_array_equal(interpolate_by_flow(*discs, 0.0), discs[0])
    np.testing.assert_array_equal(interpolate_by_flow(*discs, 1.0), discs[1])
    np.testing.assert_array_equal(interpolate_by_flow(discs[0], discs[0], 0.5), discs[0])


CLIP = moving(3)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: flicker(CLIP[:1]), "clip: 1 frames, and this figure needs at least 2"),
        (lambda: unsteadiness(CLIP[:2]), "clip: 2 frames, and this figure needs at least 3"),
        (lambda: motion_amount(CLIP, 0), "fps 0: give the clip's frames per second"),
        (lambda: is_dynamic(CLIP, math.nan), "fps nan"),
        (lambda: motion_amount(CLIP[:, :15], 8), "at least 16 pixels each way"),
        (lambda: interpolate_by_flow(CLIP[0], CLIP[1][:32], 0.5), r"give two uint8 \[H,W,3\] of one size"),
        (lambda: interpolate_by_flow(CLIP[0] / 255, CLIP[1] / 255, 0.5), "optical flow: frames float64"),
        (lambda: interpolate_by_flow(CLIP[0], CLIP[1], 1.2), "share 1.2 lies outside 0 to 1"),
    ],
)
def test_clips_without_a_figure_are_refused(call, problem: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=problem):
        call()


def test_without_opencv_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *rest: object, **named: object) -> object:
        if name == "cv2":
            raise ImportError(name)
        return found(name, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"opencv-python-headless is not installed; .* pip install 'videodiff\[eval\]'"):
        motion_amount(CLIP, 8)
    assert flicker(CLIP) > 0  # what needs no flow needs no OpenCV
