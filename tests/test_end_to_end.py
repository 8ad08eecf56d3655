"""The whole road at toy size, through the real commands: data, five stages, generate, evaluate."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.world import render_clip
from stages.cli import main
from stages.demo_model import RUNS
from stages.runs import reshape
from tests.test_encode import changed
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.parts import STAGES
from videodiff.video_io import read_image, read_video, write_png

ROOT = Path(__file__).resolve().parents[1]

# The demo's own YAMLs, made small: 32x32 pixels, 4 frames at 8 fps, two steps a stage.
EVERY = ["run.steps=2", "run.save_every=2", "run.sample_every=2", "data.batch_size=4", "data.size=32", "data.workers=0"]
OWN = {
    "autoencoder": ["data.frames=2", "network={latent_channels: 4, patch: 4, widths: [16, 16]}"],
    "text": [
        "network={width: 16, layers: 1, heads: 2, embed_dim: 16, image_size: 32, image_width: 16, image_layers: 1,"
        " image_heads: 2}",
        "data.frames=7",
        "num_merges=50",
    ],
    "image": [
        "network={channels: 4, model_channels: 16, channel_mult: [1, 1], num_res_blocks: 1,"
        " attention_levels: [true, true], head_channels: 8, context_dims: [16], pooled_dim: 16}",
        "sampling.sampler.steps=2",
    ],
    "image_prompt": ["data.frames=4", "network.width=16"],
    "video": ["data.frames=4", "temporal.image_prompt.width=16", "sampling.sampler.steps=2"],
    "interpolation": [
        "network={channels: 4, model_channels: 16, channel_mult: [1], num_res_blocks: 1, attention_levels: [true],"
        " head_channels: 8, temporal: {}}",
        "data.frames=5",
        "sampling.sampler.steps=2",
    ],
    "control": [],
    "upscale": [
        "data.size=64",
        "network={channels: 48, model_channels: 16, channel_mult: [1, 1], num_res_blocks: 1,"
        " attention_levels: [false, true], head_channels: 8}",
        "sampling.sampler.steps=2",
    ],
}


def in_this_process(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code


def in_its_own(arguments: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [in_this_process, pytest.param(in_its_own, marks=pytest.mark.slow)])
def test_from_nothing_to_a_judged_video(
    command: Callable[[list[str]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the YAMLs are found in the package all the same
    world = ["--num-clips", "8", "--size", "32", "--frames", "7", "--fps", "16", "--seed", "1"]
    command(["data", "world", "--out", "shards", *world])
    former = None
    for stage in RUNS:
        if stage == "upscale":  # on other shards, below
            continue
        overrides = [*EVERY, *OWN[stage], f"run.dir=runs/{stage}", "data.shards=shards"]
        if former is not None:
            overrides.append(f"model=runs/{former}")
        command(["train", f"configs/demo/{stage}.yaml", *overrides])
        former = stage
        run = tmp_path / "runs" / stage
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2]
        assert all(line["loss"] > 0 and len(line["samples"]) == 4 for line in lines)
        assert bool(list((run / "samples").glob("*.png"))) == (stage != "text")
    # Reshaping, as resuming, asks whether the frozen layers are still those of the checkpoint.
    command(["checkpoint", "reshape", "runs/video", "--ranks", "2", "--out", "reshaped"])
    base = tmp_path / "runs/video/base"
    odd = changed(Model.load(base), tmp_path / "odd", "image", "").folder
    base.rename(tmp_path / "kept")
    odd.rename(base)
    with pytest.raises(UserError, match="its frozen layers are not those of"):
        reshape(Path("runs/video"), 2, Path("again"))
    # A run goes on without the one it stands on, which may have trained further and pruned what was taken.
    shutil.rmtree("runs/video")
    command(["train", "configs/demo/interpolation.yaml", *EVERY, *OWN["interpolation"], "run.dir=runs/interpolation",
             "data.shards=shards", "model=runs/video", "run.steps=3"])  # fmt: skip
    model = Model.load("runs/interpolation")
    assert tuple(model.config.stages()) == STAGES
    assert model.diffusion("interpolation").factor == 2

    command(["generate", "a large red circle moving left", "--model", "runs/interpolation", "-o", "out.mp4"])
    frames, fps = read_video("out.mp4")
    assert frames.shape == (7, 32, 32, 3)
    assert fps == 16
    command(["export", "runs/interpolation", "--out", "model", "--half"])
    command(["generate", "a red circle", "--model", "model", "-o", "half.mp4", "--no-interpolation"])
    assert read_video("half.mp4")[0].shape == (4, 32, 32, 3)

    command(["evaluate", "model", "--stage", "all", "--num-prompts", "2", "--seed", "1", "--out", "judged"])
    assert list((tmp_path / "judged").glob("*.json"))


def test_from_an_image_stage_to_a_controlled_and_larger_picture(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands beside the road, each on the one before it."""
    monkeypatch.chdir(tmp_path)
    former = str(toy_model)
    for stage, size in (("control", "32"), ("upscale", "64")):
        world = ["--num-clips", "4", "--size", size, "--frames", "2", "--fps", "8", "--seed", "1"]
        in_this_process(["data", "world", "--out", f"shards/{stage}", *world])
        overrides = [*EVERY, *OWN[stage], f"run.dir=runs/{stage}", f"data.shards=shards/{stage}", f"model={former}"]
        in_this_process(["train", f"configs/demo/{stage}.yaml", *overrides])
        former = f"runs/{stage}"
        assert list((tmp_path / former / "samples").glob("*.png"))
    write_png("picture.png", render_clip(1, 1, 32, 1, 8.0).frames[0])
    given = ["a large red circle moving left", "--model", former, "--control", "picture.png", "--upscale"]
    in_this_process(["generate", *given, "-o", "out.mp4"])
    frames, fps = read_video("out.mp4")
    assert frames.shape == (7, 64, 64, 3)
    assert fps == 16
    in_this_process(["generate", *given, "-o", "one.png", "--image-only"])
    assert read_image("one.png").shape == (64, 64, 3)
