"""Reads a video of the built-in world with two objects back. For measuring alone.

The objects have unequal colours, and grey mixed into a colour leaves its hue: so the hue of a pixel tells which object
it is of. Each is then read as if it were alone (world_reader.py), the other one's pixels turned grey.
T frames, S frame side in pixels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from data_pipeline.world import COLOURS
from data_pipeline.world_motion import read_motion
from data_pipeline.world_reader import (
    HUE_LIMIT,
    HUES,
    LEAST_AREA,
    LEAST_CHROMA,
    SYMMETRY,
    Attribute,
    ObjectReading,
    as_planes,
    check_frames,
    chroma_of,
    read_background,
    read_object,
    spread,
    vote,
)
from data_pipeline.world_two import RELATIONS, TwoCombination

COLOURED = 0.4  # of the frame's strongest chroma: pixels that count as an object's
OTHER_HUES = 0.15  # of the coloured pixels that may have neither object's hue
MOVING_CLEAR = 0.8  # of the frames, at least, must show an object clearly for its motion to be read


@dataclass(frozen=True)
class TwoReading:
    """One video or picture: colour, shape and motion of each object, where the first lies from the other in the first
    frame, the background. `consistent`: each frame shows both, with the same colours, shapes and background."""

    objects: tuple[dict[str, str | None], dict[str, str | None]]
    relation: str | None
    background: str | None
    consistent: bool

    def values(self, asked: TwoCombination) -> dict[str, str | None]:
        """Attribute name -> value, in the order of TWO_ATTRIBUTES. Which object is the first is told by the colours
        asked for; where these don't tell, by all else."""
        one, other = self.objects
        turned = None if self.relation is None else RELATIONS[self.relation]
        ways = [self._named(one, self.relation, other), self._named(other, turned, one)]

        def found(way: dict[str, str | None]) -> tuple[int, int]:
            right = [name for name, value in way.items() if value == getattr(asked, name)]
            return sum(name.endswith("colour") for name in right), len(right)

        return max(ways, key=found)

    def _named(
        self, one: dict[str, str | None], relation: str | None, other: dict[str, str | None]
    ) -> dict[str, str | None]:
        others = {f"other_{name}": value for name, value in other.items()}
        return {**one, "relation": relation, **others, "background": self.background}


def _nearest_hue(frame: np.ndarray) -> np.ndarray:
    """Of each pixel of [3,S,S] the index of the named colour whose hue is near; -1 where none is."""
    r, g, b = frame
    # HSV's hue, in sixths of a turn.
    strongest, chroma = frame.argmax(0), np.maximum(chroma_of(frame), 1e-6)
    sixth = np.choose(strongest, [((g - b) / chroma) % 6, (b - r) / chroma + 2, (r - g) / chroma + 4])
    away = np.abs((60 * sixth[..., None] - HUES + 180) % 360 - 180)
    return np.where(away.min(-1) < HUE_LIMIT, away.argmin(-1), -1)


def _objects(frame: np.ndarray) -> tuple[ObjectReading, ObjectReading] | None:
    """Both objects of a frame [3,S,S], in the order of COLOURS; None unless there are just two colours."""
    chroma = chroma_of(frame)
    strongest = float(np.quantile(chroma, 0.98))
    if strongest < LEAST_CHROMA:
        return None
    coloured, hue = chroma > COLOURED * strongest, _nearest_hue(frame)
    areas = np.array([(coloured & (hue == index)).sum() for index in range(len(COLOURS))])
    chosen = sorted(int(index) for index in areas.argsort()[-2:])
    few = 0.5 * LEAST_AREA * frame.shape[1] ** 2
    if areas[chosen].min() < few or coloured.sum() - areas[chosen].sum() > OTHER_HUES * coloured.sum():
        return None
    masks = [coloured & (hue == index) for index in chosen]
    found = []
    for own, other in (masks, masks[::-1]):
        hidden = spread(other, max(1, frame.shape[1] // 32)) & ~own
        found.append(read_object(np.where(hidden, frame.mean(0), frame)))
    one, two = found
    return None if one is None or two is None else (one, two)


def _relation(one: ObjectReading, other: ObjectReading) -> str | None:
    """Where the first lies, seen from the other."""
    across, down = one.x - other.x, one.y - other.y
    if not np.isfinite(across + down):
        return None
    if abs(across) > abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def read_two(frames: np.ndarray) -> TwoReading:
    """Reads a video or a picture, uint8 [T,S,S,3]; motion from 4 frames on, of which those of a second or more show one
    plainly: in less, objects that move by so little seem to stand still."""
    check_frames(frames)
    planes = [as_planes(frame) for frame in frames]
    seen = [_objects(frame) for frame in planes]
    grounds = []
    for frame, pair in zip(planes, seen, strict=True):
        free = np.ones(frame.shape[1:], bool) if pair is None else pair[0].ground & pair[1].ground
        grounds.append(read_background(frame, free))
    background = vote(grounds)
    counts = Counter((a.colour.value, b.colour.value) for a, b in filter(None, seen))
    colours = counts.most_common(1)[0][0] if counts else (None, None)
    # A frame with other colours shows other objects.
    same = [p if p is not None and (p[0].colour.value, p[1].colour.value) == colours else None for p in seen]
    objects = []
    consistent = background.value is not None and all(ground.value == background.value for ground in grounds)
    consistent = consistent and all(pair is not None for pair in same)
    for place in (0, 1):
        track = [None if pair is None else pair[place] for pair in same]
        shape = vote([Attribute() if each is None else each.shape for each in track]).value
        clear = np.array([each is not None and each.shape.value == shape is not None for each in track])
        consistent = consistent and bool(clear.all())
        motion = None
        if clear.mean() >= MOVING_CLEAR and len(track) >= 4:
            path = [(e.x, e.y, e.diameter, e.angle) for e, good in zip(track, clear, strict=True) if e and good]
            motion, _ = read_motion(np.array(path), np.flatnonzero(clear), SYMMETRY[shape or "circle"])
        objects.append({"colour": colours[place], "shape": shape, "motion": motion})
    relation = _relation(*same[0]) if same[0] is not None else None
    return TwoReading((objects[0], objects[1]), relation, background.value, consistent)
