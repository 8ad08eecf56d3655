"""The metrics are tested themselves: each fault of drawn clips is seen by the figures meant for it, not by others."""

from functools import cache

import numpy as np
import pytest
import torch

from tests.metric_peers import disc
from videodiff.metrics.gaussian import frechet_distance
from videodiff.metrics.kernels import polynomial_mmd
from videodiff.metrics.manifold import nearest, support
from videodiff.metrics.motion import consistency, flicker, is_dynamic, motion_amount, still, unsteadiness
from videodiff.metrics.pictures import looks

FRAMES, FPS = 8, 8.0


@cache
def clips(seed: int) -> list[np.ndarray]:
    """Clips uint8 [T,64,64,3] of discs of any colour and place that go straight, 1.6 to 3 pixels a frame."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(10):
        x, y = rng.uniform(20, 44, 2)
        angle, speed, colour = rng.uniform(0, 6.28), rng.uniform(1.6, 3), tuple(rng.integers(40, 230, 3))
        steps = speed * (np.arange(FRAMES) - FRAMES / 2 + 0.5)
        made.append(np.stack([disc(x + np.cos(angle) * s, y + np.sin(angle) * s, 64, 11, colour) for s in steps]))
    return made


def features(frames: np.ndarray) -> torch.Tensor:
    """Mean colours of 4x4 fields of frames [N,64,64,3]: [N,48], as a network's features would be."""
    return torch.from_numpy(frames.reshape(-1, 4, 16, 4, 16, 3).mean((2, 4)).reshape(-1, 48))


def frozen(clip: np.ndarray, number: int) -> np.ndarray:
    return clip[[0] * FRAMES]


def shuffled(clip: np.ndarray, number: int) -> np.ndarray:
    return clip[np.random.default_rng(number).permutation(FRAMES)]


def flickering(clip: np.ndarray, number: int) -> np.ndarray:
    return np.stack([(frame + 12.0 * (-1) ** t).clip(0, 255) for t, frame in enumerate(clip)]).astype(np.uint8)


def blurred(clip: np.ndarray, number: int) -> np.ndarray:
    x = clip.astype(np.float64)
    for axis in (1, 2):
        x = sum(np.roll(x, step, axis) for step in range(-2, 3)) / 5
    return x.astype(np.uint8)


def shifted(clip: np.ndarray, number: int) -> np.ndarray:
    return (clip * np.array([1.25, 1.0, 0.7])).clip(0, 255).astype(np.uint8)


FAULTS = {f.__name__: f for f in (frozen, shuffled, flickering, blurred, shifted)}


@cache
def figures(fault: str | None, seed: int = 1) -> dict[str, float]:
    """Every figure of clips with a fault, beside sound clips of another seed as the real ones."""
    made = [FAULTS[fault](clip, n) if fault else clip for n, clip in enumerate(clips(seed))]
    frames, real = np.concatenate(made), features(np.concatenate(clips(0)))
    told = looks(frames)
    cover = support(real, features(frames))
    return {
        "flicker": float(np.mean([flicker(clip) for clip in made])),
        "unsteadiness": float(np.mean([unsteadiness(clip) for clip in made])),
        "motion": float(np.mean([motion_amount(clip, FPS) for clip in made])),
        "dynamic": float(np.mean([is_dynamic(clip, FPS) for clip in made])),
        "still": float(np.mean([still(clip).mean() for clip in made])),
        "inconsistency": 1 - float(np.mean([consistency(features(clip)).neighbours for clip in made])),
        "sharpness": float(told["sharpness"].mean()),
        "brightness": float(told["brightness"].mean()),
        "saturation": float(told["saturation"].mean()),
        "frechet": frechet_distance(real, features(frames)),
        "mmd": polynomial_mmd(real / 100, features(frames) / 100),
        "precision": cover.precision,
        "recall": cover.recall,
        "density": cover.density,
        "coverage": cover.coverage,
    }


