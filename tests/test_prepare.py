"""The whole of `videodiff data prepare`, `merge` and `filter` on real files: killed, cut short, fuzzed, filled up."""

import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from data_pipeline import making
from data_pipeline.clips import decode_clip
from data_pipeline.journal import Journal, read_rows
from data_pipeline.prepare import merge, parse_part, prepare, refilter
from data_pipeline.prepare_config import PrepareConfig
from data_pipeline.publish import alone
from data_pipeline.shards import open_shards, read_sample
from stages.cli import main
from tests.numbered_videos import KINDS, X264, encode, numbered, numbers
from tests.test_measures import moving, texture
from videodiff.config import ConfigError, build, load
from videodiff.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SETTINGS: dict[str, Any] = {"clip": {"frames": 4, "fps": 8, "size": 64}, "scenes": None, "workers": 0}


def settings(**changes: Any) -> PrepareConfig:
    return build(PrepareConfig, {**SETTINGS, **changes}, "a test")


def rows(out: Path) -> list[dict[str, Any]]:
    return parquet.read_table(out / "clips.parquet").to_pylist()


def captioned(videos: Path, folder: Path, *names: str) -> Path:
    """Some of the videos in a folder of their own, each with a caption."""
    folder.mkdir()
    for name in names:
        shutil.copy(videos / f"{name}.mp4", folder)
        (folder / f"{name}.txt").write_text("a caption")
    return folder


def samples(out: Path) -> list[Any]:
    return [read_sample(shard, n) for shard in open_shards(str(out)) for n in range(len(shard.offsets))]


