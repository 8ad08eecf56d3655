"""The videos of a folder and their captions, in .json or .txt beside them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_pipeline.source import FILE_SUFFIXES, PassedOver, Source, captions_of
from videodiff.errors import UserError

_CAPTIONS = (".json", ".JSON", ".txt", ".TXT")
_LONGEST_FILE = 2**20  # bytes of a caption file; what is longer is none


def in_folder(root: Path, passed: PassedOver | None = None) -> Iterator[Source]:
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


def holds_shards(folder: Path) -> bool:
    """Whether a folder is one of shards; UserError where it may as well be one of videos."""
    if (folder / "index.json").is_file():
        return True
    tar = next((path for path in sorted(folder.glob("*.tar")) if path.name[0] != "."), None)
    if tar is None:
        return False
    video = next(
        (source for source in in_folder(Path(os.path.abspath(folder))) if source.problem != "unreadable"), None
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
        if not os.path.isfile(path):  # a pipe would wait for its writer
            return replace(source, problem="no caption", detail=f"{path}: no regular file")
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
