"""Clips are encoded for real and decoded by decord; each frame's brightness says which one it is."""

import io
import struct
import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from data_pipeline import decoder_choice
from data_pipeline.clips import ClipError, decode_clip, fit, grid_frames, resize, window_start
from videodiff.video_io import encode_video


def numbered(frames: int, height: int = 16, width: int = 16) -> np.ndarray:
    clip = np.zeros((frames, height, width, 3), np.uint8)
    clip[:] = (8 * np.arange(frames))[:, None, None, None]
    return clip


def numbers(frames: np.ndarray) -> list[int]:
    return [round(float(value) / 8) for value in frames.mean((1, 2, 3))]


VIDEO = encode_video(numbered(31), 16)


@pytest.mark.parametrize(
    ("fps", "frames", "position", "expected"),
    [
        (16, 31, 0.0, list(range(31))),
        (8, 16, 0.5, list(range(0, 31, 2))),
        (8, 4, 0.999, [24, 26, 28, 30]),
        (4, 8, 0.0, list(range(0, 31, 4))),
        (16, 9, 0.5, list(range(11, 20))),
        (16, 1, 0.999, [30]),
        (5, 3, 0.0, [0, 3, 6]),  # 3.2 and 6.4 frames of the source
    ],
)
def test_frames_nearest_in_time(fps: float, frames: int, position: float, expected: list[int]) -> None:
    clip = decode_clip(VIDEO, fps=fps, frames=frames, size=16, position=position)
    assert numbers(clip.frames) == expected
    whole = decode_clip(VIDEO, fps=fps, frames=frames, size=16, position=position, whole_bytes=10**9)
    assert (whole.first, len(whole.frames)) == (0, whole.total)
    assert np.array_equal(whole.window(frames, position), clip.window(frames, position))
    assert np.array_equal(clip.window(frames, position), clip.frames)


def test_every_start_has_its_share() -> None:
    starts = [window_start(31, 9, (i + 0.5) / 2300) for i in range(2300)]
    assert np.bincount(starts).tolist() == [100] * 23
    assert window_start(31, 9, np.nextafter(1, 0)) == 22


def test_the_grid_of_uneven_and_fractional_rates() -> None:
    ntsc = np.arange(100) * 1001 / 30000
    assert grid_frames(ntsc, 30, 1).tolist() == list(range(100)), "29.97 for 30: no frame twice"
    assert grid_frames(ntsc + 7, 15, 1).tolist() == list(range(0, 100, 2)), "a start other than 0"
    film = np.arange(48) / 24
    assert grid_frames(film, 16, 1).tolist() == [round(1.5 * j - 0.01) for j in range(32)]
    uneven = np.array([0.0, 0.1, 0.11, 0.12, 0.5, 0.51])
    assert grid_frames(uneven, 5, 1).tolist() == [0, 3, 4]


def test_any_size_keeps_its_aspect(tmp_path: Path) -> None:
    wide = np.zeros((2, 60, 160, 3), np.uint8)
    wide[:, 20:40, 70:90] = 255  # a centred square of a third of the height
    clip = decode_clip(encode_video(wide, 8), fps=8, frames=2, size=30)
    assert clip.frames.shape == (2, 30, 30, 3)
    bright = clip.frames[0, :, :, 0] > 128
    assert (bright.sum(0).max(), bright.sum(1).max()) == (10, 10)
    assert bright[10:20, 10:20].all()
    tall = fit(wide.transpose(0, 2, 1, 3).copy(), 30)
    assert (tall[0, 10:20, 10:20] > 200).mean() > 0.9
    fine = np.zeros((1, 64, 64, 3), np.uint8)
    fine[:, ::2] = 255
    assert np.abs(fit(fine, 16)[0].astype(int) - 127).max() < 12, "a fine pattern becomes grey, not another pattern"


@pytest.mark.parametrize("width", [2, 12, 16, 24, 32, 48, 50, 64])
def test_every_even_width_decodes(width: int) -> None:
    clip = np.random.default_rng(width).integers(0, 256, (3, 1, 1, 3), np.uint8).repeat(16, 1).repeat(width, 2)
    decoded = decode_clip(encode_video(clip, 8), fps=8, frames=3, size=min(16, width)).frames
    assert np.abs(decoded.astype(int) - clip[:, : decoded.shape[1], : decoded.shape[2]]).max() <= 12


@pytest.mark.parametrize("seed", range(40))
def test_a_resized_part_is_what_pillow_makes_of_the_whole(seed: int) -> None:
    """Only what the kernel sees is handed to Pillow: nothing else may matter."""
    rng = np.random.default_rng(seed)
    width, height, w, h = rng.integers(1, 150, 4).tolist()
    frame = rng.integers(64, 192, (height, width, 3), np.uint8)
    # In sixteenths of a pixel, which Pillow's single precision has exactly.
    left, top = (int(rng.integers(0, 8 * side)) / 16 for side in (width, height))
    right, bottom = (side - int(rng.integers(0, 8 * side)) / 16 for side in (width, height))
    box = (left, top, right, bottom)
    whole = np.asarray(Image.fromarray(frame).resize((w, h), Image.Resampling.BICUBIC, box=box))
    off = np.abs(resize(frame, w, h, box).astype(int) - whole)
    assert off.max() <= 2  # Pillow goes first down or first across, by what is less work, and rounds in between


