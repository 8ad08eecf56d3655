"""Where videos come from: a folder, a table or shards become one list of sources, in an order that is always the same.

A source is a span of one file, with its captions. What is wrong with one is told in it and stops nobody else; what is
wrong with all of them is a UserError.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from data_pipeline import locations
from data_pipeline.decoders import ClipError
from data_pipeline.samples import SampleError
from data_pipeline.shards import Shard, open_shards, read_sample, read_texts
from data_pipeline.source import FILE_SUFFIXES, PassedOver, Source, SourcesConfig, captions_of
from data_pipeline.source_folders import holds_shards, in_folder
from data_pipeline.source_tables import in_table
from data_pipeline.tables import TABLE_SUFFIXES, utf8
from videodiff.errors import UserError


def find_sources(config: SourcesConfig, location: str, passed: PassedOver | None = None) -> Iterator[Source]:
    """All sources of a folder of videos, a table (.csv, .tsv, .jsonl, .parquet), or shards (a folder, tar or pattern of
    them, or a .txt with one such in each line).

    Keys are unique and depend on names alone. passed: is told of the files that are no source. Raises UserError where
    there is nothing to find, or nothing to read.
    """
    path = Path(location)
    if path.suffix.lower()[1:] in FILE_SUFFIXES and path.is_file():
        raise UserError(f"{location}: is one video; name its folder, or a table that lists it")
    if path.suffix.lower() in TABLE_SUFFIXES:
        found = _merged(in_table(config, path))
    elif path.is_dir() and not holds_shards(path):
        found = in_folder(Path(os.path.abspath(path)), passed)
    else:
        found = _in_shards(_lines(path) if path.suffix.lower() == ".txt" else [location])
    seen: set[bytes] = set()
    number = -1
    for number, source in enumerate(found):
        identity = f"{source.name}\0{source.start}\0{source.end}"
        digest = hashlib.sha256(identity.encode(errors="surrogateescape")).digest()
        if digest[:12] in seen:
            digest = hashlib.sha256(digest + str(number).encode()).digest()
            source = replace(source, problem=source.problem or "listed twice")
        seen.add(digest[:12])
        slug = re.sub(r"[^A-Za-z0-9]+", "-", os.path.splitext(source.name)[0])[-40:].strip("-") or "clip"
        yield _checked(config, replace(source, number=number, key=f"{slug}-{digest.hex()[:12]}"))
    if number < 0:
        raise UserError(f"{location}: there is no video here; name a folder of videos, a table or shards")


def _merged(sources: Iterable[Source]) -> Iterator[Source]:
    """Rows that follow one another and say the same but for the caption are one source with several captions."""
    last: Source | None = None
    for source in sources:
        if last is not None and not source.problem and replace(source, captions=last.captions) == last:
            last = replace(last, captions=tuple(dict.fromkeys((*last.captions, *source.captions))))
            continue
        if last is not None:
            yield last
        last = source
    if last is not None:
        yield last


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
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait for its writer
            raise OSError(0, "no regular file")
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
                reason = error.reason if isinstance(error, SampleError) else "unreadable"
                yield replace(base, problem=reason, detail=str(error))
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
