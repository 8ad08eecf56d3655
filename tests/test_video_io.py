"""Files are read back: by ffmpeg for videos, by Pillow for pictures."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from videodiff import video_io
from videodiff.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def moving_square(frames: int = 12, height: int = 32, width: int = 48) -> np.ndarray:
    clip = np.full((frames, height, width, 3), (200, 200, 210), np.uint8)
    for t in range(frames):
        clip[t, 8:24, 2 * t : 2 * t + 16] = (210, 40, 40)
    return clip


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.parametrize(
    ("size", "fps", "frames"), [((32, 48), 8, 12), ((66, 98), 7.5, 3), ((2, 2), 29.97, 5), ((64, 64), 16, 1)]
)
def test_a_written_video_has_exactly_the_asked_size_rate_and_length(
    tmp_path: Path, size: tuple[int, int], fps: float, frames: int
) -> None:
    path = tmp_path / "deep" / "clip.mp4"
    clip = moving_square(frames, *size)
    video_io.write_video(path, clip, fps)
    probe = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)], capture_output=True, text=True).stderr
    assert f"{size[1]}x{size[0]}" in probe
    assert "yuv420p(tv, bt709" in probe
    assert imageio_ffmpeg.count_frames_and_secs(path)[0] == frames
    stored, rate = video_io.read_video(path)
    assert stored.shape == clip.shape
    assert rate == pytest.approx(fps, abs=0.01)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "a browser starts to play before the end has come"
    assert [file.name for file in path.parent.iterdir()] == ["clip.mp4"]


def test_the_picture_survives_encoding() -> None:
    clip = moving_square()
    assert psnr(read_bytes(video_io.encode_video(clip, 8)), clip) > 30


def read_bytes(video: bytes) -> np.ndarray:
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(video)
        file.flush()
        return video_io.read_video(file.name)[0]


@pytest.mark.parametrize("colour", [(220, 30, 30), (30, 160, 40), (20, 40, 220), (255, 255, 255), (0, 0, 0)])
def test_plain_colours_come_back_within_three_levels(colour: tuple[int, int, int]) -> None:
    clip = np.empty((2, 32, 32, 3), np.uint8)
    clip[:] = colour
    assert np.abs(read_bytes(video_io.encode_video(clip, 8)).astype(int) - clip).max() <= 3


def test_encoding_is_deterministic_and_follows_its_arguments() -> None:
    clip = moving_square()
    first = video_io.encode_video(clip, 8)
    assert first == video_io.encode_video(clip, 8)
    assert first != video_io.encode_video(clip, 16)
    assert len(first) > len(video_io.encode_video(clip, 8, crf=40))


@pytest.mark.parametrize(
    ("frames", "fps", "words"),
    [
        (np.zeros((2, 33, 32, 3), np.uint8), 8, "32x33"),
        (np.zeros((2, 32, 31, 3), np.uint8), 8, "even"),
        (np.zeros((2, 32, 32, 3), np.float32), 8, "float32"),
        (np.zeros((0, 32, 32, 3), np.uint8), 8, r"\[0, 32, 32, 3\]"),
        (np.zeros((2, 32, 32), np.uint8), 8, r"\[2, 32, 32\]"),
        (np.zeros((2, 32, 32, 3), np.uint8), 0, "0 frames a second"),
        (np.zeros((2, 32, 32, 3), np.uint8), float("nan"), "nan frames a second"),
    ],
)
def test_impossible_videos_are_refused(tmp_path: Path, frames: np.ndarray, fps: float, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        video_io.write_video(tmp_path / "clip.mp4", frames, fps)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    for path in (tmp_path / "file" / "clip.mp4", tmp_path / "folder.mp4"):
        with pytest.raises(UserError, match="cannot be written") as error:
            video_io.write_video(path, moving_square(2), 8)
        assert str(path) in str(error.value)
    with pytest.raises(UserError, match="cannot be written"):
        video_io.write_json(tmp_path / "file" / "x.json", {})


def test_a_full_disk_loses_nothing_that_was_there(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the end of the disk."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    code = f"""
import resource, numpy as np
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
from videodiff import video_io
from videodiff.errors import UserError
noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
for write in (lambda: video_io.write_video({str(path)!r}, noise, 8),
              lambda: video_io.write_png({str(tmp_path / "x.png")!r}, noise[0])):
    try:
        write()
    except UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done
    assert all("cannot be written" in line for line in lines)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("name", ["empty.mp4", "text.mp4", "cut.mp4", "missing.mp4"])
