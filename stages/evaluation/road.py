"""One batch of prompts through the stages: what each makes, what the reader sees in it, how near it is to the truth.

B prompts, C latent channels, T frames, S frame side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from stages.evaluation.measures import CHANNELS, Gauge
from stages.evaluation.questions import Clips, Prompt
from stages.evaluation.worlds import seen_in
from stages.pipeline import SampleKey
from videodiff.parts import Sampling
from videodiff.video_io import symptoms

STRIP = 5  # frames of a clip that its picture shows
LOW_RATE = ("real", "autoencoder", "video_real", "video_generated")
SMOOTH = ("real_smooth", "interpolation", "whole")
MOVING = {*LOW_RATE, *SMOOTH} - {"real"}  # rows of clips


class Road(Protocol):
    """What is judged: `stages.pipeline.Pipeline`, or anything that answers alike."""

    def encode(self, frames: np.ndarray) -> Tensor: ...
    def decode(self, latents: Tensor) -> np.ndarray: ...
    def decode_checked(self, latents: Tensor) -> tuple[np.ndarray, list[bool]]: ...
    def image(self, keys: Sequence[SampleKey], sampling: Sampling) -> Tensor: ...
    def video(self, keys: Sequence[SampleKey], first: Tensor, fps: float, sampling: Sampling) -> Tensor: ...
    def interpolation(self, keys: Sequence[SampleKey], clip: Tensor, fps: float, sampling: Sampling) -> Tensor: ...
    def controlled_image(
        self, keys: Sequence[SampleKey], pictures: np.ndarray, scale: float, sampling: Sampling
    ) -> Tensor: ...
    def prompted_image(self, keys: Sequence[SampleKey], pictures: Tensor, sampling: Sampling) -> Tensor: ...
    def upscale(self, key: SampleKey, frames: np.ndarray, sampling: Sampling) -> np.ndarray | None: ...


@dataclass(frozen=True)
class Plan:
    """What is measured: the rows; clips of `frames` x `size` x `size` at `fps`, `factor` times as fast when smooth."""

    rows: tuple[str, ...]
    size: int
    frames: int
    fps: float
    factor: int
    seed: int
    sampling: dict[str, Sampling]
    enlarged: int = 1  # gain in height and width of the upscale stage
    classifier_scale: float | None = None  # of the rows of a classifier, where there are any
    batch: int = 8  # prompts at a time: batches change results by rounding

    @property
    def clips(self) -> Clips:
        """The real clips that the rows need, at the smooth rate; where all rows are of pictures, the first frames."""
        pictures = set(self.rows) > {"real"} and not MOVING & set(self.rows)  # alone, `real` is of clips
        count = 1 if pictures else (self.frames - 1) * self.factor + 1
        return Clips(self.size, count, self.fps * self.factor)

    @property
    def lengths(self) -> dict[str, int]:
        """Of each row of the road how many frames its clips have."""
        whole = self.clips.count
        lengths = {**dict.fromkeys(LOW_RATE, min(self.frames, whole)), "image": 1, **dict.fromkeys(SMOOTH, whole)}
        return {row: lengths[row] for row in self.rows if row in lengths}


@dataclass
class Row:
    """What a row has made of a batch: frames uint8 [B,T,S,S,3] at `fps`, and whether each is finite. near: measures
    that only this row has, of each. beside: what is shown above it."""

    frames: np.ndarray
    finite: list[bool]
    fps: float
    near: list[dict[str, float | None]]
    beside: np.ndarray | None = None


@dataclass
class Measured:
    """Row -> what the reader saw and what was measured (JSON), and row -> a picture of it."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


def measure(
    road: Road, plan: Plan, batch: Sequence[Prompt], real: np.ndarray, gauge: Gauge
) -> tuple[list[Measured], dict[str, Row]]:
    """All rows of the plan's road for a batch of prompts, in their order, and the frames that they were read from.

    real: uint8 [B,T,S,S,3], the clips that `plan.clips` describes.
    """
    made = [Measured() for _ in batch]
    rows = dict(_rows(road, plan, batch, real, gauge))
    for name, row in rows.items():
        for i, (measured, prompt, clip) in enumerate(zip(made, batch, row.frames, strict=True)):
            seen, consistent = _reading(prompt, clip, row.finite[i])
            # What is not finite was decoded from zeros: it shows nothing, and is like nothing.
            measures = {**row.near[i], **gauge.measures(clip, row.fps)} if row.finite[i] else {}
            measured.rows[name] = {
                "read": seen, "consistent": consistent, "finite": row.finite[i], "measures": measures,
                # Whether a clip should move is told by the real clips, of which the same is asked.
                "symptoms": symptoms(clip, motion_expected=True) if row.finite[i] else ["not finite"],
            }  # fmt: skip
            strips = [strip(clip)] if row.beside is None else [strip(row.beside[i]), strip(clip)]
            measured.pictures[name] = np.concatenate(strips)
    return made, rows


