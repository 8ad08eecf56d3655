"""Where videos come from: a folder, a table or shards become one list of sources, in an order that is always the same.

A source is a span of one file, with its captions. What is wrong with one is told in it and stops nobody else; what is
wrong with all of them is a UserError.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from data_pipeline import locations
from data_pipeline.decoders import ClipError
from data_pipeline.samples import SampleError
from data_pipeline.shards import VIDEO_SUFFIXES, Shard, open_shards, read_sample, read_texts
from data_pipeline.tables import TABLE_SUFFIXES, Row, read_table, utf8
from videodiff.config import Config
from videodiff.errors import UserError

FILE_SUFFIXES = (
    *VIDEO_SUFFIXES, "gif", "m4v", "mpg", "mpeg", "ts", "mts", "m2ts", "vob", "flv", "wmv", "3gp", "ogv",
)  # fmt: skip
_CAPTIONS = (".json", ".JSON", ".txt", ".TXT")
_FIELD = re.compile(r"\{([^{}]+)\}")
_LONGEST_FILE = 2**20  # bytes of a caption file; what is longer is none


class TableConfig(Config):
    """The columns of a table. ``video`` is a column or a pattern of several: "{page_dir}/{videoid}.mp4"."""

    video: str = "video"
    caption: str = "caption"  # a text, or a list with a text for each span
    start: str | None = None  # seconds, or h:mm:ss.f
    end: str | None = None
    spans: str | None = None  # in place of both: a list of [start, end]
    licence: str | None = None
    origin: str | None = None  # such as the address it came from
    keep: tuple[str, ...] = ()  # columns that go into the samples' JSON as they are


class SourcesConfig(Config):
    """How the videos and their captions are found, and what is said of all of them."""

    table: TableConfig = TableConfig()
    root: str | None = None  # where a table's files lie; its own folder by default
    caption_chars: int = Field(5000, ge=1)  # a longer caption is a mistake
    licence: str | None = None  # of all that say none of their own
    origin: str | None = None


@dataclass(frozen=True)
class Source:
    """A span of a file (all of it without ``start`` and ``end``, in seconds) and what is said of it.

    ``path`` is a video, or a shard in which the sample lies at the bytes ``extent``; a shard of a ``url`` lies in the
    cache, which may let it go. ``problem`` is the reason why it can't be used.
    """

    number: int
    key: str
    name: str
    path: str
    extent: tuple[int, int] | None = None
    start: float | None = None
    end: float | None = None
    captions: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    detail: str = ""
    url: str | None = None
    crc32: int | None = None  # of the extent's bytes, where an index tells it


class PassedOver:
    """What a folder holds beside its videos and their captions, by ending: how many, and the first one's name."""

    def __init__(self) -> None:
        self.endings: dict[str, dict[str, Any]] = {}

    def add(self, name: str) -> None:
        ending = os.path.splitext(name)[1].lower() or "no ending"
        known = self.endings.setdefault(ending, {"count": 0, "first": utf8(name)})
        known["count"] += 1


def find_sources(config: SourcesConfig, location: str, passed: PassedOver | None = None) -> Iterator[Source]:
    """All sources of a folder of videos, a table (.csv, .tsv, .jsonl, .parquet), or shards (a folder, tar or pattern of
    them, or a .txt with one such in each line).

    Keys are unique and depend on names alone. passed: is told of the files that are no source. Raises UserError where
    there is nothing to find, or nothing to read.
    """
    path = Path(location)
    if path.suffix.lower() in TABLE_SUFFIXES:
        found = _in_table(config, path)
    elif path.is_dir() and not _holds_shards(path):
        found = _in_folder(Path(os.path.abspath(path)), passed)
    else:
        found = _in_shards(_lines(path) if path.suffix.lower() == ".txt" else [location])
    seen: set[bytes] = set()
    number = -1
    for number, source in enumerate(found):
        identity = f"{source.name}\0{source.start}\0{source.end}"
        digest = hashlib.sha256(identity.encode(errors="surrogateescape")).digest()
        if digest[:12] in seen:
            digest = hashlib.sha256(digest + str(number).encode()).digest()
            source = replace(source, problem="listed twice")
        seen.add(digest[:12])
        slug = re.sub(r"[^A-Za-z0-9]+", "-", os.path.splitext(source.name)[0])[-40:].strip("-") or "clip"
        yield _checked(config, replace(source, number=number, key=f"{slug}-{digest.hex()[:12]}"))
    if number < 0:
        raise UserError(f"{location}: there is no video here; name a folder of videos, a table or shards")


