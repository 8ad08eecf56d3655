"""What was done so far, in files that are only appended to: a kill at any moment costs what was not yet written.

A folder holds rows (rows.jsonl, a JSON object a line) and bytes that belong to them (a .data file for each kind). A row
is written after its bytes and says where all of them end; what lies beyond the last whole row is cut off when the
folder is opened again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from videodiff.errors import UserError

ROWS = "rows.jsonl"
KINDS = ("clips", "strips")  # mp4, and the JPEG strips of the report
Row = dict[str, Any]


class Journal:
    """A folder to append to, by one process at a time. Use it in a ``with``."""

    def __init__(self, folder: Path) -> None:
        """Open or make the folder and mend its ends. Raises UserError where that is impossible or another has it."""
        self.folder = folder
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._rows: IO[bytes] = open(folder / ROWS, "ab")  # noqa: SIM115
            _lock(self._rows, folder)
            end, self._ends = _whole(folder)
            os.truncate(folder / ROWS, end)
            self._data: dict[str, IO[bytes]] = {}

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):  # what could not be flushed is cut off at the next start
            for file in (self._rows, *self._data.values()):
                file.close()

    def append(self, row: Row, **data: bytes) -> Row:
        """Add a row, and under each kind's name where its bytes lie: [offset, length]. Returns the row as stored."""
        with _writing(self.folder):
            for kind, content in data.items():
                if content:
                    file = self._opened(kind)
                    file.write(content)
                    file.flush()
                    row = {**row, kind: [self._ends[kind], len(content)]}
                    self._ends[kind] += len(content)
            stored = {**row, "ends": self._ends}
            self._rows.write(json.dumps(stored, sort_keys=True).encode() + b"\n")
            self._rows.flush()
        return stored

    def _opened(self, kind: str) -> IO[bytes]:
        """The file of a kind, cut off or (where its bytes were forgotten) left hollow up to where the next ones go."""
        if kind not in self._data:
            self._data[kind] = open(self.folder / f"{kind}.data", "ab")  # noqa: SIM115
            os.truncate(self.folder / f"{kind}.data", self._ends[kind])
        return self._data[kind]

    def sync(self) -> None:
        """See that all of it is on the disk, before anything says that it is done."""
        with _writing(self.folder):
            for file in (*self._data.values(), self._rows):
                os.fsync(file.fileno())


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """The lock file ``path``, held by one process at a time. Raises UserError where another has it."""
    with _writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115
    with file:
        _lock(file, path.parent)
        yield


def _lock(file: IO[bytes], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process is at work here; wait for it, or end it") from None
    except OSError:  # a file system without locks
        pass


def read_rows(folder: Path) -> Iterator[Row]:
    """The whole rows of a folder, in the order they were written; none where it does not exist."""
    with contextlib.suppress(FileNotFoundError), open(folder / ROWS, "rb") as file:
        for line in file:
            row = _parse(line)
            if row is None:
                return
            yield row


def read_data(folder: Path, kind: str, place: list[int]) -> bytes | None:
    """The bytes of a row at [offset, length]; None where they are gone, or zeros where others came after them."""
    offset, length = place
    try:
        with open(folder / f"{kind}.data", "rb") as file:
            file.seek(offset)
            content = file.read(length)
    except FileNotFoundError:
        return None
    return content if len(content) == length else None


def forget(folder: Path, kind: str) -> None:
    """Delete the bytes of one kind, once they have a place elsewhere; the rows stay."""
    (folder / f"{kind}.data").unlink(missing_ok=True)


def _whole(folder: Path) -> tuple[int, dict[str, int]]:
    """Where the last row ends whose bytes are all there, and where those end."""
    sizes = {}
    for kind in KINDS:
        path = folder / f"{kind}.data"
        # Bytes that were deleted on purpose leave rows behind that are whole without them.
        sizes[kind] = path.stat().st_size if path.exists() else None
    end, ends = 0, dict.fromkeys(KINDS, 0)
    with open(folder / ROWS, "rb") as file:
        for line in file:
            row = _parse(line)
            if row is None or any(size is not None and row["ends"][kind] > size for kind, size in sizes.items()):
                break
            end, ends = end + len(line), row["ends"]
    return end, ends


def _parse(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "ends" in row else None


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); check folder, rights and disk space, then give "
            "the same command again: it goes on"
        ) from None
