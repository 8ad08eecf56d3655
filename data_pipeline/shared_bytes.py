"""Large arrays go from one process to another without passing through a socket piece by piece."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class _Place:
    """Where an array lies."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


class SharedBytes:
    """Memory that a helper and its pool both see. What the one puts there the other takes before it asks for more."""

    # Not multiprocessing.shared_memory: its segments have names, which a killed helper would leave behind.

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._bytes: mmap.mmap | None = None

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.descriptor)

    def put(self, result: Any) -> Any:
        """A dataclass with its arrays put there, and places in their stead; anything else as it is."""
        arrays = {name: value for name, value in _fields(result) if isinstance(value, np.ndarray) and value.nbytes}
        if (total := sum(array.nbytes for array in arrays.values())) > os.fstat(self.descriptor).st_size:
            os.ftruncate(self.descriptor, total)
        places, offset = {}, 0
        for name, array in arrays.items():
            places[name] = _Place(offset, array.shape, array.dtype.str)
            self._array(places[name])[...] = array
            offset += array.nbytes
        return replace(result, **places) if places else result

    def take(self, result: Any) -> Any:
        """The inverse, with copies of the arrays."""
        places = {name: value for name, value in _fields(result) if isinstance(value, _Place)}
        return replace(result, **{n: self._array(p).copy() for n, p in places.items()}) if places else result

    def _array(self, place: _Place) -> Any:
        dtype = np.dtype(place.dtype)
        end = place.offset + dtype.itemsize * int(np.prod(place.shape))
        if self._bytes is None or len(self._bytes) < end:
            self._bytes = mmap.mmap(self.descriptor, os.fstat(self.descriptor).st_size)
        return np.frombuffer(memoryview(self._bytes)[place.offset : end], dtype).reshape(place.shape)


def _fields(result: Any) -> list[tuple[str, Any]]:
    if not is_dataclass(result):
        return []
    return [(field.name, getattr(result, field.name)) for field in fields(result)]


def anonymous_file() -> int:
    """Descriptor of a file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("videodiff")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
