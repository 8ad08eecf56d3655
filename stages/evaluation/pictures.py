"""What stands beside the road, judged: does an image follow the outlines, or show the look, that it was given; is a
picture enlarged truly.

Rows add to what `road.measure` made of a batch. S frame side in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from data_pipeline.world import SHAPES, Scene, render, sample_scene
from data_pipeline.world_reader import FrameReading, read_image
from stages.evaluation.questions import Prompt
from stages.evaluation.road import Measured, Plan, Road, decoded, strip
from stages.evaluation.worlds import IMAGE_ATTRIBUTES
from stages.pipeline import SampleKey
from stages.upscale import enlarge, shrink
from videodiff.metrics.pictures import clip_psnr

CONTROLLED = {"control": False, "control_other": True}  # row -> whether the picture shows another shape than the prompt


def _scene(prompt: Prompt, plan: Plan, another_shape: bool = False) -> Scene:
    """A picture's scene of the prompt, its place keyed apart from those of training and of the prompt's own clip."""
    shape = prompt.combination.shape
    if another_shape:
        shape = SHAPES[(SHAPES.index(shape) + 1 + prompt.number % (len(SHAPES) - 1)) % len(SHAPES)]
    combination = replace(prompt.combination, shape=shape, motion="still")
    return sample_scene(combination, "evaluation picture", plan.seed, prompt.split, prompt.number)


def control_rows(road: Road, plan: Plan, batch: Sequence[Prompt], real: np.ndarray, made: list[Measured]) -> None:
    """Images by the prompt and the outlines of a real picture at a place that the prompt does not name.

    Shape and place must be the picture's, also where the prompt says another shape; colour is in the prompt alone.
    """
    keys = _keys(plan, batch)
    free, free_finite = decoded(road, road.image(keys, plan.sampling["image"]))  # how far off chance puts it
    for row, another_shape in CONTROLLED.items():
        scenes = [_scene(prompt, plan, another_shape) for prompt in batch]
        pictures = np.stack([render(scene, plan.size, 1, plan.fps)[0] for scene in scenes])
        frames, finite = decoded(road, road.controlled_image(keys, pictures, 1.0, plan.sampling["image"]))
        for i, scene in enumerate(scenes):
            seen = read_image(frames[i, 0])
            off = {"controlled": _distance(seen, scene) if finite[i] else None}
            off["free"] = _distance(read_image(free[i, 0]), scene) if free_finite[i] else None
            truth = {**asdict(batch[i].combination), "shape": scene.shape}
            _note(made[i], row, seen, finite[i], off, truth=truth)
            made[i].pictures[row] = strip(np.concatenate([pictures[i], free[i, 0], frames[i, 0]], axis=1)[None])


def prompted_rows(road: Road, plan: Plan, batch: Sequence[Prompt], real: np.ndarray, made: list[Measured]) -> None:
    """Images that are told the first frame of each real clip, and no text: what is seen must be the same."""
    pictures = real[:, :1]
    told = road.prompted_image(_keys(plan, batch), road.encode(pictures), plan.sampling["image"])
    frames, finite = decoded(road, told)
    for i, measured in enumerate(made):
        _note(measured, "image_prompt", read_image(frames[i, 0]), finite[i], {})
        measured.pictures["image_prompt"] = strip(np.concatenate([pictures[i], frames[i]], axis=2))


def upscale_rows(
    road: Road, plan: Plan, batch: Sequence[Prompt], real_clips: np.ndarray, batch_made: list[Measured]
) -> None:
    """Large pictures, made small and enlarged again by the stage and by interpolation; and those that went through the
    autoencoder when they were small, as whatever is generated has."""
    for prompt, key, measured in zip(batch, _keys(plan, batch), batch_made, strict=True):
        real = render(_scene(prompt, plan), plan.size * plan.enlarged, 1, plan.fps)
        small = shrink(torch.from_numpy(real), plan.enlarged)
        rebuilt = torch.from_numpy(road.decode(road.encode(small.numpy()[None]))[0])
        blank = np.zeros_like(real)
        made, finite = {}, True
        for name, given in (("", small), ("rebuilt_", rebuilt)):
            frames = road.upscale(key, given.numpy(), plan.sampling["upscale"])
            made[f"{name}upscaled"] = blank if frames is None else frames
            made[f"{name}bilinear"] = enlarge(given, plan.enlarged).numpy()
            made[f"{name}bicubic"] = enlarge(given, plan.enlarged, "bicubic").numpy()
            finite = finite and frames is not None
        near = {name: None if clip is blank else clip_psnr(clip, real) for name, clip in made.items()}
        _note(measured, "upscale", read_image(made["rebuilt_upscaled"][0]), finite, near)
        shown = [made["rebuilt_bilinear"][0], made["rebuilt_upscaled"][0], real[0]]
        measured.pictures["upscale"] = np.concatenate(shown, axis=1)


def _keys(plan: Plan, batch: Sequence[Prompt]) -> list[SampleKey]:
    return [SampleKey(plan.seed, prompt.text, prompt.turn) for prompt in batch]


def _distance(seen: FrameReading, scene: Scene) -> float | None:
    """From the object's centre to the scene's, in percent of the frame side; None where no object is read."""
    if seen.shape.value is None:
        return None
    return 100 * float(np.hypot(seen.x - scene.x, seen.y - scene.y))


def _note(
    measured: Measured, row: str, seen: FrameReading, finite: bool, measures: Mapping[str, float | None], **more: Any
) -> None:
    """What the reader saw; what is not finite shows nothing."""
    read = {name: getattr(seen, name).value if finite else None for name in IMAGE_ATTRIBUTES}
    measured.rows[row] = {"read": read, "consistent": finite, "finite": finite, "measures": dict(measures), **more}
