"""One batch of prompts through the stages: what each makes, what the reader sees in it, how near it is to the truth.

B prompts, C latent channels, T frames, S frame side in pixels. Real clips are rendered, stored as mp4 and read back, as
the training data are; their starts are keyed apart from every training clip.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipeline.world import ATTRIBUTES, Combination, Split, combinations, render, sample_scene, split
from data_pipeline.world_captions import prompts
from data_pipeline.world_reader import read, read_image
from stages.evaluate_statistics import psnr
from stages.pipeline import SampleKey
from videodiff.model import Sampling
from videodiff.video_io import encode_video, read_video

IMAGE_ATTRIBUTES = tuple(name for name in ATTRIBUTES if name != "motion")
STRIP = 5  # frames of a clip that its picture shows


class Road(Protocol):
    """What is judged: `stages.pipeline.Pipeline`, or anything that answers alike."""

    def encode(self, frames: np.ndarray) -> Tensor: ...
    def decode(self, latents: Tensor) -> np.ndarray: ...
    def image(self, keys: Sequence[SampleKey], sampling: Sampling) -> Tensor: ...
    def video(self, keys: Sequence[SampleKey], first: Tensor, fps: float, sampling: Sampling) -> Tensor: ...
    def interpolation(self, keys: Sequence[SampleKey], clip: Tensor, fps: float, sampling: Sampling) -> Tensor: ...
    def controlled_image(
        self, keys: Sequence[SampleKey], pictures: np.ndarray, scale: float, sampling: Sampling
    ) -> Tensor: ...
    def upscale(self, key: SampleKey, frames: np.ndarray, sampling: Sampling) -> np.ndarray | None: ...


@dataclass(frozen=True)
class Plan:
    """What is measured: the rows; clips of `frames` x `size` x `size` at `fps`, `factor` times as fast when smooth."""

    rows: tuple[str, ...]
    size: int
    frames: int
    fps: float
    factor: int
    num_prompts: int
    num_held_out: int  # prompts of each held-out split
    seed: int
    sampling: dict[str, Sampling]
    enlarged: int = 1  # gain in height and width of the upscale stage
    classifier_scale: float | None = None  # of the rows of a classifier, where there are any


@dataclass(frozen=True)
class Prompt:
    """Prompt `number` of a split; `turn` counts how often its combination came before."""

    split: Split
    number: int
    turn: int
    combination: Combination
    text: str


@dataclass
class Measured:
    """Row -> what the reader saw (JSON), and row -> a picture of it."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