# Fault -> figure -> least and greatest ratio to that of the sound clips; (0, 0) is exactly nothing.
NOTHING, SAME = (0, 0), (0.9, 1.1)
LOOKS = {"sharpness": SAME, "brightness": SAME, "saturation": SAME}
EXPECTED: dict[str, dict[str, tuple[float, float]]] = {
    "frozen": {"flicker": NOTHING, "unsteadiness": NOTHING, "motion": NOTHING, "dynamic": NOTHING, **LOOKS},
    "shuffled": {"unsteadiness": (3, 20), "inconsistency": (4, 40), "motion": (1, 2.5), "dynamic": (1, 1)},
    "flickering": {"unsteadiness": (10, 60), "flicker": (5, 20), "motion": (0.9, 1.4), "dynamic": (1, 1), **LOOKS},
    "blurred": {**LOOKS, "sharpness": (0, 0.2), "motion": SAME, "dynamic": (1, 1), "inconsistency": (0.8, 1.2)},
    "shifted": {
        **LOOKS,
        "saturation": (1.25, 2),
        "frechet": (4, 100),
        "mmd": (4, 1000),
        "motion": SAME,
        "dynamic": (1, 1),
    },
}


@pytest.mark.parametrize("fault", EXPECTED)
def test_a_fault_is_seen_by_its_own_figures_alone(fault: str) -> None:
    sound, found = figures(None), figures(fault)
    ratios = {name: found[name] / sound[name] for name in EXPECTED[fault]}
    outside = {n: ratios[n] for n, (low, high) in EXPECTED[fault].items() if not low - 1e-9 <= ratios[n] <= high + 1e-9}
    assert outside == {}
    assert (sound["still"], found["still"]) == (0, float(fault == "frozen"))


def test_other_sound_clips_have_no_fault() -> None:
    one, other = figures(None), figures(None, 2)
    for name in ("flicker", "unsteadiness", "motion", "dynamic", "brightness", "saturation"):
        assert other[name] / one[name] == pytest.approx(1, abs=0.4), name


def test_the_order_of_frames_is_nothing_to_figures_of_sets() -> None:
    sound, found = figures(None), figures("shuffled")
    for name in ("precision", "recall", "density", "coverage"):
        assert found[name] == sound[name]
    for name in ("sharpness", "brightness", "saturation", "frechet", "mmd"):
        assert found[name] == pytest.approx(sound[name], rel=1e-9)


def pictures(seed: int, count: int = 250) -> torch.Tensor:
    """Features of pictures of discs at any place, of one of three colours."""
    rng = np.random.default_rng(seed)
    colours = ((220, 90, 40), (60, 200, 90), (80, 90, 230))
    drawn = [disc(*rng.uniform(16, 48, 2), 64, 11, colours[rng.integers(3)]) for _ in range(count)]
    return features(np.stack(drawn))


def test_collapse_is_seen_by_recall_and_coverage_and_not_by_precision() -> None:
    real, sound = pictures(0), pictures(1)
    jitter = torch.from_numpy(np.random.default_rng(2).normal(0, 0.05, sound.shape))
    collapsed = sound[:12].repeat(21, 1)[:250] + jitter
    good, bad = support(real, sound), support(real, collapsed)
    assert bad.precision == pytest.approx(good.precision, abs=0.15)
    assert bad.recall < 0.2 * good.recall
    assert bad.coverage < 0.3 * good.coverage
    assert frechet_distance(real, collapsed) > 3 * frechet_distance(real, sound)
    assert polynomial_mmd(real / 100, collapsed / 100) > 3 * abs(polynomial_mmd(real / 100, sound / 100))


def test_wandering_off_is_seen_by_precision_and_not_by_recall() -> None:
    """Half of the pictures are noise that no real one resembles: what remains still covers the real ones."""
    real, sound = pictures(0), pictures(1)
    noise = torch.from_numpy(np.random.default_rng(3).uniform(0, 255, sound.shape))
    good, bad = support(real, sound), support(real, torch.cat([sound, noise]))
    assert bad.precision == pytest.approx(good.precision / 2, abs=0.01)
    assert bad.recall >= good.recall
    assert bad.coverage == good.coverage


def test_memorised_pictures_lie_nearer_to_training_than_held_out_ones() -> None:
    training, held_out = pictures(0), pictures(1)
    memorised = training[:50] + torch.from_numpy(np.random.default_rng(4).normal(0, 0.05, (50, 48)))
    usual = nearest(held_out, training).distances
    found = nearest(memorised, training)
    assert found.indices[:, 0].tolist() == list(range(50))
    assert float(found.distances.max()) < float(usual.quantile(0.05))
    assert support(training, memorised).precision == 1  # which precision takes for perfect
