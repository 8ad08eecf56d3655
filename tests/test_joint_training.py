"""Pictures and clips of several shapes in one run of a stage; stages of one shape refuse them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_shards import clip, picture, tar
from tiny_stages import ENGINE

from data_pipeline.shards import write_index, write_shard
from stages.assemble import train_stage
from videodiff.errors import UserError

BUCKETS = [{"frames": 4, "height": 32, "width": 32}, {"frames": 1, "height": 16, "width": 32}]


@pytest.fixture
def tree(tmp_path: Path, toy_model: Path) -> dict[str, Any]:
    write_shard(tmp_path / "clips" / "a.tar", [(f"c{n}", *clip(30 * n, 40, 40)) for n in range(4)])
    write_index(tmp_path / "clips", ["a.tar"], {})
    (tmp_path / "images").mkdir()
    members = [(f"i{n}.png", picture(50 * n, 40, 20)) for n in range(4)] + [(f"i{n}.txt", b"words") for n in range(4)]
    tar(tmp_path / "images" / "a.tar", sorted(members))
    shards = [{"shards": str(tmp_path / name)} for name in ("clips", "images")]
    return {
        "stage": "video", "model": str(toy_model), "engine": ENGINE,
        "run": {"dir": str(tmp_path / "run"), "steps": 4, "save_every": 4, "sample_every": 0},
        "data": {"shards": shards, "buckets": BUCKETS, "batch_size": 2, "frames": 4, "fps": 8, "size": 32,
                 "workers": 0, "prefetch": 0, "streams": 2},
    }  # fmt: skip


def run(tree: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text(json.dumps(tree))
    train_stage(path)


def test_a_stage_trains_on_both(tree: dict[str, Any], tmp_path: Path) -> None:
    run(tree, tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    kinds = [{key[0] for key in step["samples"]} for step in steps]
    assert sorted(map(sorted, kinds)) == [["c"], ["c"], ["i"], ["i"]]


def test_sizes_and_stages_that_do_not_fit_are_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["data"]["buckets"] = [{"frames": 4, "height": 36, "width": 32}]
    with pytest.raises(UserError, match=r"data\.buckets: 36 is not a multiple of 8"):
        run(tree, tmp_path)
    with pytest.raises(UserError, match=r"data\.buckets: this stage needs clips of one shape"):
        run({**tree, "stage": "interpolation", "factor": 3}, tmp_path)
