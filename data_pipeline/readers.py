"""Video files as they come, behind one interface. The only importer of av.

decord reads what it is known to read rightly; PyAV reads the rest: AV1, GIF, more than 8 bits, turned pictures, files
whose times decord sees differently, cuts by an edit list that hides frames (`ffmpeg -ss -c copy` makes them; decord
shows others in their place), and files with open groups of pictures, of which decord gives other frames than asked
after it has sought (x265 makes them by default). Only the formats in FORMATS are opened, never a playlist that names
other files. Frames are uint8 [H,W,3], upright, in the file's own pixels (`Video.pixel_aspect`); times are in
seconds.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.decoders import ClipError, open_decord, read_frames, undecodable
from videodiff.errors import UserError

Frame = npt.NDArray[np.uint8]

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,flv,ogg,asf"
MOST_PIXELS = 2**26  # of a frame: beyond it a header lies, or memory does not suffice
_DECORD_CODECS = {"h264", "hevc", "vp8", "vp9", "mpeg4", "mpeg2video"}
# decord reads a file from end to end whenever it opens it, which is once for each clip; PyAV seeks.
_DECORD_BYTES = 2**24


@dataclass(frozen=True)
class Header:
    """What a file says of itself. ``width`` and ``height`` are of the upright picture in square pixels."""

    container: str
    codec: str
    pixel_format: str
    width: int
    height: int
    rotation: int  # degrees, counterclockwise, by which the stored picture is turned to be upright: 0, 90, 180, 270
    audio: bool


class Video(ABC):
    """An open file. ``decoder`` names what reads it; a pixel is ``pixel_aspect`` times as wide as it is high."""

    decoder: str
    header: Header
    pixel_aspect: float
    first_time: float  # of the first frame, in the file's own time
    passed_over = 0  # frames so far whose times don't go on, as in files that were put together of several

    @abstractmethod
    def all(self, start: float = -np.inf, stop: float = np.inf) -> Iterator[tuple[float, Frame]]:
        """Every frame whose time lies in start <= time < stop, in the order they are shown, with that time.

        Raises ClipError("undecodable").
        """

    @abstractmethod
    def nearest(self, times: npt.NDArray[np.float64]) -> Iterator[Frame]:
        """For each of the ascending times the frame nearest to it, the earlier of two at equal distance."""


def open_video(source: Path | bytes, decoder: str | None = None) -> Video:
    """Open a file or its bytes with ``decoder`` ("decord", "pyav"), or the one that reads it rightly.

    Raises ClipError: "undecodable", "no video" (only sound), "too large" (more than MOST_PIXELS).
    """
    video = PyavVideo(source)
    if decoder == "pyav" or (decoder is None and not _decord_reads(video, source)):
        return video
    try:
        return _DecordVideo(video, source)
    except (UserError, ClipError):  # not installed, or not of its taste
        if decoder is not None:
            raise
        return video


def decord_knows(header: Header) -> bool:
    """Whether a file is of a kind that decord decodes, unless it is damaged."""
    return header.codec in _DECORD_CODECS and header.pixel_format in ("yuv420p", "yuvj420p")


def _decord_reads(video: PyavVideo, source: Path | bytes) -> bool:
    """Whether what the header says and the order of the packets leave nothing for decord to get wrong."""
    if not decord_knows(video.header) or video.header.rotation:
        return False
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > _DECORD_BYTES or (isinstance(source, Path) and not _is_text(source)):
        return False
    return video.has_closed_groups()


class PyavVideo(Video):
    """PyAV for all. UserError where it is not installed; ClipError as `open_video`."""

    decoder = "pyav"

    def __init__(self, source: Path | bytes) -> None:
        try:
            import av
        except ImportError as error:
            raise UserError(f"PyAV cannot be loaded ({error}); install it with pip install 'videodiff[data]'") from None
        av.logging.set_level(None)  # what is wrong with a file is told once, by ClipError
        self._source = source
        with undecodable():
            self._container, stream = self._open()
            self._rate = float(stream.average_rate or 0) or 25.0
            context = stream.codec_context
            if context.width * context.height > MOST_PIXELS:
                raise ClipError("too large", f"{context.width}x{context.height} pixels")
            first = next(self._decoded(self._container, stream), None)
            if first is None:
                raise ClipError("undecodable", "no frames")
            aspect = float(stream.sample_aspect_ratio or context.sample_aspect_ratio or 1) or 1.0
            rotation = round(first.rotation / 90) * 90 % 360
            width, height = first.width, first.height
            if rotation in (90, 270):
                width, height, aspect = height, width, 1 / aspect
            width = max(1, round(width * aspect))
            self.pixel_aspect = aspect
            self._size = (first.width, first.height)
            self.first_time = first.time or 0.0
            self.header = Header(
                self._container.format.name.split(",")[0],
                context.codec.canonical_name,
                context.pix_fmt or "",
                width,
                height,
                rotation,
                bool(self._container.streams.audio),
            )

    def _open(self) -> tuple[Any, Any]:
        """A fresh container at its start, and its first stream of video."""
        import av

        # A file object, so that no path is read as a protocol, and not even an odd name is a problem.
        file = io.BytesIO(self._source) if isinstance(self._source, bytes) else open(self._source, "rb")  # noqa: SIM115
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
        container = av.open(file, metadata_errors="replace", container_options=options)
        # The picture on a song's cover is a stream of video too, of one frame.
        streams = [s for s in container.streams.video if not int(s.disposition) & 0x400]
        if not streams:
            raise ClipError("no video", "no video stream")
        streams[0].thread_type = "NONE"
        return container, streams[0]

    def packets(self) -> Iterator[tuple[float | None, bool, bool]]:
        """(time shown, whether decoding can begin here, whether it is hidden) of every packet, in decoding order."""
        with undecodable():
            container, stream = self._open()
            for packet in container.demux(stream):
                if packet.size:
                    time = None if packet.pts is None else float(packet.pts * packet.time_base)
                    yield time, packet.is_keyframe, packet.is_discard

    def has_closed_groups(self) -> bool:
        """Whether each packet is shown and says when, and no picture leans on the group of pictures before its own."""
        latest_key = -np.inf
        for time, is_key, is_hidden in self.packets():
            if time is None or is_hidden or (not is_key and time < latest_key):
                return False
            latest_key = time if is_key else latest_key
        return True

    def times(self) -> npt.NDArray[np.float64]:
        """When its frames are shown, ascending; nothing is decoded for it where the packets say it."""
        told = [time for time, _, is_hidden in self.packets() if not is_hidden]
        times = [time for time, _ in self.all()] if None in told else told
        return np.unique(np.array([time for time in times if time is not None and time >= self.first_time - 1e-6]))

    def _decoded(self, container: Any, stream: Any) -> Iterator[Any]:
        for packet in container.demux(stream):
            yield from packet.decode()

    def _timed(self, container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
        last = -1 / self._rate
        for frame in self._decoded(container, stream):
            if (frame.width, frame.height) != self._size:
                raise ClipError("undecodable", "the size of the picture changes")
            # A stream without times has the header's rate. Times that go back would hide frames.
            time = frame.time if frame.time is not None else last + 1 / self._rate
            if time <= last and last >= 0:
                self.passed_over += 1
                continue
            last = time
            yield time, frame

    def all(self, start: float = -np.inf, stop: float = np.inf) -> Iterator[tuple[float, Frame]]:
        with undecodable():
            for time, frame in self._from(start) if start > self.first_time else self._timed(*self._open()):
                if time >= stop:
                    return
                if time >= start:
                    yield time, self._upright(frame)

    def nearest(self, times: npt.NDArray[np.float64]) -> Iterator[Frame]:
        with undecodable():
            targets, picture = list(times), None
            frames = self._from(float(times[0]))
            time, frame = next(frames)
            while targets:
                following = next(frames, None)
                while targets and (following is None or targets[0] - time <= following[0] - targets[0]):
                    picture = self._upright(frame) if picture is None else picture
                    yield picture
                    targets.pop(0)
                if following is None:
                    return
                (time, frame), picture = following, None

    def _from(self, target: float) -> Iterator[tuple[float, Any]]:
        """Decoded frames from one at or before ``target`` seconds on, each as if decoded from the file's start."""
        import av

        for back in (0.0, 2.0, 20.0):  # an index may know when a frame is decoded, but not when it is shown
            container, stream = self._open()
            try:
                container.seek(int(max(0.0, target - back) / stream.time_base), stream=stream, backward=True)
                frames = self._timed(container, stream)
                # What comes before the first key frame leans on frames that were not decoded.
                first = next(((time, frame) for time, frame in frames if frame.key_frame), None)
            except av.FFmpegError:
                break
            if first is not None and first[0] <= target:
                yield first
                yield from frames
                return
        yield from self._timed(*self._open())

    def _upright(self, frame: Any) -> Frame:
        picture = frame.to_ndarray(format="rgb24")
        return np.ascontiguousarray(np.rot90(picture, self.header.rotation // 90))


class _DecordVideo(Video):
    """decord for the frames, PyAV for what the file says and for the times, which decord rounds to 32 bits."""

    decoder = "decord"

    def __init__(self, video: PyavVideo, source: Path | bytes) -> None:
        self.header, self.pixel_aspect = video.header, video.pixel_aspect
        self._times = np.sort(np.array([time for time, _, _ in video.packets()], np.float64))
        self.first_time = video.first_time
        with undecodable():
            self._reader = open_decord(io.BytesIO(source) if isinstance(source, bytes) else str(source.absolute()))
            known = np.sort(self._reader.get_frame_timestamp(range(len(self._reader)))[:, 0].astype(np.float64))
            tolerance = 1e-3 + 1e-6 * abs(self._times[-1]) if len(self._times) else 0
            if len(known) != len(self._times) or not (np.abs(known - self._times) < tolerance).all():
                raise ClipError("undecodable", "decord sees other times")

    def all(self, start: float = -np.inf, stop: float = np.inf) -> Iterator[tuple[float, Frame]]:
        first, last = np.searchsorted(self._times, [start, stop]).tolist()
        yield from zip(self._times[first:last].tolist(), self._read(list(range(first, last))), strict=True)

    def nearest(self, times: npt.NDArray[np.float64]) -> Iterator[Frame]:
        middles = (self._times[1:] + self._times[:-1]) / 2
        return self._read(np.searchsorted(middles, times, side="left").tolist())

    def _read(self, indices: list[int]) -> Iterator[Frame]:
        with undecodable():
            for first in range(0, len(indices), 8):  # in pieces, since frames may be large
                yield from read_frames(self._reader, indices[first : first + 8])


def _is_text(path: Path) -> bool:
    """Whether a name is UTF-8, as decord needs it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True
