"""Shards and their index: which samples there are, where each lies, and what it is called for.

``index.json`` beside the shards says where every sample starts, so that any sample can be read without its neighbours;
it may say each sample's checksum and shape too. Tars of others, without an index, are scanned instead.
"""

from __future__ import annotations

import glob
import hashlib
import json
import tarfile
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from data_pipeline import locations, tars
from videodiff.errors import UserError

INDEX = "index.json"
PLAN = ".making.json"  # what an interrupted write was asked for
VERSION = 1


class Shape(NamedTuple):
    """What a sample is before it is decoded: frames at fps (1 and 0 for an image) of height x width pixels."""

    frames: int
    fps: float
    height: int
    width: int

    def frames_at(self, fps: float) -> int:
        """How many frames it has on a grid of ``fps`` frames a second (see `data_pipeline.clips.grid_frames`)."""
        return 1 if self.frames <= 1 or not self.fps > 0 else int((self.frames - 0.5) / self.fps * fps * (1 - 1e-6)) + 1


@dataclass(frozen=True)
class Encoding:
    """What encoded shards hold: latents and text features, made by these encoders of clips of this shape."""

    encoder: str  # a hash of what made them, see `stages.encode.encoder_digest`
    frames: int
    fps: float
    size: int
    variants: int


@dataclass(frozen=True)
class Shard:
    """One tar file: sample i lies in its bytes offsets[i] .. offsets[i+1], the last one up to the end."""

    path: Path  # where it lies; that of a remote one in the cache, see `open`
    offsets: tuple[int, ...]
    bytes: int
    digest: str  # sha256 of the file where the index tells it, else of the member names and sizes
    url: str | None = None
    indexed: bool = False  # whether an index told all this, else a scan
    crc32: tuple[int, ...] = ()  # of each sample's bytes, where the index tells it
    shapes: tuple[Shape | None, ...] = ()  # of each sample, where the index tells it
    encoding: Encoding | None = None

    def extent(self, number: int) -> tuple[int, int]:
        """First byte of a sample, and the one after its last."""
        last = number + 1 == len(self.offsets)
        return self.offsets[number], self.bytes if last else self.offsets[number + 1]

    def open(self) -> AbstractContextManager[BinaryIO]:
        """The file, open to be read; a remote one is fetched when it is first asked for (UserError)."""
        if self.url is not None:
            # A scan's digest is of the names in it, not of the file.
            return locations.opened(self.url, self.path, self.digest if self.indexed else None)
        return open(self.path, "rb")


def open_shards(location: str, problems: list[str] | None = None) -> list[Shard]:
    """The shards that ``location`` names.

    It is a folder (with an index or without), an index.json, one tar, or several by a {000..012} or *?[] pattern; on
    this machine, or at an http(s) or s3 URL, whose shards come into a local cache when they are first read. Sizes are
    compared with the index, which finds a torn shard at once. Raises UserError for anything missing, torn or
    compressed; ``pipe:`` and other schemes are refused. Where ``problems`` are collected, shards that are missing, torn
    or compressed are named there and left out.
    """
    texts = locations.expand(location)
    if not texts:
        raise UserError("data.shards is empty; name a folder of shards")
    shards: list[Shard] = []
    for text in texts:
        shards += _remote(text, problems) if locations.is_remote(text) else _local(Path(text), problems)
    if not any(shard.offsets for shard in shards) and not problems:
        raise UserError(
            f"data.shards={location!r}: there is no sample in these shards; write some with `videodiff data world`"
        )
    return shards


def scan_shard(path: Path, hash_file: bool = False) -> Shard:
    """Find the samples of a tar by reading its headers. Raises UserError for a torn, compressed or foreign file."""
    offsets: list[int] = []
    names = hashlib.sha256()
    last_key = None
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for key, _, member in tars.members(tar):
                names.update(f"{member.name}\0{member.size}\0".encode(errors="surrogatepass"))
                if key != last_key:
                    offsets.append(member.offset)
                    last_key = key
            end = tar.offset
        with open(path, "rb") as file:
            digest = locations.sha256(file) if hash_file else names.hexdigest()
            whole = tars.is_closed(file, end)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such shard; check the path or write it again") from None
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: not a whole, uncompressed tar ({error}); write, copy or unpack it again") from None
    if not whole:
        raise UserError(f"{path}: torn at byte {end} of {size}; write or copy the shard again")
    return Shard(path, tuple(offsets), size, digest)


