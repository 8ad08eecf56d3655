"""What a helper process does with a video: look at all of it for scenes, then cut, measure and encode one clip."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.clips import resize
from data_pipeline.decoders import ClipError
from data_pipeline.decoding import alive
from data_pipeline.filters import Filters, verdict
from data_pipeline.measures import measure, perceptual_hash
from data_pipeline.readers import Video, open_video
from data_pipeline.scenes import ClipConfig, ScenesConfig, cut_clips, find_cuts, grid
from data_pipeline.source import Source
from data_pipeline.sources import read_bytes, state_of
from videodiff.video_io import encode_video

Frames = npt.NDArray[np.uint8]

WORK = "data_pipeline.cutting:work"
_LONGEST_SIDE = 16384  # pixels: x264 encodes no more


@dataclass(frozen=True)
class Cut:
    """A clip: what was measured, why it is rejected or "", its mp4 unless it is, a strip of three pictures as JPEG,
    and its first frame where that was asked for.
    """

    measures: dict[str, Any]
    problem: str
    video: bytes = b""
    strip: bytes = b""
    first: Frames | None = None


def work(task: str, **job: Any) -> Any:
    """The one door of a helper: ``task`` is "look" or "cut"."""
    return look(**job) if task == "look" else cut(**job)


def look(source: Source, scenes: ScenesConfig | None, clip: ClipConfig) -> dict[str, Any]:
    """What a video is, and the clips in it: the header's fields, decoder, fps, frames, seconds, ``state``, ``clips``.
    Each frame begins the helper's deadline anew, however long the video is. Of one that is damaged further on there are
    the clips before that, and ``damaged`` says so.

    Raises ClipError where it can't be opened or no clip of it decoded, "too short" where nothing lies in the span, and
    "changed while read".
    """
    state = _state(source)
    video = open_video(read_bytes(source))
    start = -np.inf if source.start is None else video.first_time + source.start
    stop = np.inf if source.end is None else video.first_time + source.end
    broke: list[ClipError] = []
    times, cuts = find_cuts(scenes, alive(_until(broke, video.all(start, stop))))
    _unchanged(source, state)
    clips = cut_clips(clip, times, cuts)
    if broke and all(one["problem"] for one in clips):
        raise broke[0]
    if len(times) == 0:
        raise ClipError("too short", "no frame in its span" if source.end is not None else "no frames")
    interval = float(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    return {
        **asdict(video.header),
        "decoder": video.decoder,
        "frames": len(times),
        "fps": 1 / interval if interval else None,
        "seconds": float(times[-1] - times[0]) + interval,
        "passed_over": video.passed_over,
        "damaged": f"damaged {times[-1] - times[0]:.1f} s on: {broke[0].detail}" if broke else "",
        "state": state,
        "clips": clips,
    }


def _until(broke: list[ClipError], frames: Iterator[tuple[float, Frames]]) -> Iterator[tuple[float, Frames]]:
    """The frames before the first that can't be decoded, whose error goes into ``broke``."""
    try:
        yield from frames
    except ClipError as error:
        broke.append(error)


def cut(
    source: Source,
    decoder: str,
    state: list[int],
    start: float,
    said: dict[str, Any],
    clip: ClipConfig,
    filters: Filters,
    strip_size: int,
    first_frame: bool = False,
) -> Cut:
    """Decode the clip that begins at ``start``, measure it, and encode it unless the filters reject it.

    ``said`` is what is known of it already, for filters to see; ``state`` is the file's at the first look; the strip's
    pictures are ``strip_size`` pixels high, 0 for none. Raises ClipError like `look`, "too small" and "too large".
    """
    _unchanged(source, state)
    video = open_video(read_bytes(source), decoder)
    whole: list[Frames] = []
    frames = np.stack(list(_fitted(video, clip, start, whole)))
    _unchanged(source, state)
    height, width = frames.shape[1:3]
    measures = {**measure(frames, whole), "hash": perceptual_hash(frames), "width": width, "height": height}
    problem = verdict(filters, {**said, **measures})
    strip = _strip(frames, strip_size) if strip_size else b""
    encoded = b"" if problem else encode_video(frames, clip.fps, clip.crf)
    return Cut(measures, problem, encoded, strip, frames[0] if first_frame else None)


def _fitted(video: Video, clip: ClipConfig, start: float, whole: list[Frames]) -> Iterator[Frames]:
    """The clip's frames at their size; the first, middle and last picture before the crop go into ``whole``."""
    places = {0, clip.frames // 2, clip.frames - 1}
    width, height, box = fit_box(clip, video.header.width, video.header.height, video.pixel_aspect)
    last, fitted = None, None
    count = 0
    for frame in video.nearest(grid(clip, start)):
        if count in places:
            whole.append(frame)
        if frame is not last:  # a slow source shows a frame twice
            last, fitted = frame, resize(frame, width, height, box)
        assert fitted is not None
        yield fitted
        count += 1
    if count < clip.frames:
        raise ClipError("undecodable", f"{count} of {clip.frames} frames")


def fit_box(
    clip: ClipConfig, width: int, height: int, pixel_aspect: float = 1.0
) -> tuple[int, int, tuple[float, float, float, float]]:
    """(width, height) of the clip and the box (left, top, right, bottom) of the file's pixels that becomes it.

    ``width`` and ``height`` are those of the whole picture in square pixels. The box has the clip's aspect exactly: of
    a picture that keeps its own, so much is cut off as makes both sides even. Raises ClipError "too small" and, where
    no encoder takes the clip, "too large".
    """
    aspect = clip.aspect or width / height
    long = max(aspect, 1 / aspect) * clip.size
    long = max(clip.size, round(long / 2) * 2)
    new_width, new_height = (long, clip.size) if aspect >= 1 else (clip.size, long)
    if long > _LONGEST_SIDE:
        raise ClipError("too large", f"{new_width}x{new_height} pixels, an encoder takes {_LONGEST_SIDE}")
    exact = new_width / new_height
    box_width, box_height = (width, width / exact) if width / height <= exact else (height * exact, height)
    # Half a pixel: the size in square pixels is rounded where those of the file are not square.
    if box_width + 0.5 < new_width or box_height + 0.5 < new_height:
        raise ClipError("too small", f"{width}x{height} pixels for {new_width}x{new_height}")
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return new_width, new_height, (left / pixel_aspect, top, (left + box_width) / pixel_aspect, top + box_height)


def _strip(frames: Frames, size: int) -> bytes:
    """First, middle and last frame side by side, as JPEG."""
    from PIL import Image

    height, width = frames.shape[1:3]
    width = min(max(1, round(width * size / height)), 16 * size)  # a JPEG has at most 65,535 pixels a side
    strip = Image.new("RGB", (3 * width, size))
    for place, index in enumerate((0, len(frames) // 2, len(frames) - 1)):
        strip.paste(Image.fromarray(frames[index]).resize((width, size)), (place * width, 0))
    file = io.BytesIO()
    strip.save(file, "JPEG", quality=70)
    return file.getvalue()


def _state(source: Source) -> list[int]:
    try:
        return state_of(source)
    except (OSError, ValueError) as error:
        raise ClipError("unreadable", getattr(error, "strerror", "") or str(error)) from None


def is_unchanged(source: Source, state: list[int]) -> bool:
    """Whether a source's file is there, and the one that was looked at."""
    try:
        return _state(source) == list(state)
    except ClipError:
        return False


def _unchanged(source: Source, state: list[int]) -> None:
    if _state(source) != list(state):
        raise ClipError("changed while read", "the file is another than when it was first read")
