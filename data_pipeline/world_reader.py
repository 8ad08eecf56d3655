"""Reads a video of the built-in world back: which attributes it shows, and how surely. For measuring alone.

Pure image analysis, wherever the video came from. Backgrounds are grey and objects are not, so the part of a pixel
without its grey, projected on that of the object's colour, tells how much of the pixel the object covers. Colour is its
hue; the cover, brought to a standard place and area, is compared with templates of each shape at each angle;
its area gives the size; what it leaves free is compared with each background.
T frames, S frame side in pixels, N templates, P patch side.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_pipeline.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, render_background, shape_distance
from data_pipeline.world_motion import read_motion
from videodiff.errors import UserError

LEAST_CHROMA = 0.22  # weakest object, max - min of RGB in 0..1; the world's colours have 0.55 to 0.86
LEAST_AREA, MOST_AREA = 0.012, 0.62  # of the frame
HUE_LIMIT = 20.0  # degrees from a named hue
GROUND_LIMIT = 0.11  # root mean square difference from a background
SHAPE_LIMIT = 0.16  # squared difference of cover and template, relative to the template
LEAST_SHAPE_CONFIDENCE = 0.3  # below it a blob may be any of several shapes
SIZE_LIMIT = 0.5 * float(np.log(SIZES["large"] / SIZES["small"]))
PATCH, PATCH_HALF = 24, 1.05  # P, and half its side in units of sqrt(area)
ANGLE_STEP = 3.0
SYMMETRY = {"circle": 0.0, "square": 90.0, "triangle": 120.0, "cross": 90.0}  # degrees
BLURS = (0.0, 0.06, 0.12)  # standard deviations of the templates' blurs in units of sqrt(area)


@dataclass(frozen=True)
class Attribute:
    """What was read, None where nothing clear is there, and a confidence in 0..1."""

    value: str | None = None
    confidence: float = 0.0


@dataclass(frozen=True)
class FrameReading:
    """One picture: attributes, centre (x, y) and diameter in fractions of the side (nan without a clear object)."""

    colour: Attribute
    shape: Attribute
    size: Attribute
    background: Attribute
    x: float
    y: float
    diameter: float
    angle: float


@dataclass(frozen=True)
class Reading:
    """One video. `consistent`: each frame shows the object, with the same colour, shape and background."""

    colour: Attribute
    shape: Attribute
    size: Attribute
    background: Attribute
    motion: Attribute
    consistent: bool

    def values(self) -> dict[str, str | None]:
        """Attribute name -> value, in the order of ATTRIBUTES."""
        names = ("colour", "shape", "size", "background", "motion")
        return {name: getattr(self, name).value for name in names}


@dataclass(frozen=True)
class _Templates:
    flat: np.ndarray  # [N, P*P]
    norm: np.ndarray  # [N] squared
    shape: np.ndarray  # [N] index into SHAPES
    angle: np.ndarray  # [N] degrees
    area: dict[str, float]  # of the shape with diameter 1


@lru_cache(maxsize=1)
def _templates() -> _Templates:
    """Cover of each shape with area 1 around its centroid, at each angle of its symmetry and each blur."""
    fine = (np.arange(1024) + 0.5) / 512 - 1
    area = {s: float((shape_distance(s, fine[None, :], fine[:, None], 1.0) < 0).mean() * 4) for s in SHAPES}
    step = 2 * PATCH_HALF / PATCH
    grid = (np.arange(PATCH) + 0.5) * step - PATCH_HALF
    kernels = [np.exp(-0.5 * ((grid[:, None] - grid[None, :]) / max(blur, 1e-6)) ** 2) for blur in BLURS]
    kernels = [kernel / kernel.sum(1).max() for kernel in kernels]
    x, y = np.broadcast_arrays(grid[None, :], grid[:, None])
    flat, shapes, angles = [], [], []
    for index, shape in enumerate(SHAPES):
        for degrees in np.arange(0.0, max(SYMMETRY[shape], 1.0), ANGLE_STEP):
            cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
            distance = shape_distance(shape, cos * x + sin * y, cos * y - sin * x, 1 / np.sqrt(area[shape]))
            cover = np.clip(0.5 - distance / step, 0, 1)
            for kernel in kernels:
                flat.append((kernel @ cover @ kernel).ravel())
                shapes.append(index)
                angles.append(degrees)
    table = np.array(flat, np.float32)
    return _Templates(table, (table**2).sum(1), np.array(shapes), np.array(angles), area)


HUES = np.array([360 * colorsys.rgb_to_hsv(*(v / 255 for v in rgb))[0] for rgb in COLOURS.values()])


def _colour(rgb: np.ndarray) -> Attribute:
    """The nearest named hue to a mean colour (floats in 0..1), surer the nearer it is."""
    hue = 360 * colorsys.rgb_to_hsv(*(float(v) for v in rgb))[0]
    away = np.abs((hue - HUES + 180) % 360 - 180)
    best = int(away.argmin())
    confidence = 1 - away[best] / HUE_LIMIT
    return Attribute(tuple(COLOURS)[best], float(confidence)) if confidence > 0 else Attribute()


def read_background(frame: np.ndarray, free: np.ndarray) -> Attribute:
    """The background nearest to the free pixels of a frame [3,S,S]; None if these are coloured or none is near."""
    if free.mean() < 0.03:
        return Attribute()
    pixels = frame[:, free]
    if float(chroma_of(pixels).mean()) > 0.12:
        return Attribute()
    grey = (pixels[0] + pixels[1] + pixels[2]) / 3
    away = np.array([np.sqrt(np.mean((grey - _ground(name, frame.shape[1])[free]) ** 2)) for name in BACKGROUNDS])
    best = int(away.argmin())
    confidence = 1 - float(away[best]) / GROUND_LIMIT
    return Attribute(BACKGROUNDS[best], confidence) if confidence > 0 else Attribute()


@lru_cache(maxsize=16)
def _ground(name: str, size: int) -> np.ndarray:
    return render_background(name, size)


def spread(mask: np.ndarray, pixels: int) -> np.ndarray:
    """A mask [S,S] made wider by `pixels` on each side (a square window, through running sums)."""
    sums = mask.astype(np.int32)
    for axis in (0, 1):
        length = mask.shape[axis]
        padding = [(pixels + 1, pixels) if a == axis else (0, 0) for a in (0, 1)]
        total = np.cumsum(np.pad(sums, padding), axis=axis)
        upper = total.take(range(2 * pixels + 1, 2 * pixels + 1 + length), axis=axis)
        sums = upper - total.take(range(length), axis=axis)
    return sums > 0


def chroma_of(frame: np.ndarray) -> np.ndarray:
    """Greatest minus least channel of [3,...]; 0 for a grey."""
    r, g, b = frame
    return np.maximum(np.maximum(r, g), b) - np.minimum(np.minimum(r, g), b)


def _cover(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(cover [S,S] in 0..1, mean colour) of the object in a frame [3,S,S], or None where there is no coloured one."""
    chroma = chroma_of(frame)
    levels = np.bincount((255 * chroma + 0.5).astype(np.uint8).ravel(), minlength=256)
    # The smallest object covers 4 % of the frame: the 99th percentile lies well inside it.
    reference = int(np.searchsorted(np.cumsum(levels), 0.99 * chroma.size)) / 255
    if reference < LEAST_CHROMA:
        return None
    core = chroma > 0.7 * reference
    rgb = frame[:, core].mean(1)
    if rgb.max() - rgb.min() < 0.8 * chroma[core].mean():  # many hues at once: noise, or no single object
        return None
    direction = rgb - rgb.mean()
    weight = direction / (direction @ direction)  # it has no grey in it
    cover = weight[0] * frame[0] + weight[1] * frame[1] + weight[2] * frame[2]
    near = spread(cover > 0.4, 3 + frame.shape[1] // 16)  # leaves out the noise of pixels far from the object
    return np.clip(cover, 0, 1) * ((cover > 0.1) & near), rgb


def _patch(cover: np.ndarray, x: float, y: float, side: float) -> np.ndarray:
    """The cover around (x, y), in pixels, bilinearly at the templates' points; `side` is sqrt(area) in pixels."""
    grid = ((np.arange(PATCH) + 0.5) / PATCH * 2 - 1) * PATCH_HALF * side
    size = len(cover)
    weights = [np.maximum(0, 1 - np.abs(np.arange(size) + 0.5 - (c + grid)[:, None])) for c in (x, y)]
    across, down = (w.astype(np.float32) for w in weights)
    return (down @ cover @ across.T).ravel()


def _shape(patch: np.ndarray) -> tuple[Attribute, float]:
    """The shape whose template is nearest, and its angle. Sure where it is near and all other shapes are far."""
    table = _templates()
    away = 1 + (patch @ patch - 2 * table.flat @ patch) / table.norm
    nearest = np.array([away[table.shape == index].min() for index in range(len(SHAPES))])
    order = nearest.argsort()
    best, second = nearest[order[0]], nearest[order[1]]
    confidence = float(min(1 - best / SHAPE_LIMIT, 1.0) * min(1.0, 2 * (1 - best / second)))
    row = int(np.where(table.shape == order[0], away, np.inf).argmin())
    if confidence < LEAST_SHAPE_CONFIDENCE:
        return Attribute(), float("nan")
    return Attribute(SHAPES[order[0]], confidence), float(table.angle[row])


def _size(diameter: float) -> Attribute:
    """The size whose diameter is nearest (by ratio); None beyond half way to the other, on both sides."""
    away = {name: abs(float(np.log(diameter / d))) for name, d in SIZES.items()}
    name = min(away, key=lambda n: away[n])
    confidence = 1 - away[name] / SIZE_LIMIT
    return Attribute(name, confidence) if confidence > 0 else Attribute()


@dataclass(frozen=True)
class ObjectReading:
    """The coloured object of a picture: its place in fractions of the side, diameter and angle (degrees) nan without a
    clear shape, and how much of each pixel it covers [S,S]."""

    colour: Attribute
    shape: Attribute
    x: float
    y: float
    diameter: float
    angle: float
    cover: np.ndarray

    @property
    def ground(self) -> np.ndarray:
        """The pixels [S,S] that it leaves free, with some distance."""
        return ~spread(self.cover > 0.15, max(2, len(self.cover) // 32))


def as_planes(pixels: np.ndarray) -> np.ndarray:
    """A picture uint8 [S,S,3] as floats in 0..1, [3,S,S]."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32) / 255


def read_object(frame: np.ndarray) -> ObjectReading | None:
    """What is coloured in a frame [3,S,S] of floats in 0..1, taken as one object; None where nothing is. Without a
    place where it is too small or too large for an object."""
    found = _cover(frame)
    if found is None:
        return None
    cover, rgb = found
    size, none, nan = len(cover), Attribute(), float("nan")
    area = float(cover.sum())
    if not LEAST_AREA < area / size**2 < MOST_AREA:
        return ObjectReading(none, none, nan, nan, nan, nan, cover)
    centre = np.arange(size, dtype=np.float32) + 0.5
    x, y = float(cover.sum(0) @ centre) / area, float(cover.sum(1) @ centre) / area
    shape, angle = _shape(_patch(cover, x, y, area**0.5))
    diameter = nan if shape.value is None else float(np.sqrt(area / _templates().area[shape.value])) / size
    return ObjectReading(_colour(rgb), shape, x / size, y / size, diameter, angle, cover)


def _read_frame(pixels: np.ndarray) -> FrameReading:
    frame = as_planes(pixels)
    none, nan = Attribute(), float("nan")
    found = read_object(frame)
    if found is None:
        background = read_background(frame, np.ones(frame.shape[1:], bool))
        return FrameReading(none, none, none, background, nan, nan, nan, nan)
    size = _size(found.diameter) if found.shape.value is not None else none
    background = read_background(frame, found.ground)
    where = (found.x, found.y, found.diameter, found.angle)
    return FrameReading(found.colour, found.shape, size, background, *where)


def read_image(frame: np.ndarray) -> FrameReading:
    """Reads one square picture, uint8 [S,S,3]."""
    return per_frame(frame[None])[0]


def per_frame(frames: np.ndarray) -> list[FrameReading]:
    """Reads each frame of uint8 [T,S,S,3] by itself."""
    check_frames(frames)
    return [_read_frame(frame) for frame in frames]


def check_frames(frames: np.ndarray) -> None:
    """UserError unless these are uint8 [T,S,S,3]."""
    if frames.ndim != 4 or frames.dtype != np.uint8 or frames.shape[1] != frames.shape[2] or frames.shape[3] != 3:
        raise UserError(
            f"the reader cannot read an array {frames.dtype} {list(frames.shape)}: give uint8 [frames, side, side, 3]"
        )


def vote(attributes: list[Attribute]) -> Attribute:
    """The value with the greatest total confidence; its confidence is the mean over all frames."""
    totals: dict[str, float] = {}
    for attribute in attributes:
        if attribute.value is not None:
            totals[attribute.value] = totals.get(attribute.value, 0.0) + attribute.confidence
    if not totals:
        return Attribute()
    best = max(totals, key=lambda value: totals[value])
    return Attribute(best, totals[best] / len(attributes))


def read(frames: np.ndarray) -> Reading:
    """Reads a video, uint8 [T,S,S,3], about 8 to 31 frames of 64 pixels or more. Size is that of the first frame."""
    each = per_frame(frames)
    colour, shape, background = (vote([getattr(f, n) for f in each]) for n in ("colour", "shape", "background"))
    consistent = all(
        f.colour.value == colour.value is not None
        and f.shape.value == shape.value is not None
        and f.background.value == background.value is not None
        for f in each
    )
    clear = np.array([f.shape.value is not None and f.shape.value == shape.value for f in each])
    motion = Attribute()
    if clear.mean() >= 0.8 and len(each) >= 4:
        path = np.array([[f.x, f.y, f.diameter, f.angle] for f in each])
        motion = Attribute(*read_motion(path[clear], np.flatnonzero(clear), SYMMETRY[shape.value or "circle"]))
    return Reading(colour, shape, each[0].size, background, motion, consistent)
