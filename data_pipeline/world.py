"""The built-in world: short clips of one coloured shape that moves over a grey background.

Positions are fractions of the frame side, x to the right and y downwards, so a scene has no resolution. Time is in
seconds: every second frame of a clip of 31 frames at 16 fps makes the clip of 16 frames at 8 fps. Everything random
follows from a key of integers and words, never from a global generator.
T frames, S frame side in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from typing import Any, Literal

import numpy as np

from videodiff.errors import UserError

EDITION = 2  # of what is drawn and said: data of another one are other data

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (228, 30, 30),
    "green": (30, 170, 50),
    "blue": (30, 70, 230),
    "yellow": (240, 215, 20),
    "purple": (165, 45, 205),
    "cyan": (20, 200, 215),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES: dict[str, float] = {"small": 20 / 64, "large": 32 / 64}  # diameter in the first frame
BACKGROUNDS = ("white", "black", "gradient", "checker")
MOTIONS = ("still", "left", "right", "up", "down", "growing", "diagonal", "circling")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "background": BACKGROUNDS,
    "motion": MOTIONS,
}

# No training clip shows these together, whatever the other attributes are.
HELD_OUT_PAIRS: tuple[tuple[tuple[str, str], tuple[str, str]], ...] = (
    (("colour", "red"), ("shape", "triangle")),
    (("colour", "blue"), ("shape", "cross")),
    (("colour", "yellow"), ("shape", "circle")),
    (("shape", "square"), ("motion", "circling")),
    (("shape", "triangle"), ("motion", "down")),
    (("shape", "cross"), ("motion", "growing")),
)

FULL_MOTION_SECONDS = 1.875  # a motion runs its whole path in this time, or in the clip's where the clip is longer
TRAVEL = 0.4  # of the frame side
DIAGONAL_TRAVEL = 0.3  # upwards, and as far to the right
GROWTH = 1.6  # last diameter / first diameter
ORBIT_RADIUS = 0.2  # one whole clockwise round, starting at the top
MARGIN = 0.02
GRADIENT = (0.2, 0.8)  # grey at the top and at the bottom
CHECKER = (0.35, 0.65)
CHECKER_CELLS = 8

SQUARE_HALF = 0.44  # these in units of the diameter
TRIANGLE_INRADIUS = 0.29
CROSS_LENGTH, CROSS_WIDTH = 0.5, 0.17
# Reach of each shape from its centre: left, right, up, down.
REACH = {
    "circle": (0.5, 0.5, 0.5, 0.5),
    "square": (SQUARE_HALF,) * 4,
    "triangle": (0.5023, 0.5023, 2 * TRIANGLE_INRADIUS, TRIANGLE_INRADIUS),
    "cross": (CROSS_LENGTH,) * 4,
}

Split = Literal["train", "held_out", "held_out_pair"]


@dataclass(frozen=True)
class Combination:
    """One value of each attribute (the keys of ATTRIBUTES)."""

    colour: str
    shape: str
    size: str
    background: str
    motion: str

    def __post_init__(self) -> None:
        for name, values in ATTRIBUTES.items():
            if getattr(self, name) not in values:
                raise UserError(f"{name} {getattr(self, name)!r} is not in the built-in world: use one of {values}")


@dataclass(frozen=True)
class Scene(Combination):
    """A combination with the centre of its object in the first frame, in fractions of the frame side."""

    x: float
    y: float

    @property
    def combination(self) -> Combination:
        return Combination(self.colour, self.shape, self.size, self.background, self.motion)


@dataclass(frozen=True)
class Moving:
    """One object: its diameter and centre in the first frame, in fractions of the frame side, and how far it goes, as a
    multiple of its motion's whole way."""

    colour: str
    shape: str
    motion: str
    diameter: float
    x: float
    y: float
    travel: float = 1.0


@dataclass(frozen=True)
class RenderedClip:
    """A training clip: frames uint8 [T,S,S,3], captions in different wordings, meta with the truth."""

    key: str
    frames: np.ndarray
    captions: list[str]
    meta: dict[str, Any]


