"""A classifier of noisy latents, judged: what it says of real pictures, and what becomes of images that it guides.

B prompts, C latent channels, S picture size, N noise levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data_pipeline.world import ATTRIBUTES
from data_pipeline.world_reader import read_image
from stages.evaluation.questions import Prompt
from stages.evaluation.road import Measured, Plan, Road, decoded, strip
from stages.evaluation.worlds import IMAGE_ATTRIBUTES
from stages.guides import Guides, check_classifier, classifier_part
from stages.pipeline import Pipeline, SampleKey, adjusted
from videodiff.diffusion.guidance import ClassifierGuidance, class_logits
from videodiff.diffusion.prediction import add_noise
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.seeding import normals

# Row -> share of the noise levels at which the classifier is asked.
LEVELS = {"classifier_clean": 0.0, "classifier_quarter": 0.25, "classifier_half": 0.5, "classifier_noisy": 0.75}
GUIDED = ("unguided", "guided")


def classifier_problem(model: Model) -> str | None:
    """The reader must know what the classifier tells, and the classifier fit the image stage beside it."""
    part = classifier_part(model)
    if part.attribute not in IMAGE_ATTRIBUTES or set(part.classes) != set(ATTRIBUTES[part.attribute]):
        return (
            f"{model.folder}: the classifier tells {part.attribute} ({', '.join(part.classes)}), the built-in world's "
            f"pictures are read for {', '.join(IMAGE_ATTRIBUTES)}; judge the other stages by name"
        )
    try:
        check_classifier(model, model)
    except UserError as error:
        return str(error)
    return None


def classifier_scale_for(plan: Plan, asked: float | None) -> float | None:
    """The scale that a plan with a classifier's rows has; UserError where one is asked for and there are none."""
    if "guided" in plan.rows:
        return ClassifierGuidance().scale if asked is None else asked
    if asked is not None:
        raise UserError("--classifier-scale: no classifier is judged here; leave it out, or name a model that has one")
    return None


@torch.no_grad()
def classifier_rows(road: Road, plan: Plan, batch: Sequence[Prompt], real: np.ndarray, made: list[Measured]) -> None:
    """What the classifier says of real first frames under more and more noise, and what the reader finds in images
    made without any text, left alone and guided to the class that the prompt would have asked for."""
    assert isinstance(road, Pipeline), "only a model has a classifier"
    part = classifier_part(road.model)
    truth = [getattr(prompt.combination, part.attribute) for prompt in batch]
    x0 = road.encode(real[:, :1])
    shape = tuple(x0.shape[1:])
    eps = torch.cat([normals(shape, plan.seed, f"classifier-{p.split}", [p.number]) for p in batch]).to(x0)
    for row, level in LEVELS.items():
        t = torch.full((len(batch),), round(level * part.schedule.num_steps), device=x0.device)
        x_t = add_noise(x0, eps, t, part.schedule)
        logits = class_logits(road.classifier, x_t, t)
        found: list[str | None] = [part.classes[place] for place in logits.argmax(1).tolist()]
        frames, _ = decoded(road, x_t)  # as much as can be seen through the noise
        _note(made, row, part.attribute, found, torch.isfinite(logits).all(1).tolist(), frames)
    keys = [SampleKey(plan.seed, prompt.text, prompt.turn) for prompt in batch]
    sampling = adjusted(plan.sampling["image"], text=0.0)
    for row, scale in zip(GUIDED, (0.0, plan.classifier_scale or 0.0), strict=True):
        guides = Guides([key.prompt for key in keys], road, ClassifierGuidance(scale=scale), truth)
        frames, finite = decoded(road, road.image(keys, sampling, steering=guides))
        read = [getattr(read_image(clip[0]), part.attribute).value for clip in frames]
        _note(made, row, part.attribute, read, finite, frames)


def _note(
    made: list[Measured], row: str, attribute: str, found: list[str | None], finite: list[bool], frames: np.ndarray
) -> None:
    """Keep what was found in each sample, and a picture; what is not finite shows nothing."""
    for measured, value, whole, clip in zip(made, found, finite, frames, strict=True):
        read = {attribute: value if whole else None}
        measured.rows[row] = {"read": read, "consistent": whole, "finite": whole, "measures": {}}
        measured.pictures[row] = strip(clip)
