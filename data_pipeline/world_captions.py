"""English for the built-in world: captions in many wordings, and the attributes that a prompt asks for.

A wording is a sentence with gaps; each gap takes one of several phrases. A third of the wordings serves evaluation
alone, but each of its words also occurs in the others: what is measured is another sentence, not another vocabulary.
"""

from __future__ import annotations

import re
from typing import Literal

import numpy as np

from data_pipeline.world import ATTRIBUTES, Combination, Split, combinations, rng, split
from videodiff.errors import UserError

Words = dict[str, tuple[str, ...]]

# The first phrase of each row is its plain name: it is drawn in half of all cases, and as one of all in the others.
COLOUR_WORDS: Words = {
    "red": ("red", "scarlet"),
    "green": ("green", "emerald"),
    "blue": ("blue", "cobalt"),
    "yellow": ("yellow", "lemon"),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
}
SHAPE_WORDS: Words = {
    "circle": ("circle", "disc", "round dot"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "cross": ("cross", "plus sign"),
}
SIZE_WORDS: Words = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
GROUND_WORDS: Words = {
    "white": ("white background", "white backdrop", "plain white background"),
    "black": ("black background", "black backdrop", "plain black background"),
    "gradient": ("gradient background", "grey gradient backdrop", "shaded grey background"),
    "checker": ("checkered background", "checkerboard background", "checkered grey backdrop"),
}
DOING_WORDS: Words = {
    "still": ("standing still", "staying still", "not moving", "resting"),
    "left": ("moving left", "moving to the left", "sliding to the left", "going left", "drifting leftwards"),
    "right": ("moving right", "moving to the right", "sliding to the right", "going right", "drifting rightwards"),
    "up": ("moving up", "rising", "sliding upwards", "going up", "drifting upwards"),
    "down": ("moving down", "sinking", "sliding downwards", "going down", "drifting downwards"),
    "growing": ("growing", "getting bigger", "expanding", "growing in size"),
    "diagonal": ("moving diagonally", "sliding diagonally", "going up to the right", "drifting diagonally upwards"),
    "circling": ("circling", "moving in a circle", "going round in a circle", "orbiting"),
}
DOES_WORDS: Words = {
    "still": ("stands still", "stays still", "does not move", "rests"),
    "left": ("moves left", "moves to the left", "slides to the left", "goes left", "drifts leftwards"),
    "right": ("moves right", "moves to the right", "slides to the right", "goes right", "drifts rightwards"),
    "up": ("moves up", "rises", "slides upwards", "goes up", "drifts upwards"),
    "down": ("moves down", "sinks", "slides downwards", "goes down", "drifts downwards"),
    "growing": ("grows", "gets bigger", "expands", "grows in size"),
    "diagonal": ("moves diagonally", "slides diagonally", "goes up to the right", "drifts diagonally upwards"),
    "circling": ("circles", "moves in a circle", "goes round in a circle", "orbits"),
}
RELATION_WORDS: Words = {  # of two objects
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "under", "lower than"),
}