def rng(*key: int | str) -> np.random.Generator:
    """A generator that depends on `key` alone, the same on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


@lru_cache(maxsize=1)
def _combinations() -> tuple[Combination, ...]:
    return tuple(Combination(*values) for values in product(*ATTRIBUTES.values()))


def combinations() -> list[Combination]:
    """All combinations; every one of them can be seen."""
    return list(_combinations())


def split(combination: Combination) -> Split:
    """Where a combination belongs. Rule: a held-out pair first; of the others a tenth, by a hash of its words."""
    for (first, a), (second, b) in HELD_OUT_PAIRS:
        if getattr(combination, first) == a and getattr(combination, second) == b:
            return "held_out_pair"
    words = " ".join(getattr(combination, name) for name in ATTRIBUTES)
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return "held_out" if int.from_bytes(digest, "little") % 10 == 0 else "train"


def held_out(combination: Combination) -> bool:
    """True if no training clip shows this combination."""
    return split(combination) != "train"


@lru_cache(maxsize=1)
def _balanced_train() -> tuple[tuple[Combination, ...], np.ndarray]:
    """The training combinations and their cumulative probabilities, under which each attribute's values are equally
    frequent (iterative proportional fitting, Deming & Stephan 1940)."""
    train = tuple(c for c in _combinations() if split(c) == "train")
    codes = {name: np.array([v.index(getattr(c, name)) for c in train]) for name, v in ATTRIBUTES.items()}
    weights = np.ones(len(train))
    for _ in range(50):
        for name, values in ATTRIBUTES.items():
            share = np.bincount(codes[name], weights, minlength=len(values))
            weights /= share[codes[name]]
    return train, np.cumsum(weights / weights.sum())


def draw_train(generator: np.random.Generator) -> Combination:
    """A training combination; over many draws every value of an attribute is equally frequent."""
    train, cumulative = _balanced_train()
    return train[min(int(np.searchsorted(cumulative, generator.random(), side="right")), len(train) - 1)]


def path(motion: str, progress: np.ndarray, travel: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets dx, dy from the start, `travel` times as far, and scale at `progress` 0..1, each of its shape."""
    zero = np.zeros_like(progress)
    dx, dy, scale = zero, zero, zero + 1
    if motion in ("left", "right"):
        dx = progress * (TRAVEL if motion == "right" else -TRAVEL)
    elif motion in ("up", "down"):
        dy = progress * (TRAVEL if motion == "down" else -TRAVEL)
    elif motion == "diagonal":
        dx, dy = DIAGONAL_TRAVEL * progress, -DIAGONAL_TRAVEL * progress
    elif motion == "growing":
        scale = 1 + (GROWTH - 1) * progress
    elif motion == "circling":
        turn = 2 * np.pi * progress
        dx, dy = ORBIT_RADIUS * np.sin(turn), ORBIT_RADIUS * (1 - np.cos(turn))
    return travel * dx, travel * dy, scale


def sample_scene(combination: Combination, *key: int | str) -> Scene:
    """A scene of `combination` whose start is uniform among those from which the object never leaves the frame."""
    generator = rng("scene", *key)
    across, down = room(combination.shape, combination.motion, SIZES[combination.size])
    x, y = generator.uniform(*across), generator.uniform(*down)
    return Scene(**asdict(combination), x=float(x), y=float(y))


