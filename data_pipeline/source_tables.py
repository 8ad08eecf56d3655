"""The videos that a table names, with their spans of time and captions: the shapes of WebVid, OpenVid, Panda-70M."""

from __future__ import annotations

import ast
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.source import Source, SourcesConfig, TableConfig
from data_pipeline.tables import Row, read_table

_FIELD = re.compile(r"\{([^{}]+)\}")


def in_table(config: SourcesConfig, table: Path) -> Iterator[Source]:
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
        one = replace(base, start=start, end=end, captions=captions)
        if not 0 <= (start or 0.0) < (math.inf if end is None else end):
            yield replace(one, problem="unreadable row", detail="not a span of time")
        else:
            yield one


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
