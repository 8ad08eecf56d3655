"""Shards are written and read for real, also by plain webdataset."""

import hashlib
import io
import json
import pickle
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from webdataset import tariterators

from data_pipeline import tars
from data_pipeline.order import Order
from data_pipeline.shards import (
    all_captions,
    fingerprint,
    open_shards,
    read_sample,
    scan_shard,
    started,
    write_shard,
    write_world_shards,
)
from videodiff.errors import UserError

WORLD: dict[str, Any] = {"num_clips": 7, "size": 32, "frames": 4, "fps": 8, "seed": 3, "samples_per_shard": 3}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world_shards(tmp_path_factory.mktemp("world"), **WORLD).parent


@pytest.fixture
def copied(world: Path, tmp_path: Path) -> Path:
    for name, content in contents(world).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def foreign(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_equal_arguments_give_equal_bytes(world: Path, tmp_path: Path) -> None:
    write_world_shards(tmp_path / "again", workers=1, **WORLD)
    assert contents(tmp_path / "again") == contents(world)
    write_world_shards(tmp_path / "other", **{**WORLD, "seed": 4})
    assert contents(tmp_path / "other")["world-000000.tar"] != contents(world)["world-000000.tar"]


def test_motion_captions_make_a_set_of_their_own(world: Path, tmp_path: Path) -> None:
    motions = write_world_shards(tmp_path / "motions", motion_captions=2, **WORLD)
    for told, plain in zip(open_shards(str(motions)), open_shards(str(world)), strict=True):
        for number in range(len(plain.offsets)):
            ours, theirs = read_sample(told, number), read_sample(plain, number)
            assert (ours.key, ours.video) == (theirs.key, theirs.video)
            assert ours.captions[:2] == theirs.captions[:2]
            assert set(ours.captions[2:]).isdisjoint(theirs.captions)
    for count, folder in ((0, "motions"), (1, "motions")):
        with pytest.raises(UserError, match=r"other shards \(source"):
            write_world_shards(tmp_path / folder, motion_captions=count, **WORLD)
    with pytest.raises(UserError, match="is 5, a clip has 4"):
        write_world_shards(tmp_path / "more", motion_captions=5, **WORLD)


def test_the_index_tells_the_truth(world: Path) -> None:
    index = json.loads((world / "index.json").read_text())
    assert {key: index[key] for key in ("clips", "size", "frames", "fps", "seed", "source")} == {
        "clips": 7, "size": 32, "frames": 4, "fps": 8, "seed": 3, "source": "world",
    }  # fmt: skip
    assert [entry["samples"] for entry in index["shards"]] == [3, 3, 1]
    for entry in index["shards"]:
        data = (world / entry["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        assert list(scan_shard(world / entry["file"]).offsets) == entry["offsets"]


def test_plain_webdataset_reads_the_same_samples(world: Path) -> None:
    urls = [str(path) for path in sorted(world.glob("*.tar"))]
    plain = [
        (sample["__key__"], sample["mp4"], json.loads(sample["json"]))
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    ]
    shards = open_shards(str(world))
    ours = [read_sample(shard, number) for shard in shards for number in range(len(shard.offsets))]
    assert [(sample.key, sample.video, sample.meta) for sample in ours] == plain
    assert len({sample.key for sample in ours}) == 7
    assert all(sample.captions and "." not in sample.key for sample in ours)
    assert ours[0].meta["scene"]["colour"] in " ".join(f"{sample.meta}" for sample in ours)


def test_an_interrupted_run_continues_and_a_finished_one_is_left_alone(copied: Path) -> None:
    finished = contents(copied)
    stamps = {path: path.stat().st_mtime_ns for path in copied.iterdir()}
    write_world_shards(copied, **WORLD)
    assert {path: path.stat().st_mtime_ns for path in copied.iterdir()} == stamps
    # As a kill in the second shard leaves the folder.
    plan = {key: value for key, value in json.loads(finished["index.json"]).items() if key not in ("shards", "version")}
    (copied / ".making.json").write_text(json.dumps(plan))
    for name in ("index.json", "world-000001.tar", "world-000002.tar"):
        (copied / name).unlink()
    (copied / ".world-000001-abcd1234.tar").write_bytes(b"half")
    with pytest.raises(UserError, match="never finished"):
        open_shards(str(copied))
    write_world_shards(copied, **WORLD)
    assert contents(copied) == finished
    first = copied / "world-000000.tar"
    assert first.stat().st_mtime_ns == stamps[first], "the finished shard was kept"


def test_other_content_is_never_overwritten(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seed 3 instead of 9"):
        write_world_shards(copied, **{**WORLD, "seed": 9})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("")
    with pytest.raises(UserError, match=r"other files \(todo.txt\)"):
        write_world_shards(tmp_path / "notes", **WORLD)
    with pytest.raises(UserError, match="cannot be used as a folder"):
        write_world_shards(tmp_path / "notes" / "todo.txt", **WORLD)
    index = json.loads((copied / "index.json").read_text())
    (copied / "index.json").write_text(json.dumps({**index, "edition": index["edition"] - 1}))
    with pytest.raises(UserError, match="holds other shards \\(edition"):  # rendered by another version
        write_world_shards(copied, **WORLD)
    (copied / "index.json").write_text("[]")
    with pytest.raises(UserError, match="not readable"):
        write_world_shards(copied, **WORLD)
    for wrong in ({"num_clips": 0}, {"size": 33}, {"fps": -1}, {"frames": 0}, {"samples_per_shard": 0},
                  {"fps": 2000}, {"fps": float("inf")}, {"fps": float("nan")}, {"size": 8}):  # fmt: skip
        with pytest.raises(UserError, match="world shards"):
            write_world_shards(tmp_path / "new", **{**WORLD, **wrong})
    assert not (tmp_path / "new").exists()


def test_missing_and_torn_shards_are_named_at_once(copied: Path) -> None:
    shard = copied / "world-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    with pytest.raises(UserError, match=r"world-000001\.tar: torn, .* bytes where the index says"):
        open_shards(str(copied))
    shard.unlink()
    with pytest.raises(UserError, match=r"world-000001\.tar.*missing"):
        open_shards(str(copied / "index.json"))
    shard.write_bytes(bytes(len(whole)))  # of the right size, but not the file
    torn = next(s for s in open_shards(str(copied)) if s.path == shard)
    with pytest.raises(UserError, match=r"world-000001\.tar: torn at byte 0"):
        read_sample(torn, 0)
    (copied / "index.json").write_text('{"version": 1}')
    with pytest.raises(UserError, match="not an index"):
        open_shards(str(copied))
    (copied / "index.json").write_text('{"version": 99, "shards": []}')
    with pytest.raises(UserError, match="version 99"):
        open_shards(str(copied))


def test_shards_of_others_need_no_index(tmp_path: Path) -> None:
    a = foreign(
        tmp_path / "a-0.tar",
        [("x/1.json", b'{"caption": "one"}'), ("x/1.MP4", b"v1"), ("x/2.mp4", b"v2"), ("x/2.txt", b"two\n")],
    )
    third = [("README", b"?"), ("3.mp4", b"v3"), ("3.json", b'{"captions": ["three", "iii"]}')]
    fourth = [("4.mp4", b"v4"), ("4.json", b'{"captions": "four"}')]
    b = foreign(tmp_path / "a-1.tar", third + fourth)
    for location in (str(tmp_path), f"{tmp_path}/a-{{0..1}}.tar", f"{tmp_path}/a-*.tar", f"file:{tmp_path}"):
        shards = open_shards(location)
        samples = [read_sample(shard, number) for shard in shards for number in range(len(shard.offsets))]
        assert [(s.key, s.video, s.captions) for s in samples] == [
            ("x/1", b"v1", ("one",)),
            ("x/2", b"v2", ("two",)),
            ("3", b"v3", ("three", "iii")),
            ("4", b"v4", ("four",)),
        ]
    assert (
        fingerprint(open_shards(str(a))) != fingerprint(open_shards(str(b))) != fingerprint(open_shards(str(tmp_path)))
    )
    (tmp_path / "moved").mkdir()
    assert fingerprint([scan_shard(a.rename(tmp_path / "moved" / "z.tar"))]) == fingerprint(shards[:1])


def test_torn_and_compressed_shards_of_others_are_refused(tmp_path: Path) -> None:
    path = foreign(tmp_path / "a.tar", [(f"{i}.mp4", bytes(700)) for i in range(40)])
    whole = path.read_bytes()
    third = 3 * 1536
    flipped = whole[:third] + b"\xff" + whole[third + 1 :]
    for content in (whole[:5000], whole[:third], whole[: third + 100], whole[:-20000], flipped, b"", b"hello" * 500):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.tar"):
            open_shards(str(path))
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("1.mp4"))
    for location, words in {
        str(tmp_path / "b.tar"): "uncompressed",
        str(tmp_path / "none.tar"): "no such shard",
        str(tmp_path / "none-*.tar"): "no shard here",
        "": "empty",
    }.items():
        with pytest.raises(UserError, match=words):
            open_shards(location)
    tarfile.open(tmp_path / "c.tar", "w").close()
    with pytest.raises(UserError, match="no sample"):
        open_shards(str(tmp_path / "c.tar"))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("1.mp4", b"v")], "sample 1 has no caption"),
        ([("1.mp4", b"v"), ("1.json", b"{}")], "sample 1 has no caption"),
        ([("1.mp4", b"v"), ("1.json", b'{"captions": ["  ", 7]}')], "sample 1 has no caption"),
        ([("1.mp4", b"v"), ("1.json", b"{torn")], "sample 1 has no caption"),
        ([("1.json", b'{"caption": "one"}')], "sample 1 has no video"),
    ],
)
def test_half_samples_are_named(tmp_path: Path, members: list[tuple[str, bytes]], words: str) -> None:
    shards = open_shards(str(foreign(tmp_path / "a.tar", members)))
    with pytest.raises(UserError, match=words):
        read_sample(shards[0], 0)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_nothing_in_a_shard_or_its_name_is_executed(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    bomb = pickle.dumps(Bomb(marker))
    members = [(f"1.{suffix}", bomb) for suffix in ("pyd", "pkl", "pickle", "pth", "npy", "mp4")]
    path = foreign(tmp_path / "a.tar", [*members, ("1.json", b'{"caption": "one"}')])
    assert read_sample(open_shards(str(path))[0], 0).captions == ("one",)
    for location in (
        f"pipe:touch {marker}",
        f"pipe:touch {marker}; cat a{{0..1}}.tar",
        "ftp://example.com/a.tar",
        "simplecache::http://a/b",
    ):
        with pytest.raises(UserError, match="not opened"):
            open_shards(location)
    for location in (f"{{pipe:touch {marker},b}}", f"$(touch {marker})", f"`touch {marker}`", f"| touch {marker}"):
        with pytest.raises(UserError):
            open_shards(location)
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists(), "the bomb is a real one"


def test_the_writer_refuses_keys_and_samples_that_cannot_be_read_back(tmp_path: Path) -> None:
    for sample in [("a.b", b"v", {"captions": ["x"]}), ("", b"v", {"captions": ["x"]}), ("a", b"v", {"captions": []})]:
        with pytest.raises(ValueError, match="key has no dots"):
            write_shard(tmp_path / "x.tar", [sample])
    assert list(tmp_path.iterdir()) == []


def test_keys_and_captions_of_others_can_be_written_again(tmp_path: Path) -> None:
    """A folder in a key may have dots; half a surrogate pair in the JSON is carried along, and is no caption."""
    write_shard(tmp_path / "a.tar", [("v1.0/0001", b"x", {"captions": ["\ud800", "a fox"], "note": "\udfff"})])
    (shard,) = open_shards(str(tmp_path))
    sample = read_sample(shard, 0)
    assert (sample.key, sample.captions, sample.meta["note"]) == ("v1.0/0001", ("a fox",), "\udfff")
    for key in ("v1/a.b", "v1/", ""):
        with pytest.raises(ValueError, match="no dots"):
            write_shard(tmp_path / "b.tar", [(key, b"x", {"captions": ["a"]})])


NAMES = st.sampled_from(["a.mp4", "a.MP4", "a.json", "a.seg.mp4", "b/a.mp4", "b/a.txt", "__x__/a.mp4", "__y.mp4",
                        "noext", ".hidden", f"{'x' * 120}.mp4", f"{'x' * 120}.txt", "é.mp4"])  # fmt: skip


@given(st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=12))
def test_a_tar_of_others_is_grouped_as_webdataset_does(members: list[tuple[str, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = foreign(Path(folder, "a.tar"), members)
        theirs, broken = [], False
        try:
            with open(path, "rb") as file:
                theirs += tariterators.group_by_keys(tariterators.tar_file_expander([{"url": "a", "stream": file}]))
        except ValueError:  # two members of one name
            broken = True
        shard = scan_shard(path)
        content = path.read_bytes()
        ours, torn = [], False
        for number in range(len(shard.offsets)):
            start, stop = shard.extent(number)
            try:
                ours.append(tars.read_group(content[start:stop]))
            except ValueError:
                torn = True
    assert torn == broken
    for mine, other in zip(ours, theirs, strict=False):
        assert mine == {name: value for name, value in other.items() if name not in ("__url__", "__local_path__")}
    if not broken:
        assert len(ours) == len(theirs)


def test_only_webdatasets_own_members_are_skipped(tmp_path: Path) -> None:
    members = [("__meta__", b"x"), ("__x.mp4", b"v"), ("__x.json", b'{"captions": ["a"]}')]
    foreign(tmp_path / "a.tar", members)
    (shard,) = open_shards(str(tmp_path))
    assert [read_sample(shard, n).key for n in range(len(shard.offsets))] == ["__x"]


def test_what_a_sigkill_left_of_a_plan_is_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "..making-0123abcd.json").write_text("{")
    assert not started(tmp_path, {"seed": 0})
    (tmp_path / ".making.json").unlink()
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(UserError, match="holds other files"):
        started(tmp_path, {"seed": 0})


def test_captions_are_read_without_the_videos(world: Path, tmp_path: Path) -> None:
    long = "x" * 120  # a name that takes a header of its own
    others = foreign(
        tmp_path / "a.tar",
        [("README", b"?"), ("1.MP4", bytes(3 << 20)), ("1.TXT", b"one\n"), (f"{long}.mp4", bytes(3 << 20)),
         (f"{long}.json", b'{"captions": ["two", "zwei"]}')],
    )  # fmt: skip
    for location in (world, others):
        shards = open_shards(str(location))
        samples = [read_sample(shard, number) for shard in shards for number in range(len(shard.offsets))]
        assert list(all_captions(str(location))) == [caption for sample in samples for caption in sample.captions]
    before = _bytes_read()
    list(all_captions(str(others)))
    assert _bytes_read() - before < 1 << 20


def _bytes_read() -> int:
    """What this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_bad_samples_give_no_captions_and_the_others_theirs(copied: Path, tmp_path: Path) -> None:
    """One bad sample among many must not keep a text stage from beginning; the loader counts and names it."""
    folder = tmp_path / "half"
    folder.mkdir()
    foreign(
        folder / "a.tar",
        [("1.mp4", b"v"), ("2.json", b'{"caption": "no video"}'), ("3.mp4", b"v"), ("3.json", b'{"caption": "three"}')],
    )
    assert list(all_captions(str(folder))) == ["three"]
    whole = list(all_captions(str(copied)))
    shard = copied / "world-000001.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    rest = list(all_captions(str(copied)))
    assert 0 < len(rest) < len(whole)
    assert set(rest) <= set(whole)


def test_the_order_stays_whatever_happens_between_two_lines() -> None:
    """As another thread would: before every line of a call, the order is asked for a sample of another epoch."""
    sizes, total = [5, 3, 9, 1, 30], 48
    alone, order = Order(sizes, 7, seed=2), Order(sizes, 7, seed=2)
    expected = [alone.sample(number) for number in range(2 * total)]
    lines = 0

    def intrude(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code is Order._stream.__code__ and event == "line":
            sys.settrace(None)
            lines += 1
            other = (number + total) % (2 * total)
            assert order.sample(other) == expected[other]
            sys.settrace(intrude)
        return intrude

    before = sys.gettrace()
    for number in range(0, 2 * total, 6):
        sys.settrace(intrude)
        try:
            found = order.sample(number)
        finally:
            sys.settrace(before)
        assert found == expected[number]
    assert lines > 4 * total // 3


def test_the_order_is_the_same_from_many_threads() -> None:
    """Each thread is in an epoch of its own."""
    sizes, total = [5, 3, 9, 1, 30], 48
    alone, order = Order(sizes, 7, seed=2), Order(sizes, 7, seed=2)
    epochs = [range(epoch * total, (epoch + 1) * total) for epoch in range(4)]
    expected = [[alone.sample(number) for number in epoch] for epoch in epochs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda epoch: [order.sample(n) for n in epoch], epochs)) == expected
