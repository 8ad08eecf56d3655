"""What is measured of a clip, and how pictures are made smaller for it. The only importer of cv2 and imagehash.

T frames of h x w pixels. All is measured on the clip as it is stored, but bars at the edges before any crop.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]

_SIDE = 128  # pixels of the shorter side on which motion is measured
_WINDOW = 11  # frames j-5 .. j+5, of Emu Video's filter
_DARK = 24  # grey levels: what is darker is black in a video's limited range

MEASURES = ("motion", "motion_window", "sharpness", "brightness", "static", "black", "letterbox")


def measure(frames: Frames, whole: Sequence[Frames]) -> dict[str, float | None]:
    """Measures of a clip uint8 [T,h,w,3]; ``whole`` are some of its pictures [H,W,3] before any crop.

    motion: mean length of the optical flow between neighbouring frames, in percent of the shorter side.
    motion_window: the least sum of it over 11 frames, min_j sum_{i=j-5..j+5} motion(f_i), as in Emu Video's filter of
    fine-tuning data (Girdhar et al. 2023, section 4); of a shorter clip 11 times its mean. Theirs is taken from H.264's
    motion vectors, so thresholds differ.
    sharpness: variance of the Laplacian of grey levels, median over frames. brightness: mean grey level, 0 to 255.
    static: share of neighbouring frames of which no part differs. black: share of frames without any light.
    letterbox: share of the picture that lies in black bars at its edges. Motion and static of one frame are None.
    """
    import cv2

    cv2.setNumThreads(1)  # helpers are the parallelism; and equal clips have equal measures
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    sharpness = float(np.median([cv2.Laplacian(picture, cv2.CV_32F).var() for picture in grey]))
    black = [float(np.percentile(picture, 99)) < _DARK for picture in grey]
    little = [small(picture, _SIDE) for picture in grey]
    motion = _motion(little)
    still = [_largest_change(a, b) < 3 for a, b in itertools.pairwise(little)]
    return {
        "motion": float(motion.mean()) if len(motion) else None,
        "motion_window": _least_window(motion) if len(motion) else None,
        "sharpness": sharpness,
        "brightness": float(np.mean([picture.mean() for picture in grey])),
        "static": float(np.mean(still)) if still else None,
        "black": float(np.mean(black)),
        "letterbox": letterbox(whole),
    }


def perceptual_hash(frames: Frames) -> str:
    """192 bits in hexadecimal: the DCT hashes (pHash) of the first, middle and last frame of uint8 [T,h,w,3]."""
    import imagehash
    from PIL import Image

    places = (0, len(frames) // 2, len(frames) - 1)
    return "".join(str(imagehash.phash(Image.fromarray(frames[place]))) for place in places)


def small(picture: Frames, side: int) -> Frames:
    """A picture [h,w] or [h,w,3] whose shorter side is ``side`` pixels, unless it is smaller already."""
    import cv2

    height, width = picture.shape[:2]
    if min(height, width) <= side:
        return picture
    scale = side / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def letterbox(whole: Sequence[Frames]) -> float:
    """The share of black bars at the edges of pictures [H,W,3] of one size, 0 where all is black."""
    light = np.max([picture.max(-1) for picture in whole], 0) >= _DARK
    if not light.any():
        return 0.0
    rows, columns = np.flatnonzero(light.mean(1) > 0.02), np.flatnonzero(light.mean(0) > 0.02)
    if not len(rows) or not len(columns):  # specks
        return 0.0
    inside = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    return float(1 - inside / light.size)


def _motion(grey: list[Frames]) -> npt.NDArray[np.float64]:
    """Mean flow into each frame but the first, in percent of the shorter side."""
    import cv2

    if len(grey) < 2 or min(grey[0].shape) < 16:
        return np.zeros(max(0, len(grey) - 1))
    flow: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    lengths = [np.linalg.norm(flow.calc(a, b, None), axis=-1).mean() for a, b in itertools.pairwise(grey)]
    return 100 * np.array(lengths, np.float64) / min(grey[0].shape)


def _least_window(motion: npt.NDArray[np.float64]) -> float:
    if len(motion) < _WINDOW:
        return float(_WINDOW * motion.mean())
    return float(np.convolve(motion, np.ones(_WINDOW), "valid").min())


def _largest_change(before: Frames, after: Frames) -> float:
    """The largest mean change of a block of 8x8 pixels: a small object that moves changes few of them a lot."""
    change = np.abs(after.astype(np.int16) - before)
    height, width = (max(8, size - size % 8) for size in change.shape)
    padded = np.pad(change, [(0, max(0, 8 - size)) for size in change.shape])[:height, :width]
    return float(padded.reshape(height // 8, 8, width // 8, 8).mean((1, 3)).max())