def room(shape: str, motion: str, diameter: float, travel: float = 1.0) -> tuple[tuple[float, float], ...]:
    """The least and the greatest x, and y, from which an object never leaves the frame."""
    dx, dy, scale = path(motion, np.linspace(0, 1, 33), travel)  # 33 points hit the orbit's extremes
    left, right, up, down = (diameter * scale * r for r in REACH[shape])
    return (
        (MARGIN - (dx - left).min(), 1 - MARGIN - (dx + right).max()),
        (MARGIN - (dy - up).min(), 1 - MARGIN - (dy + down).max()),
    )


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray, diameter: np.ndarray | float) -> np.ndarray:
    """Signed distance (negative inside) to the shape around the origin, in the units of x, y and diameter."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - diameter / 2
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - SQUARE_HALF * diameter
    if shape == "triangle":  # three half planes; only outside its corners does this differ from the true distance
        return np.maximum(y, 0.8660254 * np.abs(x) - 0.5 * y) - TRIANGLE_INRADIUS * diameter
    x, y = np.abs(x), np.abs(y)
    long, wide = np.maximum(x, y), np.minimum(x, y)
    return np.maximum(long - CROSS_LENGTH * diameter, wide - CROSS_WIDTH * diameter)


def render_background(background: str, size: int) -> np.ndarray:
    """Greys in 0..1, float32 [S,S]."""
    centre = (np.arange(size, dtype=np.float32) + 0.5) / size
    if background == "white":
        return np.ones((size, size), np.float32)
    if background == "black":
        return np.zeros((size, size), np.float32)
    if background == "gradient":
        low, high = GRADIENT
        return np.repeat((low + (high - low) * centre)[:, None], size, axis=1)
    # A triangle wave through the cells' edges, clipped at half a pixel on each side of them, is anti-aliased.
    within = centre * CHECKER_CELLS
    edge = np.abs((within + 0.5) % 1 - 0.5) * size / CHECKER_CELLS
    sign = np.where(np.floor(within) % 2 == 0, 1, -1) * np.clip(2 * edge, 0, 1)
    low, high = CHECKER
    return ((low + high) / 2 + (high - low) / 2 * sign[:, None] * sign[None, :]).astype(np.float32)


def render(scene: Scene, size: int, num_frames: int, fps: float) -> np.ndarray:
    """Frames uint8 [T,S,S,3] of a scene."""
    moving = Moving(scene.colour, scene.shape, scene.motion, SIZES[scene.size], scene.x, scene.y)
    return draw([moving], scene.background, size, num_frames, fps)


def draw(objects: Sequence[Moving], background: str, size: int, num_frames: int, fps: float) -> np.ndarray:
    """Frames uint8 [T,S,S,3] of objects on a background, later ones in front. Clips shorter than FULL_MOTION_SECONDS
    show the beginning of the motion, longer ones a slower motion: so it never leaves the frame."""
    if size < 16 or num_frames < 1 or not fps > 0:
        raise UserError(
            f"cannot render size={size}, num_frames={num_frames}, fps={fps}: "
            "use at least 16 pixels, 1 frame and fps above 0"
        )
    seconds = np.arange(num_frames) / fps
    progress = seconds / max(FULL_MOTION_SECONDS, float(seconds[-1]))
    centre = (np.arange(size, dtype=np.float32) + 0.5) / size
    ground = 255 * render_background(background, size)[None, :, :, None]
    picture = np.broadcast_to(ground, (num_frames, size, size, 3))
    for each in objects:
        dx, dy, scale = (a.astype(np.float32)[:, None, None] for a in path(each.motion, progress, each.travel))
        x = centre[None, None, :] - (np.float32(each.x) + dx)
        y = centre[None, :, None] - (np.float32(each.y) + dy)
        distance = shape_distance(each.shape, x, y, np.float32(each.diameter) * scale)
        cover = np.clip(0.5 - distance * size, 0, 1)[..., None]
        picture = picture + cover * (np.array(COLOURS[each.colour], np.float32) - picture)
    return (picture + 0.5).astype(np.uint8)


def render_clip(
    seed: int, number: int, size: int, num_frames: int, fps: float, motion_captions: int = 0
) -> RenderedClip:
    """Training clip `number` of the world `seed`: depends on nothing else. Of `motion_captions` of its captions
    the motion alone is true."""
    from data_pipeline.world_captions import training_captions  # here, as that module builds on this one

    generator = rng("clip", seed, number)
    scene = sample_scene(draw_train(generator), seed, number)
    captions = training_captions(scene.combination, generator, motion_captions)
    key = f"world-{seed}-{number:08d}"
    meta = {"scene": asdict(scene), "seed": seed, "number": number, "fps": fps}
    return RenderedClip(key, render(scene, size, num_frames, fps), captions, meta)


def clips(num_clips: int, seed: int, size: int, num_frames: int, fps: float) -> Iterator[RenderedClip]:
    """The first `num_clips` training clips of the world `seed`: only training combinations, each attribute balanced."""
    for number in range(num_clips):
        yield render_clip(seed, number, size, num_frames, fps)