def fingerprint(shards: Iterable[Shard]) -> str:
    """A name for exactly these samples in this order, wherever the files lie."""
    text = json.dumps([[len(shard.offsets), shard.bytes, shard.digest] for shard in shards])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_index(index: Path, problems: list[str] | None = None) -> list[Shard]:
    """The shards that an index on this machine names; UserError where it is none, or a shard is missing or torn, unless
    ``problems`` are collected."""
    try:
        shards = _parse(index.read_bytes(), str(index))
    except OSError as error:
        raise _no_index(str(index), error) from None
    return [shard for shard in shards if _is_whole(shard, problems)]


def _is_whole(shard: Shard, problems: list[str] | None) -> bool:
    problem = None
    if not shard.path.is_file():
        problem = f"{shard.path}: the index names this shard, but it is missing; write or copy it again"
    elif (size := shard.path.stat().st_size) != shard.bytes:
        problem = f"{shard.path}: torn, {size} bytes where the index says {shard.bytes}; write or copy it again"
    if problem is not None:
        _tell(problem, problems)
    return problem is None


def _tell(problem: str, problems: list[str] | None) -> None:
    if problems is None:
        raise UserError(problem)
    problems.append(problem)


def _scanned(path: Path, problems: list[str] | None) -> list[Shard]:
    try:
        return [scan_shard(path)]
    except UserError as error:
        _tell(str(error), problems)
        return []


def _local(path: Path, problems: list[str] | None) -> list[Shard]:
    if path.is_dir():
        if (path / INDEX).is_file():
            return read_index(path / INDEX, problems)
        if (path / PLAN).exists():
            raise UserError(f"{path}: these shards were never finished; run the command that writes them again")
        found = sorted(tar for tar in path.glob("*.tar") if tar.name[0] != ".")
    elif not path.exists() and glob.has_magic(str(path)):
        found = sorted(Path(name) for name in glob.glob(str(path)))
        return [shard for one in found for shard in _local(one, problems)] if found else _none_at(path)
    else:
        found = [path]
    if not found:
        return _none_at(path)
    opened = (read_index(file, problems) if file.name == INDEX else _scanned(file, problems) for file in found)
    return [shard for shards in opened for shard in shards]


def _none_at(path: Path) -> NoReturn:
    raise UserError(f"{path}: there is no shard here; write some with `videodiff data world`, or check the path")


def _remote(url: str, problems: list[str] | None) -> list[Shard]:
    name = locations.file_name(url)
    if "*" in name:
        found = locations.glob(url)
        if not found:
            raise UserError(f"{url}: there is no shard here; check the URL")
        return [shard for one in found for shard in _remote(one, problems)]
    if name.endswith(".tar"):
        path = locations.cached_path(url, locations.version_of(url))
        with locations.opened(url, path):  # without an index it has to be read to be known
            return [replace(shard, url=url) for shard in _scanned(path, problems)]
    index = url if name == INDEX else locations.beside(url.rstrip("/") + "/", INDEX)
    return _parse(locations.read(index), index)


def _parse(text: bytes, where: str) -> list[Shard]:
    try:
        content = json.loads(text)
        version, entries = content["version"], content["shards"]
        encoding = Encoding(**content["encoding"]) if "encoding" in content else None
        shards = [_shard(entry, where, encoding) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise _no_index(where, error) from None
    if version != VERSION:
        raise UserError(f"{where}: version {version}, this program reads {VERSION}; write the shards again")
    return shards


def _shard(entry: dict[str, Any], where: str, encoding: Encoding | None) -> Shard:
    name = str(entry["file"])
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{name!r} points out of the folder")
    place = locations.beside(where, name)
    remote = locations.is_remote(place)
    crc32 = tuple(entry.get("crc32", ()))
    shapes = tuple(None if shape is None else Shape(*shape) for shape in entry.get("shapes", ()))
    for per_sample in (crc32, shapes):
        if len(per_sample) not in (0, len(entry["offsets"])):
            raise ValueError(f"{name}: other numbers of samples")
    return Shard(
        path=locations.cached_path(place, entry["sha256"]) if remote else Path(place),
        offsets=tuple(_whole(offset, name) for offset in entry["offsets"]),
        bytes=_whole(entry["bytes"], name),
        digest=entry["sha256"],
        url=place if remote else None,
        indexed=True,
        crc32=crc32,
        shapes=shapes,
        encoding=encoding,
    )


def _whole(value: object, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name}: {value!r} is no number of bytes")
    return value


def _no_index(where: str, error: Exception) -> UserError:
    return UserError(f"{where}: not an index of shards ({error!r}); write the shards again, or delete it to scan them")