TRAIN_WORDINGS = (
    "a {size} {colour} {shape} {doing} on a {ground}",
    "a {size} {colour} {shape} {does} on a {ground}",
    "{size} {colour} {shape} {doing}, {ground}",
    "a {colour} {shape}, {size}, {doing} on a {ground}",
    "a {ground} with a {size} {colour} {shape} {doing}",
    "on a {ground}, a {size} {colour} {shape} {does}",
    "on a {ground} there is a {size} {colour} {shape} {doing}",
    "a {size} {shape} in {colour} {doing} in front of a {ground}",
    "a video of a {size} {colour} {shape} {doing} on a {ground}",
    "a short video: a {size} {colour} {shape} {does} on a {ground}",
    "a {size} {colour} {shape} that {does} on a {ground}",
    "a {size} {colour} {shape} that is {doing} over a {ground}",
    "the {size} {colour} {shape} is {doing} on the {ground}",
    "the {shape} is {size} and {colour} and it {does} on a {ground}",
    "we see a {size} {colour} {shape} {doing} in front of a {ground}",
    "{doing}: a {size} {colour} {shape} on a {ground}",
    "one {size} {colour} {shape} {doing} against a {ground}",
    "a {ground}; in front of it a {size} {colour} {shape} {does}",
    "this clip shows a {size} {colour} {shape} {doing} on a {ground}",
    "a simple clip of a {size} {shape} with {colour} colour, {doing}, seen against a {ground}",
    "there is a {shape}. it is {colour} and {size}. it {does}. we see it against a {ground}",
    "a {size} {colour} {shape} {doing}",
    "a {colour} {shape} {doing} on a {ground}",
    "a {size} {colour} {shape} on a {ground}",
)
TEST_WORDINGS = (
    "there is a {size} {colour} {shape} {doing} on a {ground}",
    "the {size} {colour} {shape} {does} in front of a {ground}",
    "against a {ground} a {size} {colour} {shape} {does}",
    "a {ground}, and on it a {size} {colour} {shape} {doing}",
    "this video shows a {size} {colour} {shape} that {does} on a {ground}",
    "a clip of a {colour} {shape}, {size}, {doing} over a {ground}",
    "we see a {ground} with one {size} {colour} {shape} that is {doing}",
    "in this clip a {size} {shape} in {colour} {does} against a {ground}",
    "{ground}, {size} {colour} {shape}, {doing}",
    "a {shape} that is {size} and {colour} {does} on a {ground}",
    "a simple video of one {size} {colour} {shape} {doing} in front of the {ground}",
    "it is a {size} {colour} {shape} and it {does} over a {ground}",
)
# What someone writes who shows the first image beside it: how it moves, and little else.
SHORT_WORDINGS = (
    "it {does}",
    "it is {doing}",
    "{doing}",
    "the {shape} {does}",
    "the {shape} is {doing}",
    "a {colour} {shape} {doing}",
    "it is {colour} and it {does}",
    "it is {size} and it {does}",
    "a {size} {shape} that {does}",
    "we see it {doing}",
    "a video: it {does}",
    "it is {doing} on a {ground}",
)
Kind = Literal["train", "motion", "test"]
WORDINGS: dict[Kind, tuple[str, ...]] = {
    "train": TRAIN_WORDINGS,
    "motion": (*(wording for wording in TRAIN_WORDINGS if "{do" in wording), *SHORT_WORDINGS),
    "test": TEST_WORDINGS,
}
CAPTIONS_PER_CLIP = 4


def caption(
    combination: Combination,
    generator: np.random.Generator,
    wordings: Kind = "train",
    wording: int | None = None,
) -> str:
    """A caption of `combination` in wording number `wording` of that list, or a random one; lower case."""
    sentences = WORDINGS[wordings]
    sentence = sentences[int(generator.integers(len(sentences))) if wording is None else wording]

    text = sentence.format(
        size=draw_phrase(SIZE_WORDS[combination.size], generator),
        colour=draw_phrase(COLOUR_WORDS[combination.colour], generator),
        shape=draw_phrase(SHAPE_WORDS[combination.shape], generator),
        ground=draw_phrase(GROUND_WORDS[combination.background], generator),
        doing=draw_phrase(DOING_WORDS[combination.motion], generator),
        does=draw_phrase(DOES_WORDS[combination.motion], generator),
    )
    return with_articles(text)


def draw_phrase(phrases: tuple[str, ...], generator: np.random.Generator) -> str:
    """The plain one in half of all cases, and one of all in the others."""
    plain = generator.random() < 0.5
    return phrases[0 if plain else int(generator.integers(len(phrases)))]


def with_articles(text: str) -> str:
    """Says "an" in place of "a" where the next word asks for it."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def training_captions(combination: Combination, generator: np.random.Generator, motion_alone: int = 0) -> list[str]:
    """CAPTIONS_PER_CLIP captions of one clip, each of them in another wording. Of the last `motion_alone` the
    motion alone is true: all else is drawn for the caption, from all combinations, and tells nothing of the clip."""

    def any_look() -> Combination:
        drawn = {name: values[int(generator.integers(len(values)))] for name, values in ATTRIBUTES.items()}
        return Combination(**{**drawn, "motion": combination.motion})

    def draw(kind: Kind, count: int) -> list[str]:
        chosen = generator.permutation(len(WORDINGS[kind]))[:count]
        told = (combination if kind == "train" else any_look() for _ in chosen)
        return [caption(each, generator, kind, int(number)) for each, number in zip(told, chosen, strict=True)]

    return [*draw("train", CAPTIONS_PER_CLIP - motion_alone), *draw("motion", motion_alone)]


def prompts(num: int, seed: int, which: Split) -> list[tuple[Combination, str]]:
    """`num` evaluation prompts in test wordings, over the combinations of that split in a random order, none twice
    before each came once. Prompt i depends on (i, seed, which) alone."""
    if num < 1:
        raise UserError(f"cannot make {num} prompts: ask for at least 1")
    members = [c for c in combinations() if split(c) == which]
    result: list[tuple[Combination, str]] = []
    for number in range(num):
        turn, place = divmod(number, len(members))
        order = rng("prompt order", seed, which, turn).permutation(len(members))
        combination = members[int(order[place])]
        result.append((combination, caption(combination, rng("prompt", seed, which, number), "test")))
    return result


def _phrases() -> list[tuple[str, str, str]]:
    """(phrase, attribute, value), longest first, so that "moving in a circle" is read before "circle"."""
    tables: tuple[tuple[str, Words], ...] = (
        ("colour", COLOUR_WORDS),
        ("shape", SHAPE_WORDS),
        ("size", SIZE_WORDS),
        ("background", GROUND_WORDS),
        ("motion", DOING_WORDS),
        ("motion", DOES_WORDS),
        ("relation", RELATION_WORDS),
    )
    rows = [(p, attribute, v) for attribute, table in tables for v, phrases in table.items() for p in phrases]
    rows += [(p, a, v) for (a, v), phrases in MORE_PHRASES.items() for p in phrases]
    return sorted(set(rows), key=lambda row: (-len(row[0]), row))


# What people also write. Read only, never written into a caption.
MORE_PHRASES: dict[tuple[str, str], tuple[str, ...]] = {
    ("motion", "left"): ("to the left", "leftwards", "leftward", "left"),
    ("motion", "right"): ("to the right", "rightwards", "rightward", "right"),
    ("motion", "up"): ("upwards", "upward", "up"),
    ("motion", "down"): ("downwards", "downward", "down", "falling", "falls"),
    ("motion", "still"): ("still", "static", "motionless"),
    ("motion", "growing"): ("growing larger", "getting larger", "becoming bigger", "becoming larger"),
    ("motion", "diagonal"): ("diagonally", "diagonal", "up and to the right", "up to the right"),
    ("background", "white"): ("on white", "over white", "white"),
    ("background", "black"): ("on black", "over black", "black"),
    ("background", "gradient"): ("gradient", "shaded"),
    ("background", "checker"): ("checker", "checkered", "checkerboard", "chequered"),
    ("shape", "circle"): ("disk", "ball", "dot"),
    ("shape", "cross"): ("plus",),
}
_PHRASES = [(re.compile(rf"\b{phrase}\b"), attribute, value) for phrase, attribute, value in _phrases()]


def _named(text: str) -> list[tuple[int, str, str]]:
    """(place, attribute, value) of all that `text` names, in its order."""
    rest = " ".join(re.findall(r"[a-z]+", text.lower()))
    found: list[tuple[int, str, str]] = []
    for pattern, attribute, value in _PHRASES:
        found += [(match.start(), attribute, value) for match in pattern.finditer(rest)]
        rest = pattern.sub(lambda match: "_" * len(match.group()), rest)  # read once; places stay
    return sorted(found)


def parse(text: str) -> dict[str, str]:
    """The attributes that `text` names, a subset of ATTRIBUTES; of two values of one attribute, the first named."""
    found = {attribute: value for _, attribute, value in reversed(_named(text))}
    return {name: found[name] for name in ATTRIBUTES if name in found}


def asks_for_motion(text: str) -> bool:
    """Whether `text` says of any object that it moves; where one lies from another ("left of") is no motion."""
    return any(attribute == "motion" and value != "still" for _, attribute, value in _named(text))
