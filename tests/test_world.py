"""The built-in world against its own truth: what is drawn, said, and read back."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, replace
from functools import lru_cache

import numpy as np
import pytest

from data_pipeline import world
from data_pipeline.world import ATTRIBUTES, Combination, combinations, rng, split
from data_pipeline.world_captions import (
    SHORT_WORDINGS,
    TEST_WORDINGS,
    TRAIN_WORDINGS,
    asks_for_motion,
    caption,
    parse,
    prompts,
)
from data_pipeline.world_reader import read, read_image
from videodiff.errors import UserError
from videodiff.video_io import encode_video, read_video

LEFT = Combination("red", "circle", "large", "white", "left")


def clip(combination: Combination, key: int = 0, size: int = 64, frames: int = 16, fps: float = 8) -> np.ndarray:
    return world.render(world.sample_scene(combination, key), size, frames, fps)


@lru_cache
def decoded(size: int, frames: int, fps: int, crf: int, number: int, tmp: str) -> list[tuple[Combination, np.ndarray]]:
    """Random combinations of all splits, encoded to real mp4s and decoded again."""
    every, generator, result = combinations(), rng("reader test", size, frames), []
    for index in range(number):
        combination = every[int(generator.integers(len(every)))]
        file = f"{tmp}/{size}-{frames}-{index}.mp4"
        with open(file, "wb") as out:
            out.write(encode_video(clip(combination, index, size, frames, fps), fps, crf))
        result.append((combination, read_video(file)[0]))
    return result


# -- combinations ------------------------------------------------------------------------------------------------------


def test_held_out_rule() -> None:
    every = combinations()
    counts = Counter(map(split, every))
    assert len(every) == 6 * 4 * 2 * 4 * 8
    rest = counts["train"] + counts["held_out"]
    assert 0.08 < counts["held_out"] / rest < 0.12
    assert len(world.HELD_OUT_PAIRS) >= 6
    assert split(LEFT) == "train"
    train = [c for c in every if split(c) == "train"]
    for (first, a), (second, b) in world.HELD_OUT_PAIRS:
        assert not any(getattr(c, first) == a and getattr(c, second) == b for c in train)
    for name, values in ATTRIBUTES.items():
        shares = [sum(getattr(c, name) == v for c in train) / len(train) for v in values]
        assert min(shares) > 0.6 / len(values)
    # A change of the rule would mix training and evaluation of models that exist: these must never move.
    digest = rng(*sorted(" ".join(asdict(c).values()) for c in train)).integers(1 << 62)
    assert (counts["train"], counts["held_out"], counts["held_out_pair"]) == (1106, 110, 320)
    assert digest == 4244802120654910863


def test_training_draws_are_balanced_and_never_held_out() -> None:
    generator = rng("draws")
    drawn = [world.draw_train(generator) for _ in range(6000)]
    assert all(split(c) == "train" for c in drawn)
    for name, values in ATTRIBUTES.items():
        counts = Counter(getattr(c, name) for c in drawn)
        expected = len(drawn) / len(values)
        assert all(abs(counts[v] - expected) < 5 * expected**0.5 for v in values)


# -- rendering ---------------------------------------------------------------------------------------------------------


def object_area(frames: np.ndarray) -> np.ndarray:
    chroma = np.ptp(frames.astype(int), axis=-1)
    return (chroma / chroma.max()).sum((1, 2)) / frames.shape[1] ** 2


def test_motion_never_leaves_the_frame() -> None:
    for index, combination in enumerate(combinations()):
        if combination.background != "white" or combination.colour not in ("red", "blue"):
            continue
        frames = clip(combination, index, 64, 9, (9 - 1) / 1.875 if index % 2 else 1.0)
        border = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], 1)
        assert (border >= 254).all(), combination


def test_area_is_that_of_the_shape() -> None:
    diameter = world.SIZES["large"]
    units = {"circle": np.pi / 4, "square": 0.88**2, "triangle": 3 * 3**0.5 * 0.29**2, "cross": 0.5644}
    for shape, unit in units.items():
        area = object_area(clip(Combination("blue", shape, "large", "black", "growing"), 1, 64, 31, 16))
        np.testing.assert_allclose(area[[0, -1]], unit * diameter**2 * np.array([1, world.GROWTH**2]), rtol=0.01)


@pytest.mark.parametrize("motion", ATTRIBUTES["motion"])
def test_time_is_continuous_and_resolution_free(motion: str) -> None:
    combination = Combination("purple", "square", "small", "checker", motion)
    fine = clip(combination, 3, 64, 31, 16)
    assert (fine[::2] == clip(combination, 3, 64, 16, 8)).all()
    assert (fine[:9] == clip(combination, 3, 64, 9, 16)).all()
    half = clip(combination, 3, 128, 31, 16).reshape(31, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(half - fine).max() < 40  # only edge pixels differ: the coverage is clipped, not integrated
    assert np.abs(half - fine).mean() < 0.5
    long = clip(combination, 3, 64, 61, 16)  # twice as long: the same path at half the speed
    assert np.abs(long[::2].astype(int) - fine).mean() < 2.5
    assert (motion == "still") == bool((fine[0] == fine[8]).all())


def test_refuses_what_is_not_of_this_world() -> None:
    with pytest.raises(UserError, match="colour 'pink'"):
        Combination("pink", "circle", "large", "white", "left")
    with pytest.raises(UserError, match="num_frames=0"):
        world.render(world.sample_scene(LEFT, 0), 64, 0, 8)
    with pytest.raises(UserError, match="0 prompts"):
        prompts(0, 0, "train")


def test_clips_depend_on_seed_and_number_alone() -> None:
    first = list(world.clips(4, 5, 32, 8, 8))
    again = world.render_clip(5, 3, 32, 8, 8)
    assert (again.frames == first[3].frames).all()
    assert again.captions == first[3].captions
    assert again.key == first[3].key
    assert again.meta == first[3].meta
    assert "." not in again.key
    assert world.render_clip(6, 3, 32, 8, 8).meta["scene"] != again.meta["scene"]
    truth = {name: again.meta["scene"][name] for name in ATTRIBUTES}
    assert split(Combination(**truth)) == "train"
    assert len(set(again.captions)) == 4
    for text in again.captions:
        assert parse(text).items() <= truth.items()


def test_motion_captions_tell_the_motion_of_the_same_clip_and_nothing_else_of_it() -> None:
    right: Counter[str] = Counter()
    told: Counter[str] = Counter()
    unseen = set()
    for number in range(200):
        whole, ours = (world.render_clip(5, number, 16, 1, 8, motion_captions=count) for count in (0, 3))
        assert (ours.frames == whole.frames).all()
        assert ours.meta == whole.meta
        assert ours.captions[:1] == whole.captions[:1]
        assert len(set(ours.captions)) == 4
        truth = {name: whole.meta["scene"][name] for name in ATTRIBUTES}
        for text in ours.captions[1:]:
            found = parse(text)
            assert found["motion"] == truth["motion"]
            told.update(found.keys())
            right.update(name for name, value in found.items() if truth[name] == value)
            unseen |= {pair for pair in world.HELD_OUT_PAIRS if all(found.get(name) == value for name, value in pair)}
    assert unseen == set(world.HELD_OUT_PAIRS)  # words alone: no clip shows them
    for name, values in ATTRIBUTES.items():
        if name != "motion":  # right as often as a guess: within four deviations
            chance = 1 / len(values)
            assert abs(right[name] / told[name] - chance) < 4 * (chance * (1 - chance) / told[name]) ** 0.5


# -- captions ----------------------------------------------------------------------------------------------------------


def test_test_wordings_are_other_sentences_of_the_same_words() -> None:
    def words(wordings: tuple[str, ...]) -> set[str]:
        return set(re.findall("[a-z]+", re.sub(r"\{\w+\}", "", " ".join(wordings))))

    assert len(set(TRAIN_WORDINGS)) == 24
    assert len(set(TEST_WORDINGS)) == 12
    assert not set(TRAIN_WORDINGS) & set(TEST_WORDINGS)
    assert words(TEST_WORDINGS) | words(SHORT_WORDINGS) <= words(TRAIN_WORDINGS)
    assert caption(LEFT, rng(0), "train", 0).startswith("a ")
    plain = {caption(LEFT, rng(i), "train", 0) for i in range(500)}
    assert "a large red circle moving left on a white background" in plain
    assert len(plain) > 20


def test_every_caption_parses_to_its_truth() -> None:
    for index, combination in enumerate(combinations()[::7]):
        truth = asdict(combination)
        for number, wording in enumerate(TRAIN_WORDINGS):
            if (number + index) % 6 == 0:
                found = parse(caption(combination, rng("parse", index, number), "train", number))
                assert found == {k: v for k, v in truth.items() if k in found}
                gaps = {"ground": "background", "doing": "motion", "does": "motion"}
                assert set(found) == {gaps.get(gap, gap) for gap in re.findall(r"\{(\w+)\}", wording)}
        text = caption(combination, rng("parse test", index), "test")
        assert parse(text) == truth, text


def test_prompts_are_balanced_and_repeatable() -> None:
    for which in ("train", "held_out", "held_out_pair"):
        made = prompts(220, 3, which)
        assert made[:50] == prompts(50, 3, which)
        assert made != prompts(220, 4, which)
        assert all(split(c) == which and parse(text) == asdict(c) for c, text in made)
        if which == "held_out":  # 110 combinations, each twice
            assert set(Counter(c for c, _ in made).values()) == {2}


def test_parse_reads_what_people_write() -> None:
    assert parse("A BIG red ball, falling. White background!") == {
        "colour": "red", "shape": "circle", "size": "large", "background": "white", "motion": "down",
    }  # fmt: skip
    assert parse("a square moving in a circle") == {"shape": "square", "motion": "circling"}
    assert parse("a dog") == {}


def test_a_place_is_no_motion() -> None:
    asked = {
        "a red circle left of a blue square, both standing still": False,
        "a red circle standing still, left of a blue square moving up": True,
        "a red circle to the right of a blue square": False,
        "a red circle moving to the left": True,
        "a circle sliding to the left of the frame": True,
        "a still circle": False,
    }
    assert {text: asks_for_motion(text) for text in asked} == asked


# -- reader ------------------------------------------------------------------------------------------------------------


def check_reader(cases: list[tuple[Combination, np.ndarray]]) -> None:
    wrong: Counter[str] = Counter()
    for combination, frames in cases:
        reading = read(frames)
        truth = asdict(combination)
        wrong.update(name for name, value in reading.values().items() if value != truth[name])
        wrong["consistent"] += not reading.consistent
    assert all(count <= 0.005 * len(cases) for count in wrong.values()), wrong


@pytest.mark.parametrize(
    ("size", "frames", "fps", "crf", "number"), [(64, 16, 8, 18, 24), (64, 8, 16, 12, 12), (128, 9, 16, 18, 8)]
)
def test_reader_is_right_on_decoded_videos(tmp_path, size: int, frames: int, fps: int, crf: int, number: int) -> None:
    check_reader(decoded(size, frames, fps, crf, number, str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "frames", "fps", "crf"), [(64, 16, 8, 18), (64, 31, 16, 12), (64, 9, 16, 18), (128, 16, 8, 18)]
)
def test_reader_is_right_on_many_decoded_videos(tmp_path, size: int, frames: int, fps: int, crf: int) -> None:
    check_reader(decoded(size, frames, fps, crf, 200, str(tmp_path)))


@pytest.mark.parametrize("motion", ATTRIBUTES["motion"])
def test_reader_calls_wrong_motions_wrong(motion: str) -> None:
    combination = Combination("green", "square", "small", "gradient", motion)
    frames = clip(combination, 7)
    assert read(frames).motion.value == motion
    assert read(np.repeat(frames[:1], 16, 0)).motion.value == "still"
    backwards = {"left": "right", "right": "left", "up": "down", "down": "up", "growing": None, "diagonal": None}
    assert read(frames[::-1]).motion.value == backwards.get(motion, motion)
    if motion != "still":
        assert read(frames[rng(1).permutation(16)]).motion.confidence < 0.2
        assert read(np.concatenate([frames[::2], frames[::-2]])).motion.value != motion


def test_reader_calls_wrong_objects_wrong() -> None:
    for shape in ATTRIBUTES["shape"]:
        frames = clip(replace(LEFT, shape=shape), 2)
        assert read(frames).values() == asdict(replace(LEFT, shape=shape))
        assert read(frames[..., [1, 2, 0]]).colour.value == "blue"
        half = np.concatenate([frames[:8], frames[8:, ..., [1, 2, 0]]])
        assert read(frames).consistent
        assert not read(half).consistent
        assert read(half).colour.confidence < 0.6
    vanished = clip(LEFT, 2)
    vanished[8:] = 255
    assert not read(vanished).consistent
    assert read(vanished).motion.value is None
    morphed = np.concatenate([clip(LEFT, 2)[:8], clip(replace(LEFT, shape="square"), 2)[8:]])
    assert not read(morphed).consistent
    other_ground = np.concatenate([clip(LEFT, 2)[:8], clip(replace(LEFT, background="checker"), 2)[8:]])
    assert not read(other_ground).consistent


def test_reader_sees_nothing_in_nothing() -> None:
    noise = rng("noise").integers(0, 256, (16, 64, 64, 3)).astype(np.uint8)
    assert set(read(noise).values().values()) == {None}
    blank = read(np.full((16, 64, 64, 3), 255, np.uint8))
    assert blank.values() == dict.fromkeys(ATTRIBUTES, None) | {"background": "white"}
    assert not blank.consistent
    with pytest.raises(UserError, match="uint8"):
        read(np.zeros((16, 64, 64, 3), np.float32))


def paint(mask: np.ndarray) -> np.ndarray:
    return (255 + mask[..., None] * (np.array([228, 30, 30]) - 255.0)).astype(np.uint8)


def test_reader_names_no_shape_for_what_is_none() -> None:
    y, x = np.mgrid[:64, :64] - 31.5
    distance, angle = np.hypot(x, y), np.arctan2(y, x)
    blobs = {
        "ellipse": np.hypot(x / 1.5, y) < 9,
        "rectangle": (abs(x) < 16) & (abs(y) < 9),
        "half circle": (distance < 14) & (x > 0),
        "ring": (distance < 14) & (distance > 8),
        "star": distance < 12 + 5 * np.cos(5 * angle),
        "lumps": distance < 11 + 2.2 * np.cos(3 * angle + 1) + 1.5 * np.cos(2 * angle),
        "two": (np.hypot(x - 12, y) < 8) | (np.hypot(x + 12, y) < 8),
        "letter L": ((abs(x + 8) < 4) & (abs(y) < 14)) | ((abs(y - 10) < 4) & (x > -10) & (x < 12)),
    }
    for name, mask in blobs.items():
        assert read_image(paint(mask)).shape.value is None, name
    sharp = read_image(paint(distance < 10)).shape.confidence
    assert read_image(paint(np.exp(-(distance**2) / 128))).shape.confidence < 0.5 < 0.9 < sharp


def test_reader_stands_soft_and_noisy_pictures() -> None:
    kernel = np.exp(-(np.arange(-3, 4) ** 2) / 2.0)  # sigma of one pixel
    kernel /= kernel.sum()
    for index, combination in enumerate(combinations()[::97]):
        frames = clip(combination, index).astype(np.float32)
        for axis in (1, 2):
            frames = sum(k * np.roll(frames, i - 3, axis) for i, k in enumerate(kernel))
        frames = frames + rng("grain", index).normal(0, 5, frames.shape)
        reading = read(np.clip(frames, 0, 255).astype(np.uint8))
        assert reading.values() == asdict(combination)
        assert reading.consistent


def test_turning_is_none_of_the_motions() -> None:
    y, x = np.mgrid[:64, :64] - 31.5
    for shape, symmetry in (("square", 90), ("triangle", 120), ("cross", 90)):
        frames = []
        for angle in np.deg2rad(np.arange(16) * symmetry / 12):
            across, along = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
            frames.append(paint(world.shape_distance(shape, across, along, 32.0) < 0))
        seen = read(np.stack(frames))
        assert (seen.shape.value, seen.motion.value) == (shape, None)
