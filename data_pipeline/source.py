"""What a source is, and how it is described: by the configuration, and by the JSON beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from data_pipeline.samples import VIDEO_SUFFIXES, captions_in
from data_pipeline.tables import utf8
from videodiff.config import Config

FILE_SUFFIXES = (
    *VIDEO_SUFFIXES, "gif", "m4v", "mpg", "mpeg", "ts", "mts", "m2ts", "vob", "flv", "wmv", "3gp", "ogv",
)  # fmt: skip


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


def captions_of(said: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Captions of a JSON object, and all else that it says."""
    names = {"license": "licence", "url": "origin", "source": "origin"}
    rest = {key: value for key, value in said.items() if key not in ("captions", "caption", "text")}
    meta = {names[key]: value for key, value in rest.items() if key in names}
    meta |= {key: value for key, value in rest.items() if key not in names}  # a word of ours wins
    return captions_in(said), meta
