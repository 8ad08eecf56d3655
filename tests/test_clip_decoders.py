"""Which decoder reads a clip of a shard: real files whose frames carry their number, also through the loader."""

from __future__ import annotations

import builtins
import io
import subprocess
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest

from data_pipeline.check import check_shards
from data_pipeline.clips import ClipError, decode_clip, preview_clip
from data_pipeline.decoders import open_decord, read_frames
from data_pipeline.loader import DataConfig, ShardSource
from data_pipeline.readers import open_video
from data_pipeline.shards import write_shard
from stages.cli import main
from tests.numbered_videos import KINDS, X264, encode, numbered, numbers
from tests.test_clips import broken
from videodiff.errors import UserError

COUNT = 40
FRAMES = numbered(COUNT)
PYAV = ("av1.mp4", "av1.webm", "h264_opengop.mkv", "hevc_opengop.mkv", "mpeg4.avi")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("files")
    kinds = [name for name in KINDS if not name.startswith(("vfr", "anim"))]
    return {name: encode(folder / name, FRAMES, *KINDS[name]).read_bytes() for name in kinds}


@pytest.fixture
def shard(files: dict[str, bytes], tmp_path: Path) -> Path:
    """An AV1 file, one that decord reads, and one that neither does."""
    samples = {"a": files["av1.mp4"], "h": files["h264.mp4"], "x": files["av1.mp4"][:2000]}
    write_shard(tmp_path / "a.tar", [(key, video, {"captions": [key]}) for key, video in samples.items()])
    return tmp_path / "a.tar"


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    original = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] in packages:
            raise ImportError(f"No module named {name!r}")
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_every_kind_gives_the_frames_asked_for(files: dict[str, bytes]) -> None:
    for name, video in files.items():
        assert preview_clip(video, frames=2, height=16).decoder == ("pyav" if name in PYAV else "decord"), name
        for position in (0.0, 0.35, 0.7, 0.999):
            clip = decode_clip(video, fps=8, frames=5, size=(64, 96), position=position)
            first = 3 * clip.first
            assert clip.total == 14
            assert numbers(clip.frames) == list(range(first, first + 15, 3)), (name, position)


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Cut without encoding anew: what a player shows of them is the rest of packets that an edit list hides."""
    folder = tmp_path_factory.mktemp("cuts")
    whole = encode(folder / "whole.mp4", numbered(120), *X264, "-g", "48", "-bf", "2")
    ways = {
        "middle.mp4": ("-ss", "2.5", "-t", "2", "-i", whole),
        "start.mov": ("-ss", "1.0", "-i", whole, "-t", "1.2"),
        "one_key.mp4": ("-ss", "1.4", "-t", "0.5", "-i", whole),
        "head.mp4": ("-i", whole, "-t", "1.9"),
    }
    for name, way in ways.items():
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *way, "-c", "copy", "-y", folder / name]
        subprocess.run(list(map(str, command)), check=True)
    found = {name: (folder / name).read_bytes() for name in ways}
    shortened = bytearray(found.pop("head.mp4"))  # an edit list that ends before the packets do
    place = shortened.index(b"elst") + 12
    shortened[place : place + 4] = (int.from_bytes(shortened[place : place + 4], "big") // 2).to_bytes(4, "big")
    return {**found, "end.mp4": bytes(shortened)}


def test_hidden_frames_of_a_cut_stay_hidden(cuts: dict[str, bytes], tmp_path: Path) -> None:
    """As ffmpeg itself shows them, also to the loader and from any place in the file."""
    for name, video in cuts.items():
        path = tmp_path / name
        path.write_bytes(video)
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-fps_mode", "passthrough"]
        raw = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], check=True, capture_output=True)
        shown = numbers(np.frombuffer(raw.stdout, np.uint8).reshape(-1, 64, 96, 3))
        opened = open_video(path)
        assert numbers(np.stack([frame for _, frame in opened.all()])) == shown, name
        assert opened.decoder == "pyav"
        for position in (0.0, 0.5, 0.999):
            clip = decode_clip(video, fps=12, frames=5, size=(64, 96), position=position)
            found = numbers(clip.frames)
            assert set(found) <= set(shown), (name, position)
            assert all(1 <= b - a <= 3 for a, b in pairwise(found)), (name, position, found)


def test_what_decord_reads_stays_decords(files: dict[str, bytes]) -> None:
    for name in ("h264.mp4", "h264.mkv", "vp9.webm"):
        whole = read_frames(open_decord(io.BytesIO(files[name])), list(range(COUNT)))
        clip = decode_clip(files[name], fps=24, frames=7, size=(64, 96), position=0.6)
        assert np.array_equal(clip.frames, whole[clip.first : clip.first + 7])


def test_damaged_files_are_damaged_by_either(files: dict[str, bytes]) -> None:
    for name in ("av1.mp4", "av1.webm", "h264.mp4", "h264.mkv"):
        video = files[name]
        for content in (video[: len(video) // 2], video[:-400] if name.endswith("mp4") else video[:60]):
            with pytest.raises(ClipError) as error:
                decode_clip(content, fps=8, frames=14, size=32)
            assert error.value.reason in ("undecodable", "too short"), name


def test_an_av1_file_in_a_shard_trains_and_is_told(shard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DataConfig(shards=str(shard), batch_size=3, frames=4, fps=8, size=64, workers=1, prefetch=0)
    source = ShardSource(config, 0)
    (batch,) = islice(source.batches(0, 0, 1, 3), 1)
    assert dict(zip(batch.keys, batch.weight.tolist(), strict=True)) == {"a": 1, "h": 1, "x": 0}
    assert source.bad_counts == {"undecodable": 1}
    for row, key in enumerate(batch.keys):
        found = numbers(batch.frames[row].numpy())
        assert key == "x" or np.diff(found).tolist() == [3, 3, 3]
    assert check_shards(str(shard), 0, 60).decoders == {"decord": 1, "pyav": 1}
    with pytest.raises(SystemExit):
        main(["data", "check", str(shard), "--workers", "0"])
    assert "read by decord 1, pyav 1\n" in capsys.readouterr().out


def test_where_a_decoder_is_missing(files: dict[str, bytes], shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "av")
    problems = check_shards(str(shard), 0, 60).problems
    assert len(problems) == 2
    assert all(line.count("\n") == 0 and "pip install 'videodiff[data]'" in line for line in problems)
    for name in ("h264.mp4", "h264_opengop.mkv"):
        clip = decode_clip(files[name], fps=8, frames=5, size=(64, 96), position=0.999)
        assert numbers(clip.frames) == [27, 30, 33, 36, 39], name
    monkeypatch.undo()
    without(monkeypatch, "decord")
    assert numbers(decode_clip(files["h264.mp4"], fps=24, frames=COUNT, size=(64, 96)).frames) == list(range(COUNT))
    for content in broken().values():
        with pytest.raises(ClipError, match=r"undecodable|no video"):
            decode_clip(content, fps=8, frames=16, size=16)
    without(monkeypatch, "decord", "av")
    with pytest.raises(UserError, match=r"pip install 'videodiff\[data\]'"):
        decode_clip(files["h264.mp4"], fps=8, frames=4, size=32)


def test_many_groups_of_x264_are_decords(tmp_path: Path) -> None:
    video = encode(tmp_path / "a.mp4", FRAMES, *X264, "-g", "6").read_bytes()
    assert preview_clip(video, frames=1, height=16).decoder == "decord"
