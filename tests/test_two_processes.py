"""The train command under torchrun: two ranks, sharded by ZeRO, follow one process alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.shards import write_world_shards
from videodiff.model import Model

ROOT = Path(__file__).resolve().parents[1]
ALONE = [sys.executable, "-m", "stages"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
TWO += ["--rdzv-endpoint=localhost:0", "-m", "stages"]
COMMON = ["run.steps=3", "run.save_every=3", "run.sample_every=3", "data.batch_size=4", "data.size=32"]
COMMON += ["data.workers=0", "data.frames=4", "engine.precision=fp32", "sampling.sampler.steps=2"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world_shards(tmp_path_factory.mktemp("shards"), num_clips=8, size=32, frames=4, fps=8, seed=1).parent


def losses(command: list[str], run: Path, *overrides: str, stage: str = "video") -> list[float]:
    """Loss of each step of a run started by `command`."""
    arguments = ["train", str(ROOT / f"configs/demo/{stage}.yaml"), f"run.dir={run}", *COMMON, *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_video_stage_on_two_ranks_follows_one_process(shards: Path, toy_model: Path, tmp_path: Path) -> None:
    """With frozen layers inside, ZeRO 1, 2 and 3 take the steps of one process; what they save opens as a model."""
    given = (f"data.shards={shards}", f"model={toy_model}", "temporal.image_prompt=null")
    alone = losses(ALONE, tmp_path / "alone", *given)
    for stage in (1, 2, 3):
        run = tmp_path / f"zero-{stage}"
        assert losses(TWO, run, *given, f"engine.zero_stage={stage}") == pytest.approx(
            alone, rel=1e-4
        )  # Adam magnifies rounding
        assert Model.load(run).config.stages() == ["autoencoder", "text", "image", "video"]


def test_a_mistake_in_the_configuration_is_told_once(shards: Path, tmp_path: Path) -> None:
    arguments = ["train", str(ROOT / "configs/demo/image.yaml"), f"data.shards={shards}", "data.bach_size=4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*TWO, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert done.stderr.count("videodiff: error:") == 1, done.stderr
    assert "data.bach_size: unknown key" in done.stderr


def test_a_run_begins_on_ranks_that_its_streams_divide_by_and_goes_on_with_any(
    shards: Path, toy_model: Path, tmp_path: Path
) -> None:
    run, environment = tmp_path / "run", {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    given = [f"run.dir={run}", f"data.shards={shards}", f"model={toy_model}", *COMMON, "data.streams=3"]
    given += ["run.save_every=1", "temporal.image_prompt=null"]
    arguments = ["train", str(ROOT / "configs/demo/video.yaml"), *given]

    def train(command: list[str], *further: str) -> subprocess.CompletedProcess[str]:
        command = [*command, *arguments, *further]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    refused = train(TWO)
    assert refused.returncode != 0
    assert refused.stderr.count("videodiff: error:") == 1, refused.stderr
    assert "data.streams=3 is not a multiple of 2 ranks" in refused.stderr
    assert "set data.streams=4" in refused.stderr
    assert train(ALONE, "run.steps=1").returncode == 0
    on_two = train(TWO)
    assert on_two.returncode == 0, on_two.stderr[-3000:]
    assert on_two.stderr.count("is not a multiple of 2 ranks") == 1
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["image", "video"])
def test_all_zero_stages_give_one_curve_over_fifty_steps(
    shards: Path, toy_model: Path, tmp_path: Path, stage: str
) -> None:
    """One process without ZeRO, two with each stage; the video stage has frozen layers inside."""
    settings = [
        f"data.shards={shards}",
        f"model={toy_model}",
        "run.steps=50",
        "run.save_every=50",
        "run.sample_every=0",
    ]
    settings += ["engine.learning_rate=1e-4", "engine.decay=constant", "engine.decay_steps=null"]
    if stage == "image":
        settings += ["data.frames=1", "network.channels=4", "network.model_channels=16", "network.channel_mult=[1]"]
        settings += ["network.attention_levels=[true]", "network.head_channels=8"]
    alone = losses(ALONE, tmp_path / "alone", *settings, "engine.zero_stage=0", stage=stage)
    assert len(alone) == 50
    for zero in range(4):
        both = losses(TWO, tmp_path / f"zero-{zero}", *settings, f"engine.zero_stage={zero}", stage=stage)
        assert both == pytest.approx(alone, rel=1e-5)


def test_two_ranks_evaluate_as_one(toy_model: Path, tmp_path: Path) -> None:
    """The ranks share the prompts, each writes its own file, and the report is that of one process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    reports = []
    for command in (ALONE, TWO):
        out = tmp_path / str(len(command))
        arguments = ["evaluate", str(toy_model), "--stage", "image", "--num-prompts", "9", "--out", str(out)]
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        reports.append((out / "evaluation.json").read_text())
    assert reports[0] == reports[1]
    shares = [len((out / name).read_text().splitlines()) for name in ("samples.jsonl", "samples-1.jsonl")]
    assert sum(shares) == 2 + 27  # each file's protocol, nine prompts of three splits
    assert min(shares) > 9
