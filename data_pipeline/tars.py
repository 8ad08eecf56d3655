"""Tar files as webdataset reads and writes them: members of one key make a sample. The only importer of webdataset.

Nothing in a tar is executed: no decoder of webdataset is used, and no member is ever written to disk under the name it
brings.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from videodiff.video_io import atomic_path

_SKIPPED = re.compile(r"__[^/]*__($|/)")  # webdataset's rule of what belongs to no sample


def write_tar(path: Path, samples: Iterable[Mapping[str, bytes | str]]) -> None:
    """Write samples, their members by suffix and ``__key__``, as one tar, whole or not at all.

    Equal samples give equal bytes. Raises UserError where the place cannot be written.
    """
    from webdataset import TarWriter

    with (
        atomic_path(path) as temporary,
        open(temporary, "wb") as file,
        TarWriter(file, encoder=False, mtime=0) as writer,
    ):
        for sample in samples:
            writer.write(dict(sample))


def read_group(data: bytes) -> dict[str, Any]:
    """The first sample in a piece of a tar: its members' bytes by suffix in lower case, and ``__key__``.

    webdataset's naming and grouping; its reader is for pipes, and takes the time of three more copies of each member.
    Raises tarfile.TarError, EOFError or ValueError where there is no whole one.
    """
    sample: dict[str, Any] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for key, suffix, member in members(tar):
            if sample.setdefault("__key__", key) != key:
                break
            if suffix in sample:
                raise ValueError(f"two members {member.name}")
            end = member.offset_data + member.size
            if end > len(data):
                raise EOFError
            sample[suffix] = data[member.offset_data : end]
    if not sample:
        raise EOFError
    return sample


def members(tar: tarfile.TarFile, stop: int | None = None) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, suffix in lower case, member) of what belongs to a sample, in order, up to the byte ``stop``."""
    from webdataset.tariterators import base_plus_ext

    while (member := tar.next()) is not None and (stop is None or member.offset < stop):
        key, suffix = base_plus_ext(member.name)  # the key ends at the first dot
        if member.isreg() and key is not None and not _SKIPPED.match(member.name):
            yield key, suffix.lower(), member


def is_closed(file: IO[bytes], end: int) -> bool:
    """Whether a tar ends as it should after its last member: tarfile itself is silent about a tear in the middle."""
    file.seek(end)
    return file.read(512) == bytes(512)