def digests(out: Path) -> dict[str, str]:
    """sha256 of every file that a user sees, by name."""
    names = [path for path in out.iterdir() if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos of three scenes' worth, a copy of the first in another codec, one that is broken, one of black."""
    root = tmp_path_factory.mktemp("videos")
    for index, name in enumerate(("a", "b", "c")):
        frames = moving([2] * 35, texture(index))
        encode(root / f"{name}.mp4", frames, *X264, "-g", "12")
    encode(root / "copy.webm", moving([2] * 35, texture(0)), *KINDS["vp9.webm"])
    encode(root / "dark.mp4", np.zeros((24, 64, 96, 3), np.uint8), *X264)
    (root / "broken.mp4").write_bytes((root / "a.mp4").read_bytes()[:900])
    for path in sorted(root.iterdir()):
        said = {"captions": [f"video {path.stem}", "another"], "license": "CC0", "url": f"from/{path.name}"}
        path.with_suffix(".json").write_text(json.dumps(said))
    return root


@pytest.fixture(scope="module")
def made(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    prepare(str(videos), out, settings(filters={"black": {"max": 0.5}}))
    return out


def test_every_clip_has_a_row_a_verdict_and_what_was_measured(made: Path) -> None:
    table = rows(made)
    by_reason = Counter(row["reason"] for row in table)
    assert by_reason == {"": 9, "near-duplicate": 3, "black high": 2, "undecodable": 1}
    copies = [row for row in table if row["reason"] == "near-duplicate"]
    assert [row["duplicate_of"].partition("-")[0] for row in copies] == ["a"] * 3
    for row in table:
        assert row["kept"] == (row["shard"] is not None) == (row["reason"] == "")
        if row["source"] == "broken.mp4":
            assert (row["decoder"], row["detail"] != "") == (None, True)
            continue
        assert (row["decoder"], row["licence"], row["origin"]) == ("decord", "CC0", f"from/{row['source']}")
        assert row["source_fps"] == pytest.approx(24, rel=0.01)
        assert (row["seconds"], row["frames"], row["fps"]) == (0.5, 4, 8)
        if row["kept"]:
            assert (row["width"], row["height"], row["source_side"]) == (64, 64, 128)
            assert row["motion"] == pytest.approx(100 * 6 / 64 / 2, rel=0.4)  # three moves of two pixels, halved
            assert len(row["hash"]) == 48


def test_the_shards_hold_what_the_table_says(made: Path) -> None:
    kept = [row for row in rows(made) if row["kept"]]
    stored = samples(made)
    assert [sample.key for sample in stored] == [row["key"] for row in kept]
    for sample, row in zip(stored, kept, strict=True):
        assert hashlib.sha256(sample.video).hexdigest() == row["sha256"]
        assert sample.captions == (f"video {row['source'][0]}", "another")
        assert (sample.meta["licence"], sample.meta["source"], sample.meta["fps"]) == ("CC0", row["source"], 8)
        assert sample.meta["measures"]["motion"] == row["motion"]
        assert decode_clip(sample.video, fps=8, frames=4, size=64).frames.shape == (4, 64, 64, 3)
    index = json.loads((made / "index.json").read_text())
    assert index["hours"] == pytest.approx(9 * 0.5 / 3600)
    for entry in index["shards"]:
        assert entry["sha256"] == hashlib.sha256((made / entry["file"]).read_bytes()).hexdigest()
    import webdataset

    tars = [str(made / entry["file"]) for entry in index["shards"]]
    assert len(list(webdataset.WebDataset(tars, shardshuffle=False))) == 9


def test_the_report_shows_all_of_it_in_one_file(made: Path) -> None:
    page = (made / "report.html").read_text()
    for said in ("9 of 14 clips kept", "near-duplicate", "black high", "undecodable", "broken.mp4", "decord", "vp9"):
        assert said in page
    assert page.count("data:image/jpeg;base64,") == page.count(", sharpness ") == 9 + 3 + 2
    assert not re.search(r"(src|href)=(?!\"data:)|url\(|@import", page), "nothing is loaded from elsewhere"
    for measure in ("motion", "sharpness", "brightness", "letterbox"):
        assert f"<b>{measure}</b>" in page


def test_what_anybody_writes_into_a_caption_stays_text(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    encode(tmp_path / "in" / "a.mp4", numbered(12), *X264)
    (tmp_path / "in" / "a.txt").write_text("<script>alert(1)</script> {{ 7 * 7 }}")
    prepare(str(tmp_path / "in"), tmp_path / "out", settings())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert "{{ 7 * 7 }}" in page


def test_doing_it_again_changes_nothing(made: Path, videos: Path) -> None:
    before = digests(made)
    times = {path.name: path.stat().st_mtime_ns for path in made.glob("clips-*.tar")}
    prepare(str(videos), made, settings(filters={"black": {"max": 0.5}}))
    assert digests(made) == before
    assert {path.name: path.stat().st_mtime_ns for path in made.glob("clips-*.tar")} == times


@pytest.mark.parametrize("parts", [2, 5])
def test_parts_that_are_merged_are_the_whole(parts: int, videos: Path, made: Path, tmp_path: Path) -> None:
    config = settings(filters={"black": {"max": 0.5}})
    for number in (*range(2, parts + 1), 1):
        if number == 1:
            with pytest.raises(UserError, match=f"part 1/{parts} is not done"):
                merge(tmp_path)
            with pytest.raises(UserError, match="never finished"):
                open_shards(str(tmp_path))
        assert f"part {number}/{parts}" in prepare(str(videos), tmp_path, config, (number, parts))
    merge(tmp_path)
    assert digests(tmp_path) == digests(made)
    before = sorted(path.name for path in (tmp_path / "work").iterdir())
    with pytest.raises(UserError, match=f"was begun in {parts} parts, not in {parts + 1}"):
        prepare(str(videos), tmp_path, config, (1, parts + 1))
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == before
    merge(tmp_path)
    lines = (tmp_path / "work" / f"1-of-{parts}" / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "work" / f"1-of-{parts}" / "rows.jsonl").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(UserError, match=f"{len(lines) - 1} rows where {len(lines)} were written.*part 1/{parts}"):
        merge(tmp_path)


def test_shards_are_near_the_wanted_size(videos: Path, tmp_path: Path) -> None:
    prepare(str(videos), tmp_path, settings(shard_mb=0.025))
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("clips-*.tar"))]
    assert len(sizes) > 2
    assert all(12_000 < size < 36_000 for size in sizes[:-1]), sizes
    assert len(samples(tmp_path)) == sum(row["kept"] for row in rows(tmp_path))


def test_odd_names_and_what_cannot_be_opened_go_through(videos: Path, tmp_path: Path) -> None:
    """Spaces, quotes, a newline, a shell's words, a name that is not UTF-8; a loop of links, a link to nothing."""
    source = tmp_path / "in put"
    source.mkdir()
    names = ["a b", "it's \"", "new\nline", "$(touch hacked)", "ünï", os.fsdecode(b"raw\xff")]
    for name in names:
        shutil.copy(videos / "a.mp4", source / f"{name}.mp4")
        (source / f"{name}.txt").write_text("a caption")
    (source / "loop").symlink_to(source)
    for name, target in (("self", "self.mp4"), ("dead", "nowhere")):
        (source / f"{name}.mp4").symlink_to(source / target)
        (source / f"{name}.txt").write_text("a caption")
    for name in ("1.JPG", "2.jpg", "nobody's.txt", "README", ".hidden"):
        (source / name).write_text("neither a video nor the caption of one")
    out = tmp_path / "out"
    said = prepare(str(source), out, settings(filters={"duplicate_bits": None}))
    assert said.endswith("passed over, as neither video nor caption: 2 .jpg, 1 no ending, 1 .txt"), said
    assert {"1.JPG", "nobody&#39;s.txt", "README"} <= set(re.split("[<>]", (out / "report.html").read_text()))
    assert Counter(row["reason"] for row in rows(out)) == {"": 3 * len(names), "unreadable": 2}
    assert {sample.captions for sample in samples(out)} == {("a caption",)}
    assert {row["source"] for row in rows(out)} >= {"new\nline.mp4", "raw\\udcff.mp4"}
    assert not list(tmp_path.rglob("hacked"))


def test_shards_can_be_prepared_again(made: Path, tmp_path: Path) -> None:
    """Smaller clips from those in shards: what their JSON says is carried along."""
    clip = {"frames": 2, "fps": 4, "size": 32, "aspect": 1.0}
    prepare(str(made), tmp_path, settings(clip=clip, filters={"duplicate_bits": None}))
    stored = samples(tmp_path)
    assert len(stored) == 9
    assert {(s.meta["width"], s.meta["height"], s.meta["licence"]) for s in stored} == {(32, 32, "CC0")}
    assert {(s.captions, s.meta["origin"]) for s in stored} == {(s.captions, s.meta["origin"]) for s in samples(made)}


def test_a_sample_that_is_none_and_a_clip_that_takes_too_long_stop_nobody(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    video = (videos / "a.mp4").read_bytes()
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for name, content in (("a.mp4", video), ("a.txt", b"a"), ("b.mp4", video), ("b.mp4", video), ("b.txt", b"b")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    changes: dict[str, Any] = {"filters": {"duplicate_bits": None}}
    prepare(str(tmp_path / "in.tar"), tmp_path / "out", settings(**changes))
    told = {row["source"]: row["reason"] for row in rows(tmp_path / "out")}
    assert told == {"in.tar/a": "", "in.tar/b": "torn"}

    # To encode a clip starts ffmpeg, which takes longer. What was killed once is not tried again, with more time
    # either.
    for seconds in (0.02, 60):
        late = settings(**changes, workers=1, clip_seconds=seconds)
        with pytest.raises(UserError, match=r"none of 4 clips is kept \(3 deadline, 1 torn\)"):
            prepare(str(tmp_path / "in.tar"), tmp_path / "late", late)
        assert Counter(row["reason"] for row in rows(tmp_path / "late")) == {"deadline": 3, "torn": 1}
        assert not list((tmp_path / "scratch").iterdir())


# Filters


def test_tightening_decodes_nothing_and_loosening_cuts_what_is_new(
    videos: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, moved = tmp_path / "out", tmp_path / "videos"
    shutil.copytree(videos, moved, symlinks=True)
    prepare(str(moved), out, settings(filters={"black": {"max": 0.5}, "sharpness": {"min": 1}}))
    whole, before = digests(out), {row["key"]: row for row in rows(out)}
    shutil.move(str(moved), str(tmp_path / "away"))  # whatever were decoded would be missing
    median = sorted(row["sharpness"] for row in before.values() if row["kept"])[4]
    refilter(out, [f"filters.sharpness.min={median}"])
    tight = {row["key"]: row for row in rows(out)}
    assert len(samples(out)) == sum(row["kept"] for row in tight.values()) == 5
    assert Counter(row["reason"] for row in tight.values())["sharpness low"] >= 4

    told = digests(out)
    with pytest.raises(UserError, match=r"videos are gone or changed .*\(.*\.mp4"):
        refilter(out, ["filters.sharpness.min=1"])
    assert digests(out) == told

    shutil.move(str(tmp_path / "away"), str(moved))
    cut: list[Any] = []
    original = making._cut_job
    monkeypatch.setattr(making, "_cut_job", lambda *given: cut.append(given[2]) or original(*given))
    refilter(out, ["filters.sharpness.min=1"])
    assert len(cut) == 4, "those that were dropped, and no other"
    assert digests(out) == whole
    cut.clear()
    refilter(out, ["filters.black=null", "filters.sharpness=null", "filters.duplicate_bits=null"])
    assert len(cut) == 3 + 2
    assert Counter(row["reason"] for row in rows(out)) == {"": 14, "undecodable": 1}
    assert len(samples(out)) == 14
    assert load(PrepareConfig, out / "prepare.yaml").filters.black is None


def test_each_filter_rejects_by_its_name(made: Path, tmp_path: Path) -> None:
    for name, limits, expected in (
        ("motion", "{max: 0.1}", "motion high"),
        ("motion_window", "{min: 1000}", "motion_window low"),
        ("sharpness", "{min: 1e6}", "sharpness low"),
        ("brightness", "{max: 1}", "brightness high"),
        ("words", "{min: 3}", "words low"),
        ("source_fps", "{min: 30}", "source_fps low"),
        ("source_side", "{min: 200}", "source_side low"),
        ("aspect", "{min: 3}", "aspect low"),
    ):
        with pytest.raises(UserError, match=rf"keep none of 15 clips \(\d+ .*{expected}") as error:
            refilter(made, [f"filters.{name}={limits}"])
        assert "nothing was changed" in str(error.value)
    assert len(samples(made)) == 9


def test_only_verdicts_can_be_changed_afterwards(made: Path, tmp_path: Path) -> None:
    for change, problem in {
        "clip.fps=4": "clip.fps: 8.0 -> 4.0: only filters, exclude, shard_mb can change here",
        "filters.motoin={min: 1}": "did you mean",
        "filters.motion={min: 3, max: 1}": "nothing would be kept",
        "filters.motion={}": "give min, max or both",
    }.items():
        with pytest.raises(UserError, match=re.escape(problem)):
            refilter(made, [change])
    with pytest.raises(UserError, match="was not made by"):
        refilter(tmp_path, [])


@pytest.mark.parametrize("other", [0.025, 256.0])
def test_other_sizes_of_shards_keep_every_sample_once(made: Path, other: float, tmp_path: Path) -> None:
    """From one shard to several, and back to fewer: the names of shards say how the clips are shared among them."""
    out = tmp_path / "out"
    shutil.copytree(made, out)
    refilter(out, [f"shard_mb={0.025 + 256 - other}"])
    keys = [sample.key for sample in samples(made)]
    for shard_mb in (other, 0.05):
        refilter(out, [f"shard_mb={shard_mb}"])
        assert [sample.key for sample in samples(out)] == keys
        named = [entry["file"] for entry in json.loads((out / "index.json").read_text())["shards"]]
        assert sorted(path.name for path in out.glob("*.tar")) == named
        assert len(named) > 1 or shard_mb > 1


def test_the_exclude_list_names_clips_and_sources(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exclude = tmp_path / "exclude.txt"
    exclude.write_text("b.mp4\n")
    out = tmp_path / "out"
    prepare(str(videos), out, settings(exclude=str(exclude)))
    assert Counter(row["source"] for row in rows(out) if row["reason"] == "excluded") == {"b.mp4": 3}
    one = next(row["key"] for row in rows(out) if row["source"] == "c.mp4")
    exclude.write_text(f"{one}\n")
    monkeypatch.chdir(tmp_path)
    refilter(out, ["exclude=exclude.txt"])
    monkeypatch.chdir("/")
    refilter(out, [])  # where the list lies is known from anywhere
    assert [row["key"] for row in rows(out) if row["reason"] == "excluded"] == [one]
    assert one not in {sample.key for sample in samples(out)}
    with pytest.raises(UserError, match=r"exclude=.*/nowhere: cannot be read"):
        refilter(out, ["exclude=nowhere"])


# Kills


def test_whatever_was_written_when_it_was_killed_it_ends_the_same(videos: Path, made: Path, tmp_path: Path) -> None:
    """A kill leaves some bytes of rows, and at least the data of them; here after every few bytes."""
    config = settings(filters={"black": {"max": 0.5}})
    first = tmp_path / "first"
    prepare(str(videos), first, config, (1, 2))
    prepare(str(videos), first, config, (2, 2))
    work = first / "work" / "1-of-2"
    length = (work / "rows.jsonl").stat().st_size
    data = {kind: (work / f"{kind}.data").read_bytes() for kind in ("clips", "strips")}
    text = (work / "rows.jsonl").read_bytes()
    (work / "done.json").unlink()
    for kept in (0, 1, length // 3, length // 2, length - 1):
        (work / "rows.jsonl").write_bytes(text[:kept])
        for kind, content in data.items():
            (work / f"{kind}.data").write_bytes(content)
        if kept == length // 2:  # the machine failed: rows were on the disk, and their data was not
            (work / "clips.data").write_bytes(data["clips"][: len(data["clips"]) // 4])
        prepare(str(videos), first, config, (1, 2))
        assert (work / "rows.jsonl").read_bytes() == text
        assert (work / "clips.data").read_bytes() == data["clips"]
    merge(first)
    assert digests(first) == digests(made)


def start(source: Path, out: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """`videodiff data prepare` in a process of its own, with one helper."""
    arguments = ["data", "prepare", str(source), "--out", str(out), *overrides]
    code = f"import sys; sys.argv = ['videodiff', *{arguments!r}]; from stages.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """True once the condition holds, False if the process ends before."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise AssertionError("nothing happened in 300 s")


def test_sigkill_at_several_points_and_the_same_bytes(videos: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    overrides = ("clip={frames: 4, fps: 8, size: 64}", "scenes=null", "workers=1", "filters.black.max=0.5")
    points: list[Callable[[], bool]] = [
        lambda: (out / "work/1-of-1/rows.jsonl").is_file(),
        lambda: (out / "work/1-of-1/clips.data").is_file(),
        lambda: len(list(read_rows(out / "work/1-of-1"))) > 14,
        lambda: any(out.glob("*clips-*.tar")) or any(out.glob(".clips-*")),
    ]
    for point in points:
        process = start(videos, out, *overrides)
        if wait_for(point, process):
            process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start(videos, out, *overrides)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    names = digests(made).keys() - {"prepare.yaml"}  # the number of helpers is in it
    assert {name: digests(out)[name] for name in names} == {name: digests(made)[name] for name in names}
    assert not list(out.glob(".*"))


def test_a_deadline_is_a_verdict_until_it_is_tried_again(videos: Path, tmp_path: Path) -> None:
    """In parts, one of which has nothing to try again."""
    folder = captioned(videos, tmp_path / "in", "a", "b")
    out = tmp_path / "out"
    hasty, patient = settings(workers=1, video_seconds=0.02), settings(workers=1, video_seconds=60)
    prepare(str(folder), out, hasty, (1, 2))
    prepare(str(folder), out, patient, (2, 2))
    merge(out)
    reasons = {(row["source"], row["reason"], row["detail"]) for row in rows(out)}
    assert reasons == {("a.mp4", "deadline", "not decoded in 0.02 s"), ("b.mp4", "", "")}
    before = digests(out)
    prepare(str(folder), out, patient, (1, 2))
    merge(out)
    assert digests(out) == before, "the verdict was noted"
    for number in (1, 2):
        prepare(str(folder), out, patient, (number, 2), retry=("deadline",))
    merge(out)
    assert {(row["source"], row["reason"]) for row in rows(out)} == {("a.mp4", ""), ("b.mp4", "")}
    straight = tmp_path / "straight"
    prepare(str(folder), straight, patient)
    assert {key: value for key, value in digests(out).items() if key.endswith(".tar")} == {
        key: value for key, value in digests(straight).items() if key.endswith(".tar")
    }


def test_what_is_no_file_waits_for_nobody(videos: Path, tmp_path: Path) -> None:
    """Pipes that nobody writes to, in the place of a video and of a caption: opening them would wait for ever."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        shutil.copy(videos / f"{name}.mp4", folder)
    (folder / "a.txt").write_text("a caption")
    (folder / "pipe.txt").write_text("a caption")
    for name in ("b.txt", "pipe.mp4"):
        os.mkfifo(folder / name)
    out = tmp_path / "out"
    prepare(str(folder), out, settings())
    reasons = {row["source"]: (row["reason"], row["detail"].rpartition(": ")[2]) for row in rows(out)}
    expected = {"b.mp4": ("no caption", "no regular file"), "pipe.mp4": ("unreadable", "no regular file")}
    assert reasons == {"a.mp4": ("", ""), **expected}


def test_videos_put_together_of_several_lose_no_frame_unsaid(tmp_path: Path) -> None:
    """`cat a.ts b.ts`: the times of the second begin anew."""
    folder = tmp_path / "in"
    folder.mkdir()
    parts = [encode(tmp_path / f"{n}.ts", numbered(48, first=100 * n), *X264, "-g", "12") for n in (0, 1)]
    (folder / "cat.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    (folder / "cat.txt").write_text("a caption")
    out = tmp_path / "out"
    said = prepare(str(folder), out, settings())
    assert "1 videos have frames whose times don't go on, which were left out" in said
    assert {row["passed_over"] for row in rows(out)} == {48}


def test_what_lies_before_the_damage_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    path = encode(folder / "film.mp4", numbered(120), *KINDS["h264.mp4"])
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3 : len(content) * 2 // 3 + 3000] = bytes(3000)
    path.write_bytes(content)
    (folder / "film.txt").write_text("a caption")
    out = tmp_path / "out"
    said = prepare(str(folder), out, settings())
    assert "1 videos are damaged further on, and were cut up to there" in said
    table = rows(out)
    assert {row["damaged"] for row in table} == {True}
    assert 3 <= sum(row["kept"] for row in table) < 10
    for sample, row in zip(samples(out), [row for row in table if row["kept"]], strict=True):
        first = round(row["start"] * 24)
        assert numbers(decode_clip(sample.video, fps=8, frames=4, size=(64, 96)).frames) == [
            first + 3 * i for i in range(4)
        ]


def test_names_that_others_take_for_patterns_or_addresses(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = captioned(videos, tmp_path / "in", "a", "b")
    monkeypatch.chdir(tmp_path)
    for name in ("run:1", "q{a,b}", "x[1]*"):
        prepare("in", Path(name), settings())
        refilter(Path(name), ["shard_mb=0.01"])
        assert len(list(Path(name).glob("clips-*.tar"))) == sum(row["kept"] for row in rows(tmp_path / name)), name
    with pytest.raises(UserError, match="is one video; name its folder"):
        prepare(str(folder / "a.mp4"), tmp_path / "other", settings())


def test_what_comes_later_is_left_out_and_counted(videos: Path, tmp_path: Path) -> None:
    folder = captioned(videos, tmp_path / "in", "b", "c")
    out = tmp_path / "out"
    prepare(str(folder), out, settings(), (1, 2))
    for name in ("a", "d"):  # one before those that were there, one after
        shutil.copy(videos / "a.mp4", folder / f"{name}.mp4")
        (folder / f"{name}.txt").write_text("another caption")
    assert "; 2 sources came after the work was begun and are left out" in prepare(str(folder), out, settings(), (2, 2))
    merge(out)
    assert {row["source"] for row in rows(out)} == {"b.mp4", "c.mp4"}
    before = digests(out)
    prepare(str(folder), out, settings(), (1, 2))
    merge(out)
    assert digests(out) == before


# Bad input


def test_another_set_of_settings_or_sources_is_refused(videos: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(videos / "a.mp4", source / "a.mp4")
    (source / "a.txt").write_text("a caption")
    out = tmp_path / "out"
    prepare(str(source), out, settings())
    with pytest.raises(UserError, match=r"begun with other settings \(clip.size: 64 -> 32\)"):
        prepare(str(source), out, settings(clip={"frames": 4, "fps": 8, "size": 32}))
    (source / "a.txt").write_text("another caption")
    with pytest.raises(UserError, match=r"not what it was .*\(1 sources then, 0 of them now"):
        prepare(str(source), out, settings())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds other files"):
        prepare(str(source), tmp_path / "other", settings())
    for text in ("3/2", "0/2", "x", "1"):
        with pytest.raises(UserError, match="i/n is part i of n"):
            prepare(str(source), tmp_path / "new", settings(), parse_part(text))
    with pytest.raises(ConfigError):
        settings(clip={"size": 33})
    with pytest.raises(UserError, match="was not made by"):
        merge(tmp_path / "nowhere")


def test_two_processes_in_one_part_are_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "work"), pytest.raises(UserError, match="another process is at work"):
        Journal(tmp_path / "work")


def test_two_processes_do_not_publish_at_once(made: Path) -> None:
    with alone(made), pytest.raises(UserError, match="another process is at work"):
        merge(made)


def test_bytes_that_were_given_up_do_not_hide_those_in_a_shard(made: Path, tmp_path: Path) -> None:
    """A journal that was cut on after its bytes were published is hollow at its beginning."""
    out = tmp_path / "out"
    shutil.copytree(made, out)
    (folder,) = (out / "work").glob("1-of-1")
    end = max(row["ends"]["clips"] for row in read_rows(folder))
    (folder / "clips.data").write_bytes(bytes(end))
    refilter(out, ["shard_mb=0.03"])
    assert [sample.video for sample in samples(out)] == [sample.video for sample in samples(made)]


def test_a_picture_too_wide_for_the_encoder_costs_itself(videos: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(videos / "a.mp4", source / "a.mp4")
    encode(source / "wide.gif", np.full((12, 32, 16_480, 3), 90, np.uint8), fps=10)
    for name in ("a", "wide"):
        (source / f"{name}.txt").write_text("a caption")
    prepare(str(source), tmp_path / "out", settings(clip={"frames": 2, "fps": 8, "size": 32}))
    assert {row["source"]: row["reason"] for row in rows(tmp_path / "out")} == {"a.mp4": "", "wide.gif": "too large"}


def test_nothing_kept_is_said_with_its_reasons(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.mp4").write_bytes(b"no video")
    (source / "a.txt").write_text("a caption")
    with pytest.raises(UserError, match=r"none of 1 clips is kept \(1 undecodable\).*report.html"):
        prepare(str(source), tmp_path / "out", settings())
    assert "a.mp4" in (tmp_path / "out" / "report.html").read_text()


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(videos: Path, made: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails with an OSError
    config = settings(filters={"black": {"max": 0.5}})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
        with pytest.raises(UserError, match=r"cannot be (written|encoded)") as error:
            prepare(str(videos), tmp_path, config)
        assert len(str(error.value).splitlines()) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    prepare(str(videos), tmp_path, config)
    assert digests(tmp_path) == digests(made)


def test_an_output_that_cannot_be_written_is_one_line(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(UserError, match=r"cannot be (written|used)") as error:
            prepare(str(videos), out, settings())
        assert len(str(error.value).splitlines()) == 1


def test_the_command_line(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(videos / "a.mp4", source / "a.mp4")
    (source / "a.txt").write_text("a caption")

    def run(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out + printed.err

    (tmp_path / "p.yaml").write_text("clip: {frames: 4, fps: 8, size: 64}\nscenes: null\nworkers: 0\n")
    given = ("data", "prepare", source, "clip.frames=6", "--out", tmp_path / "out", "--config", tmp_path / "p.yaml")
    assert run(*given, "--part", "1/2")[0] == 0
    assert run(*given, "--part", "2/2")[0] == 0
    code, said = run("data", "merge", tmp_path / "out")
    assert (code, "kept 2 of 2 clips" in said) == (0, True), said
    code, said = run("data", "filter", tmp_path / "out", "filters.duplicate_bits=191")
    assert (code, "kept 1 of 2 clips" in said, "1 near-duplicate" in said) == (0, True, True), said
    code, said = run("data", "prepare", tmp_path / "out" / "work", "--out", tmp_path / "other")
    assert (code, "there is no video here" in said, len(said.splitlines())) == (2, True, 1), said


# Fuzz


def fuzzed(folder: Path, count: int) -> None:
    """Truncated, bit-flipped, wrongly named and random files, each with a caption."""
    rng = np.random.default_rng(3)
    bases = []
    for name in ("h264.mp4", "vp9.webm", "mpeg4.avi", "h264.mkv", "anim.gif", "av1.mp4"):
        path = encode(folder.parent / name, numbered(12), *KINDS[name])
        bases.append((path.suffix, path.read_bytes()))
    folder.mkdir()
    endings = [".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif"]
    for index in range(count):
        suffix, content = bases[index // 4 % len(bases)]
        kind = index % 4
        if kind == 0:
            content = content[: int(rng.integers(len(content)))]
        elif kind == 1:
            flipped = bytearray(content)
            for place in rng.integers(0, len(content), int(rng.integers(1, 60))):
                flipped[place] ^= 1 << int(rng.integers(8))
            content = bytes(flipped)
        elif kind == 2:
            suffix = endings[int(rng.integers(len(endings)))]
        else:
            content = rng.bytes(int(rng.integers(1, 5000)))
        (folder / f"fuzz{index:03d}{suffix}").write_bytes(content)
        (folder / f"fuzz{index:03d}.txt").write_text(f"fuzzed file {index}")


@pytest.mark.parametrize("count", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_fuzzed_files_neither_crash_nor_hang_it(count: int, tmp_path: Path) -> None:
    fuzzed(tmp_path / "in", count)
    out = tmp_path / "out"
    prepare(str(tmp_path / "in"), out, settings(workers=2, filters={"duplicate_bits": None}))
    table = rows(out)
    assert {row["source"] for row in table} == {
        path.name for path in (tmp_path / "in").iterdir() if path.suffix != ".txt"
    }
    reasons = Counter(row["reason"] for row in table)
    assert set(reasons) <= {"", "undecodable", "too short", "too slow", "too small", "no video", "too large", "crash"}
    assert reasons["undecodable"] >= count // 4, "the random ones at least"
    assert reasons[""] >= count // 4, "the wrongly named ones at least"
    page = (out / "report.html").read_text()
    for row in table:
        assert row["kept"] or row["reason"] in page
    listed = page.partition("Sources of which nothing was kept")[2].partition("<details>")[0]
    kept = {row["source"] for row in table if row["kept"]}
    for row in table:
        assert (f"<td>{row['source']}</td>" in listed) == (row["source"] not in kept)
    for sample in samples(out):
        assert len(numbers(decode_clip(sample.video, fps=8, frames=4, size=64).frames)) == 4
