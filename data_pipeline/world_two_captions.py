"""English for the built-in world with two objects: which is where, and how each moves.

The words are those of one object (world_captions.py) and the relations; a third of the wordings serves evaluation
alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from data_pipeline.world import Split, rng
from data_pipeline.world_captions import (
    CAPTIONS_PER_CLIP,
    COLOUR_WORDS,
    DOES_WORDS,
    DOING_WORDS,
    GROUND_WORDS,
    RELATION_WORDS,
    SHAPE_WORDS,
    draw_phrase,
    with_articles,
)
from data_pipeline.world_two import RELATIONS, TwoCombination, draw_of, split
from videodiff.errors import UserError

TRAIN_WORDINGS = (
    "a {colour} {shape} {doing}, {relation} a {other_colour} {other_shape} {other_doing}, on a {ground}",
    "a {colour} {shape} {relation} a {other_colour} {other_shape} on a {ground}, the {colour} one {doing}, the "
    "{other_colour} one {other_doing}",
    "on a {ground}, a {colour} {shape} {relation} a {other_colour} {other_shape}: the {colour} one {does} and the "
    "{other_colour} one {other_does}",
    "a {colour} {shape} that {does}, {relation} a {other_colour} {other_shape} that {other_does}, on a {ground}",
    "a {ground} with a {colour} {shape} {relation} a {other_colour} {other_shape}; the {colour} {shape} {does}, the "
    "{other_colour} {other_shape} {other_does}",
    "a video of a {colour} {shape} {doing}, {relation} a {other_colour} {other_shape} {other_doing}, in front of a "
    "{ground}",
    "{relation} a {other_colour} {other_shape} that {other_does} is a {colour} {shape} that {does}, on a {ground}",
    "there is a {colour} {shape} {relation} a {other_colour} {other_shape}. the {colour} one is {doing}, the "
    "{other_colour} one is {other_doing}. {ground}",
    "two objects on a {ground}: a {colour} {shape} {doing}, {relation} a {other_colour} {other_shape} {other_doing}",
    "the {colour} {shape} is {doing} and the {other_colour} {other_shape} is {other_doing}; the {colour} one is "
    "{relation} the {other_colour} one, over a {ground}",
    "we see a {colour} {shape} {relation} a {other_colour} {other_shape} against a {ground}. the {colour} one {does}. "
    "the {other_colour} one {other_does}",
    "a {ground}, and on it a {colour} {shape} {relation} a {other_colour} {other_shape}, the {colour} one {doing} and "
    "the {other_colour} one {other_doing}",
    "this clip shows a {colour} {shape} {relation} a {other_colour} {other_shape}, on a {ground}: the {colour} {shape} "
    "is {doing}, the {other_colour} {other_shape} is {other_doing}",
    "a {colour} {shape} {doing}, {relation} a {other_colour} {other_shape} {other_doing}",
    "a {colour} {shape} {relation} a {other_colour} {other_shape}, {ground}",
    "a {colour} {shape} {relation} a {other_colour} {other_shape}; the {colour} one {does}, the {other_colour} one "
    "{other_does}",
)
TEST_WORDINGS = (
    "there is a {colour} {shape} that {does}, {relation} a {other_colour} {other_shape} that {other_does}. {ground}",
    "against a {ground} a {colour} {shape} {does}, {relation} a {other_colour} {other_shape} that is {other_doing}",
    "a {colour} {shape} {relation} a {other_colour} {other_shape} over a {ground}; the {colour} {shape} is {doing}, "
    "the {other_colour} {other_shape} is {other_doing}",
    "on a {ground} we see a {colour} {shape} {relation} a {other_colour} {other_shape}, the {colour} one {doing} and "
    "the {other_colour} one {other_doing}",
    "a video of a {colour} {shape} {relation} a {other_colour} {other_shape}: the {colour} one {does}, the "
    "{other_colour} one {other_does}, on a {ground}",
    "{ground}, a {colour} {shape} {doing}, {relation} a {other_colour} {other_shape} {other_doing}",
    "this clip shows a {ground} and two objects: a {colour} {shape} that {does}, {relation} a {other_colour} "
    "{other_shape} that {other_does}",
    "a {ground} with a {colour} {shape} {relation} a {other_colour} {other_shape}. the {colour} one is {doing}. the "
    "{other_colour} one is {other_doing}",
)
Kind = Literal["train", "test"]
WORDINGS: dict[Kind, tuple[str, ...]] = {"train": TRAIN_WORDINGS, "test": TEST_WORDINGS}


def caption(combination: TwoCombination, generator: np.random.Generator, wordings: Kind, wording: int) -> str:
    """A caption of `combination` in wording number `wording` of that list; lower case."""
    colour = draw_phrase(COLOUR_WORDS[combination.colour], generator)
    other_colour = draw_phrase(COLOUR_WORDS[combination.other_colour], generator)
    text = WORDINGS[wordings][wording].format(
        colour=colour,
        shape=draw_phrase(SHAPE_WORDS[combination.shape], generator),
        doing=draw_phrase(DOING_WORDS[combination.motion], generator),
        does=draw_phrase(DOES_WORDS[combination.motion], generator),
        relation=draw_phrase(RELATION_WORDS[combination.relation], generator),
        other_colour=other_colour,
        other_shape=draw_phrase(SHAPE_WORDS[combination.other_shape], generator),
        other_doing=draw_phrase(DOING_WORDS[combination.other_motion], generator),
        other_does=draw_phrase(DOES_WORDS[combination.other_motion], generator),
        ground=draw_phrase(GROUND_WORDS[combination.background], generator),
    )
    return with_articles(text)


def training_captions(combination: TwoCombination, generator: np.random.Generator) -> list[str]:
    """CAPTIONS_PER_CLIP captions of one clip, each in another wording; either object may be named first."""
    chosen = generator.permutation(len(TRAIN_WORDINGS))[:CAPTIONS_PER_CLIP]
    named = [combination if generator.random() < 0.5 else combination.turned() for _ in chosen]
    return [caption(each, generator, "train", int(number)) for each, number in zip(named, chosen, strict=True)]


def wrong_captions(combination: TwoCombination, generator: np.random.Generator) -> list[str]:
    """Captions in the words of a true one that are wrong about the scene: the relation is turned round, or the objects
    have each other's colour, shape or motion, where these differ. Of what is held out none is told, not even as wrong:
    a tower would learn that such words are never true.

    Random rivals differ in some word, so that a text tower need not learn which word belongs to which (Yuksekgonul et
    al. 2023, "When and why vision-language models behave like bags-of-words": its remedy are such captions).
    """
    c = combination
    wrong = [replace(c, relation=RELATIONS[c.relation])]
    for name in ("colour", "shape", "motion"):
        one, other = getattr(c, name), getattr(c, f"other_{name}")
        if one != other:
            wrong.append(replace(c, **{name: other, f"other_{name}": one}))
    told = []
    for scene in (scene for scene in wrong if split(scene) == "train"):
        named = scene if generator.random() < 0.5 else scene.turned()
        # Where motions alone are wrong the wording has to tell them.
        fit = [
            n
            for n, words in enumerate(TRAIN_WORDINGS)
            if scene.motion == c.motion or "{doing}" in words or "{does}" in words
        ]
        told.append(caption(named, generator, "train", fit[int(generator.integers(len(fit)))]))
    return told


def prompts(num: int, seed: int, which: Split) -> list[tuple[TwoCombination, str]]:
    """`num` evaluation prompts in test wordings on random combinations of that split. Prompt i depends on
    (i, seed, which) alone."""
    if num < 1:
        raise UserError(f"cannot make {num} prompts: ask for at least 1")
    found = []
    for number in range(num):
        generator = rng("two objects, prompt", seed, which, number)
        combination = draw_of(which, generator)
        wording = int(generator.integers(len(TEST_WORDINGS)))
        found.append((combination, caption(combination, generator, "test", wording)))
    return found
