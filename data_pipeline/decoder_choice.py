"""Which decoder reads a clip of a shard.

decord reads what it can, and PyAV the rest: what decord has no decoder for (AV1), where it is not installed, and files
of which decord would give other frames than asked: with several key frames, or an edit list (see
data_pipeline/readers.py).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from data_pipeline.decoders import ClipError, open_decord, read_frames, undecodable
from data_pipeline.readers import PyavVideo, decord_knows
from videodiff.errors import UserError

_PIECE = 32  # frames read at once, since the source may be much larger than what is made of it
Result = TypeVar("Result")


class Opened(NamedTuple):
    """A video to read frames from, once: when each is shown, and ascending indices -> their frames uint8 [T,H,W,3] in
    pieces. A pixel is ``pixel_aspect`` times as wide as it is high."""

    decoder: str
    times: npt.NDArray[np.float64]
    read: Callable[[list[int]], Iterator[npt.NDArray[np.uint8]]]
    sure: bool = True  # nothing in it can be read wrongly
    pixel_aspect: float = 1.0


def read_video(video: bytes, use: Callable[[Opened], Result]) -> Result:
    """What ``use`` makes of a video that decord opens, or where decord isn't to be trusted PyAV.

    With one key frame there is nothing that decord could seek to, and PyAV isn't asked. Raises ClipError; UserError
    where neither is installed.
    """
    opened, problem = None, None
    try:
        with undecodable():
            opened = _by_decord(video)
            if opened.sure:
                return use(opened._replace(pixel_aspect=_pixel_aspect(video)))
    except ClipError as error:
        if error.reason != "undecodable":
            raise
        problem = error
    except UserError:  # there is no decord for this machine
        pass
    try:
        other = PyavVideo(video)
    except UserError as missing:
        if opened is not None and problem is None:
            with undecodable():
                return use(_without_seeking(opened))
        if problem is None:
            raise
        raise ClipError(problem.reason, f"{problem.detail}; {missing}") from None
    except ClipError as error:
        raise problem or error from None
    if problem is not None and decord_knows(other.header):
        raise problem  # it is damaged, and what a decoder patches up after an error can't be told from pictures
    with undecodable():
        trusted = opened is not None and problem is None and other.has_closed_groups()
        chosen = opened if opened is not None and trusted else _by_pyav(other)
        return use(chosen._replace(pixel_aspect=other.pixel_aspect))


def _by_decord(video: bytes) -> Opened:
    reader = open_decord(io.BytesIO(video))
    times = np.sort(reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64))

    def read(indices: list[int]) -> Iterator[npt.NDArray[np.uint8]]:
        nonlocal reader
        for first in range(0, len(indices), _PIECE):
            piece = read_frames(reader, indices[first : first + _PIECE])
            if first + _PIECE >= len(indices):
                reader = None  # it would go on decoding ahead while somebody works on the piece
            yield piece

    # Some files say no times, in which place decord has random ones; and what an edit list hides is not shown.
    shown = bool(((times > -1e-3) & (times < min(1e6, _edited_seconds(video)))).all())
    sure = len(reader.get_key_indices()) < 2 and shown
    return Opened("decord", times, read, sure)


def _edited_seconds(video: bytes) -> float:
    """How long an mp4 or mov is shown by the edit list of its shortest track; endless without one, and elsewhere.

    ISO/IEC 14496-12, 8.2.2 and 8.6.6: seconds are a count of the movie header's time scale.
    """
    movie = video.rfind(b"moov") if video[4:8] == b"ftyp" else -1
    header = video.find(b"mvhd", movie) if movie >= 0 else -1
    if header < 0:
        return np.inf
    scale = int.from_bytes(video[header + (24 if video[header + 4 :][:1] == b"\1" else 16) :][:4], "big")
    seconds, place = np.inf, video.find(b"elst", header)
    while place >= 0 and scale:
        size = 8 if video[place + 4 : place + 5] == b"\1" else 4
        count = int.from_bytes(video[place + 8 : place + 12], "big")
        entry = 2 * size + 4
        entries = (place + 12 + entry * number for number in range(min(count, 64)))
        seconds = min(seconds, sum(int.from_bytes(video[at : at + size], "big") for at in entries) / scale)
        place = video.find(b"elst", place + 4)
    return seconds or np.inf  # 0: as long as it is


def _pixel_aspect(video: bytes) -> float:
    """What decord doesn't tell. mp4 and mov say it in a box of their own, so that PyAV is seldom asked.

    ISO/IEC 14496-12, 12.1.4: after its name two numbers of four bytes, whose quotient it is.
    """
    if video[4:8] == b"ftyp" and all(box[:4] == box[4:8] for box in video.split(b"pasp")[1:]):
        return 1.0
    try:
        return PyavVideo(video).pixel_aspect
    except (UserError, ClipError):  # it isn't installed, or can't open what decord can
        return 1.0


def _without_seeking(opened: Opened) -> Opened:
    """It reads from the start on, which is slower and gives the right frames of any file."""

    def read(indices: list[int]) -> Iterator[npt.NDArray[np.uint8]]:
        first = 0
        for piece in opened.read(list(range(indices[-1] + 1))):
            chosen = [index - first for index in indices if first <= index < first + len(piece)]
            if chosen:
                yield piece[chosen]
            first += len(piece)

    return opened._replace(read=read)


def _by_pyav(video: PyavVideo) -> Opened:
    times = video.times()

    def read(indices: list[int]) -> Iterator[npt.NDArray[np.uint8]]:
        shown = video.all(times[indices[0]] - 1e-6, times[indices[-1]] + 1e-6)
        number, picture = indices[0] - 1, np.empty(0, np.uint8)
        for index in indices:
            while number < index:
                number += 1
                time, picture = next(shown, (np.inf, picture))
                if abs(time - times[number]) > 1e-3:
                    raise ClipError("undecodable", f"frame {number} of {len(times)} cannot be decoded")
            yield picture[None]

    return Opened("pyav", times, read)
