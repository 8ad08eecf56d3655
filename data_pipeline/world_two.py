"""The built-in world with two objects, each moving its own way: "a red circle left of a green square".

A second set, beside that of one object (world.py), for what one object can't tell: whether a model gives each object
its own colour, shape and motion, and puts them where the prompt says.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

import numpy as np

from data_pipeline.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_PAIRS,
    REACH,
    SHAPES,
    Moving,
    RenderedClip,
    Split,
    draw,
    path,
    rng,
    room,
)
from videodiff.errors import UserError

# Where the first object named lies, seen from the other one, in the first frame -> its opposite.
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MOTIONS = ("still", "left", "right", "up", "down", "growing")  # the others leave no room for a second object
DIAMETER = 18 / 64  # of both in the first frame
TRAVEL = 0.4  # of a motion's way with one object
GAP = 3 / 64  # between the objects' boxes, at MOMENTS moments of their way
MOMENTS = 17
SLANT = 1.5  # the way from one to the other along the relation, over the way across it: at least
CANDIDATES, ATTEMPTS = 4096, 256  # two triangles that grow side by side have room in one of 20,000

TWO_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "relation": tuple(RELATIONS),
    "other_colour": tuple(COLOURS),
    "other_shape": SHAPES,
    "other_motion": MOTIONS,
    "background": BACKGROUNDS,
}


@dataclass(frozen=True)
class TwoCombination:
    """One value of each attribute (the keys of TWO_ATTRIBUTES), of the object named first and of the other."""

    colour: str
    shape: str
    motion: str
    relation: str
    other_colour: str
    other_shape: str
    other_motion: str
    background: str

    def __post_init__(self) -> None:
        for name, values in TWO_ATTRIBUTES.items():
            if getattr(self, name) not in values:
                raise UserError(f"{name} {getattr(self, name)!r} is not in the world of two objects: use {values}")
        if self.colour == self.other_colour:
            raise UserError(f"two {self.colour} objects: they can't be told apart; give them unequal colours")

    def turned(self) -> TwoCombination:
        """The same scene with the other object named first."""
        one, other = ((self.colour, self.shape, self.motion), (self.other_colour, self.other_shape, self.other_motion))
        return TwoCombination(*other, RELATIONS[self.relation], *one, self.background)

    def canonical(self) -> TwoCombination:
        """The same scene, named from the left or from above."""
        return self if self.relation in ("left of", "above") else self.turned()


@dataclass(frozen=True)
class TwoScene:
    """A combination with the centres of both objects in the first frame, in fractions of the frame side."""

    combination: TwoCombination
    x: float
    y: float
    other_x: float
    other_y: float

    def objects(self) -> tuple[Moving, Moving]:
        """The object that is named first, and the other one."""
        c = self.combination
        return (
            Moving(c.colour, c.shape, c.motion, DIAMETER, self.x, self.y, TRAVEL),
            Moving(c.other_colour, c.other_shape, c.other_motion, DIAMETER, self.other_x, self.other_y, TRAVEL),
        )


def _is_held_out_pair(colour: str, shape: str, motion: str) -> bool:
    named = {("colour", colour), ("shape", shape), ("motion", motion)}
    return any({*pair} <= named for pair in HELD_OUT_PAIRS)


def split(combination: TwoCombination) -> Split:
    """Where a combination belongs, whichever object is named first. Rule: "held_out_pair" if either object shows one of
    HELD_OUT_PAIRS, as with one object; else "held_out" for a tenth of the looks (both colours, shapes and where they
    lie)."""
    c = combination.canonical()
    if _is_held_out_pair(c.colour, c.shape, c.motion) or _is_held_out_pair(
        c.other_colour, c.other_shape, c.other_motion
    ):
        return "held_out_pair"
    words = " ".join((c.colour, c.shape, c.relation, c.other_colour, c.other_shape))
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return "held_out" if int.from_bytes(digest, "little") % 10 == 0 else "train"


def draw_of(which: Split, generator: np.random.Generator) -> TwoCombination:
    """A combination of that split: uniform over all of them, as either object may be named first."""
    for _ in range(10000):
        drawn = {name: values[int(generator.integers(len(values)))] for name, values in TWO_ATTRIBUTES.items()}
        if drawn["colour"] != drawn["other_colour"] and split(found := TwoCombination(**drawn)) == which:
            return found
    raise AssertionError(f"no combination of {which} in 10000 draws")


def sample_scene(combination: TwoCombination, *key: int | str) -> TwoScene:
    """A scene of `combination`: starts uniform among those where both stay in the frame and never come nearer than GAP,
    and the relation is plain in the first frame."""
    generator = rng("two objects", *key)
    c = combination.canonical()
    objects = ((c.shape, c.motion), (c.other_shape, c.other_motion))
    rooms = [room(shape, motion, DIAMETER, TRAVEL) for shape, motion in objects]
    for _ in range(ATTEMPTS):
        starts = np.stack([[generator.uniform(*side, CANDIDATES) for side in sides] for sides in rooms])  # [2,2,N]
        across, down = starts[1] - starts[0]
        along, aside = (across, down) if c.relation == "left of" else (down, across)
        good = (along > SLANT * np.abs(aside)) & _apart(objects, starts)
        if good.any():
            (x, y), (other_x, other_y) = starts[:, :, int(good.argmax())].tolist()
            if c != combination:
                (x, y), (other_x, other_y) = (other_x, other_y), (x, y)
            return TwoScene(combination, x, y, other_x, other_y)
    raise AssertionError(f"no room for {combination}")


def _apart(objects: tuple[tuple[str, str], ...], starts: np.ndarray) -> np.ndarray:
    """Whether the boxes of two objects with these starts [2,2,N] stay GAP apart: [N]."""
    boxes = []
    for (shape, motion), (x, y) in zip(objects, starts, strict=True):
        dx, dy, scale = (a[:, None] for a in path(motion, np.linspace(0, 1, MOMENTS), TRAVEL))
        left, right, up, down = (DIAMETER * scale * r for r in REACH[shape])
        boxes.append((x + dx - left, x + dx + right, y + dy - up, y + dy + down))  # each [17,N]
    (left, right, top, bottom), (other_left, other_right, other_top, other_bottom) = boxes
    between = np.stack([other_left - right, left - other_right, other_top - bottom, top - other_bottom])
    return (between.max(0) >= GAP).all(0)


def render(scene: TwoScene, size: int, num_frames: int, fps: float) -> np.ndarray:
    """Frames uint8 [T,S,S,3] of a scene."""
    return draw(scene.objects(), scene.combination.background, size, num_frames, fps)


def render_clip(seed: int, number: int, size: int, num_frames: int, fps: float) -> RenderedClip:
    """Training clip `number` of the world `seed`: depends on nothing else."""
    from data_pipeline.world_two_captions import (  # here, as that module builds on this one
        training_captions,
        wrong_captions,
    )

    generator = rng("two objects, clip", seed, number)
    scene = sample_scene(draw_of("train", generator), seed, number)
    told = asdict(scene)
    meta = {"scene": {**told.pop("combination"), **told}, "seed": seed, "number": number, "fps": fps}
    captions = training_captions(scene.combination, generator)
    meta["negatives"] = wrong_captions(scene.combination, rng("two objects, negatives", seed, number))
    return RenderedClip(f"two-{seed}-{number:08d}", render(scene, size, num_frames, fps), captions, meta)
