"""Tar shards and their index: written whole or not at all, read at indexed places. webdataset does the tar work.

A sample is a video member and a JSON member of one key; the JSON holds ``captions``. ``index.json`` beside the shards
says where every sample starts, so that any sample can be read without its neighbours. Tars of others, without an index,
are scanned instead. Nothing is ever executed from a shard: only local files are opened, and only video, JSON and text
members are looked at.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.progress import Progress

from videodiff.errors import UserError
from videodiff.video_io import atomic_path, encode_video, write_json

VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "mov", "avi")
INDEX = "index.json"
PLAN = ".making.json"  # what an interrupted write was asked for
_VERSION = 1
_Sample = tuple[str, bytes, dict[str, Any]]  # key, bytes of an mp4, JSON
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")


@dataclass(frozen=True)
class Shard:
    """One tar file: sample i lies in its bytes offsets[i] .. offsets[i+1], the last one up to the end."""

    path: Path
    offsets: tuple[int, ...]
    bytes: int
    digest: str  # sha256 of the file where the index tells it, else of the member names and sizes


@dataclass(frozen=True)
class RawSample:
    """A sample as it is stored: the bytes of its video file, its captions (one at least), and all of its JSON."""

    key: str
    video: bytes
    captions: tuple[str, ...]
    meta: dict[str, Any]


def write_world_shards(
    out: str | os.PathLike[str],
    num_clips: int,
    size: int,
    frames: int,
    fps: float,
    seed: int,
    samples_per_shard: int = 256,
    workers: int | None = None,
    progress: bool = False,
) -> Path:
    """Render ``num_clips`` clips of the built-in world (``frames`` of ``size`` x ``size`` pixels at ``fps``) into
    shards in ``out``.

    The same arguments give the same bytes, whatever ``workers`` (threads, one per core by default). A run that was
    interrupted continues when asked again for the same; a folder that holds anything else is refused. Returns the path
    of the index.
    """
    numbers = {"clips": num_clips, "size": size, "frames": frames, "fps": float(fps)}
    numbers["samples_per_shard"] = samples_per_shard
    for name, value in numbers.items():
        if not value > 0:
            raise UserError(f"world shards: {name} is {value}; it must be positive")
    plan = {"source": "world", "seed": seed, **numbers}
    if size % 2:
        raise UserError(f"world shards: size {size} is odd, which mp4 players cannot show; use {size + 1}")
    out = Path(out)
    if _started(out, plan):
        return out / INDEX
    names = [f"world-{number:06d}.tar" for number in range(-(-num_clips // samples_per_shard))]
    firsts = range(0, num_clips, samples_per_shard)
    workers = workers or os.cpu_count() or 1
    # Threads suffice: nearly all the time is spent in ffmpeg processes and inside numpy.
    pool = ThreadPoolExecutor(workers)
    try:
        with Progress(disable=not progress) as bar:
            task = bar.add_task("world shards", total=num_clips)
            for name, first in zip(names, firsts, strict=True):
                part = range(first, min(first + samples_per_shard, num_clips))
                if (out / name).exists():  # whole, since it was renamed into place
                    bar.advance(task, len(part))
                    continue
                samples = _world_samples(part, plan, pool, ahead=2 * workers)
                write_shard(out / name, _counted(samples, lambda: bar.advance(task)))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    write_index(out, names, plan)
    for leftover in (*out.glob(".world-*.tar"), out / PLAN):  # of runs that were killed
        leftover.unlink(missing_ok=True)
    return out / INDEX


def write_index(out: Path, names: Iterable[str], said: dict[str, Any]) -> None:
    """Write index.json of the finished shards ``names`` in ``out``: where each sample starts, and each file's sha256.

    ``said`` goes along: where they come from.
    """
    shards = [scan_shard(out / name, hash_file=True) for name in names]
    entries = [
        {"file": s.path.name, "samples": len(s.offsets), "bytes": s.bytes, "sha256": s.digest, "offsets": s.offsets}
        for s in shards
    ]
    write_json(out / INDEX, {"version": _VERSION, **said, "fingerprint": fingerprint(shards), "shards": entries})


def write_shard(path: Path, samples: Iterable[_Sample]) -> None:
    """Write samples (key, bytes of an mp4, JSON with "captions") as one tar, whole or not at all.

    Equal samples give equal bytes. Raises UserError where the place cannot be written.
    """
    from webdataset import TarWriter

    with (
        atomic_path(path) as temporary,
        open(temporary, "wb") as file,
        TarWriter(file, encoder=False, mtime=0) as writer,
    ):
        for key, video, meta in samples:
            if "." in key or not key or not meta.get("captions"):
                raise ValueError(f"sample {key!r}: a key has no dots, and a sample has captions")
            text = json.dumps(meta, sort_keys=True, ensure_ascii=False)
            writer.write({"__key__": key, "mp4": video, "json": text.encode()})


def open_shards(location: str) -> list[Shard]:
    """The shards that ``location`` names.

    It is a folder (with an index or without), an index.json, one tar, or several by a {000..012} or * pattern. Sizes
    are compared with the index, which finds a torn shard at once. Raises UserError for anything missing, torn, not
    local or compressed; ``pipe:`` and other schemes are refused.
    """
    scheme = _SCHEME.match(location)
    if scheme and scheme[1].lower() != "file":
        raise UserError(
            f"data.shards={location!r}: {scheme[1]}: is not opened, shards are read as local files; copy them to a disk"
        )
    if scheme:
        location = re.sub(r"^file:(//)?", "", location)
    paths = _paths(location)
    shards: list[Shard] = []
    for path in paths:
        shards += _indexed(path) if path.name == INDEX else [scan_shard(path)]
    if not any(shard.offsets for shard in shards):
        raise UserError(
            f"data.shards={location!r}: there is no sample in these shards; write some with `videodiff data world`"
        )
    return shards


def read_sample(shard: Shard, number: int) -> RawSample:
    """Sample ``number`` of a shard, read at its place. Raises UserError where it is torn, without video or caption."""
    import webdataset.utils
    from webdataset import tariterators

    webdataset.utils.enforce_security = True
    start, stop = _extent(shard, number)
    try:
        with open(shard.path, "rb") as file:
            file.seek(start)
            source = {"url": shard.path.name, "stream": io.BytesIO(file.read(stop - start))}
        sample = next(iter(tariterators.group_by_keys(tariterators.tar_file_expander([source]))))
    except (OSError, tarfile.TarError, EOFError, StopIteration, ValueError) as error:
        raise _torn(shard, start, error) from None
    return _checked(shard, sample)


def read_texts(shard: Shard, number: int) -> RawSample:
    """As `read_sample`, without reading the video: its bytes are empty."""
    return _checked(shard, _read_texts(shard, number))


def _checked(shard: Shard, sample: dict[str, Any]) -> RawSample:
    key = str(sample["__key__"])
    video = next((sample[suffix] for suffix in VIDEO_SUFFIXES if suffix in sample), None)
    if video is None:
        raise UserError(
            f"{shard.path}: sample {key} has no video ({', '.join(VIDEO_SUFFIXES)}); remove it or write it again"
        )
    meta, captions = _captions(sample)
    if not captions:
        raise UserError(
            f"{shard.path}: sample {key} has no caption (JSON 'captions' or 'caption', or a txt member); give it one"
        )
    return RawSample(key, video, captions, meta)


def all_captions(location: str) -> Iterator[str]:
    """Every caption of the shards at ``location`` (see `open_shards`), in their order. Videos are skipped, not read."""
    for shard in open_shards(location):
        for number in range(len(shard.offsets)):
            yield from read_texts(shard, number).captions


def all_labels(location: str, field: str) -> set[str]:
    """Every value that the samples of the shards at ``location`` have in a field of their JSON, see `label_of`."""
    found = set()
    for shard in open_shards(location):
        for number in range(len(shard.offsets)):
            sample = read_texts(shard, number)
            found.add(label_of(shard, sample.key, sample.meta, field))
    return found


def label_of(shard: Shard, key: str, meta: dict[str, Any], field: str) -> str:
    """What the JSON of a sample says in ``field``, a dotted path such as scene.shape: a word, or a whole number as one.

    Raises UserError where it says nothing of the kind.
    """
    value: Any = meta
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        has = ", ".join(sorted(meta)) or "nothing"
        raise UserError(
            f"{shard.path}: the JSON of sample {key} has no word or whole number at data.label={field} "
            f"(it has: {has}); name another field, or write it"
        )
    return str(value)


def _read_texts(shard: Shard, number: int) -> dict[str, Any]:
    """The members of a sample by suffix, as webdataset gives them, but only json and txt have their content."""
    from webdataset.tariterators import base_plus_ext

    start, stop = _extent(shard, number)
    sample: dict[str, Any] = {}
    try:
        with open(shard.path, "rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None and member.offset < stop:
                    key, suffix = base_plus_ext(member.name)
                    if not member.isreg() or key is None or member.name.startswith("__"):
                        continue
                    content = tar.extractfile(member) if suffix.lower() in ("json", "txt") else None
                    sample.setdefault("__key__", key)
                    sample[suffix.lower()] = b"" if content is None else content.read()
        if not sample:
            raise EOFError
    except (OSError, tarfile.TarError, EOFError) as error:
        raise _torn(shard, start, error) from None
    return sample


def _extent(shard: Shard, number: int) -> tuple[int, int]:
    """First byte of a sample, and the one after its last."""
    return shard.offsets[number], shard.offsets[number + 1] if number + 1 < len(shard.offsets) else shard.bytes


def _torn(shard: Shard, start: int, error: Exception) -> UserError:
    return UserError(f"{shard.path}: torn at byte {start} ({type(error).__name__}); write or copy the shard again")


def scan_shard(path: Path, hash_file: bool = False) -> Shard:
    """Find the samples of a tar by reading its headers. Raises UserError for a torn, compressed or foreign file."""
    from webdataset.tariterators import base_plus_ext

    offsets: list[int] = []
    names = hashlib.sha256()
    last_key = None
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _ = base_plus_ext(member.name)  # the key ends at the first dot
                if not member.isreg() or key is None or member.name.startswith("__"):
                    continue
                names.update(f"{member.name}\0{member.size}\0".encode())
                if key != last_key:
                    offsets.append(member.offset)
                    last_key = key
            end = tar.offset
        with open(path, "rb") as file:
            if hash_file:
                names = _digest(file)
            file.seek(end)
            whole = file.read(512) == bytes(
                512
            )  # closes every tar; tarfile itself is silent about a tear in the middle
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such shard; check the path or write it again") from None
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: not a whole, uncompressed tar ({error}); write, copy or unpack it again") from None
    if not whole:
        raise UserError(f"{path}: torn at byte {end} of {size}; write or copy the shard again")
    return Shard(path, tuple(offsets), size, names.hexdigest())


def fingerprint(shards: Iterable[Shard]) -> str:
    """A name for exactly these samples in this order, wherever the files lie."""
    text = json.dumps([[len(shard.offsets), shard.bytes, shard.digest] for shard in shards])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _paths(location: str) -> list[Path]:
    """Indices and tars in a fixed order."""
    import braceexpand  # webdataset's own dependency for the same patterns

    paths: list[Path] = []
    for text in braceexpand.braceexpand(location) if location else []:
        path = Path(text)
        if path.is_dir():
            found = (
                [path / INDEX]
                if (path / INDEX).is_file()
                else sorted(tar for tar in path.glob("*.tar") if tar.name[0] != ".")
            )
            if (path / PLAN).exists() and not (path / INDEX).is_file():
                raise UserError(f"{path}: these shards were never finished; run the command that writes them again")
        elif "*" in path.name and path.parent.is_dir():
            found = sorted(path.parent.glob(path.name))
        else:
            found = [path]
        if not found:
            raise UserError(
                f"{text}: there is no shard here; write some with `videodiff data world`, or check the path"
            )
        paths += found
    if not paths:
        raise UserError("data.shards is empty; name a folder of shards")
    return paths


def _indexed(index: Path) -> list[Shard]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        version, entries = content["version"], content["shards"]
        shards = [Shard(index.parent / e["file"], tuple(e["offsets"]), e["bytes"], e["sha256"]) for e in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{index}: not an index of shards ({error!r}); write the shards again, or delete it to scan them"
        ) from None
    if version != _VERSION:
        raise UserError(f"{index}: version {version}, this program reads {_VERSION}; write the shards again")
    for shard in shards:
        if not shard.path.is_file():
            raise UserError(f"{shard.path}: the index names this shard, but it is missing; write or copy it again")
        if (size := shard.path.stat().st_size) != shard.bytes:
            raise UserError(
                f"{shard.path}: torn, {size} bytes where the index says {shard.bytes}; write or copy it again"
            )
    return shards


def _captions(sample: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    try:
        meta = json.loads(sample.get("json", b"{}"))
        text = sample.get("txt", b"").decode("utf-8")
    except ValueError:
        return {}, ()
    if not isinstance(meta, dict):
        return {}, ()
    given = meta.get("captions") or [meta.get("caption") or text]
    captions = tuple(c.strip() for c in given if isinstance(c, str) and c.strip()) if isinstance(given, list) else ()
    return meta, captions


def _started(out: Path, plan: dict[str, Any]) -> bool:
    """Make the folder ready. True where everything is there already; UserError where something else is."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        there = sorted(path.name for path in out.iterdir())
    except OSError as error:
        raise UserError(f"{out}: cannot be used as a folder ({error.strerror}); choose another") from None
    for name in (INDEX, PLAN):
        if name in there:
            try:
                known = json.loads((out / name).read_text(encoding="utf-8"))
            except ValueError:
                raise UserError(f"{out / name}: not readable; delete the folder or choose another") from None
            different = [key for key in plan if known.get(key) != plan[key]]
            if different:
                what = ", ".join(f"{key} {known.get(key)} instead of {plan[key]}" for key in different)
                raise UserError(f"{out}: holds other shards ({what}); choose another folder or delete this one")
            if name == INDEX:
                _indexed(out / INDEX)
                return True
            return False
    if there:
        raise UserError(f"{out}: holds other files ({there[0]}); choose an empty folder")
    write_json(out / PLAN, plan)
    return False


def _counted(samples: Iterable[_Sample], advance: Callable[[], None]) -> Iterator[_Sample]:
    for sample in samples:
        yield sample
        advance()


def _world_samples(
    numbers: Iterable[int], plan: dict[str, Any], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[_Sample]:
    """Render and encode clips in ``pool``, give them back in order; never more than ``ahead`` wait at once."""
    from data_pipeline import world

    def make(number: int) -> _Sample:
        clip = world.render_clip(plan["seed"], number, plan["size"], plan["frames"], plan["fps"])
        return (
            clip.key,
            encode_video(clip.frames, plan["fps"]),
            {**clip.meta, "captions": clip.captions, "fps": plan["fps"]},
        )

    waiting: deque[Future[_Sample]] = deque()
    for number in numbers:
        waiting.append(pool.submit(make, number))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _digest(file: IO[bytes]) -> hashlib._Hash:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest
