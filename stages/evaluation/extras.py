"""What stands beside the road, judged on the same prompts: for each such stage its rows and what makes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from stages.evaluation.classifier import GUIDED, LEVELS, classifier_problem, classifier_rows
from stages.evaluation.pictures import CONTROLLED, control_rows, prompted_rows, upscale_rows
from stages.evaluation.questions import Prompt
from stages.evaluation.road import Measured, Plan, Road
from videodiff.model import Model


@dataclass(frozen=True)
class Extra:
    """A stage beside the road, which needs autoencoder, text and image stage too. make: (road, plan, batch, real clips,
    measured) adds the rows to what is measured of each prompt. problem: why a model can't be judged, None where it
    can."""

    rows: tuple[str, ...]
    make: Callable[[Road, Plan, Sequence[Prompt], np.ndarray, list[Measured]], None]
    problem: Callable[[Model], str | None] = lambda model: None


EXTRA_STAGES: dict[str, Extra] = {
    "classifier": Extra((*LEVELS, *GUIDED), classifier_rows, classifier_problem),
    "control": Extra(tuple(CONTROLLED), control_rows),
    "image_prompt": Extra(("image_prompt",), prompted_rows),
    "upscale": Extra(("upscale",), upscale_rows),
}
EXTRA_NEEDS = {name: ("autoencoder", "text", "image", name) for name in EXTRA_STAGES}


def measure_extras(road: Road, plan: Plan, batch: Sequence[Prompt], real: np.ndarray, made: list[Measured]) -> None:
    """The rows of the plan that belong to stages beside the road, added to `made`; real: uint8 [B,T,S,S,3]."""
    for extra in EXTRA_STAGES.values():
        if set(extra.rows) & set(plan.rows):
            extra.make(road, plan, batch, real, made)