def _rows(
    road: Road, plan: Plan, batch: Sequence[Prompt], smooth_real: np.ndarray, gauge: Gauge
) -> Iterator[tuple[str, Row]]:
    keys = [SampleKey(plan.seed, prompt.text, prompt.turn) for prompt in batch]
    real, wanted, nothing = smooth_real[:, :: plan.factor], set(plan.rows), [{} for _ in batch]
    smooth_fps = plan.fps * plan.factor
    if "real" in wanted:
        yield "real", Row(real, [True] * len(batch), plan.fps, nothing)
    if "real_smooth" in wanted:
        yield "real_smooth", Row(smooth_real, [True] * len(batch), smooth_fps, nothing)
    if "autoencoder" in wanted:
        latents = road.encode(real)
        frames, finite = decoded(road, latents)
        near = gauge.likeness("reconstruction", frames, real)
        for told, latent in zip(near, latents, strict=True):  # what the next stages see: 0 and 1, were it perfect
            told |= {"latent_mean": float(latent.mean()), "latent_deviation": float(latent.std())}
            for channel, values in enumerate(latent[:CHANNELS]):
                told |= {f"latent_mean_{channel}": float(values.mean())}
                told |= {f"latent_deviation_{channel}": float(values.std())}
        yield "autoencoder", Row(frames, finite, plan.fps, near, real)
    if "video_real" in wanted:
        first = road.encode(real[:, :1])
        clip = road.video(keys, first, plan.fps, plan.sampling["video"])
        yield "video_real", _video(road, plan, clip, first, gauge)
    if {"image", "video_generated", "whole"} & wanted:
        first = road.image(keys, plan.sampling["image"])
        if "image" in wanted:
            yield "image", Row(*decoded(road, first), plan.fps, nothing)
    if {"video_generated", "whole"} & wanted:
        clip = road.video(keys, first, plan.fps, plan.sampling["video"])
        if "video_generated" in wanted:
            yield "video_generated", _video(road, plan, clip, first, gauge)
    if "whole" in wanted:
        smooth = within(road.interpolation(keys, clip, plan.fps, plan.sampling["interpolation"]), smooth_real.shape[1])
        yield "whole", Row(*decoded(road, smooth), smooth_fps, nothing)
    if "interpolation" in wanted:
        smooth = road.interpolation(keys, road.encode(real), plan.fps, plan.sampling["interpolation"])
        frames, finite = decoded(road, within(smooth, smooth_real.shape[1]))
        middle = np.arange(smooth_real.shape[1]) % plan.factor != 0
        # The autoencoder's own loss on these frames is the most that the stage could reach.
        rivals = {"middle": frames, "middle_rebuilt": road.decode(road.encode(smooth_real))}
        # Blending what the stage is given, and (as no model can) the real frames before the autoencoder.
        given = rivals["middle_rebuilt"][:, :: plan.factor]
        rivals["middle_rebuilt_blended"] = np.stack([blend(clip, plan.factor) for clip in given])
        rivals["middle_blended"] = np.stack([blend(clip, plan.factor) for clip in real])
        if (moved := gauge.by_flow(real, plan.factor)) is not None:
            rivals["middle_by_flow"] = moved
        found = [gauge.likeness(name, clips[:, middle], smooth_real[:, middle]) for name, clips in rivals.items()]
        near = [{name: value for told in each for name, value in told.items()} for each in zip(*found, strict=True)]
        yield "interpolation", Row(frames, finite, smooth_fps, near, smooth_real)


def _video(road: Road, plan: Plan, clip: Tensor, first: Tensor, gauge: Gauge) -> Row:
    frames, finite = decoded(road, clip)
    given, _ = decoded(road, first)  # what the stage was given, so that the autoencoder's loss is not counted again
    return Row(frames, finite, plan.fps, gauge.likeness("first_frame", frames[:, :1], given))


def _reading(prompt: Prompt, clip: np.ndarray, finite: bool) -> tuple[dict[str, str | None], bool]:
    """What the reader sees in frames uint8 [T,S,S,3] of the built-in world, and whether it is the same in each of them;
    what is not finite shows nothing. Of other data nothing is read."""
    if prompt.combination is None:
        return {}, finite
    seen, consistent = seen_in(prompt.combination, clip)
    return (seen if finite else dict.fromkeys(seen)), finite and consistent


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
    """Frames uint8 [B,T,S,S,3], and whether each sample was finite, in latents and when they were decoded."""
    given = torch.isfinite(latents).flatten(1).all(1).tolist()
    frames, finite = road.decode_checked(torch.nan_to_num(latents, 0.0, 0.0, 0.0))
    return frames, [a and b for a, b in zip(given, finite, strict=True)]


def strip(clip: np.ndarray) -> np.ndarray:
    """Frames spread over a clip, side by side; a single picture at twice its size, so that words fit below it."""
    if len(clip) == 1:
        return clip[0].repeat(2, axis=0).repeat(2, axis=1)
    return np.concatenate([clip[round(i)] for i in np.linspace(0, len(clip) - 1, STRIP)], axis=1)


def record(prompt: Prompt, measured: Measured) -> dict[str, Any]:
    """A finished sample as JSON; a measure that is not finite is none."""
    for told in measured.rows.values():
        told["measures"] = {
            name: value if value is None or math.isfinite(value) else None for name, value in told["measures"].items()
        }
    told = {"split": prompt.split, "number": prompt.number, "prompt": prompt.text}
    truth = None if prompt.combination is None else asdict(prompt.combination)
    return {**told, "truth": truth, "rows": measured.rows}
