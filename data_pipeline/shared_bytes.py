"""Large results go from one process to another without passing through a socket piece by piece."""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import tempfile
from collections.abc import Iterable


class SharedBytes:
    """Memory that a helper and its pool both see. What the one puts there the other takes before it asks for more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._bytes: mmap.mmap | None = None

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.descriptor)

    def put(self, buffers: Iterable[pickle.PickleBuffer]) -> list[int]:
        """Their sizes."""
        raw = [buffer.raw() for buffer in buffers]
        if (total := sum(part.nbytes for part in raw)) > os.fstat(self.descriptor).st_size:
            os.ftruncate(self.descriptor, total)
        offset = 0
        for part in filter(len, raw):
            self._mapped(total)[offset : offset + part.nbytes] = part
            offset += part.nbytes
        return [part.nbytes for part in raw]

    def take(self, sizes: Iterable[int]) -> list[bytearray]:
        """Copies of what was put there, of those sizes."""
        offset, taken = 0, []
        for size in sizes:
            taken.append(bytearray(memoryview(self._mapped(offset + size))[offset : offset + size] if size else 0))
            offset += size
        return taken

    def _mapped(self, size: int) -> mmap.mmap:
        if self._bytes is None or len(self._bytes) < size:
            self._bytes = mmap.mmap(self.descriptor, os.fstat(self.descriptor).st_size)
        return self._bytes


def anonymous_file() -> int:
    """Descriptor of a file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("videodiff")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
