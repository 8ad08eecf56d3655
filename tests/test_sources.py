"""Folders, tables and shards as people have them, with what is wrong in each."""

import datetime
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from data_pipeline.clips import ClipError
from data_pipeline.prepare_config import PrepareConfig
from data_pipeline.readers import open_video
from data_pipeline.shards import write_index, write_shard
from data_pipeline.source import Source, SourcesConfig, TableConfig
from data_pipeline.source_tables import seconds
from data_pipeline.sources import find_sources, fingerprint, read_bytes
from data_pipeline.tables import read_columns, write_table
from videodiff.config import load
from videodiff.errors import UserError


def found(location: object, **settings: Any) -> dict[str, Source]:
    sources = list(find_sources(SourcesConfig(**settings), str(location)))
    assert [source.number for source in sources] == list(range(len(sources)))
    assert len({source.key for source in sources}) == len(sources)
    assert not any("." in source.key for source in sources)
    return {source.name: source for source in sources}


def video(path: Path, caption: bytes | str | None = None, suffix: str = ".txt") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not looked at yet")
    if caption is not None:
        path.with_suffix(suffix).write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    return path


def problems(sources: dict[str, Source]) -> dict[str, str]:
    return {name: source.problem for name, source in sources.items()}


def test_a_folder_with_captions_beside_the_videos(tmp_path: Path) -> None:
    video(tmp_path / "b.MP4", "  a fox \n")
    video(tmp_path / "deep" / "a.webm", json.dumps({"captions": ["one", "two"], "license": "CC0", "n": 3}), ".json")
    video(tmp_path / "UP.MP4", "loud", ".TXT")
    video(tmp_path / "c.mov", json.dumps({"caption": "three", "url": "somewhere"}), ".json")
    (tmp_path / "notes.pdf").write_bytes(b"")
    sources = found(tmp_path, licence="all of them", origin="a set")
    assert list(sources) == ["UP.MP4", "b.MP4", "c.mov", "deep/a.webm"]
    assert sources["UP.MP4"].captions == ("loud",)
    assert sources["b.MP4"].captions == ("a fox",)
    assert sources["b.MP4"].meta == {"licence": "all of them", "origin": "a set"}
    assert sources["deep/a.webm"].captions == ("one", "two")
    assert sources["deep/a.webm"].meta == {"licence": "CC0", "origin": "a set", "n": 3}
    assert sources["c.mov"].meta["origin"] == "somewhere"
    again = found(tmp_path, licence="all of them", origin="a set")
    assert [fingerprint(source) for source in again.values()] == [fingerprint(source) for source in sources.values()]
    (tmp_path / "b.txt").write_text("another")
    assert fingerprint(found(tmp_path)["b.MP4"]) != fingerprint(sources["b.MP4"])


def test_captions_that_cannot_be_used_have_their_reasons(tmp_path: Path) -> None:
    video(tmp_path / "none.mp4")
    video(tmp_path / "empty.mp4", " \n")
    video(tmp_path / "latin.mp4", "caf\xe9".encode("latin-1"))
    video(tmp_path / "long.mp4", "word " * 20_000)
    video(tmp_path / "huge.mp4", b"x" * 2_000_000)
    video(tmp_path / "torn.mp4", '{"caption": "a', ".json")
    video(tmp_path / "list.mp4", '["a"]', ".json")
    video(tmp_path / "deep.mp4", "[" * 100_000, ".json")
    video(tmp_path / "number.mp4", '{"caption": 3}', ".json")
    video(tmp_path / "odd.mp4", '{"caption": "\\ud800"}', ".json")
    assert problems(found(tmp_path)) == {
        "none.mp4": "no caption",
        "empty.mp4": "no caption",
        "latin.mp4": "caption not UTF-8",
        "long.mp4": "caption too long",
        "huge.mp4": "caption too long",
        "torn.mp4": "no caption",
        "list.mp4": "no caption",
        "deep.mp4": "no caption",
        "number.mp4": "no caption",
        "odd.mp4": "caption not UTF-8",
    }
    assert found(tmp_path, caption_chars=200_000)["long.mp4"].problem == ""


def test_two_files_of_one_name(tmp_path: Path) -> None:
    """In two folders they are two; in one they may not share a caption file, but have their own."""
    video(tmp_path / "x" / "same.mp4", "in x")
    video(tmp_path / "y" / "same.mp4", "in y")
    video(tmp_path / "z.mp4")
    video(tmp_path / "z.webm", "of which?")
    sources = found(tmp_path)
    assert [sources[f"{folder}/same.mp4"].captions for folder in "xy"] == [("in x",), ("in y",)]
    assert problems(sources)["z.mp4"] == problems(sources)["z.webm"] == "ambiguous caption"
    assert "name it z.mp4.txt" in sources["z.mp4"].detail
    (tmp_path / "z.mp4.txt").write_text("of the mp4")
    assert found(tmp_path)["z.mp4"].captions == ("of the mp4",)


def test_any_name_and_any_link(tmp_path: Path) -> None:
    names = ["with space.mp4", "quote'\".mp4", "new\nline.mp4", "$(touch hacked).mp4", "-rf.mp4", "ünï.mp4"]
    for name in names:
        video(tmp_path / name, "a caption")
    raw = os.fsdecode(b"raw\xff.mp4")
    video(tmp_path / raw, "a caption")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self.mp4").symlink_to(tmp_path / "self.mp4")
    (tmp_path / "self.txt").write_text("a caption")
    (tmp_path / "dead.mp4").symlink_to(tmp_path / "nowhere")
    (tmp_path / "dead.txt").write_text("a caption")
    sources = found(tmp_path)
    assert set(sources) == {*names, raw, "self.mp4", "dead.mp4"}
    assert set(problems(sources).values()) == {""}
    for name in ("self.mp4", "dead.mp4"):  # opening them says what is wrong
        with pytest.raises(ClipError, match="unreadable"):
            open_video(Path(sources[name].path))


def test_a_folder_without_videos_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no video")
    for location in (tmp_path, tmp_path / "nowhere.tar"):
        with pytest.raises(UserError, match=r"there is no") as error:
            found(location)
        assert "\n" not in str(error.value)


# Tables


