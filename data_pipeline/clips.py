"""From the bytes of a video or image file to frames at a rate and size. The only importer of decord.

An image is a clip of one frame.

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

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CENTRE = (0.5, 0.5)


class ClipError(ValueError):
    """One clip is unusable. ``reason`` is a short fixed word to count by, the message says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # both, so that the error survives pickling
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True)
class Clip:
    """Frames uint8 [T,H,W,3] of a clip on its grid of ``total`` frames at the asked rate,
    from grid frame ``first`` on.
    """

    frames: npt.NDArray[np.uint8]
    first: int
    total: int

    def window(self, frames: int, position: float) -> npt.NDArray[np.uint8]:
        """The ``frames`` frames that start at the fraction ``position`` in [0,1) of all possible starts."""
        first = window_start(self.total, frames, position) - self.first
        return self.frames[first : first + frames]


@dataclass(frozen=True)
class Preview(Clip):
    """A few frames of a clip all of whose ``total`` frames were decoded, and what the file is."""

    fps: float  # on average; 0 for an image
    height: int
    width: int


def window_start(total: int, frames: int, position: float) -> int:
    """The grid frame where a window starts: each of the total - frames + 1 starts has an equal share of [0,1)."""
    return min(int(position * (total - frames + 1)), total - frames)


def decode_clip(
    video: bytes,
    *,
    fps: float,
    frames: int,
    size: int | tuple[int, int],
    position: float = 0.0,
    whole_bytes: int = 0,
    crop: tuple[float, float] = CENTRE,
    suffix: str = "mp4",
) -> Clip:
    """Decode a window of ``frames`` frames at ``fps``, resized and cropped to ``size``: S, or (height, width) pixels.

    The clip's grid is its first frame and then, each 1/fps seconds, the frame nearest in time. ``position`` in [0,1)
    chooses the start of the window; where all of the grid fits into ``whole_bytes`` it is decoded instead, from which
    any window can be cut. ``crop`` says where the cropped part lies, see `fit`; ``suffix`` is that of the file's name.
    Raises ClipError: "undecodable", "too short" (fewer frames than asked), "too slow" (a source rate well below fps).
    """
    height, width = (size, size) if isinstance(size, int) else size
    if suffix in IMAGE_SUFFIXES:
        if frames > 1:
            raise ClipError("too short", f"1 frame, {frames} asked")
        return Clip(fit(_image(video), (height, width), crop), 0, 1)
    try:
        reader = open_decord(io.BytesIO(video))
        times = np.sort(reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64))
        grid = grid_frames(times, fps, frames)
        first, count = window_start(len(grid), frames, position), frames
        if len(grid) * height * width * 3 <= whole_bytes:
            first, count = 0, len(grid)
        # In pieces, since the source may be much larger than its fitted frames.
        pieces = [grid[i : min(i + 32, first + count)].tolist() for i in range(first, first + count, 32)]
        fitted = [fit(read_frames(reader, piece), (height, width), crop) for piece in pieces]
    except (ClipError, UserError):
        raise
    except Exception as error:  # decord's own error class exists only where decord does, and it raises others too
        raise _undecodable(error) from None
    return Clip(np.concatenate(fitted), first, len(grid))


def preview_clip(video: bytes, *, frames: int, height: int, suffix: str = "mp4") -> Preview:
    """Decode all of a clip, and keep up to ``frames`` frames from its beginning to its end, ``height`` pixels high.

    Raises ClipError "undecodable".
    """
    if suffix in IMAGE_SUFFIXES:
        picture = _image(video)
        return Preview(_lowered(picture, height), 0, 1, 0.0, *picture.shape[1:3])
    try:
        reader = open_decord(io.BytesIO(video))
        total = len(reader)
        times = reader.get_frame_timestamp(range(total))[:, 0]
        kept = set(np.linspace(0, total - 1, min(frames, total)).astype(int).tolist())
        rows = []
        for first in range(0, total, 32):
            piece = read_frames(reader, list(range(first, min(first + 32, total))))
            chosen = [i for i in range(len(piece)) if first + i in kept]
            rows += [_lowered(piece[chosen], height)] if chosen else []
    except (ClipError, UserError):
        raise
    except Exception as error:
        raise _undecodable(error) from None
    seconds = float(times.max() - times.min())
    fps = (total - 1) / seconds if seconds > 0 else 0.0
    return Preview(np.concatenate(rows), 0, total, fps, *piece.shape[1:3])


def _lowered(frames: npt.NDArray[np.uint8], height: int) -> npt.NDArray[np.uint8]:
    return fit(frames, (height, max(round(height * frames.shape[2] / frames.shape[1]), 1)))


def open_decord(source: str | io.BytesIO) -> Any:
    """decord's reader of a file or its bytes. UserError where there is no decord; decord's own errors pass."""
    try:
        import decord
    except ImportError as error:
        raise UserError(f"decord cannot be loaded ({error}); install it with pip install 'videodiff[train]'") from None
    decord.logging.set_level(decord.logging.QUIET)  # what is wrong with a file is told once, by ClipError
    return decord.VideoReader(source, num_threads=1)


def _undecodable(error: Exception) -> ClipError:
    detail = re.sub(r"\[[\d:]+\] \S+:\d+: ", "", str(error))  # no times and places of decord's own code
    return ClipError("undecodable", (detail.strip().splitlines() or [type(error).__name__])[0][:200])


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


def fit(
    frames: npt.NDArray[np.uint8], size: int | tuple[int, int], crop: tuple[float, float] = CENTRE
) -> npt.NDArray[np.uint8]:
    """Crop and resize uint8 [T,H,W,3] to ``size``, S or (height, width): [T,h,w,3], as much of the picture as goes
    into that aspect, which itself stays untouched.

    ``crop`` in [0,1] says where the kept part lies, down and across; (0.5, 0.5) is the centre.
    """
    height, width = frames.shape[1:3]
    h, w = (size, size) if isinstance(size, int) else size
    if (height, width) == (h, w):
        return frames
    from PIL import Image

    kept_height, kept_width = (height, height * w / h) if height * w <= width * h else (width * h / w, width)
    left, top = (width - kept_width) * crop[1], (height - kept_height) * crop[0]
    box = (left, top, left + kept_width, top + kept_height)
    # Pillow's bicubic widens its kernel when it shrinks, so nothing aliases.
    rows = [Image.fromarray(f).resize((w, h), Image.Resampling.BICUBIC, box=box) for f in frames]
    return np.stack([np.asarray(row) for row in rows])


def _image(data: bytes) -> npt.NDArray[np.uint8]:
    """An image file as uint8 [1,H,W,3], turned upright by its own tag; transparency falls on white."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ClipError("undecodable", (str(error).splitlines() or [type(error).__name__])[0][:200]) from None
    paper = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(paper, picture).convert("RGB"))[None].copy()