def test_what_is_no_video_is_refused(tmp_path: Path, name: str) -> None:
    video = video_io.encode_video(moving_square(), 8)
    for file, content in {"empty.mp4": b"", "text.mp4": b"hello " * 99, "cut.mp4": video[: len(video) // 2]}.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=name) as error:
        video_io.read_video(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["mp4", "png"])
@pytest.mark.parametrize(
    "text", [None, json.dumps({"prompt": "a=b; c#d \\ \"é\" 'x'\n", "n": [1, 2]}), "two\nlines = 2"]
)
def test_metadata_comes_back(tmp_path: Path, suffix: str, text: str | None) -> None:
    path = tmp_path / f"file.{suffix}"
    if suffix == "mp4":
        video_io.write_video(path, moving_square(2), 8, metadata=text)
    else:
        video_io.write_png(path, moving_square(1)[0], metadata=text)
    assert video_io.read_metadata(path) == text


def test_pictures_are_lossless_of_any_size(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    video_io.write_png(tmp_path / "x.png", image)
    assert np.array_equal(video_io.read_image(tmp_path / "x.png"), image)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), image)
    with pytest.raises(UserError, match="picture"):
        video_io.write_png(tmp_path / "y.png", image.astype(float))
    (tmp_path / "bad.png").write_bytes(b"nonsense")
    for name in ("bad.png", "none.png"):
        with pytest.raises(UserError, match=name):
            video_io.read_image(tmp_path / name)
        with pytest.raises(UserError, match=name):
            video_io.read_metadata(tmp_path / name)


def test_pictures_of_phones_are_turned_upright_and_transparency_is_white(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    Image.new("RGB", (40, 20), "red").save(tmp_path / "x.jpg", exif=exif)
    assert video_io.read_image(tmp_path / "x.jpg").shape == (40, 20, 3)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "x.png")
    assert (video_io.read_image(tmp_path / "x.png") == 255).all()


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    video_io.write_json(path, {"prompt": "é"})
    with pytest.raises(TypeError):
        video_io.write_json(path, {"prompt": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"prompt": "é"}
    with pytest.raises(KeyboardInterrupt), video_io.atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text(encoding="utf-8")) == {"prompt": "é"}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_contact_sheet_holds_each_image_and_its_label(tmp_path: Path) -> None:
    images = [np.full((16, 40, 3), value, np.uint8) for value in (10, 90, 170)]
    sheet = video_io.contact_sheet(images, columns=2, gap=2)
    assert sheet.shape == (2 * 18 + 2, 2 * 42 + 2, 3)
    for image, (y, x) in zip(images, [(2, 2), (2, 44), (20, 2)], strict=True):
        assert np.array_equal(sheet[y : y + 16, x : x + 40], image)
    labelled = video_io.contact_sheet(images, 2, ["one", "two", "a label too long for one line"])
    assert labelled.shape[0] > sheet.shape[0]
    assert (labelled[19:30, 2:42] < 128).any(), "the label under the first image"
    video_io.save_sheet(tmp_path / "sheet.png", images, 5)
    assert video_io.read_image(tmp_path / "sheet.png").shape == (20, 3 * 42 + 2, 3)
    for bad in ([], [images[0], images[0][:8]]):
        with pytest.raises(UserError, match="contact sheet"):
            video_io.contact_sheet(bad, 2)


def test_sick_clips_are_named_and_healthy_ones_are_not() -> None:
    healthy = moving_square()
    assert video_io.symptoms(healthy, motion_expected=True) == []
    assert video_io.symptoms(healthy.astype(np.float32) / 127.5 - 1, motion_expected=True) == []
    assert video_io.symptoms(read_bytes(video_io.encode_video(healthy, 8)), motion_expected=True) == []
    still = healthy[:1].repeat(12, axis=0)
    assert video_io.symptoms(still, motion_expected=False) == []
    assert video_io.symptoms(still, motion_expected=True) == ["static"]
    noise = np.random.default_rng(0).normal(0, 2, still.shape)
    assert video_io.symptoms((still + noise).clip(0, 255).astype(np.uint8), motion_expected=True) == ["static"]
    assert video_io.symptoms(np.zeros_like(still), motion_expected=False) == ["black"]
    for value in (np.nan, np.inf):
        sick = healthy.astype(np.float32) / 127.5 - 1
        sick[3, 4, 5, 1] = value
        assert video_io.symptoms(sick, motion_expected=True) == ["not finite"]
    blown = np.random.default_rng(0).choice([-9.0, 9.0], healthy.shape)
    assert video_io.symptoms(blown, motion_expected=True) == ["saturated"]
    white = np.full_like(still, 255)
    white[:, 8:16, 8:16] = (255, 0, 0)
    assert video_io.symptoms(white, motion_expected=False) == []


def test_an_animation_plays_its_frames_at_their_rate(tmp_path: Path) -> None:
    frames = np.stack([np.full((16, 24, 3), value, np.uint8) for value in (0, 120, 250)])
    video_io.write_animation(tmp_path / "a.webp", frames, 8)
    with Image.open(tmp_path / "a.webp") as opened:
        assert (opened.n_frames, opened.size, opened.info["loop"]) == (3, (24, 16), 0)
        for number, frame in enumerate(frames):
            opened.seek(number)
            assert abs(int(np.asarray(opened.convert("RGB")).mean()) - int(frame[0, 0, 0])) < 4
            assert opened.info["duration"] == 125
