"""`videodiff compare` on evaluations whose numbers are drawn: what it calls better, and what it can't tell."""

import json
from pathlib import Path

import numpy as np
import pytest

from stages.evaluation.compare import _apart, compared, main
from stages.evaluation.kept import Samples

PROTOCOL = {"rows": ["real", "video_generated"], "model": "m", "weights": "ema", "features": []}
COUNT = 60
DRAWN = np.random.default_rng(5)
REAL = DRAWN.normal(5.0, 1.0, COUNT)  # motion of the real clips


def finished(out: Path, motion: np.ndarray, lpips: np.ndarray) -> Path:
    samples = Samples(out, PROTOCOL)
    for number in range(COUNT):
        row = {"read": {}, "consistent": True, "finite": True}
        made = {**row, "measures": {"motion": motion[number], "first_frame_lpips": lpips[number]}}
        if np.isnan(lpips[number]):
            made |= {"finite": False, "measures": {}}
        rows = {"real": {**row, "measures": {"motion": REAL[number]}}, "video_generated": made}
        samples.keep({"split": "data", "number": number, "prompt": "a", "truth": None, "rows": rows})
    (out / "evaluation.json").write_text(json.dumps({"rows": []}))
    return out


def test_videos_that_are_not_finite_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = finished(tmp_path / "whole", REAL, DRAWN.normal(0.3, 0.05, COUNT))
    near = np.where(np.arange(COUNT) < 12, np.nan, DRAWN.normal(0.2, 0.05, COUNT))
    main(whole, finished(tmp_path / "sick", REAL, near), None)
    told = {line["figure"]: line for line in compared(whole, tmp_path / "sick")}
    sick = told["videos that are not finite, %"]
    assert (sick["first"], sick["second"], sick["verdict"], sick["not_finite"]) == (0.0, 20.0, "worse", [0, 12])
    assert {line["n"] for line in told.values()} == {COUNT}
    said = " ".join(capsys.readouterr().out.split())
    assert "12 of the second are not finite; each counts as the worst that either made" in said


def test_shares_too_few_to_halve_are_told_by_the_intervals_of_each() -> None:
    """As recalls at 10 of 16 to 21 captions are: 9 of 10 against 3 of 10 is the method's own example of equal sizes."""
    line = _apart(0.3, 0.9, 10)
    assert line["interval"] == pytest.approx([0.1705, 0.8090], abs=1e-4)
    assert line["verdict"] == "better"
    assert _apart(0.9, 0.3, 10)["verdict"] == "worse"
    same = _apart(1.0, 1.0, 18)
    assert (same["difference"], same["verdict"], same["more"]) == (0, "can't tell", 4)
    assert same["interval"][0] < -0.1 < 0.1 < same["interval"][1]


def verdicts(first: Path, second: Path) -> dict[str, str]:
    return {line["figure"].split(",")[0]: line["verdict"] for line in compared(first, second)}


def test_what_should_be_like_the_real_clips_is_judged_by_its_distance_from_them(tmp_path: Path) -> None:
    even = np.full(COUNT, 0.2)
    alike = finished(tmp_path / "alike", DRAWN.normal(5.0, 1.0, COUNT), even)
    fast = finished(tmp_path / "fast", DRAWN.normal(7.0, 1.0, COUNT), even)
    slow = finished(tmp_path / "slow", DRAWN.normal(3.5, 1.0, COUNT), even)
    middle = finished(tmp_path / "middle", np.full(COUNT, 5.0), even)
    assert verdicts(fast, alike)["motion"] == "better"  # less of it
    assert verdicts(slow, alike)["motion"] == "better"  # more of it
    assert verdicts(alike, fast)["motion"] == "worse"
    assert verdicts(fast, slow)["motion"] == "better"  # 1.5 off on the other side, and not 2
    assert verdicts(alike, middle)["motion"] == "can't tell"  # always the same clip is no gain
    (line,) = (line for line in compared(alike, fast) if line["figure"].startswith("motion"))
    assert line["second"] == pytest.approx(200, abs=50)  # percent of the diagonal: 100 times a share of 2
    assert line["interval"][0] < 100 * (2 - 0) < line["interval"][1]


def test_truth_may_be_known_of_some_and_a_rank_may_have_none(tmp_path: Path) -> None:
    for name in ("a", "b"):
        samples = Samples(tmp_path / name, PROTOCOL)
        for number in range(20):
            row = {"read": {"colour": "red"}, "consistent": True, "finite": True, "measures": {"unsteadiness": number}}
            truth = {"colour": "red"} if number % 2 else None
            told = {"split": "data", "number": number, "prompt": "a", "truth": truth}
            samples.keep({**told, "rows": {"real": row, "video_generated": row}})
        (tmp_path / name / "evaluation.json").write_text(json.dumps({"rows": []}))
        (tmp_path / name / "samples-1.jsonl").touch()
    counts = {line["figure"]: line["n"] for line in compared(tmp_path / "a", tmp_path / "b")}
    assert (counts["colour right, %"], counts["unsteadiness, grey levels"]) == (10, 20)


def test_less_is_better_where_less_is_meant(tmp_path: Path) -> None:
    far = finished(tmp_path / "far", REAL, DRAWN.normal(0.3, 0.05, COUNT))
    near = finished(tmp_path / "near", REAL, DRAWN.normal(0.2, 0.05, COUNT))
    told = verdicts(far, near)
    assert told == {"first frame LPIPS": "better", "motion": "can't tell"}
