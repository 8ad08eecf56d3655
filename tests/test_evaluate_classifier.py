"""Rows of what stands beside the road: when they are planned, and that they say what is so."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_guides import described

from stages.evaluation.classifier import GUIDED, classifier_rows, classifier_scale_for
from stages.evaluation.command import STAGE_ROWS, plan_for
from stages.evaluation.extras import EXTRA_STAGES
from stages.evaluation.questions import WorldQuestions
from stages.evaluation.road import Measured
from stages.evaluation.statistics import ROWS, right
from stages.guides import classifier_part
from stages.pipeline import Pipeline
from videodiff.errors import UserError
from videodiff.model import Model


def test_a_classifier_is_judged_where_there_is_one(toy_model: Path, toy_classifier: Path, tmp_path: Path) -> None:
    rows = EXTRA_STAGES["classifier"].rows
    assert all(row in ROWS for extra in EXTRA_STAGES.values() for row in extra.rows)
    every, skipped = plan_for(Model.load(toy_classifier), "all", 0)
    road = (row for stage in STAGE_ROWS.values() for row in stage)
    assert every.rows == ("real", "real_smooth", *road, *rows)
    assert not skipped
    assert plan_for(Model.load(toy_classifier), "classifier", 0)[0].rows == ("real", *rows)
    plain, skipped = plan_for(Model.load(toy_model), "all", 0)
    assert not set(plain.rows) & set(rows)
    assert not skipped
    with pytest.raises(UserError, match="holds no classifier"):
        plan_for(Model.load(toy_model), "classifier", 0)
    strange = Model.load(described(toy_classifier, tmp_path / "strange", classifier={"attribute": "form"}))
    plan, skipped = plan_for(strange, "all", 0)
    assert plan.rows == plain.rows
    assert "form" in skipped["classifier"]
    with pytest.raises(UserError, match="form"):
        plan_for(strange, "classifier", 0)
    assert classifier_scale_for(plain, None) is None
    assert (classifier_scale_for(every, None), classifier_scale_for(every, 3.0)) == (1.0, 3.0)
    with pytest.raises(UserError, match="--classifier-scale"):
        classifier_scale_for(plain, 3.0)


def test_the_rows_tell_at_which_noise_a_classifier_is_right(toy_classifier: Path) -> None:
    pipeline, questions = Pipeline(Model.load(toy_classifier)), WorldQuestions(3, 0, 0)
    batch = questions.prompts
    part = classifier_part(pipeline.model)
    truth = torch.tensor([part.classes.index(prompt.combination.shape) for prompt in batch])

    def oracle(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Right below time 400, of the same mind everywhere: its gradient leads nowhere."""
        answer = truth if time[0] < 400 else (truth + 1) % 4
        return F.one_hot(answer, 4) + 0 * x.flatten(1).sum(1, keepdim=True)

    def rows(scale: float) -> list[Measured]:
        plan = replace(plan_for(pipeline.model, "classifier", 0)[0], classifier_scale=scale)
        made = [Measured() for _ in batch]
        real = np.stack([questions.clip(prompt, plan.clips) for prompt in batch])
        classifier_rows(pipeline, plan, batch, real, made)
        return made

    def differs(made: list[Measured]) -> list[bool]:
        unguided, guided = ([measured.pictures[row] for measured in made] for row in GUIDED)
        return [not np.array_equal(a, b) for a, b in zip(unguided, guided, strict=True)]

    assert all(differs(rows(50.0)))
    pipeline.__dict__["classifier"] = oracle
    made = rows(50.0)
    assert not any(differs(made))
    for prompt, measured in zip(batch, made, strict=True):
        verdicts = {row: right(result, vars(prompt.combination))["shape"] for row, result in measured.rows.items()}
        told = [verdicts[f"classifier_{level}"] for level in ("clean", "quarter", "half", "noisy")]
        assert told == [True, True, False, False]
