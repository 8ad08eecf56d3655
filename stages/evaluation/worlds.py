"""The built-in worlds that a model is asked about, of one object and of two: prompts, clips, and what a reader sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from data_pipeline import world, world_captions, world_two, world_two_captions
from data_pipeline.world import ATTRIBUTES, Combination, Split
from data_pipeline.world_reader import read, read_image
from data_pipeline.world_two import TWO_ATTRIBUTES, TwoCombination
from data_pipeline.world_two_reader import read_two
from videodiff.errors import UserError

WORLD_SPLITS: tuple[Split, ...] = ("train", "held_out", "held_out_pair")
IMAGE_ATTRIBUTES = tuple(name for name in ATTRIBUTES if name != "motion")
MOVING_ATTRIBUTES = {"motion", "other_motion"}  # what a picture can't show


def attributes_of(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The attributes and values of the world that has attributes `names`; without any, of one object's."""
    return TWO_ATTRIBUTES if not {*names} <= {*ATTRIBUTES, "all"} else ATTRIBUTES


def columns(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """The attributes of the world that entries of a report are about, and "all"."""
    return [*attributes_of(name for entry in entries for name in entry["shares"]), "all"]


def attribute_label(attribute: str) -> str:
    """An attribute's name as people read it."""
    return attribute.replace("_", " ")


def planned(objects: int, which: Split, num: int, seed: int) -> list[tuple[int, Combination | TwoCombination, str]]:
    """(how often the prompt's words, or its combination, came before; combination; prompt) of `num` prompts of a split;
    of one object no more of a held-out one than it has combinations."""
    if objects == 2:
        turns: Counter[str] = Counter()
        found = []
        for two, text in world_two_captions.prompts(num, seed, which) if num else ():
            found.append((turns[text], two, text))
            turns[text] += 1
        return found
    members = sum(world.split(c) == which for c in world.combinations())
    count = num if which == "train" else min(num, members)
    asked = world_captions.prompts(count, seed, which) if count else []
    return [(number // members, combination, text) for number, (combination, text) in enumerate(asked)]


def rendered(
    combination: Combination | TwoCombination, size: int, count: int, fps: float, *key: int | str
) -> np.ndarray:
    """A clip uint8 [count,size,size,3] of a combination; where its objects start follows from `key`."""
    if isinstance(combination, TwoCombination):
        return world_two.render(world_two.sample_scene(combination, *key), size, count, fps)
    return world.render(world.sample_scene(combination, *key), size, count, fps)


def seen_in(combination: Combination | TwoCombination, clip: np.ndarray) -> tuple[dict[str, str | None], bool]:
    """Attribute -> what the reader of that combination's world sees in frames uint8 [T,S,S,3], and whether it is the
    same in each of them; of one frame no motion."""
    if isinstance(combination, TwoCombination):
        two = read_two(clip)
        values, consistent = two.values(combination), two.consistent
    elif len(clip) == 1:
        picture = read_image(clip[0])
        values, consistent = {name: getattr(picture, name).value for name in IMAGE_ATTRIBUTES}, True
    else:
        reading = read(clip)
        values, consistent = reading.values(), bool(reading.consistent)
    return {name: value for name, value in values.items() if len(clip) > 1 or name not in MOVING_ATTRIBUTES}, consistent


def told_in(scene: Any) -> Combination | TwoCombination | None:
    """The combination in what a built-in world wrote into a sample's JSON; None where it is something else."""
    if not isinstance(scene, dict):
        return None
    try:
        if "relation" in scene:
            return TwoCombination(**{name: scene[name] for name in TWO_ATTRIBUTES})
        return Combination(**{name: scene[name] for name in ATTRIBUTES})
    except (KeyError, UserError):
        return None
