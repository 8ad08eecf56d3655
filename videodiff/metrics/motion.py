"""How a clip moves: flicker, motion by optical flow, stillness, and how far it stays with its first frame.

Shapes: a clip is uint8 [T,H,W,3]; figures of changes are in grey levels, 0 to 255, those of motion in pixels or shares.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from videodiff.errors import UserError
from videodiff.metrics.flow import dense_flow, interpolate_by_flow
from videodiff.metrics.samples import Features, Floats, Pictures, matrix, pictures_of

_STILL = 3.0  # grey levels: what changes less on average over 8x8 pixels is noise of a codec


def flicker(clip: Pictures) -> float:
    """Mean absolute change from frame to frame: VBench's temporal flickering is 1 - this / 255 (Huang et al. 2024).

    Motion raises it too: it is a fault's figure only of scenes that stand still.
    """
    x = pictures_of(clip, "clip", 2)
    return float(np.mean([np.abs(b.astype(np.int16) - a).mean() for a, b in pairwise(x)]))


def unsteadiness(clip: Pictures) -> float:
    """The second difference along the motion: 2 |x[t] - the middle of x[t-1] and x[t+1] along their flow|, mean.

    Where nothing moves that is the plain second difference: 4a for a flicker of +-a, 0 for fades. Small for any even
    motion. The frame that is judged has no
    part in the flow. Raises UserError as `flow.dense_flow`.
    """
    x = pictures_of(clip, "clip", 3)
    around = zip(x[:-2], x[1:-1], x[2:], strict=True)
    changes = (interpolate_by_flow(a, b, 0.5).astype(np.int16) - middle for a, middle, b in around)
    return float(np.mean([2 * np.abs(change).mean() for change in changes]))


def motion_amount(clip: Pictures, fps: float) -> float:
    """Mean length of the flow, in shares of the frame's diagonal per second. UserError as `flow.dense_flow`."""
    _check_rate(fps)
    return float(np.mean([length.mean() for length in _lengths(clip)])) * fps / float(np.hypot(*clip.shape[1:3]))


def strongest_motion(clip: Pictures) -> Floats:
    """[T-1]: from each frame to the next, the mean length in pixels of the strongest 5 % of the flow, as in VBench."""
    strongest = []
    for length in _lengths(clip):
        ordered = np.sort(length, axis=None)
        strongest.append(ordered[-max(1, int(0.05 * ordered.size)) :].mean())
    return np.array(strongest, np.float64)


def is_dynamic(clip: Pictures, fps: float) -> bool:
    """Whether a clip moves, by VBench's rule: seen at about 8 frames a second, the strongest 5 % of the flow exceed
    6 pixels per 256 of the shorter side in a quarter of its frames or more, in one at least.

    VBench's flow is RAFT's and ours is DIS, which sees less of large motions of small things: compare with real clips.
    """
    _check_rate(fps)
    x = pictures_of(clip, "clip", 2)
    seen = x[:: max(1, round(fps / 8))]
    if len(seen) < 2:
        seen = x[[0, -1]]
    threshold = max(1.0, 8 / fps) * 6 * min(x.shape[1:3]) / 256
    return int((strongest_motion(seen) > threshold).sum()) >= max(1, round(len(seen) / 4))


def still(clip: Pictures) -> np.ndarray:
    """bool [T-1]: whether nothing changes from a frame to the next, in no block of 8x8 pixels by 3 grey levels.

    A static clip is still throughout; one that freezes, or repeats frames, in part: `still(clip).mean()` is its share.
    """
    x = pictures_of(clip, "clip", 2)
    return np.array([_largest_change(a, b) < _STILL for a, b in pairwise(x)])


@dataclass(frozen=True)
class Consistency:
    """Mean cosines of a clip's frames: with the frame before, and with the first one."""

    neighbours: float
    first: float

    @property
    def both(self) -> float:
        """Their mean: VBench's subject consistency (features of DINO) or background consistency (of CLIP)."""
        return (self.neighbours + self.first) / 2


def consistency(features: Features) -> Consistency:
    """Of the features [T,D] of a clip's frames, negative cosines counted as 0. UserError for one frame, or zeros."""
    x = matrix(features, "frames").double()
    if len(x) < 2 or not bool(x.any(1).all()):
        raise UserError(f"frames: {len(x)} rows of features; give at least two, none of them all zeros")
    x = torch.nn.functional.normalize(x, dim=1)
    before, first = ((x[1:] * other).sum(1).clamp(min=0).mean() for other in (x[:-1], x[:1]))
    return Consistency(float(before), float(first))


def _lengths(clip: Pictures) -> Iterable[np.ndarray]:
    x = pictures_of(clip, "clip", 2)
    return (np.linalg.norm(dense_flow(a, b), axis=-1) for a, b in pairwise(x))


def _largest_change(a: Pictures, b: Pictures) -> float:
    """The largest mean change of a block: a small object that moves changes few pixels a lot, a codec all a little."""
    change = np.abs(b.astype(np.int16) - a).mean(-1)
    padded = np.pad(change, [(0, -size % 8) for size in change.shape], mode="edge")
    return float(padded.reshape(padded.shape[0] // 8, 8, -1, 8).mean((1, 3)).max())


def _check_rate(fps: float) -> None:
    if not 0 < fps < float("inf"):
        raise UserError(f"fps {fps}: give the clip's frames per second, more than 0")