def planned_prompts(num: int, num_held_out: int, seed: int) -> list[Prompt]:
    """`num` prompts on seen combinations, `num_held_out` on each held-out split, or one for each combination it has."""
    found: list[Prompt] = []
    which: Split
    for which in ("train", "held_out", "held_out_pair"):
        members = sum(split(c) == which for c in combinations())
        count = num if which == "train" else min(num_held_out, members)
        for number, (combination, text) in enumerate(prompts(count, seed, which) if count else ()):
            found.append(Prompt(which, number, number // members, combination, text))
    return found


def real_clip(prompt: Prompt, plan: Plan) -> np.ndarray:
    """A real clip of the prompt at the smooth rate, uint8 [(T-1)*factor+1,S,S,3], through an mp4 and back."""
    scene = sample_scene(prompt.combination, "evaluation", plan.seed, prompt.split, prompt.number)
    fps = plan.fps * plan.factor
    frames = render(scene, plan.size, (plan.frames - 1) * plan.factor + 1, fps)
    with tempfile.TemporaryDirectory(prefix="videodiff-") as folder:
        path = Path(folder) / "clip.mp4"
        path.write_bytes(encode_video(frames, fps))
        return read_video(path)[0]


def measure(road: Road, plan: Plan, batch: Sequence[Prompt]) -> list[Measured]:
    """All rows of the plan for a batch of prompts, in their order."""
    keys = [SampleKey(plan.seed, prompt.text, prompt.turn) for prompt in batch]
    made = [Measured() for _ in batch]
    smooth_real = np.stack([real_clip(prompt, plan) for prompt in batch])
    real = smooth_real[:, :: plan.factor]

    if "autoencoder" in plan.rows:
        frames, finite = decoded(road, road.encode(real))
        near = [{"reconstruction": psnr(a, b)} for a, b in zip(frames, real, strict=True)]
        _note(made, "autoencoder", frames, finite, near, real)
    if {"video_real"} & set(plan.rows):
        first = road.encode(real[:, :1])
        clip = road.video(keys, first, plan.fps, plan.sampling["video"])
        _note_video(road, made, "video_real", clip, first)
    if {"image", "video_generated", "whole"} & set(plan.rows):
        first = road.image(keys, plan.sampling["image"])
        if "image" in plan.rows:
            _note(made, "image", *decoded(road, first), [{} for _ in batch])
    if {"video_generated", "whole"} & set(plan.rows):
        clip = road.video(keys, first, plan.fps, plan.sampling["video"])
        if "video_generated" in plan.rows:
            _note_video(road, made, "video_generated", clip, first)
    if "whole" in plan.rows:
        smooth = within(road.interpolation(keys, clip, plan.fps, plan.sampling["interpolation"]), smooth_real.shape[1])
        _note(made, "whole", *decoded(road, smooth), [{} for _ in batch])
    if "interpolation" in plan.rows:
        smooth = road.interpolation(keys, road.encode(real), plan.fps, plan.sampling["interpolation"])
        smooth = within(smooth, smooth_real.shape[1])
        frames, finite = decoded(road, smooth)
        middle = np.arange(smooth_real.shape[1]) % plan.factor != 0
        rebuilt = road.decode(road.encode(smooth_real))
        blended = np.stack([blend(clip, plan.factor) for clip in real])
        # The autoencoder's own loss on these frames is the most that the stage could reach.
        rivals = {"middle": frames, "middle_blended": blended, "middle_reconstructed": rebuilt}
        near = [
            {name: psnr(clips[i][middle], smooth_real[i][middle]) for name, clips in rivals.items()}
            for i in range(len(batch))
        ]
        _note(made, "interpolation", frames, finite, near, smooth_real)
    return made


def within(smooth: Tensor, count: int) -> Tensor:
    """The middle `count` frames of latents [B,C,T,H,W]: those from the first given frame to the last."""
    aside = (smooth.shape[2] - count) // 2
    return smooth[:, :, aside : aside + count]


def blend(clip: np.ndarray, factor: int) -> np.ndarray:
    """Frames between the given uint8 [T,S,S,3] by linear mixing of neighbours: uint8 [(T-1)*factor+1,S,S,3]."""
    place = np.arange((len(clip) - 1) * factor + 1) / factor
    before = np.floor(place).astype(int)
    weight = (place - before)[:, None, None, None]
    after = clip[np.minimum(before + 1, len(clip) - 1)]
    return ((1 - weight) * clip[before] + weight * after + 0.5).astype(np.uint8)


def decoded(road: Road, latents: Tensor) -> tuple[np.ndarray, list[bool]]:
    """Frames uint8 [B,T,S,S,3], and whether each sample's latents were finite."""
    finite = torch.isfinite(latents).flatten(1).all(1).tolist()
    return road.decode(torch.nan_to_num(latents, 0.0, 0.0, 0.0)), finite


def _note_video(road: Road, made: list[Measured], row: str, clip: Tensor, first: Tensor) -> None:
    frames, finite = decoded(road, clip)
    given, _ = decoded(road, first)  # what the stage was given, so that the autoencoder's loss is not counted again
    near = [{"first_frame": psnr(a[0], b[0])} for a, b in zip(frames, given, strict=True)]
    _note(made, row, frames, finite, near)


def _note(
    made: list[Measured],
    row: str,
    frames: np.ndarray,
    finite: list[bool],
    near: list[dict[str, float]],
    above: np.ndarray | None = None,
) -> None:
    """Let the reader look at each sample; what is not finite shows nothing."""
    for i, (measured, clip) in enumerate(zip(made, frames, strict=True)):
        seen: dict[str, str | None]
        if row == "image":
            picture = read_image(clip[0])
            seen, consistent = {name: getattr(picture, name).value for name in IMAGE_ATTRIBUTES}, True
        else:
            reading = read(clip)
            seen, consistent = reading.values(), bool(reading.consistent)
        if not finite[i]:
            seen, consistent = dict.fromkeys(seen), False
        measured.rows[row] = {"read": seen, "consistent": consistent, "finite": finite[i], "psnr": near[i]}
        strips = [strip(clip)] if above is None else [strip(above[i]), strip(clip)]
        measured.pictures[row] = np.concatenate(strips)


def strip(clip: np.ndarray) -> np.ndarray:
    """Frames spread over a clip, side by side; a single picture at twice its size, so that words fit below it."""
    if len(clip) == 1:
        return clip[0].repeat(2, axis=0).repeat(2, axis=1)
    return np.concatenate([clip[round(i)] for i in np.linspace(0, len(clip) - 1, STRIP)], axis=1)


def record(prompt: Prompt, measured: Measured) -> dict[str, Any]:
    """A finished sample as JSON."""
    told = {"split": prompt.split, "number": prompt.number, "prompt": prompt.text}
    return {**told, "truth": asdict(prompt.combination), "rows": measured.rows}