def fingerprint(source: Source) -> bytes:
    """Differs where anything said of a source does."""
    said = asdict(source)
    for name in ("url", "crc32"):  # so that folders which were begun before there were any go on
        if said[name] is None:
            del said[name]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()


def read_bytes(source: Source) -> Path | bytes:
    """What a reader opens: the file's path, or the bytes of a shard's sample. ClipError where that is no sample."""
    if source.extent is None:
        return Path(source.path)
    start, stop = source.extent
    sums = () if source.crc32 is None else (source.crc32,)
    shard = Shard(Path(source.path), (start,), stop, "", source.url, crc32=sums)
    try:
        return read_sample(shard, 0, FILE_SUFFIXES).video
    except SampleError as error:
        raise ClipError(error.reason, str(error)) from None


def state_of(source: Source) -> list[int]:
    """Size and time of change of a source's file: while they stay, it is the same. Raises OSError, ValueError.

    What is remote is fetched for it (UserError) and has no time: the cache's is that of its last use.
    """
    if source.url is None:
        status = os.stat(source.path)
        return [status.st_size, status.st_mtime_ns]
    with locations.opened(source.url, Path(source.path)) as file:
        return [os.fstat(file.fileno()).st_size, 0]


def _checked(config: SourcesConfig, source: Source) -> Source:
    """Captions and what is said of all sources, brought into form; a caption that can't be used is the problem."""
    said = {"licence": config.licence, "origin": config.origin}
    meta = {**{name: value for name, value in said.items() if value is not None}, **source.meta}
    captions = tuple(caption.strip() for caption in source.captions if caption.strip())
    problem, detail = source.problem, source.detail
    if not problem and not captions:
        problem = "no caption"
    elif not problem and any(len(caption) > config.caption_chars for caption in captions):
        problem, detail = "caption too long", f"{max(map(len, captions))} characters"
    elif not problem and not all(_is_utf8(caption) for caption in captions):
        problem = "caption not UTF-8"
    if problem:  # none of it travels on
        captions = ()
    return replace(source, captions=captions, meta=utf8(meta), problem=problem, detail=detail)


# --- folders ----------------------------------------------------------------------------------------------------------


def _in_folder(root: Path, passed: PassedOver | None = None) -> Iterator[Source]:
    for folder, names, problem in _walk(root):
        if problem:
            yield Source(0, "", os.path.relpath(folder, root), folder, problem="unreadable", detail=problem)
            continue
        there = set(names)
        videos = [name for name in names if os.path.splitext(name)[1].lower()[1:] in FILE_SUFFIXES]
        stems = Counter(os.path.splitext(name)[0] for name in videos)
        if passed is not None:
            known = {*videos, *(f"{name}{end}" for name in (*videos, *stems) for end in _CAPTIONS)}
            for name in names:
                if name not in known:
                    passed.add(os.path.relpath(os.path.join(folder, name), root))
        for name in videos:
            path = os.path.join(folder, name)
            source = Source(0, "", os.path.relpath(path, root), path)
            stem = os.path.splitext(name)[0]
            own, shared = ([f"{n}{end}" for end in _CAPTIONS if f"{n}{end}" in there] for n in (name, stem))
            if not own and shared and stems[stem] > 1:
                detail = f"{shared[0]} may belong to any of {stems[stem]} videos; name it {name}.txt"
                yield replace(source, problem="ambiguous caption", detail=detail)
                continue
            files = own + (shared if stems[stem] == 1 else [])
            if not files:
                yield replace(source, problem="no caption", detail=f"no {stem}.txt or .json beside it")
                continue
            for file in files:  # a .json that has no caption may say more of what the .txt describes
                source = _with_caption_file(source, os.path.join(folder, file))
                if source.problem or any(caption.strip() for caption in source.captions):
                    break
            yield source


