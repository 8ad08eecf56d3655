"""Shards at URLs: a real http server on this machine, and one that speaks as much S3 as reading needs."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from data_pipeline import locations
from data_pipeline.loader import DataConfig, ShardSource
from data_pipeline.shards import Shard, open_shards, read_sample, scan_shard, write_world_shards
from data_pipeline.source import SourcesConfig
from data_pipeline.sources import find_sources, read_bytes, state_of
from videodiff.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world_shards(tmp_path_factory.mktemp("www") / "set", 7, 32, 4, 8, seed=0, samples_per_shard=3).parent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(locations.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Counts what is fetched; `fails` requests are answered with an error first."""

    fetched: Counter[str]
    fails: int

    def do_GET(self) -> None:
        if type(self).fails > 0:
            type(self).fails -= 1
            self.send_error(503)
            return
        type(self).fetched[self.path] += 1
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path, handler: type = Handler) -> Iterator[tuple[str, type[Handler]]]:
    class Own(handler):  # type: ignore[misc, valid-type]
        fetched: Counter[str] = Counter()
        fails = 0

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Own, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", Own
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def batches(location: str) -> list[tuple[tuple[str, ...], bytes]]:
    config = DataConfig(shards=location, batch_size=7, frames=4, fps=8, size=32, streams=2, workers=0, prefetch=0)
    opened = ShardSource(config, 0)
    taken = list(islice(opened.batches(0, 0, 1, 7), 2))
    return [(opened.fingerprint, batch.keys, batch.captions, batch.frames.numpy().tobytes()) for batch in taken]


def test_the_same_samples_come_over_http(world: Path, cache: Path) -> None:
    expected = batches(str(world))
    with serving(world.parent) as (address, server):
        for location in ("set", "set/", "set/index.json"):
            assert batches(f"http://{address}/{location}") == expected
        assert [server.fetched[f"/set/world-00000{n}.tar"] for n in range(3)] == [1, 1, 1], "each once, then cached"
        tars = f"http://{address}/set/world-{{000000..000002}}.tar"
        assert [keys for _, keys, _, _ in batches(tars)] == [keys for _, keys, _, _ in expected]
        assert [keys for _, keys, _, _ in batches(f"http://{address}/set/*.tar")] == [k for _, k, _, _ in expected]
        assert all(path.name[0] == "." or path.stat().st_size for path in cache.iterdir())
        assert not [path for path in cache.iterdir() if path.name[0] == "." and not path.name.endswith(".lock")]
    assert batches.__name__  # the server is gone: what was fetched is still read
    with serving(world.parent) as (address, server):
        batches(f"http://{address}/set")
        assert sum(server.fetched.values()) == 4, "another address is another cache entry"


def test_only_what_is_read_is_fetched(world: Path) -> None:
    with serving(world.parent) as (address, server):
        shards = open_shards(f"http://{address}/set")
        assert set(server.fetched) == {"/set/index.json"}
        read_sample(shards[1], 0)
        assert set(server.fetched) == {"/set/index.json", "/set/world-000001.tar"}


def test_a_server_that_fails_now_and_then_is_asked_again(world: Path) -> None:
    with serving(world.parent) as (address, server):
        server.fails = 1
        shards = open_shards(f"http://{address}/set")
        server.fails = 1
        assert read_sample(shards[0], 0).captions
        server.fails = 99
        with pytest.raises(UserError, match=r"world-000002\.tar: cannot be fetched"):
            read_sample(shards[2], 0)


