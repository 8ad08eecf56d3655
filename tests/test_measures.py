"""Measures are held against clips that were drawn with known motion, light and bars."""

import numpy as np
import pytest

from data_pipeline.filters import duplicates
from data_pipeline.measures import letterbox, measure, perceptual_hash, small

SIZE = 128


def texture(seed: int = 0, grain: int = 8) -> np.ndarray:
    """A smooth random picture uint8 [SIZE,2*SIZE,3] whose details are about ``grain`` pixels wide."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 216, (SIZE // grain + 1, 2 * SIZE // grain + 1, 3)).astype(np.uint8)
    from PIL import Image

    return np.asarray(Image.fromarray(coarse).resize((2 * SIZE, SIZE), Image.Resampling.BICUBIC))


def moving(steps: list[int], picture: np.ndarray) -> np.ndarray:
    """A clip uint8 [T,SIZE,SIZE,3] whose content moves left by so many pixels into each frame."""
    places = np.cumsum([0, *steps])
    return np.stack([picture[:, place : place + SIZE] for place in places])


def of(frames: np.ndarray) -> dict[str, float]:
    return measure(frames, [frames[0]])  # type: ignore[return-value]


def test_motion_is_the_distance_that_was_drawn() -> None:
    for pixels in (1, 2, 4):
        motion = of(moving([pixels] * 5, texture()))["motion"]
        assert motion == pytest.approx(100 * pixels / SIZE, rel=0.15)
    still = of(moving([0] * 5, texture()))
    assert (still["motion"], still["motion_window"], still["static"]) == (pytest.approx(0, abs=1e-3), 0, 1)
    assert of(moving([2] * 5, texture()))["static"] == 0
    one = of(texture()[None, :, :SIZE])
    assert (one["motion"], one["motion_window"], one["static"]) == (None, None, None)


def test_the_window_finds_the_stillest_eleven_frames() -> None:
    """20 moves of 2 pixels, 11 of none, 4 of 2: the mean sees motion, the window does not."""
    steps = [2] * 20 + [0] * 11 + [2] * 4
    measured = of(moving(steps, texture()))
    assert measured["motion"] == pytest.approx(100 * 2 / SIZE * 24 / 35, rel=0.2)
    assert measured["motion_window"] == pytest.approx(0, abs=0.05)
    even = of(moving([2] * 14, texture()))
    assert even["motion_window"] == pytest.approx(11 * even["motion"], rel=0.1)


def test_a_small_object_that_moves_is_not_static() -> None:
    frames = np.full((4, SIZE, SIZE, 3), 100, np.uint8)
    for index in range(4):
        frames[index, 60:66, 20 + 8 * index : 26 + 8 * index] = 220
    assert of(frames)["static"] == 0
    noise = np.random.default_rng(0).integers(-2, 3, frames.shape)
    assert of((np.full_like(frames, 100) + noise).astype(np.uint8))["static"] == 1


def test_light_and_sharpness() -> None:
    grey = np.full((3, 64, 64, 3), 90, np.uint8)
    assert of(grey)["brightness"] == 90
    half = np.concatenate([grey[:2], np.zeros((2, 64, 64, 3), np.uint8)])
    assert (of(half)["black"], of(half)["brightness"], of(grey)["black"]) == (0.5, 45, 0)
    fine, coarse = (of(moving([0], texture(grain=grain)))["sharpness"] for grain in (4, 16))
    assert fine > 4 * coarse > 0
    assert of(grey)["sharpness"] == 0


def test_bars_are_found_and_a_dark_scene_has_none() -> None:
    frame = texture()[:, :SIZE].copy()
    assert letterbox([frame]) == 0
    barred = frame.copy()
    barred[:16], barred[-16:], barred[:, :8] = 0, 0, 5
    assert letterbox([barred]) == pytest.approx(1 - 96 * 120 / SIZE**2)
    assert letterbox([barred, frame]) == 0, "one picture with light there shows that these are no bars"
    assert letterbox([np.zeros_like(frame)]) == 0


def test_hashes_find_the_same_clip_again_and_no_other() -> None:
    """A copy in other light and size is found, 40 other clips are not, and what repeats a dropped one is compared."""
    from PIL import Image

    clips = [moving([1] * 4, texture(seed)) for seed in range(40)]
    hashes = [(f"clip{index}", perceptual_hash(clip)) for index, clip in enumerate(clips)]
    assert all(len(text) == 48 for _, text in hashes)
    assert duplicates(hashes, 12) == {}
    smaller = np.stack([np.asarray(Image.fromarray(frame).resize((80, 80))) for frame in clips[3]])
    brighter = np.clip(clips[7].astype(int) * 1.1 + 5, 0, 255).astype(np.uint8)
    copies = [("small", perceptual_hash(smaller)), ("bright", perceptual_hash(brighter))]
    assert duplicates([*hashes, *copies], 12) == {"small": "clip3", "bright": "clip7"}


def test_every_near_duplicate_is_found() -> None:
    """Against comparing all with all, on hashes that differ from others in known numbers of bits."""
    rng = np.random.default_rng(1)
    hashes: list[int] = []
    for _ in range(60):
        base = int.from_bytes(rng.bytes(24), "big")
        hashes.append(base)
        for flips in (0, 1, 5, 6, 7, 40):
            value = base
            for bit in rng.choice(192, flips, replace=False):
                value ^= 1 << int(bit)
            hashes.append(value)
    order = rng.permutation(len(hashes))
    pairs = [(str(index), f"{hashes[index]:048x}") for index in order]
    for bits in (0, 6, 30):
        kept: list[int] = []
        expected = {}
        for index in order:
            twin = next((other for other in kept if (hashes[other] ^ hashes[index]).bit_count() <= bits), None)
            if twin is None:
                kept.append(index)
            else:
                expected[str(index)] = str(twin)
        assert duplicates(pairs, bits) == expected


def test_small_keeps_the_aspect_and_enlarges_nothing() -> None:
    assert small(np.zeros((200, 400, 3), np.uint8), 100).shape == (100, 200, 3)
    assert small(np.zeros((50, 400), np.uint8), 100).shape == (50, 400)