def test_other_containers_and_codecs(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(VIDEO)
    for name, codec in {"x.mkv": "mpeg4", "x.mov": "mjpeg", "x.webm": "libvpx"}.items():
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(tmp_path / "x.mp4"), "-c:v", codec]
        subprocess.run([*command, "-q:v", "2", "-b:v", "2M", str(tmp_path / name)], check=True)
        clip = decode_clip((tmp_path / name).read_bytes(), fps=8, frames=16, size=16)
        assert numbers(clip.frames)[::5] == [0, 10, 20, 30], name


@pytest.mark.parametrize("name", ["wide.mp4", "wide.mkv"])
def test_pixels_that_are_not_square_become_square(name: str, tmp_path: Path) -> None:
    """A circle that is stored squeezed to half its width is round again."""
    y, x = np.mgrid[:64, :64] - 31.5
    circle = np.where((x * 2) ** 2 + y**2 < 24**2, 255, 0).astype(np.uint8)[None, :, :, None].repeat(4, 0).repeat(3, 3)
    (tmp_path / "x.mp4").write_bytes(encode_video(circle, 8))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(tmp_path / "x.mp4"), "-vf", "setsar=2/1"]
    subprocess.run([*command, "-c:v", "libx264", "-crf", "5", str(tmp_path / name)], check=True)
    seen = decode_clip((tmp_path / name).read_bytes(), fps=8, frames=1, size=64).frames[0, :, :, 0] > 127
    assert seen.any(0).sum() == pytest.approx(48, abs=2)
    assert seen.any(1).sum() == pytest.approx(48, abs=2)


def test_damage_outside_the_window_costs_nothing_whatever_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    real = decoder_choice.read_frames

    def torn(reader: Any, indices: list[int]) -> np.ndarray:
        if max(indices) > 20:
            raise RuntimeError("damaged")
        return real(reader, indices)

    whole = decode_clip(VIDEO, fps=8, frames=4, size=16)
    monkeypatch.setattr(decoder_choice, "read_frames", torn)
    kept = decode_clip(VIDEO, fps=8, frames=4, size=16, whole_bytes=2**30)
    assert (kept.frames == whole.frames).all()
    with pytest.raises(ClipError, match="undecodable"):
        decode_clip(VIDEO, fps=8, frames=4, size=16, position=0.99, whole_bytes=2**30)


def test_a_picture_with_a_broken_tag_is_one_bad_clip() -> None:
    # To be turned by a quarter, and a resolution in letters, over which Pillow raises a TypeError.
    tags = struct.pack(">HHIHH", 0x112, 3, 1, 6, 0) + struct.pack(">HHI4s", 0x11A, 2, 4, b"abc")
    file = io.BytesIO()
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + tags + bytes(4)
    Image.new("RGB", (32, 32)).save(file, "JPEG", exif=exif)
    with pytest.raises(ClipError, match="undecodable"):
        decode_clip(file.getvalue(), fps=8, frames=1, size=16, suffix="jpg")


def broken() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    flipped = bytearray(VIDEO)
    for place in rng.integers(len(VIDEO) // 2, len(VIDEO), 40):
        flipped[place] ^= 0x55
    return {
        "empty": b"",
        "garbage": rng.bytes(4000),
        "zeros": bytes(4000),
        "head": VIDEO[:100],
        "half": VIDEO[: len(VIDEO) // 2],
        "tail": VIDEO[:-10],
        "flipped": bytes(flipped),
        "text": b"#EXTM3U\nfile:///etc/passwd\n" * 50,
    }


@pytest.mark.parametrize("name", broken())
def test_what_does_not_decode_has_its_reason(name: str) -> None:
    with pytest.raises(ClipError) as error:
        decode_clip(broken()[name], fps=8, frames=16, size=16)
    assert error.value.reason == "undecodable"
    assert "\n" not in str(error.value)


def test_short_and_slow_clips_have_their_reasons() -> None:
    with pytest.raises(ClipError, match="16 frames at 8 a second, 17 asked") as error:
        decode_clip(VIDEO, fps=8, frames=17, size=16)
    assert error.value.reason == "too short"
    with pytest.raises(ClipError, match="16 frames a second, 24 asked") as error:
        decode_clip(VIDEO, fps=24, frames=2, size=16)
    assert error.value.reason == "too slow"
    assert len(decode_clip(VIDEO, fps=24, frames=1, size=16).frames) == 1, "a single image has no rate"
