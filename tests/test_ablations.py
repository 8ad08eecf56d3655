"""The ablations: each way is a recipe that trains, and the table tells what its clips were."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablations
from benchmarks.ablations import BASE, RECIPE, WAYS
from stages.assemble import load_stage
from stages.demo_model import SHARDS

GIVEN = argparse.Namespace(model="demo", shards=Path("shards"), steps=10, batch=4, runs=Path("runs"))
TRUTH = {"colour": "red", "motion": "left"}


def configuration(way: str) -> dict[str, Any]:
    told = load_stage(RECIPE, ablations.overrides(way, GIVEN)).model_dump(mode="json")
    told["run"].pop("dir")
    return told


def sample(colour: str, motion: str) -> dict[str, Any]:
    read = {"colour": colour, "motion": motion}
    row = {"read": read, "consistent": True, "measures": {"first_frame_psnr": 30.0}}
    return {"truth": TRUTH, "rows": {ablations.ROW: row}}


@pytest.mark.parametrize("way", [way for way in WAYS if way != BASE])
def test_a_way_is_another_configuration_than_the_one_it_is_held_against(way: str) -> None:
    assert WAYS[way].against in WAYS
    assert WAYS[way].shards in SHARDS
    if WAYS[way].guidance is None:
        assert configuration(way) != configuration(WAYS[way].against)
    else:
        guidance = load_stage(RECIPE).sampling.guidance  # type: ignore[union-attr]
        assert guidance.model_copy(update=WAYS[way].guidance) != guidance


def test_the_table_tells_shares_and_differences_in_pairs(tmp_path: Path) -> None:
    """Of 100 prompts the recipe has all, `true_captions` 60 and `text_everywhere` 20 of those; the motion is right."""
    keys = [("train" if number < 50 else "held_out_pair", number) for number in range(100)]
    right = {BASE: 100, "true_captions": 60, "text_everywhere": 20}
    judged = {
        way: {key: sample("red" if key[1] % 50 < count / 2 else "blue", "left") for key in keys}
        for way, count in right.items()
    }
    for way in right:
        (tmp_path / way).mkdir()
        lines = [json.dumps({"seconds": seconds}) for seconds in (1.0, 2.0, 9.0)]
        (tmp_path / way / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    head, _, *lines = ablations.rows(judged, tmp_path)
    cells = {line.split("|")[1].strip().replace(" ", "_"): [c.strip() for c in line.split("|")[2:-1]] for line in lines}
    names = [name.strip() for name in head.split("|")[2:-1]]
    assert list(cells) == list(right)
    for way, count in right.items():
        told = dict(zip(names, cells[way], strict=True))
        for split in ("seen", "held out pair"):
            assert told[f"motion, {split}, %"].startswith("100.0 (")
            assert told[f"all, {split}, %"].startswith(f"{count}.0 (")
        assert told["first frame, dB"] == "30.0"
        assert told["s a step"] == "2.00"
    for way, other in (("true_captions", BASE), ("text_everywhere", "true_captions")):
        told = dict(zip(names, cells[way], strict=True))
        assert told["against"] == other.replace("_", " ")
        assert told["all: points"].startswith("-40.0 (-")
        assert told["verdict"] == "worse"
