"""The model card says what the runs and the evaluation say."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import two_objects
from data_pipeline.data_config import DataConfig
from data_pipeline.shards import open_shards, write_world_shards
from stages.assemble import load_stage
from stages.demo_model import NEIGHBOURS, RUNS, SHARDS, card, encoded, neighbours
from videodiff import config as configs
from videodiff.resources import path as resource
from videodiff.training.run_folder import machine, record_machine
from videodiff.video_io import read_image, write_png

ROOT = Path(__file__).resolve().parents[1]
SLOW_TO_END = """
import signal, sys, time

def end(*_):
    time.sleep(2)
    open("saved", "w").close()
    sys.exit(130)

signal.signal(signal.SIGINT, end)
open("begun", "w").close()
time.sleep(60)
"""


def test_ctrl_c_lets_the_training_save(tmp_path: Path) -> None:
    """The parent waits for a child that takes two seconds to end well."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "__main__.py").write_text(SLOW_TO_END)
    call = "from stages import demo_model; demo_model.call_videodiff('train')"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {call}"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(60) == 130
    assert (tmp_path / "saved").exists()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Run folders as the trainings leave them."""
    for number, stage in enumerate(RUNS, 1):
        (tmp_path / stage).mkdir()
        records = [{"step": step, "loss": 10.0 * number, "seconds": 36.0} for step in range(1, 201)]
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        config = load_stage(resource(f"configs/demo/{stage}.yaml"), [f"data.batch_size={number}", "run.seed=70"])
        configs.save(config, tmp_path / stage / "config.yaml")
        record_machine(tmp_path / stage)
    return tmp_path


def test_the_card_states_recipe_and_figures(runs: Path, toy_model: Path) -> None:
    share = {"right": 3, "n": 4, "share": 0.75, "interval": [0.301, 0.954]}
    report = {
        "rows": [
            {"row": "image", "split": "held_out_pair", "n": 4, "shares": {"shape": share}, "measures": {}},
            {
                "row": "autoencoder",
                "split": "seen",
                "n": 4,
                "shares": {},
                "measures": {"reconstruction_psnr": {"mean": 35.25}},
            },
            {
                "row": "video_generated",
                "split": "held_out",
                "n": 40,
                "shares": {},
                "measures": {},
                "confusions": {
                    "motion": {"up": {"up": 12, "still": 8}, "left": {"left": 19, "up": 1}, "down": {}},
                },
            },
        ],
        "verdict": "The image stage loses most.",
        "memorized": {
            "training_clips": 96,
            "features": "the tower",
            "made": {"mean": 0.25},
            "unseen": {"mean": 0.125},
            "usual": 0.05,
            "nearer_than_usual": {"right": 1, "n": 4},
        },
    }
    text = card(runs, toy_model, report, ("--num-prompts", "4"))
    assert "| image | held out pair | 4 | - | 75.0 (30.1-95.4) | - | - | - | - | - |" in text
    assert "reconstruction 35.2" in text
    assert "The image stage loses most." in text
    assert "| video | 200 | 5 | 70 | 2.00 | 50.0000 | A |" in text  # 200 steps of 36 s are two hours
    assert "lie 0.250 from theirs, unseen real ones 0.125; 1 of 4" in text
    assert text.count(machine()) == 1
    assert "- Of held out combinations not surely: motion up (12 of 20 right)." in text
    assert "motion left" not in text  # one of 20 may be chance
    assert "motion down" not in text
    assert "4 frames of 32x32 at 8 fps; 7 frames at 16 fps after interpolation." in text


def test_latents_are_made_once_as_a_stage_reads_them(toy_model: Path, tmp_path: Path) -> None:
    write_world_shards(tmp_path / "shards" / "motions", 4, size=32, frames=4, fps=8, seed=1)
    shutil.copytree(toy_model, tmp_path / "text")
    data = DataConfig(shards="motions", batch_size=2, frames=4, fps=8, size=32)
    made = encoded(tmp_path, "motions", data)
    (shard,) = open_shards(str(made))
    assert len(shard.offsets) == 4
    assert shard.encoding is not None
    assert (shard.encoding.frames, shard.encoding.fps, shard.encoding.size) == (4, 8, 32)
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    assert encoded(tmp_path, "motions", data) == made
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_the_nearest_pairs_become_one_picture(tmp_path: Path) -> None:
    assert not neighbours(tmp_path, tmp_path)
    assert not (tmp_path / NEIGHBOURS).exists()
    for rank, grey in enumerate((40, 200)):
        write_png(tmp_path / "neighbours" / f"{rank:02d}.png", np.full((16, 64, 3), grey, np.uint8))
    assert neighbours(tmp_path, tmp_path)
    found = read_image(tmp_path / NEIGHBOURS)
    assert [int((found == grey).all(-1).sum()) for grey in (40, 200)] == [16 * 64, 16 * 64]


@pytest.mark.parametrize(
    ("recipe", "every_run", "every_set", "begins_with"),
    [("demo", RUNS, SHARDS, None), ("two", two_objects.RUNS, two_objects.SHARDS, "demo")],
)
def test_the_recipe_is_what_is_trained(
    recipe: str, every_run: dict[str, str], every_set: dict[str, dict[str, int]], begins_with: str | None
) -> None:
    """Of each run, its shards and what it stands on."""
    before = begins_with
    for run, shards in every_run.items():
        config = load_stage(resource(f"configs/{recipe}/{run}.yaml"))
        made = every_set[shards]
        assert config.data.shards == f"runs/{recipe}/shards/{shards}"
        assert config.data.size == made["size"]
        assert (config.data.frames - 1) / config.data.fps <= (made["frames"] - 1) / made["fps"]  # long enough
        assert config.model == before
        before = config.run.dir