def test_what_is_not_there_or_not_the_named_file_is_told(world: Path, tmp_path: Path, cache: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in world.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    shard = copy / "world-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with serving(tmp_path) as (address, _):
        shards = open_shards(f"http://{address}/copy")
        with pytest.raises(UserError, match="sha256 differs"):
            read_sample(shards[1], 0)
        assert not shards[1].path.exists()
        for location, words in (
            ("nothing", "no such file"),
            ("nothing.tar", "no such file"),
            ("copy/none-*.tar", "no shard here"),
        ):
            with pytest.raises(UserError, match=words):
                open_shards(f"http://{address}/{location}")
    cache.rename(tmp_path / "gone")
    cache.write_text("")  # no folder
    with serving(world.parent) as (address, _), pytest.raises(UserError, match="cannot keep fetched shards"):
        read_sample(open_shards(f"http://{address}/set")[0], 0)


def test_a_changed_tar_is_fetched_anew(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "www"
    folder.mkdir()
    target = folder / "a.tar"
    target.write_bytes((world / "world-000000.tar").read_bytes())
    with serving(folder) as (address, _):
        first = open_shards(f"http://{address}/a.tar")
        target.write_bytes((world / "world-000002.tar").read_bytes())
        second = open_shards(f"http://{address}/a.tar")
    assert (len(first[0].offsets), len(second[0].offsets)) == (3, 1)
    assert second[0].digest == scan_shard(world / "world-000002.tar").digest


def test_a_tar_without_an_index_is_fetched_again_when_it_had_to_go(world: Path, cache: Path) -> None:
    with serving(world) as (address, server):
        (shard,) = open_shards(f"http://{address}/world-000000.tar")
        first = read_sample(shard, 0)
        shard.path.unlink()
        assert read_sample(shard, 0) == first
        assert server.fetched["/world-000000.tar"] == 2


def test_prepare_fetches_a_shard_again_when_it_had_to_go(world: Path) -> None:
    with serving(world) as (address, server):
        source = next(find_sources(SourcesConfig(), f"http://{address}/world-000000.tar"))
        first, state = read_bytes(source), state_of(source)
        assert state == state_of(source), "reading it is no change"
        Path(source.path).unlink()
        assert (state_of(source), read_bytes(source)) == (state, first)
        assert server.fetched["/world-000000.tar"] == 2


def test_many_processes_fetch_a_shard_once(world: Path) -> None:
    import subprocess
    import sys

    code = "import sys; from data_pipeline.shards import *; s = open_shards(sys.argv[1]); read_sample(s[0], 0)"
    with serving(world.parent) as (address, server):
        command = [sys.executable, "-c", code, f"http://{address}/set"]
        running = [subprocess.Popen(command, cwd=Path(__file__).parents[1]) for _ in range(3)]
        assert [process.wait() for process in running] == [0, 0, 0]
        assert server.fetched["/set/world-000000.tar"] == 1


def test_the_least_recently_used_shards_go_first_and_never_one_in_use(
    world: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept() -> set[str]:
        return {path.name.partition("-")[2] for path in cache.iterdir() if path.name[0] != "."}

    def touch(shard: Shard) -> None:
        assert read_sample(shard, 0).captions

    names = [f"world-{n:06d}.tar" for n in range(3)]
    cache.mkdir()
    (cache / "somebody-elses.tar").write_bytes(bytes(10**6))
    with serving(world.parent) as (address, server):
        shards = open_shards(f"http://{address}/set")
        monkeypatch.setenv(locations.LIMIT, str((shards[0].bytes + shards[1].bytes) / 2**30))
        for number in (0, 1, 0, 2):
            touch(shards[number])
        assert kept() == {names[0], names[2], "elses.tar"}, "the second was used least recently"
        with shards[0].open():
            touch(shards[2])
            touch(shards[1])
            assert kept() == {names[0], names[1], "elses.tar"}, "the first is open"
        monkeypatch.setenv(locations.LIMIT, "0")
        touch(shards[2])
        assert kept() == {names[2], "elses.tar"}
        touch(shards[1])
        touch(shards[0])
        assert server.fetched["/set/world-000000.tar"] == 2, "what is read again is fetched again"
        monkeypatch.setenv(locations.LIMIT, "much")
        with pytest.raises(UserError, match="VIDEODIFF_CACHE_GIB=much: not a number"):
            touch(shards[1])


class S3(Handler):
    """GET and HEAD of objects, and ranges: as much as reading asks of a store. The bucket is the first folder."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        type(self).fetched[self.path] += 1
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = Path(self.directory) / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.end_headers()
        if body:
            self.wfile.write(data)


def test_the_same_samples_come_from_s3(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    import fsspec

    with serving(world.parent.parent, S3) as (address, server):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        try:
            assert batches(f"s3://{world.parent.name}/set") == batches(str(world))
            with pytest.raises(UserError, match="no such file"):
                open_shards(f"s3://{world.parent.name}/none")
        finally:
            fsspec.get_filesystem_class("s3").clear_instance_cache()
        assert sum(server.fetched.values()) == 5


@pytest.mark.parametrize(
    "location",
    ["pipe:cat a.tar", "{a,pipe:cat a.tar}", "PIPE:cat", "ftp://h/a.tar", "simplecache::http://h/a.tar", "gs://b/a",
     "file:pipe:touch x", "github://x", "memory://a"],
)  # fmt: skip
def test_other_schemes_are_refused(location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        open_shards(location)
    assert str(refused.value).count("data.shards=") <= 1
    assert "brace" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_places_beside() -> None:
    assert locations.beside("http://h/a/index.json?x=1", "b.tar") == "http://h/a/b.tar?x=1"
    assert locations.beside("/a/index.json", "b.tar") == "/a/b.tar"
    assert locations.file_name("https://h/a/b.tar?sig=/x") == "b.tar"
    with pytest.raises(UserError, match="close every brace"):
        locations.expand("a{0..1.tar")
