"""Tables in files: CSV, TSV, JSONL and Parquet are read row by row, Parquet is written. Only importer of pyarrow."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from videodiff.errors import UserError
from videodiff.video_io import atomic_path

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
Row = dict[str, Any]


def read_table(path: Path, needed: Iterable[str]) -> Iterator[Row | None]:
    """The rows of a table, in their order; None for a line that is no row. Text that is not UTF-8 has surrogates.

    Raises UserError where the file can't be read, or where it has not all of the ``needed`` columns.
    """
    if path.suffix.lower() == ".parquet":
        yield from _read_parquet(path, needed)
        return
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                yield from _checked(path, (_json(line) for line in file if line.strip()), needed)
            else:
                csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
                yield from _read_csv(path, file, needed)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check path and rights") from None


def write_table(path: Path, columns: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Write rows as Parquet, whole or not at all: ``columns`` names them and their types (string, int64, double, ...).

    Equal rows give equal bytes. Text that is not UTF-8 is written with its bytes spelled out.
    """
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in columns.items()])
    data = {name: [utf8(row.get(name)) for row in rows] for name in columns}
    # Open files: pyarrow takes a path with a colon for the address of a file system.
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        parquet.write_table(pyarrow.table(data, schema), file, compression="zstd")


def read_columns(path: Path, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Some columns of a Parquet file that was written here, row by row."""
    for row in _read_parquet(path, names):
        assert row is not None  # it was written as UTF-8
        yield tuple(row[name] for name in names)


def _read_parquet(path: Path, needed: Iterable[str]) -> Iterator[Row | None]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: needs pyarrow ({error}); install it with pip install 'videodiff[data]'") from None
    try:
        with open(path, "rb") as opened, parquet.ParquetFile(opened) as file:
            _check(path, file.schema_arrow.names, needed)
            for batch in file.iter_batches(columns=list(dict.fromkeys(needed))):
                yield from _rows(batch)
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or ["unknown"])[0]
        raise UserError(f"{path}: not a Parquet file that can be read ({reason}); write or copy it again") from None


def _rows(batch: Any) -> Iterator[Row | None]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # Parquet promises UTF-8, and not every writer keeps it: only such rows are lost
        if batch.num_rows == 1:
            yield None
            return
        for number in range(batch.num_rows):
            yield from _rows(batch.slice(number, 1))


def _read_csv(path: Path, file: Iterable[str], needed: Iterable[str]) -> Iterator[Row | None]:
    reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    header: list[str] | None = None
    while True:
        try:
            cells = next(reader, None)
        except csv.Error:
            yield None
            continue
        if cells is None:
            break
        if header is None:
            header = cells
            _check(path, header, needed)
        elif cells:
            yield dict(zip(header, cells, strict=False)) if len(cells) == len(header) else None
    if header is None:
        _check(path, [], needed)


def _json(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _checked(path: Path, rows: Iterator[Row | None], needed: Iterable[str]) -> Iterator[Row | None]:
    """JSONL says its columns in each line, and leaves out what is not there: a needed one stands in some line."""
    lacking, has = dict.fromkeys(needed), dict[str, None]()
    for row in rows:
        for name in row or ():
            has[name] = None
            lacking.pop(name, None)
        yield row
    _check(path, list(has), lacking)


def _check(path: Path, has: Sequence[str], needed: Iterable[str]) -> None:
    for name in needed:
        if name not in has:
            raise UserError(
                f"{path}: there is no column {name!r} (it has: {', '.join(has) or 'none'}); name the columns in "
                "sources.table"
            )
        if list(has).count(name) > 1:
            raise UserError(f"{path}: two columns are called {name!r}; rename the one that is not meant")


def utf8(value: Any) -> Any:
    """A value as JSON and Parquet can hold it: bytes of a text that are not UTF-8 are spelled out, also inside lists
    and objects, and what is no such thing (a date) becomes a text.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {utf8(str(key)): utf8(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [utf8(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float)) else utf8(str(value))
