"""The rows beside the road: a control that is followed or not, a picture that is enlarged truly or not."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from test_evaluate import IDENTITY, PLAN, Oracle, shares
from tiny_stages import with_extras

from data_pipeline.world import Scene, render
from data_pipeline.world_captions import parse
from data_pipeline.world_reader import read_image
from stages.evaluation.command import Request, main, plan_for
from stages.evaluation.judging import Job, evaluate
from stages.evaluation.measures import Gauge
from stages.evaluation.questions import WorldQuestions
from stages.evaluation.sheets import table
from stages.upscale import enlarge
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.parts import Sampling

QUIET = Console(quiet=True)
ROWS = ("control", "control_other", "image_prompt", "upscale")
BESIDE = replace(PLAN, rows=ROWS, enlarged=2, sampling={**PLAN.sampling, "upscale": Sampling()})


class Follower(Oracle):
    """Draws the picture's shape at its place, in the prompt's colour; enlarges as well as interpolation can."""

    def controlled_image(self, keys, pictures, scale, sampling) -> torch.Tensor:
        clips = []
        for key, picture in zip(keys, pictures, strict=True):
            seen, told = read_image(picture), parse(key.prompt)
            given = (told["colour"], seen.shape.value, seen.size.value, told["background"], "still")
            clips.append(render(Scene(*given, seen.x, seen.y), 64, 1, 8.0))
        return self.encode(np.stack(clips))

    def prompted_image(self, keys, pictures, sampling) -> torch.Tensor:
        return pictures

    def upscale(self, key, frames, sampling) -> np.ndarray:
        return enlarge(torch.from_numpy(frames), 2, "bicubic").numpy()


class Deaf(Follower):
    """Does not look at the control picture; gives numbers that are not finite where it should enlarge."""

    def controlled_image(self, keys, pictures, scale, sampling) -> torch.Tensor:
        return self.image(keys, sampling)

    def prompted_image(self, keys, pictures, sampling) -> torch.Tensor:
        return pictures.roll(1, dims=0)

    def upscale(self, key, frames, sampling) -> None:
        return None


def judge(road: Oracle, folder: Path) -> dict:
    report = evaluate(Job(road, BESIDE, WorldQuestions(3, 2, 5), Gauge(), IDENTITY, folder), QUIET)
    assert report is not None
    return report


def test_pictures_need_the_first_frames_of_real_clips_alone() -> None:
    whole = (PLAN.frames - 1) * PLAN.factor + 1
    assert whole > 1
    for rows, count in (
        (("real", *ROWS), 1),
        (("real", "image"), 1),
        (("real",), whole),
        (("real", "video_real"), whole),
    ):
        assert replace(BESIDE, rows=rows).clips.count == count, rows


def test_a_follower_is_told_from_one_who_is_deaf(tmp_path: Path) -> None:
    report = judge(Follower(), tmp_path / "follower")
    for row in ROWS:
        assert set(shares(report, row).values()) == {1.0}, row
        assert (tmp_path / "follower" / f"{row}.png").is_file()
    assert [e["split"] for e in report["rows"] if e["row"] == "control"] == ["seen", "held_out", "held_out_pair"]
    entry = next(e for e in report["rows"] if e["row"] == "control_other")
    assert entry["measures"]["controlled"]["mean"] < 1  # percent of the side
    assert entry["measures"]["free"]["mean"] > 5
    near = next(e for e in report["rows"] if e["row"] == "upscale")["measures"]
    for given in ("", "rebuilt_"):  # the oracle's autoencoder loses nothing
        assert near[f"{given}upscaled"] == near[f"{given}bicubic"]
        assert 20 < near[f"{given}bilinear"]["mean"] < near[f"{given}bicubic"]["mean"]
    assert table(report["rows"]).row_count == len(report["rows"]) == 12
    json.dumps(report, allow_nan=False)

    report = judge(Deaf(), tmp_path / "deaf")
    other = shares(report, "control_other")
    assert other["shape"] == 0  # each prompt's picture showed another one
    assert other["colour"] == 1
    entry = next(e for e in report["rows"] if e["row"] == "control")
    assert entry["measures"]["controlled"]["mean"] == entry["measures"]["free"]["mean"]
    assert shares(report, "image_prompt")["all"] == 0  # each shows the picture of another prompt
    assert set(shares(report, "upscale").values()) == {0.0}
    assert next(e for e in report["rows"] if e["row"] == "upscale")["not_finite"] == 3
    assert "upscaled" not in next(e for e in report["rows"] if e["row"] == "upscale")["measures"]


def test_the_command_judges_what_a_model_has(
    toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_extras(toy_model, tmp_path / "model")
    for stage, rows in (("control", ROWS[:2]), ("image_prompt", ROWS[2:3]), ("upscale", ROWS[3:])):
        main(Request(str(folder), stage, 1, 3, tmp_path / stage, 0))
        told = json.loads((tmp_path / stage / "evaluation.json").read_text())
        assert tuple(e["row"] for e in told["rows"]) == ("real", *rows)
        assert stage in capsys.readouterr().out
        with pytest.raises(UserError, match=f"holds no {stage} stage"):
            main(Request(str(toy_model), stage, 1, 3, tmp_path / "none", 0))
    plan, skipped = plan_for(Model.load(folder), "all", 0)
    assert plan.rows[-4:] == ROWS
    assert plan.enlarged == 2
    assert skipped == {}
    assert not set(ROWS) & set(plan_for(Model.load(toy_model), "all", 0)[0].rows)
