"""From the bytes of a video file to frames at a rate and size. The only importer of decord.

decord is opened in the process that decodes (a reader that is carried over a fork aborts it), with one thread, and
reads ahead: helper processes (data_pipeline/decoding.py) keep that memory and those crashes away from training.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from videodiff.errors import UserError


class ClipError(ValueError):
    """One clip is unusable. ``reason`` is a short fixed word to count by, the message says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # both, so that the error survives pickling
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True)
class Clip:
    """Frames uint8 [T,S,S,3] of a clip on its grid of ``total`` frames at the asked rate,
    from grid frame ``first`` on.
    """

    frames: npt.NDArray[np.uint8]
    first: int
    total: int

    def window(self, frames: int, position: float) -> npt.NDArray[np.uint8]:
        """The ``frames`` frames that start at the fraction ``position`` in [0,1) of all possible starts."""
        first = window_start(self.total, frames, position) - self.first
        return self.frames[first : first + frames]


def window_start(total: int, frames: int, position: float) -> int:
    """The grid frame where a window starts: each of the total - frames + 1 starts has an equal share of [0,1)."""
    return min(int(position * (total - frames + 1)), total - frames)


def decode_clip(
    video: bytes, *, fps: float, frames: int, size: int, position: float = 0.0, whole_bytes: int = 0
) -> Clip:
    """Decode a window of ``frames`` frames at ``fps``, resized and centre-cropped to ``size`` x ``size`` pixels.

    The clip's grid is its first frame and then, each 1/fps seconds, the frame nearest in time. ``position`` in [0,1)
    chooses the start of the window; where all of the grid fits into ``whole_bytes`` it is decoded instead, from which
    any window can be cut.
    Raises ClipError: "undecodable", "too short" (fewer frames than asked), "too slow" (a source rate well below fps).
    """
    try:
        reader = open_decord(io.BytesIO(video))
        times = np.sort(reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64))
        grid = grid_frames(times, fps, frames)
        first, count = window_start(len(grid), frames, position), frames
        if len(grid) * size * size * 3 <= whole_bytes:
            first, count = 0, len(grid)
        # In pieces, since the source may be much larger than its fitted frames.
        pieces = [grid[i : min(i + 32, first + count)].tolist() for i in range(first, first + count, 32)]
        fitted = [fit(read_frames(reader, piece), size) for piece in pieces]
    except (ClipError, UserError):
        raise
    except Exception as error:  # decord's own error class exists only where decord does, and it raises others too
        detail = re.sub(r"\[[\d:]+\] \S+:\d+: ", "", str(error))  # no times and places of decord's own code
        raise ClipError("undecodable", (detail.strip().splitlines() or [type(error).__name__])[0][:200]) from None
    return Clip(np.concatenate(fitted), first, len(grid))


def open_decord(source: str | io.BytesIO) -> Any:
    """decord's reader of a file or its bytes. UserError where there is no decord; decord's own errors pass."""
    try:
        import decord
    except ImportError as error:
        raise UserError(f"decord cannot be loaded ({error}); install it with pip install 'videodiff[train]'") from None
    decord.logging.set_level(decord.logging.QUIET)  # what is wrong with a file is told once, by ClipError
    return decord.VideoReader(source, num_threads=1)


def read_frames(reader: Any, indices: list[int]) -> npt.NDArray[np.uint8]:
    """Frames uint8 [T,H,W,3] of a decord reader."""
    try:
        return np.asarray(reader.get_batch(indices).asnumpy())
    except Exception as error:
        if "from_size == to_size" not in str(error):
            raise
    # decord 0.6: where rows are padded to a multiple of a small width (12, 16, 24, 48), it takes the rest for channels.
    padded = np.stack([reader[index].asnumpy() for index in indices])
    count, height, width = padded.shape[:3]
    rows = padded.reshape(count, height, -1)[:, :, : 3 * width]
    return rows.reshape(count, height, width, 3)


def grid_frames(times: npt.NDArray[np.float64], fps: float, frames: int) -> npt.NDArray[np.int64]:
    """Indices of the source frames nearest to first + j/fps seconds, j = 0, 1, ... to the end; ``times`` are sorted."""
    if len(times) < 1:
        raise ClipError("undecodable", "no frames")
    times = times - times[0]
    interval = times[-1] / (len(times) - 1) if len(times) > 1 else 0.0
    if frames > 1 and interval * fps > 1.1:  # nearest frames would stand still now and then
        raise ClipError("too slow", f"{1 / interval:.3g} frames a second, {fps:g} asked")
    # Each source frame lasts half an interval beyond its time before it stops to be the nearest one.
    total = int((times[-1] + interval / 2) * fps * (1 - 1e-6)) + 1
    if total < frames:
        raise ClipError("too short", f"{total} frames at {fps:g} a second, {frames} asked")
    middles = (times[1:] + times[:-1]) / 2
    return np.searchsorted(middles, np.arange(total) / fps * (1 - 1e-6), side="left")


def fit(frames: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Resize uint8 [T,H,W,3] so that the shorter side is ``size``, and crop the centre: [T,S,S,3],
    the aspect untouched.
    """
    height, width = frames.shape[1:3]
    if height == width == size:
        return frames
    from PIL import Image

    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    # Pillow's bicubic widens its kernel when it shrinks, so nothing aliases.
    rows = [Image.fromarray(f).resize((size, size), Image.Resampling.BICUBIC, box=box) for f in frames]
    return np.stack([np.asarray(row) for row in rows])
