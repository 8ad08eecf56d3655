"""What the readers of video files share: the error of a clip, and decord's door. The only importer of decord.

decord is opened in the process that decodes (a reader that is carried over a fork aborts it), with one thread, and
reads ahead: helper processes (data_pipeline/decoding.py) keep that memory and those crashes away from training.
"""

from __future__ import annotations

import contextlib
import errno
import io
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from videodiff.errors import UserError

_UNREADABLE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR}


class ClipError(ValueError):
    """One clip is unusable. ``reason`` is a short fixed word to count by, the message says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # both, so that the error survives pickling
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@contextlib.contextmanager
def undecodable() -> Iterator[None]:
    """Whatever a library raises over a file becomes a ClipError of one line."""
    try:
        yield
    except (ClipError, UserError, ImportError):
        raise
    except StopIteration:
        raise ClipError("undecodable", "no frames") from None
    except Exception as error:  # av and decord have classes of their own, and raise others too
        if isinstance(error, OSError) and error.errno in _UNREADABLE:
            raise ClipError("unreadable", error.strerror or str(error)) from None
        detail = re.sub(r"\[[\d:]+\] \S+:\d+: |\[Errno -?\d+\] ", "", str(error))  # no places of a library's own code
        line = (detail.strip().splitlines() or [type(error).__name__])[0]
        raise ClipError("undecodable", re.sub(r": '.*", "", line)[:200]) from None  # nor the file's name again


def open_decord(source: str | io.BytesIO) -> Any:
    """decord's reader of a file or its bytes. UserError where there is no decord; decord's own errors pass."""
    try:
        import decord
    except ImportError as error:
        raise UserError(f"decord cannot be loaded ({error}); install it with pip install 'videodiff[train]'") from None
    decord.logging.set_level(decord.logging.QUIET)  # what is wrong with a file is told once, by ClipError
    return decord.VideoReader(source, num_threads=1)


class _NotCopied:
    """decord's array as numpy takes it, without the copy that `asnumpy` makes: a clip's frames are many megabytes."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **_: object) -> Any:
        return self._array.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the CPU


def read_frames(reader: Any, indices: list[int]) -> npt.NDArray[np.uint8]:
    """Frames uint8 [T,H,W,3] of a decord reader."""
    try:
        return np.from_dlpack(_NotCopied(reader.get_batch(indices)))
    except Exception as error:
        if "from_size == to_size" not in str(error):
            raise
    # decord 0.6: where rows are padded to a multiple of a small width (12, 16, 24, 48), it takes the rest for channels.
    padded = np.stack([reader[index].asnumpy() for index in indices])
    count, height, width = padded.shape[:3]
    rows = padded.reshape(count, height, -1)[:, :, : 3 * width]
    return rows.reshape(count, height, width, 3)
