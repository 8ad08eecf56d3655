"""From the bytes of a video or image file to frames at a rate and size. An image is a clip of one frame."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.decoder_choice import Opened, read_video
from data_pipeline.decoders import ClipError, undecodable

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CENTRE = (0.5, 0.5)


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
    decoder: str  # "decord", "pyav", or "pillow" for an image


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

    def window(opened: Opened, limit: int) -> Clip:
        grid = grid_frames(opened.times, fps, frames)
        first, count = window_start(len(grid), frames, position), frames
        if len(grid) * height * width * 3 <= limit:
            first, count = 0, len(grid)
        pieces = opened.read(grid[first : first + count].tolist())
        fitted = [fit(piece, (height, width), crop, opened.pixel_aspect) for piece in pieces]
        return Clip(fitted[0] if len(fitted) == 1 else np.concatenate(fitted), first, len(grid))

    try:
        return read_video(video, lambda opened: window(opened, whole_bytes))
    except ClipError as error:
        if error.reason != "undecodable" or not whole_bytes:
            raise
    # The damage may lie elsewhere, and what is left of a cache mustn't decide which clips are bad.
    return read_video(video, lambda opened: window(opened, 0))


def preview_clip(
    video: bytes, *, frames: int, height: int, suffix: str = "mp4", wanted: tuple[float, int] | None = None
) -> Preview:
    """Decode all of a clip, and keep up to ``frames`` frames from its beginning to its end, ``height`` pixels high.

    ``wanted``: the rate and the number of frames that training will ask for. Raises ClipError "undecodable", and with
    them "too short" and "too slow" as `decode_clip` does.
    """
    if suffix in IMAGE_SUFFIXES:
        if wanted is not None and wanted[1] > 1:
            raise ClipError("too short", f"1 frame, {wanted[1]} asked")
        picture = _image(video)
        return Preview(_lowered(picture, height), 0, 1, 0.0, picture.shape[1], picture.shape[2], "pillow")

    def preview(opened: Opened) -> Preview:
        if wanted is not None:
            grid_frames(opened.times, *wanted)
        total = len(opened.times)
        kept = set(np.linspace(0, total - 1, min(frames, total)).astype(int).tolist())
        rows, first = [], 0
        for piece in opened.read(list(range(total))):
            chosen = [i for i in range(len(piece)) if first + i in kept]
            rows += [_lowered(piece[chosen], height, opened.pixel_aspect)] if chosen else []
            first += len(piece)
        seconds = float(opened.times[-1] - opened.times[0])
        fps = (total - 1) / seconds if seconds > 0 else 0.0
        return Preview(np.concatenate(rows), 0, total, fps, piece.shape[1], piece.shape[2], opened.decoder)

    return read_video(video, preview)


def _lowered(frames: npt.NDArray[np.uint8], height: int, pixel_aspect: float = 1.0) -> npt.NDArray[np.uint8]:
    width = max(round(height * frames.shape[2] * pixel_aspect / frames.shape[1]), 1)
    return fit(frames, (height, width), pixel_aspect=pixel_aspect)


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
    frames: npt.NDArray[np.uint8],
    size: int | tuple[int, int],
    crop: tuple[float, float] = CENTRE,
    pixel_aspect: float = 1.0,
) -> npt.NDArray[np.uint8]:
    """Crop and resize uint8 [T,H,W,3] to ``size``, S or (height, width): [T,h,w,3], as much of the picture as goes
    into that aspect, which itself stays untouched.

    ``crop`` in [0,1] says where the kept part lies, down and across; (0.5, 0.5) is the centre. A pixel of ``frames`` is
    ``pixel_aspect`` times as wide as it is high; one of the result is square.
    """
    height, width = frames.shape[1:3]
    h, w = (size, size) if isinstance(size, int) else size
    if (height, width, pixel_aspect) == (h, w, 1.0):
        return frames
    wide = width * pixel_aspect  # of the picture, in square pixels
    kept_height, kept_width = (height, height * w / h) if height * w <= wide * h else (wide * h / w, wide)
    left, top = (wide - kept_width) * crop[1], (height - kept_height) * crop[0]
    box = (left / pixel_aspect, top, (left + kept_width) / pixel_aspect, top + kept_height)
    fitted = np.empty((len(frames), h, w, 3), np.uint8)
    for frame, place in zip(frames, fitted, strict=True):
        place[...] = resize(frame, w, h, box)
    return fitted


def resize(
    frame: npt.NDArray[np.uint8], width: int, height: int, box: tuple[float, float, float, float]
) -> npt.NDArray[np.uint8]:
    """The ``box`` of a picture [H,W,3], bicubic with a kernel that widens when it shrinks: [height,width,3]."""
    from PIL import Image

    right, bottom = min(box[2], frame.shape[1]), min(box[3], frame.shape[0])
    if (box[0], box[1], right, bottom) == (0, 0, width, height) == (0, 0, frame.shape[1], frame.shape[0]):
        return frame
    # Pillow copies the picture before it begins, which is dear: it gets only what the kernel sees.
    x, across = _seen(box[0], right, width, frame.shape[1])
    y, down = _seen(box[1], bottom, height, frame.shape[0])
    row = 3 * frame.shape[1]
    pixels = np.ascontiguousarray(frame).reshape(-1)[y * row + 3 * x : (y + down - 1) * row + 3 * (x + across)]
    picture = Image.frombuffer("RGB", (across, down), pixels, "raw", "RGB", row, 1).resize(
        (width, height), Image.Resampling.BICUBIC, box=(box[0] - x, box[1] - y, right - x, bottom - y)
    )
    return np.frombuffer(picture.tobytes(), np.uint8).reshape(height, width, 3)


def _seen(low: float, high: float, size: int, whole: int) -> tuple[int, int]:
    """First pixel of ``whole``, and their number, that `low` to `high` resized to ``size`` depends on: Pillow's bicubic
    kernel reaches two pixels of the smaller side's scale beyond."""
    reach = 2 * max((high - low) / size, 1) + 1
    first = max(math.floor(low - reach), 0)
    return first, min(math.ceil(high + reach), whole) - first


def _image(data: bytes) -> npt.NDArray[np.uint8]:
    """An image file as uint8 [1,H,W,3], turned upright by its own tag; transparency falls on white."""
    from PIL import Image, ImageOps

    with undecodable(), Image.open(io.BytesIO(data)) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGBA")
    paper = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(paper, picture).convert("RGB"))[None].copy()
