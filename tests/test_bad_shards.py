"""What can be wrong with shards, and how the loader says so: refused at once, or counted sample by sample."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.loader import DataConfig, ShardSource
from data_pipeline.shards import SampleError, open_shards, read_sample, write_index, write_shard
from videodiff.errors import UserError
from videodiff.video_io import encode_video

COUNT = 12


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 clips in two shards with an index."""
    folder = tmp_path_factory.mktemp("original")
    clips = [
        (f"s{n:02}", encode_video(np.full((4, 16, 16, 3), 10 * n, np.uint8), 8), {"captions": [f"number {n}"]})
        for n in range(COUNT)
    ]
    write_shard(folder / "a.tar", clips[:7])
    write_shard(folder / "b.tar", clips[7:])
    write_index(folder, ["a.tar", "b.tar"], {})
    return folder


@pytest.fixture
def shards(original: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for file in original.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def epoch(folder: Path, listed: Path | None = None, **changes: Any) -> tuple[dict[str, int], set[str]]:
    """Counts by reason, and the keys of the good samples, after one epoch."""
    values = {"batch_size": 4, "frames": 4, "fps": 8, "size": 16, "streams": 4, "workers": 0, "prefetch": 0, **changes}
    opened = ShardSource(DataConfig(shards=str(folder), **values), 0, listed)
    batches = list(islice(opened.batches(0, 0, 1, 4), COUNT // 4))
    good = {key for b in batches for key, w in zip(b.keys, b.weight.tolist(), strict=True) if w}
    assert sum(len(batch) for batch in batches) == COUNT, "every sample keeps its slot"
    return opened.bad_counts, good


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(bytes(data))


def test_bit_flips_cost_the_samples_they_hit(shards: Path, tmp_path: Path) -> None:
    """In a header, in a video and in a JSON: the index's checksums find each one, exactly."""
    a, b = open_shards(str(shards))
    flip(a.path, a.offsets[1] + 3)  # the name in a header
    flip(a.path, a.offsets[4] + 700)  # in the mp4, which may decode all the same
    flip(b.path, b.offsets[3] - 600)  # in the JSON of sample 2, or the padding behind it
    listed = tmp_path / "bad.jsonl"
    counts, good = epoch(shards, listed)
    assert counts == {"torn": 3}
    assert good == {f"s{n:02}" for n in range(COUNT)} - {"s01", "s04", "s09"}
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [entry["reason"] for entry in entries] == ["torn"] * 3
    assert sorted(Path(entry["shard"]).name for entry in entries) == ["a.tar", "a.tar", "b.tar"]
    with pytest.raises(UserError, match=r"bad \(\d torn, listed in .*bad2\.jsonl"):
        epoch(shards, tmp_path / "bad2.jsonl", bad_floor=2, bad_limit=0.1)


def test_a_shard_cut_while_training_costs_what_was_cut(shards: Path) -> None:
    values = {"batch_size": 4, "frames": 4, "fps": 8, "size": 16, "streams": 4, "workers": 0, "prefetch": 0}
    opened = ShardSource(DataConfig(shards=str(shards), **values), 0)
    b = open_shards(str(shards))[1]
    b.path.write_bytes(b.path.read_bytes()[: b.offsets[2] + 600])
    batches = list(islice(opened.batches(0, 0, 1, 4), 3))
    assert opened.bad_counts == {"torn": 3}
    assert sum(float(batch.weight.sum()) for batch in batches) == COUNT - 3


def test_torn_missing_empty_and_swapped_shards_are_told_at_the_start(shards: Path) -> None:
    a, b = shards / "a.tar", shards / "b.tar"
    whole = b.read_bytes()
    for content in (whole[:-1024], whole[: len(whole) // 2], b""):
        b.write_bytes(content)
        with pytest.raises(UserError, match=r"b\.tar: torn"):
            epoch(shards)
    b.rename(shards / "c.tar")
    with pytest.raises(UserError, match=r"b\.tar: the index names this shard, but it is missing"):
        epoch(shards)
    (shards / "c.tar").unlink()
    a.rename(b)
    b.with_name("a.tar").write_bytes(whole)
    with pytest.raises(UserError, match=r"a\.tar: torn, \d+ bytes where"):
        epoch(shards)


def test_another_file_of_the_same_size_has_no_good_sample(shards: Path, tmp_path: Path) -> None:
    """As a shard that was renamed to another's place: its checksums are not those."""
    a = shards / "a.tar"
    content = a.read_bytes()
    a.write_bytes(content[512:] + content[:512])
    counts, good = epoch(shards)
    assert counts == {"torn": 7}
    assert good == {f"s{n:02}" for n in range(7, COUNT)}


def test_shards_in_another_order_are_another_data_set(shards: Path, tmp_path: Path) -> None:
    config = {"batch_size": 4, "frames": 4, "fps": 8, "size": 16}
    before = ShardSource(DataConfig(shards=str(shards), **config), 0).fingerprint
    index = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(json.dumps({**index, "shards": index["shards"][::-1]}))
    assert ShardSource(DataConfig(shards=str(shards), **config), 0).fingerprint != before
    (shards / "index.json").unlink()
    scanned = ShardSource(DataConfig(shards=str(shards), **config), 0)
    (shards / "b.tar").rename(shards / "0.tar")
    assert ShardSource(DataConfig(shards=str(shards), **config), 0).fingerprint != scanned.fingerprint
    (shards / "0.tar").rename(shards / "z.tar")  # another name, the old order
    assert ShardSource(DataConfig(shards=str(shards), **config), 0).fingerprint == scanned.fingerprint


def test_an_empty_shard_among_others_changes_nothing(shards: Path) -> None:
    (shards / "index.json").unlink()
    tarfile.open(shards / "0.tar", "w").close()
    assert epoch(shards) == ({}, {f"s{n:02}" for n in range(COUNT)})


def test_decoders_that_hang_exit_or_crash_are_counted_exactly(tmp_path: Path) -> None:
    words = ["fine", "hang", "die", "fine", "crash", "bad", "fine", "die", "fine", "fine", "fine", "fine"]
    write_shard(tmp_path / "a.tar", [(f"s{n}", f"{w} {n}".encode(), {"captions": ["x"]}) for n, w in enumerate(words)])
    values = {"batch_size": 12, "frames": 4, "fps": 8, "size": 8, "streams": 3, "workers": 2, "deadline_seconds": 3}
    listed = tmp_path / "bad.jsonl"
    opened = ShardSource(DataConfig(shards=str(tmp_path), **values), 0, listed, "misbehaving_decoder:decode")
    batch = next(batches := opened.batches(0, 0, 1, 12))
    batches.close()  # type: ignore[attr-defined]
    assert opened.bad_counts == {"deadline": 1, "crash": 3, "too short": 1}
    good = {key for key, weight in zip(batch.keys, batch.weight.tolist(), strict=True) if weight}
    assert good == {f"s{n}" for n, word in enumerate(words) if word == "fine"}
    details = {entry["key"]: entry["detail"] for entry in map(json.loads, listed.read_text().splitlines())}
    assert "status 11" in details["s2"]
    assert "status -11" in details["s4"]


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_names_that_point_elsewhere_and_pickles_do_nothing(shards: Path, tmp_path: Path) -> None:
    """Names that point out are counted, pickles beside a video ignored, pickles alone counted; nothing is run."""
    (shards / "index.json").unlink()
    marker = tmp_path / "marker"
    bomb = pickle.dumps(Bomb(marker))
    video = read_sample(open_shards(str(shards))[0], 0).video
    names = {
        "../x": ["mp4", "txt"],
        f"{tmp_path}/y": ["mp4", "txt"],
        "a/../../z": ["mp4", "txt"],
        "both": ["mp4", "txt", "pkl", "pyd", "pth"],
        "alone": ["pkl", "txt"],
    }
    (shards / "a.tar").unlink()
    (shards / "b.tar").unlink()
    with tarfile.open(shards / "a.tar", "w") as tar:
        for key, suffixes in names.items():
            for suffix in suffixes:
                data = {"mp4": video, "txt": b"words"}.get(suffix, bomb)
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        tar.addfile(link)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    values = {"batch_size": 5, "frames": 4, "fps": 8, "size": 16, "streams": 1, "workers": 1, "prefetch": 0}
    opened = ShardSource(DataConfig(shards=str(shards), **values), 0)
    batch = next(batches := opened.batches(0, 0, 1, 5))
    batches.close()  # type: ignore[attr-defined]
    assert {key for key, weight in zip(batch.keys, batch.weight.tolist(), strict=True) if weight} == {"both"}
    assert opened.bad_counts == {"unsafe name": 3, "no video": 1}
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not marker.exists()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"mp4": b"v"}, "no caption"),
        ({"mp4": b"v", "json": b"{torn"}, "no caption"),
        ({"mp4": b"v", "txt": b"\xff\xfe"}, "caption not UTF-8"),
        ({"mp4": b"v", "json": b"[" * 100_000}, "no caption"),
        ({"json": b'{"caption": "one"}'}, "no video"),
        ({"safetensors": b"v", "txt": b"one"}, "no video"),
    ],
)
def test_half_samples_have_a_reason(tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for suffix, data in members.items():
            info = tarfile.TarInfo(f"1.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(SampleError) as error:
        read_sample(open_shards(str(tmp_path))[0], 0)
    assert error.value.reason == reason


@pytest.mark.parametrize("name", ["../a.tar", "/a.tar", "", "..", "x/../../a.tar"])
def test_an_index_names_shards_in_its_own_folder_only(shards: Path, name: str) -> None:
    index = json.loads((shards / "index.json").read_text())
    index["shards"][0]["file"] = name
    (shards / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not an index of shards"):
        open_shards(str(shards))


@pytest.mark.parametrize("offsets", [["a"], [0.5], [-1], [None]])
def test_offsets_are_numbers_of_bytes(shards: Path, offsets: list[object]) -> None:
    index = json.loads((shards / "index.json").read_text())
    index["shards"][0]["offsets"][:1] = offsets
    (shards / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is no number of bytes"):
        open_shards(str(shards))