def _holds_shards(folder: Path) -> bool:
    """Whether a folder is one of shards; UserError where it may as well be one of videos."""
    if (folder / "index.json").is_file():
        return True
    tar = next((path for path in sorted(folder.glob("*.tar")) if path.name[0] != "."), None)
    if tar is None:
        return False
    video = next(
        (source for source in _in_folder(Path(os.path.abspath(folder))) if source.problem != "unreadable"), None
    )
    if video is not None:
        raise UserError(
            f"{folder}: holds videos ({video.name}) and tars ({tar.name}); move one kind away, or name {folder}/*.tar"
        )
    return True


def _walk(root: Path) -> Iterator[tuple[str, list[str], str]]:
    """(folder, sorted names of what is no folder, why it can't be read or ""), each folder once, however links lead to
    it."""
    visited: set[tuple[int, int]] = set()
    stack = [str(root)]
    while stack:
        folder = stack.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            entries = sorted((e for e in os.scandir(folder) if e.name[0] != "."), key=lambda e: os.fsencode(e.name))
        except OSError as error:
            if folder != str(root):
                yield folder, [], error.strerror or str(error)
                continue
            raise UserError(f"{folder}: cannot be read ({error.strerror}); check path and rights") from None
        names: list[str] = []
        folders: list[str] = []
        for entry in entries:
            (folders if _is_folder(entry) else names).append(entry.name)
        yield folder, names, ""
        stack += [os.path.join(folder, name) for name in reversed(folders)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: opening it will say so
        return False


def _with_caption_file(source: Source, path: str) -> Source:
    try:
        with open(path, "rb") as file:
            content = file.read(_LONGEST_FILE + 1)
    except OSError as error:
        return replace(source, problem="no caption", detail=f"{path}: {error.strerror}")
    if len(content) > _LONGEST_FILE:
        return replace(source, problem="caption too long", detail=f"{path}: more than {_LONGEST_FILE} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return replace(source, problem="caption not UTF-8", detail=path)
    if path.lower().endswith(".txt"):
        return replace(source, captions=(text,))
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        return replace(source, problem="no caption", detail=f"{path}: not a JSON object")
    captions, meta = captions_of(said)
    return replace(source, captions=captions, meta=meta)


def captions_of(said: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Captions of a JSON object ("captions", "caption" or "text"), and all else that it says."""
    names = {"license": "licence", "url": "origin", "source": "origin"}
    rest = {key: value for key, value in said.items() if key not in ("captions", "caption", "text")}
    meta = {names[key]: value for key, value in rest.items() if key in names}
    meta |= {key: value for key, value in rest.items() if key not in names}  # a word of ours wins
    given = said.get("captions") or said.get("caption") or said.get("text") or []
    texts = [given] if isinstance(given, str) else given
    return tuple(text for text in texts if isinstance(text, str)) if isinstance(texts, list) else (), meta


# --- tables -----------------------------------------------------------------------------------------------------------


def _in_table(config: SourcesConfig, table: Path) -> Iterator[Source]:
    columns = config.table
    pattern = columns.video if "{" in columns.video else f"{{{columns.video}}}"
    fields = re.findall(_FIELD, pattern)
    told = (columns.caption, columns.start, columns.end, columns.spans, columns.licence, columns.origin)
    needed = [*fields, *(name for name in told if name), *columns.keep]
    root = os.path.abspath(config.root or table.parent)
    for row_number, row in enumerate(read_table(table, needed)):
        if row is None or any(row.get(name) in (None, "") for name in fields):
            yield Source(0, "", f"row {row_number}", "", problem="unreadable row")
            continue
        # Pieces of text and names of columns take turns.
        pieces = re.split(_FIELD, pattern)
        name = "".join(str(row[piece]) if index % 2 else piece for index, piece in enumerate(pieces))
        base = Source(0, "", name, os.path.join(root, name))
        meta: dict[str, Any] = {column: row[column] for column in columns.keep if row.get(column) is not None}
        meta |= {n: row[c] for n, c in (("licence", columns.licence), ("origin", columns.origin)) if c and row.get(c)}
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name):
            yield replace(base, problem="unreadable", detail="an address; download it first")
            continue
        yield from _spans(columns, row, replace(base, meta=meta))


def _spans(columns: TableConfig, row: Row, base: Source) -> Iterator[Source]:
    try:
        if columns.spans:
            spans = [(seconds(a), seconds(b)) for a, b in _list(row.get(columns.spans))]
        else:
            ends = [seconds(row.get(column)) if column else None for column in (columns.start, columns.end)]
            spans = [(ends[0], ends[1])]
        if any(a is not None and b is not None and not 0 <= a < b for a, b in spans):
            raise ValueError
    except (ValueError, TypeError):
        yield replace(base, problem="unreadable row", detail="not a span of time")
        return
    if not spans:
        yield replace(base, problem="unreadable row", detail="an empty list of spans")
        return
    given = row.get(columns.caption)
    if columns.spans:
        try:
            texts = _list(given)
        except ValueError:  # an empty cell, or one text for many spans
            texts = []
    else:
        texts = given if isinstance(given, list) else [given]
    for index, (start, end) in enumerate(spans):
        mine = texts[index : index + 1] if columns.spans else texts
        captions = tuple(text for text in mine if isinstance(text, str))
        yield replace(base, start=start, end=end, captions=captions)


def _list(value: Any) -> list[Any]:
    """A list, also where a table holds it as text, in JSON or as Python writes it. Raises ValueError."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(value)  # literals only: nothing is run
            except (SyntaxError, TypeError, MemoryError, RecursionError):
                raise ValueError from None
    if not isinstance(value, list):
        raise ValueError
    return value


def seconds(value: Any) -> float | None:
    """Seconds of 12.5, "12.5", "0:12.5" or "0:00:12.5"; None of nothing. Raises ValueError."""
    if value is None or value == "":
        return None
    total = 0.0
    for part in str(value).split(":"):
        total = 60 * total + float(part)
    if not math.isfinite(total):
        raise ValueError
    return total


# --- shards -----------------------------------------------------------------------------------------------------------


def _in_shards(places: Iterable[str]) -> Iterator[Source]:
    """Their samples; a shard that is torn, missing or no tar has a row of its own, unless all of them are."""
    taken: dict[str, str] = {}
    problems: list[str] = []
    shards = [shard for place in places for shard in open_shards(place, problems)]
    if latents := next((shard for shard in shards if shard.encoding is not None), None):
        raise UserError(f"{latents.path}: holds latents, which can't be cut; name the shards of the videos")
    if problems and not shards:
        raise UserError(problems[0])
    for told in problems:
        path, _, detail = told.partition(": ")
        yield Source(0, "", path, path, problem="unreadable", detail=detail)
    for shard in shards:
        called = _name_of(shard, taken)
        for number in range(len(shard.offsets)):
            stop = (*shard.offsets, shard.bytes)[number + 1]
            extent = (shard.offsets[number], stop)
            total = shard.crc32[number] if shard.crc32 else None
            base = Source(0, "", f"{called}#{number}", str(shard.path.absolute()), extent, url=shard.url, crc32=total)
            try:
                sample = read_texts(shard, number, FILE_SUFFIXES)
            except UserError as error:
                yield replace(base, problem="unreadable", detail=str(error))
                continue
            _, meta = captions_of(sample.meta)
            yield replace(base, name=f"{called}/{sample.key}", captions=sample.captions, meta=meta)


def _name_of(shard: Shard, taken: dict[str, str]) -> str:
    """A shard's file name, with as many of its folders before it as tell it from the others; ``taken`` has those."""
    file = os.path.realpath(shard.path)
    parts = shard.path.absolute().parts
    names = ["/".join(parts[-depth:]) for depth in range(1, len(parts) + 1)]
    return next((name for name in names if taken.setdefault(name, file) == file), names[-1])


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of shards ({error}); give one path in each line") from None
    return [line.strip() for line in lines if line.strip()]


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