def test_webvid(tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    table.write_text(
        "videoid,contentUrl,duration,page_dir,name\n"
        '1066674784,https://somewhere/1.mp4,PT00H00M21S,100001_100050,"Rose, in ""bloom"""\n'
        "1066674785,https://somewhere/2.mp4,PT00H00M21S,100001_100050,\n"
    )
    config = load(PrepareConfig, "configs/data/webvid.yaml", ["sources.table.keep=[duration]"])
    sources = found(table, table=config.sources.table, root=str(tmp_path / "videos"))
    first = sources["100001_100050/1066674784.mp4"]
    assert first.path == str(tmp_path / "videos/100001_100050/1066674784.mp4")
    assert first.captions == ('Rose, in "bloom"',)
    assert first.meta == {"origin": "https://somewhere/1.mp4", "duration": "PT00H00M21S"}
    assert sources["100001_100050/1066674785.mp4"].problem == "no caption"


def test_openvid_as_parquet_and_jsonl(tmp_path: Path) -> None:
    rows = [{"video": f"v{i}.mp4", "caption": f"clip {i}", "aesthetic score": 5.0 + i} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    columns = load(PrepareConfig, "configs/data/openvid.yaml", ["sources.table.keep=[aesthetic score]"]).sources.table
    both = [found(tmp_path / name, table=columns) for name in ("a.parquet", "a.jsonl")]
    assert both[0] == both[1]
    dated = pyarrow.table({"video": ["a.mp4"], "caption": ["x"], "day": [datetime.date(2024, 5, 17)]})
    parquet.write_table(dated, tmp_path / "dated.parquet")
    keep = columns.model_copy(update={"keep": ("day",)})
    assert found(tmp_path / "dated.parquet", table=keep)["a.mp4"].meta == {"day": "2024-05-17"}
    assert both[0]["v2.mp4"].meta == {"aesthetic score": 7.0}


def test_panda70m_has_many_spans_in_a_row(tmp_path: Path) -> None:
    (tmp_path / "panda.csv").write_text(
        "videoID,url,timestamp,caption\n"
        "abc,https://x,\"[['0:00:13.047', '0:01:20.053'], ['1:00:20.053', '1:00:30']]\","
        '"[\'a fox\', ""it\'s red""]"\n'
        "bad,https://x,\"__import__('os').system('touch hacked')\",\"['a']\"\n"
        "odd,https://x,\"[[5, 3], [-2, 1], [1, 2]]\",\"['a', 'b', 'c']\"\n"
        'none,https://x,"[]","[]"\n'
        'empty,https://x,"[[1, 2]]",\n'
        'plain,https://x,"[[1, 2]]",a fox\n'
    )
    config = load(PrepareConfig, "configs/data/panda70m.yaml")
    sources = list(find_sources(config.sources, str(tmp_path / "panda.csv")))
    assert [(s.name, s.start, s.end, s.captions, s.problem) for s in sources] == [
        ("abc.mp4", 13.047, 80.053, ("a fox",), ""),
        ("abc.mp4", 3620.053, 3630.0, ("it's red",), ""),
        ("bad.mp4", None, None, (), "unreadable row"),
        ("odd.mp4", 5.0, 3.0, (), "unreadable row"),
        ("odd.mp4", -2.0, 1.0, (), "unreadable row"),
        ("odd.mp4", 1.0, 2.0, ("c",), ""),
        ("none.mp4", None, None, (), "unreadable row"),
        ("empty.mp4", 1.0, 2.0, (), "no caption"),
        ("plain.mp4", 1.0, 2.0, (), "no caption"),
    ]
    assert not (tmp_path / "hacked").exists()


def test_start_and_end_columns_and_rows_that_are_none(tmp_path: Path) -> None:
    lines = [
        '{"file": "a.mp4", "text": ["x", "y"], "from": 1.5, "to": "0:03"}',
        '{"file": "a.mp4", "text": "again", "from": 1.5, "to": 3}',
        "{torn",
        '{"text": "no file", "from": 0, "to": 1}',
        '{"file": "http://somewhere/a.mp4", "text": "t", "from": 0, "to": 1}',
        '{"file": "b.mp4", "text": null, "from": "soon", "to": 1}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    columns = TableConfig(video="file", caption="text", start="from", end="to")
    sources = list(find_sources(SourcesConfig(table=columns), str(tmp_path / "t.jsonl")))
    assert (sources[0].start, sources[0].end, sources[0].captions) == (1.5, 3.0, ("x", "y", "again"))
    assert [s.problem for s in sources[1:]] == ["unreadable row", "unreadable row", "unreadable", "unreadable row"]


def test_rows_of_one_video_are_its_captions_and_what_comes_later_is_told(tmp_path: Path) -> None:
    """As MSR-VTT's tables have them: a row for each caption."""
    rows = ["video,caption", "a.mp4,one", "a.mp4,two", "a.mp4,one", "b.mp4,three", "a.mp4,four", "a.mp4,"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    sources = list(find_sources(SourcesConfig(), str(tmp_path / "t.csv")))
    assert [(s.name, s.captions, s.problem) for s in sources] == [
        ("a.mp4", ("one", "two"), ""),
        ("b.mp4", ("three",), ""),
        ("a.mp4", (), "listed twice"),
    ]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet"])
def test_a_missing_column_is_named_with_those_that_are_there(name: str, tmp_path: Path) -> None:
    rows = [{"film": "a.mp4", "caption": "x"}]
    if name.endswith("parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    else:
        text = {
            "t.csv": "film,caption\na.mp4,x\n",
            "t.tsv": "film\tcaption\na.mp4\tx\n",
            "t.jsonl": json.dumps(rows[0]),
        }
        (tmp_path / name).write_text(text[name])
    with pytest.raises(UserError, match=r"no column 'video' \(it has: film, caption\).*sources.table"):
        found(tmp_path / name)
    with pytest.raises(UserError, match="nowhere"):
        found(tmp_path / f"nowhere{name[1:]}")


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_of_two_columns_of_one_name_none_is_guessed(name: str, tmp_path: Path) -> None:
    names, cells = ["video", "caption", "caption", "more", "more"], ["a.mp4", "x", "y", "1", "2"]
    if name.endswith("parquet"):
        parquet.write_table(pyarrow.table([[cell] for cell in cells], names), tmp_path / name)
    else:
        (tmp_path / name).write_text(",".join(names) + "\n" + ",".join(cells) + "\n")
    with pytest.raises(UserError, match="two columns are called 'caption'"):
        found(tmp_path / name)


def test_a_table_that_is_not_utf8_loses_no_row(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfvideo,caption\na.mp4,caf\xe9\nb.mp4,tea\nc.mp4\n" + b"d.mp4,\0\n")
    assert problems(found(tmp_path / "t.csv"))["a.mp4"] == "caption not UTF-8"
    assert found(tmp_path / "t.csv")["b.mp4"].captions == ("tea",)
    assert len(found(tmp_path / "t.csv")) == 4


def test_parquet_that_is_not_utf8_loses_such_rows_only(tmp_path: Path) -> None:
    raw = pyarrow.array([b"a fox", b"caf\xe9", b"a bear"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"video": ["a.mp4", "b.mp4", "c.mp4"], "caption": raw}), tmp_path / "t.parquet")
    sources = list(find_sources(SourcesConfig(), str(tmp_path / "t.parquet")))
    assert [(s.name, s.captions, s.problem) for s in sources] == [
        ("a.mp4", ("a fox",), ""), ("row 1", (), "unreadable row"), ("c.mp4", ("a bear",), ""),
    ]  # fmt: skip


def test_seconds() -> None:
    assert [seconds(v) for v in (None, "", 3, "2.5", "1:02", "01:00:00.25")] == [None, None, 3, 2.5, 62, 3600.25]
    for bad in ("nan", "inf", "1:x", "soon"):
        with pytest.raises(ValueError):  # noqa: PT011 - any of Python's own
            seconds(bad)


# Shards


def test_shards_are_a_source_too(tmp_path: Path) -> None:
    for name in ("a", "b"):
        samples = [(f"{name}{i}", f"bytes {name}{i}".encode(), {"captions": [f"{name} {i}"], "n": i}) for i in range(2)]
        write_shard(tmp_path / f"{name}.tar", samples)
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a.tar\n\n{tmp_path}/b.tar\n")
    for location in (tmp_path, tmp_path / "{a,b}.tar", tmp_path / "list.txt"):
        sources = found(location)
        assert list(sources) == ["a.tar/a0", "a.tar/a1", "b.tar/b0", "b.tar/b1"]
        assert (sources["b.tar/b1"].captions, sources["b.tar/b1"].meta) == (("b 1",), {"n": 1})
        assert [read_bytes(s) for s in sources.values()] == [b"bytes a0", b"bytes a1", b"bytes b0", b"bytes b1"]
    for refused in ("pipe:touch hacked", "ftp://somewhere/a.tar"):
        with pytest.raises(UserError, match="is not opened"):
            found(refused)


def test_a_pattern_may_stand_in_any_part(tmp_path: Path) -> None:
    for folder, name in (("one", "a"), ("two", "b")):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / f"{name}.tar", [("s", b"bytes", {"captions": ["a fox"]})])
    for pattern in ("*/*.tar", "*/?.tar", "[ot]*/[ab].tar", "t*", "one/*"):
        both = {"a.tar/s", "b.tar/s"} if pattern[0] in "*[" else {"b.tar/s"} if pattern == "t*" else {"a.tar/s"}
        assert set(found(tmp_path / pattern)) == both, pattern
    with pytest.raises(UserError, match=r"there is no shard here"):
        found(tmp_path / "*/z.tar")


def test_a_sample_that_is_none_costs_its_own_row(tmp_path: Path) -> None:
    """Two videos of one name; bytes that are not those the index knows; and a GIF, which is a video here."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.gif", "a.txt", "b.mp4", "b.mp4", "b.txt"):
            member = tarfile.TarInfo(name)
            member.size = 5
            tar.addfile(member, io.BytesIO(b"bytes"))
    sources = found(tmp_path / "a.tar")
    assert problems(sources) == {"a.tar/a": "", "a.tar/b": ""}
    assert read_bytes(sources["a.tar/a"]) == b"bytes"
    with pytest.raises(ClipError, match="torn"):
        read_bytes(sources["a.tar/b"])

    (tmp_path / "known").mkdir()
    write_shard(tmp_path / "known" / "a.tar", [("s", b"bytes", {"captions": ["a fox"]})])
    write_index(tmp_path / "known", ["a.tar"], {})
    assert read_bytes(found(tmp_path / "known")["a.tar/s"]) == b"bytes"
    content = (tmp_path / "known" / "a.tar").read_bytes()
    (tmp_path / "known" / "a.tar").write_bytes(content.replace(b"bytes", b"bites"))
    with pytest.raises(ClipError, match="torn"):
        read_bytes(found(tmp_path / "known")["a.tar/s"])


def test_latents_are_no_videos(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("s", b"numbers", {"captions": ["a fox"]})], "safetensors")
    encoding = {"encoder": "0" * 64, "frames": 2, "fps": 8.0, "size": 32, "variants": 1}
    write_index(tmp_path, ["a.tar"], {"encoding": encoding})
    with pytest.raises(UserError, match="holds latents, which can't be cut"):
        found(tmp_path)


def test_a_column_may_stand_in_some_lines_of_jsonl_only(tmp_path: Path) -> None:
    lines = ['{"video": "a.mp4", "caption": "x"}', '{"video": "b.mp4", "caption": "y", "from": 1, "to": 2}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    sources = found(tmp_path / "t.jsonl", table=TableConfig(start="from", end="to"))
    assert [(source.start, source.end) for source in sources.values()] == [(None, None), (1.0, 2.0)]
    with pytest.raises(UserError, match="no column 'since'"):
        found(tmp_path / "t.jsonl", table=TableConfig(start="since"))


def test_a_torn_shard_has_a_row_and_the_others_are_read(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_shard(tmp_path / f"{name}.tar", [("s", b"bytes", {"captions": ["a fox"]})])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    (tmp_path / "b.tar").write_bytes(b"no tar")
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{tmp_path}/{name}.tar\n" for name in "abcd"))
    bad = {str(tmp_path / f"{name}.tar"): "unreadable" for name in "abd"}
    assert problems(found(listed)) == {**bad, "c.tar/s": ""}
    (tmp_path / "c.tar").unlink()
    with pytest.raises(UserError, match=r"a\.tar"):
        found(listed)


def test_shards_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "a.tar", [("s", folder.encode(), {"captions": [f"in {folder}"]})])
    (tmp_path / "list.txt").write_text(f"{tmp_path}/x/a.tar\n{tmp_path}/y/a.tar\n")
    sources = found(tmp_path / "list.txt")
    assert {name: (s.captions, s.problem) for name, s in sources.items()} == {
        "a.tar/s": (("in x",), ""), "y/a.tar/s": (("in y",), ""),
    }  # fmt: skip
    assert sources["a.tar/s"].key == found(tmp_path / "x")["a.tar/s"].key
    (tmp_path / "list.txt").write_text(f"{tmp_path}/x/a.tar\n{tmp_path}/x/a.tar\n")
    assert [s.problem for s in find_sources(SourcesConfig(), str(tmp_path / "list.txt"))] == ["", "listed twice"]


def test_a_folder_of_videos_and_tars_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "stray.tar", [("s", b"x", {"captions": ["a"]})])
    assert list(found(tmp_path)) == ["stray.tar/s"]
    video(tmp_path / "deep" / "a.mp4", "a fox")
    with pytest.raises(UserError, match=r"holds videos \(deep/a.mp4\) and tars \(stray.tar\)"):
        found(tmp_path)
    (tmp_path / "stray.tar").rename(tmp_path / ".left.tar")
    assert list(found(tmp_path)) == ["deep/a.mp4"]


def test_a_folder_that_cannot_be_read_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video(tmp_path / "a.mp4", "a fox")
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(folder: Any) -> Any:  # root may read any folder, so that rights can't be taken away here
        if os.fspath(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    sources = found(tmp_path)
    assert problems(sources) == {"a.mp4": "", "locked": "unreadable"}
    assert sources["locked"].detail == "Permission denied"


def test_a_json_without_a_caption_hides_no_text(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", "a fox")
    (tmp_path / "a.json").write_text('{"license": "CC0"}')
    video(tmp_path / "b.mp4", "a bear")
    (tmp_path / "b.mp4.json").write_text('{"license": "CC0"}')
    assert [(s.captions, s.meta) for s in found(tmp_path).values()] == [
        (("a fox",), {"licence": "CC0"}), (("a bear",), {"licence": "CC0"}),
    ]  # fmt: skip


def test_a_table_is_written_as_it_reads(tmp_path: Path) -> None:
    rows = [{"key": "a", "n": 1, "x": 0.5, "more": 0}, {"key": "raw\udcff", "n": None}]
    for name in ("one.parquet", "two.parquet"):
        write_table(tmp_path / name, {"key": "string", "n": "int64", "x": "double"}, rows)
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    assert list(read_columns(tmp_path / "one.parquet", ("key", "x"))) == [("a", 0.5), ("raw\\udcff", None)]
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not a Parquet file"):
        list(read_columns(tmp_path / "torn.parquet", ("key",)))
