"""Files of every kind are made by ffmpeg, and read back frame by frame: each frame says which one it is."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from data_pipeline.clips import ClipError
from data_pipeline.cutting import fit_box
from data_pipeline.readers import open_video
from data_pipeline.scenes import ClipConfig
from tests.numbered_videos import KINDS, X264, encode, numbered, numbers, vfr_times

COUNT = 40
FRAMES = numbered(COUNT)
DECORD = {"h264.mp4", "h264.mkv", "hevc.mp4", "hevc.mov", "vp9.webm", "vfr.mkv", "vfr.mp4", "vfr.webm", "sound.mov"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


def expected_times(name: str) -> np.ndarray:
    return vfr_times(COUNT) if name.startswith("vfr") else np.arange(COUNT) / (10 if name.endswith("gif") else 24)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_frames_promised(name: str, folder: Path) -> None:
    path = encode(folder / name, FRAMES, *KINDS[name], fps=10 if name.endswith("gif") else 24)
    video = open_video(path)
    assert video.decoder == ("decord" if name in DECORD else "pyav")
    assert (video.header.width, video.header.height, video.header.rotation) == (96, 64, 0)
    times, frames = zip(*video.all(), strict=True)
    assert numbers(np.stack(frames)) == list(range(COUNT))
    assert np.allclose(np.array(times) - times[0], expected_times(name), atol=0.002)  # Matroska counts milliseconds
    assert np.abs(np.stack(frames).astype(int) - FRAMES).mean() < (20 if name.endswith("gif") else 8)

    # In the middle, where a decoder has to seek: each time twice, and the middle between two frames is the earlier one.
    grid = expected_times(name) + times[0]
    for decoder in {video.decoder, "pyav"}:
        again = open_video(path, decoder)
        assert again.decoder == decoder
        for first in (0, 7, 13, 26, 33, 39):
            wanted = grid[first::3]
            found = list(again.nearest(np.repeat(wanted, 2) + 0.004))
            assert numbers(np.stack(found)) == np.repeat(np.arange(COUNT)[first::3], 2).tolist(), (decoder, first)
    beyond = list(open_video(path).nearest(np.array([-1.0, 100.0])))
    assert numbers(np.stack(beyond)) == [0, COUNT - 1]


def test_the_bytes_of_a_file_are_read_as_the_file(folder: Path) -> None:
    for name in ("h264.mp4", "av1.webm"):
        path = encode(folder / f"bytes-{name}", FRAMES[:12], *KINDS[name])
        video, from_bytes = open_video(path), open_video(path.read_bytes())
        assert (video.decoder, video.header) == (from_bytes.decoder, from_bytes.header)
        for (time, frame), (other_time, other) in zip(video.all(), from_bytes.all(), strict=True):
            assert time == other_time
            assert np.array_equal(frame, other)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_rotation_flag_is_obeyed(degrees: int, folder: Path) -> None:
    plain = encode(folder / "plain.mp4", FRAMES[:4], *X264)
    turned = folder / f"turned{degrees}.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", str(degrees), "-i", str(plain)]
    subprocess.run([*command, "-c", "copy", "-y", str(turned)], check=True)
    # ffmpeg itself turns by the flag when it decodes: it is the judge.
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(turned), "-f", "rawvideo"]
    raw = subprocess.run([*command, "-pix_fmt", "rgb24", "-"], check=True, capture_output=True).stdout
    video = open_video(turned)
    height, width = (96, 64) if degrees != 180 else (64, 96)
    judged = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
    assert (video.decoder, video.header.rotation) == ("pyav", degrees)
    assert (video.header.width, video.header.height) == (width, height)
    assert np.abs(np.stack([frame for _, frame in video.all()]).astype(int) - judged).mean() < 2


def test_pixels_that_are_not_square_count_by_their_aspect(folder: Path) -> None:
    path = encode(folder / "wide.mp4", FRAMES[:4], *X264, "-vf", "setsar=4/3")
    video = open_video(path)
    assert (video.header.width, video.header.height) == (128, 64)
    assert video.pixel_aspect == pytest.approx(4 / 3)


@pytest.mark.parametrize("degrees", [90, 270])
def test_such_pixels_in_a_turned_picture(degrees: int, folder: Path) -> None:
    """The rows of the upright picture are what was stored as columns; its box lies within them."""
    path = encode(folder / "wide.mp4", FRAMES[:4], *X264, "-vf", "setsar=4/3")
    turned = folder / f"wide{degrees}.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", str(degrees), "-i", str(path)]
    subprocess.run([*command, "-c", "copy", "-y", str(turned)], check=True)
    video = open_video(turned)
    _, frame = next(video.all())
    assert frame.shape[:2] == (96, 64)
    assert (video.header.width, video.header.height) == (48, 96), "64 x 96 pixels, each 3/4 as wide as high"
    _, _, (left, top, right, bottom) = fit_box(ClipConfig(size=32), 48, 96, video.pixel_aspect)
    assert (left, top, right, bottom) == pytest.approx((0, 0, 64, 96))


def test_colours_are_those_of_the_file(folder: Path) -> None:
    """A picture of plain colours, tagged BT.709 and BT.601: both decoders find them again."""
    colours = np.array([[200, 40, 40], [40, 180, 60], [50, 60, 210], [128, 128, 128]], np.uint8)
    frames = np.repeat(colours.repeat(24, 0)[None, None], 64, 1).repeat(3, 0)
    for matrix in ("bt709", "smpte170m"):
        options = ("-vf", f"scale=out_color_matrix={matrix}:out_range=tv", "-colorspace", matrix)
        path = encode(folder / f"{matrix}.mp4", frames, *X264, *options)
        for decoder in ("decord", "pyav"):
            frame = next(open_video(path, decoder).nearest(np.zeros(1)))
            assert np.abs(frame[32, 12::24].astype(int) - colours).max() <= 6, (matrix, decoder)


def test_odd_sizes_sound_and_single_frames(folder: Path) -> None:
    odd = encode(folder / "odd.avi", numbered(3, 65, 97), "-c:v", "ffv1")
    video = open_video(odd)
    assert [frame.shape for _, frame in video.all()] == [(65, 97, 3)] * 3
    sound = ("-f", "lavfi", "-i", "sine=frequency=440:duration=1")
    heard = open_video(encode(folder / "sound.mov", FRAMES[:24], *X264, "-c:a", "aac", inputs=sound))
    assert (heard.header.audio, heard.decoder, len(list(heard.all()))) == (True, "decord", 24)
    one = open_video(encode(folder / "one.mp4", FRAMES[5:6], *X264))
    assert numbers(np.stack([frame for _, frame in one.all()])) == [5]
    alone = folder / "alone.m4a"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *sound, "-c:a", "aac", "-y", str(alone)]
    subprocess.run(command, check=True)
    with pytest.raises(ClipError, match="no video"):
        open_video(alone)


def test_a_header_without_duration_is_read_to_its_end(folder: Path) -> None:
    """Matroska as a recorder leaves it when it writes into a pipe: no duration, no index."""
    path = folder / "live.mkv"
    live = encode(folder / "live0.mkv", FRAMES, *X264, "-g", "10")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(live), "-c", "copy", "-f", "matroska"]
    path.write_bytes(subprocess.run([*command, "-live", "1", "-"], check=True, capture_output=True).stdout)
    for decoder in (None, "pyav"):
        video = open_video(path, decoder)
        assert numbers(np.stack([frame for _, frame in video.all()])) == list(range(COUNT))
        assert numbers(np.stack(list(video.nearest(np.array([22.0, 31.0]) / 24)))) == [22, 31]


def test_a_playlist_opens_no_other_file(folder: Path) -> None:
    encode(folder / "secret.mp4", FRAMES[:2], *X264)
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n"
    for name, text in {"a.mp4": playlist, "b.mp4": f"ffconcat version 1.0\nfile '{folder / 'secret.mp4'}'\n"}.items():
        (folder / name).write_text(text)
        with pytest.raises(ClipError, match="undecodable"):
            open_video(folder / name)


@pytest.mark.parametrize("content", [b"", b"text\n" * 100, bytes(4000)], ids=["empty", "text", "zeros"])
def test_what_is_no_video_has_its_reason(content: bytes, folder: Path) -> None:
    for source in (folder / "broken.mp4", content):
        if isinstance(source, Path):
            source.write_bytes(content)
        with pytest.raises(ClipError) as error:
            open_video(source)
        assert error.value.reason == "undecodable"
        assert "\n" not in str(error.value)
    with pytest.raises(ClipError, match="unreadable: No such file"):
        open_video(folder / "nowhere.mp4")
