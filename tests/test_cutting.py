"""Scenes, clips and pictures: what is cut is what was promised, frame by frame and pixel by pixel."""

import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.clips import ClipError, decode_clip
from data_pipeline.cutting import cut, fit_box, look, resize
from data_pipeline.filters import Filters, Limits
from data_pipeline.scenes import ClipConfig, ScenesConfig, cut_clips, find_cuts
from data_pipeline.source import Source
from tests.numbered_videos import KINDS, X264, encode, numbered, numbers, vfr_times
from tests.test_measures import moving, texture


def source(path: Path, start: float | None = None, end: float | None = None) -> Source:
    return Source(0, "key", path.name, str(path), start=start, end=end, captions=("a",))


def all_clips(path: Path, clip: ClipConfig, start: float | None = None, end: float | None = None) -> list[list[int]]:
    """The numbers of the frames of every clip of a video, as its mp4 holds them."""
    file = source(path, start, end)
    looked = look(file, None, clip)
    told = [c for c in looked["clips"] if not c["problem"]]
    done = [cut(file, looked["decoder"], looked["state"], c["start"], {}, clip, Filters(), 16) for c in told]
    return [numbers(decode_clip(c.video, fps=clip.fps, frames=clip.frames, size=64).frames) for c in done]


@pytest.mark.parametrize("name", ["h264.mp4", "hevc_opengop.mkv", "av1.webm", "vfr.mp4", "vfr.mkv", "vfr.webm"])
def test_the_exact_frames_are_cut(name: str, tmp_path: Path) -> None:
    """At constant and at variable rate: the frame nearest to each time of the grid, by a reckoning of its own."""
    path = encode(tmp_path / name, numbered(60), *KINDS[name])
    clip = ClipConfig(frames=6, fps=8, size=64)
    times = vfr_times(60) if name.startswith("vfr") else np.arange(60) / 24
    grid = np.arange(6 * int((times[-1] + times[-1] / 118) * 8 + 1) // 6 // 6 * 6) / 8
    nearest = [int(np.abs(times - at + 1e-9).argmin()) for at in grid]
    assert all_clips(path, clip) == [nearest[i : i + 6] for i in range(0, len(nearest) - 5, 6)]


def test_a_span_is_cut_by_its_own_times(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", numbered(60), *X264, "-g", "12")
    clip = ClipConfig(frames=4, fps=24, size=64)
    assert all_clips(path, clip, 1.0, 1.4) == [[24, 25, 26, 27], [28, 29, 30, 31]]
    assert all_clips(path, clip, end=0.2) == [[0, 1, 2, 3]]
    with pytest.raises(ClipError, match="too short: no frame in its span"):
        look(source(path, 100.0, 200.0), None, clip)


def test_scenes_are_found_and_no_clip_crosses_a_cut(tmp_path: Path) -> None:
    scenes = [moving([1] * 35, texture(seed, grain=16) // 2 + 50 * seed) for seed in (0, 1, 2)]
    path = encode(tmp_path / "scenes.mp4", np.concatenate(scenes), *X264)
    for detector in ("adaptive", "content"):
        looked = look(source(path), ScenesConfig(detector=detector), ClipConfig(frames=16, fps=24, size=64))
        assert [(c["scene"], round(c["start"] * 24)) for c in looked["clips"]] == [
            (0, 0), (0, 16), (1, 36), (1, 52), (2, 72), (2, 88),
        ]  # fmt: skip
    blind = look(source(path), ScenesConfig(detector="content", threshold=250), ClipConfig(frames=16, fps=24, size=64))
    assert {c["scene"] for c in blind["clips"]} == {0}
    close = ScenesConfig(detector="content", min_frames=60)
    assert len(find_cuts(close, ((i / 24, f) for i, f in enumerate(np.concatenate(scenes))))[1]) < 3
    few = look(source(path), ScenesConfig(), ClipConfig(frames=16, fps=24, size=64, per_scene=1))
    assert [c["scene"] for c in few["clips"]] == [0, 1, 2]


def test_scenes_that_give_no_clip_are_listed() -> None:
    times = np.arange(48) / 24
    clips = cut_clips(ClipConfig(frames=8, fps=8), times, [0, 24, 40])
    assert [(c["scene"], c["problem"]) for c in clips] == [(0, ""), (1, "too short"), (2, "too short")]
    assert [c["problem"] for c in cut_clips(ClipConfig(frames=8, fps=30), times, [0])] == ["too slow"]
    assert [c["problem"] for c in cut_clips(ClipConfig(frames=1, fps=30), times[:1], [0])] == [""]
    assert clips[0]["source_fps"] == pytest.approx(24)


def test_a_pause_is_too_slow_and_what_lies_around_it_is_not() -> None:
    """A screen recording: 10 s at 24 frames a second, nothing for 15 s, 10 s again."""
    times = np.concatenate([np.arange(240) / 24, 25 + np.arange(240) / 24])
    clips = cut_clips(ClipConfig(frames=16, fps=8), times, [0])
    for clip in clips:
        in_pause = clip["start"] < 25 and clip["start"] + 15 / 8 > 240 / 24
        assert clip["problem"] == ("too slow" if in_pause else ""), clip
        assert in_pause or clip["source_fps"] == pytest.approx(24)
    assert sum(not clip["problem"] for clip in clips) == 9


@pytest.mark.parametrize(
    ("size", "aspect", "expected"),
    [
        ((1920, 1080), None, (456, 256, 1080)),  # 455.1 becomes even; so much is cut off that 456:256 is exact
        ((1080, 1920), None, (256, 456, None)),
        ((640, 640), None, (256, 256, 640)),
        ((1920, 1080), 1.0, (256, 256, 1080)),
        ((1920, 1080), 4 / 3, (342, 256, 1080)),
        ((1080, 1920), 16 / 9, (456, 256, None)),
    ],
)
def test_the_box_has_the_aspect_of_what_becomes_of_it(
    size: tuple[int, int], aspect: float | None, expected: tuple[int, int, int | None]
) -> None:
    width, height, (left, top, right, bottom) = fit_box(ClipConfig(size=256, aspect=aspect), *size)
    assert (width, height) == expected[:2]
    assert (right - left) / (bottom - top) == pytest.approx(width / height)
    assert left >= 0
    assert top >= 0
    assert left + right == pytest.approx(size[0]), "the centre is kept"
    assert top + bottom == pytest.approx(size[1])
    if aspect is None:
        assert (right - left) * (bottom - top) > 0.99 * size[0] * size[1]


def test_nothing_is_enlarged() -> None:
    assert fit_box(ClipConfig(size=256), 256, 256)[:2] == (256, 256)
    with pytest.raises(ClipError, match="too small: 320x240 pixels for 342x256"):
        fit_box(ClipConfig(size=256), 320, 240)
    with pytest.raises(ClipError, match="too small"):
        fit_box(ClipConfig(size=256, aspect=2.0), 256, 256)


def test_a_square_stays_a_square_whatever_the_pixels_are(tmp_path: Path) -> None:
    """A square of 48 square pixels, stored as 36x48 with pixels that are 4/3 as wide as high."""
    frames = np.zeros((2, 96, 144, 3), np.uint8)
    frames[:, 24:72, 54:90] = 255
    path = encode(tmp_path / "wide.mp4", frames, *X264, "-vf", "setsar=4/3")
    for aspect in (None, 1.0):
        clip = ClipConfig(frames=1, fps=8, size=48, aspect=aspect)
        looked = look(source(path), None, clip)
        video = cut(source(path), looked["decoder"], looked["state"], 0.0, {}, clip, Filters(), 0).video
        picture = decode_clip(video, fps=8, frames=1, size=48).frames[0, :, :, 0] > 128
        assert picture.any(0).sum() == pytest.approx(24, abs=1)
        assert picture.any(1).sum() == pytest.approx(24, abs=1)


def test_what_is_known_is_filtered_before_it_is_encoded(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", numbered(24), *X264)
    clip = ClipConfig(frames=8, fps=8, size=32)
    looked = look(source(path), None, clip)
    job = (source(path), looked["decoder"], looked["state"], 0.0)
    good = cut(*job, {}, clip, Filters(), 16)
    assert (good.problem, good.measures["width"], good.measures["height"]) == ("", 48, 32)
    assert good.strip[:2] == b"\xff\xd8"
    bad = cut(*job, {}, clip, Filters(brightness=Limits(max=10)), 0)
    assert (bad.problem, bad.video, bad.strip) == ("brightness high", b"", b"")
    assert bad.measures == good.measures
    assert cut(*job, {"words": 1}, clip, Filters(words=Limits(min=2)), 0).problem == "words low"


def test_a_file_that_changes_is_told_from_the_one_before(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", numbered(24), *X264)
    clip = ClipConfig(frames=8, fps=8, size=32)
    looked = look(source(path), None, clip)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ClipError, match="changed while read"):
        cut(source(path), looked["decoder"], looked["state"], 0.0, {}, clip, Filters(), 0)
    path.unlink()
    with pytest.raises(ClipError, match="unreadable"):
        look(source(path), None, clip)


def test_resize_averages_what_it_shrinks() -> None:
    fine = np.zeros((64, 64, 3), np.uint8)
    fine[::2] = 255
    assert np.abs(resize(fine, 16, 16, (0, 0, 64, 64)).astype(int) - 127).max() < 12
    assert resize(fine, 64, 64, (0, 0, 64, 64)) is fine
