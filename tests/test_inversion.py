"""DDIM inversion as a user's tool: a picture or a video to noise and back."""

import hashlib
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_generate import PROMPT, run, sidecar

from data_pipeline.world import render_clip
from stages.inversion import round_trip
from stages.pipeline import Pipeline, adjusted
from videodiff.model import Model
from videodiff.parts import DiffusionStage, Sampling
from videodiff.video_io import read_image, read_video, write_png, write_video


def shown(frames: int) -> np.ndarray:
    return render_clip(0, 0, 32, frames, 8.0).frames


@pytest.mark.parametrize("count", [1, 4], ids=["picture", "video"])
def test_the_round_trips_error_falls_with_the_steps(count: int, toy_model: Path) -> None:
    pipeline, frames = Pipeline(Model.load(toy_model)), shown(count)
    stages: tuple[DiffusionStage, ...] = ("image",) if count == 1 else ("image", "video")
    errors = []
    for steps in (4, 16, 64):
        samplings: dict[DiffusionStage, Sampling] = {
            stage: adjusted(pipeline.model.diffusion(stage).sampling, "ddim", steps, 1.0, 1.0) for stage in stages
        }
        noise, again, ceiling = round_trip(pipeline, frames, PROMPT, samplings)
        assert {stage: tuple(value.shape) for stage, value in noise.items()} == {
            stage: (4, 1 if stage == "image" else 4, 4, 4) for stage in stages
        }
        errors.append(float(np.square(again.astype(float) - ceiling).mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_a_picture_comes_back_from_its_noise(toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_png(tmp_path / "in.png", shown(1)[0])
    out = tmp_path / "noise.safetensors"
    assert run("invert", tmp_path / "in.png", "--prompt", PROMPT, "-o", out, "--model", toy_model, "--steps", 60) == 0
    printed = capsys.readouterr().out.splitlines()
    told = sidecar(tmp_path / "noise.safetensors.json")
    assert printed[-2:] == [str(out), str(tmp_path / "noise.safetensors.json")]
    assert set(load_file(out)) == {"image"}
    command = shlex.split(next(line for line in printed if "videodiff generate" in line).partition("videodiff ")[2])
    assert run(*command, "-o", tmp_path / "again.mp4") == 0
    pipeline = Pipeline(Model.load(toy_model))
    seen = pipeline.decode(pipeline.encode(shown(1)[None]))[0, 0].astype(float)
    again = read_image(tmp_path / "again.png").astype(float)
    assert run("generate", *command[1:2], "--model", toy_model, "--image-only", "-o", tmp_path / "fresh.mp4") == 0
    fresh = read_image(tmp_path / "fresh.png")
    assert np.abs(again - seen).mean() < 0.2 * np.abs(fresh - seen).mean()
    error = np.square(again - shown(1)[0]).mean()
    assert told["psnr"]["noise_and_back"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-6)
    assert told["stages"]["image"]["sampler"]["steps"] == 60
    assert json.loads((tmp_path / "again.json").read_text())["stages"]["image"]["noise"] == "given"


def test_generate_gives_what_inversion_promised(
    toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A video, with the printed command, to the last bit."""
    write_video(tmp_path / "in.mp4", shown(4), 8.0)
    out = tmp_path / "noise.safetensors"
    given = ("--prompt", PROMPT, "-o", out, "--model", toy_model, "--steps", 10)
    assert run("invert", tmp_path / "in.mp4", *given, "--image-guidance", 1.5) == 0
    printed = capsys.readouterr().out
    command = shlex.split(printed.partition("with: ")[2].splitlines()[0])
    assert run(*command[1:], "-o", tmp_path / "again.mp4") == 0
    pipeline, frames = Pipeline(Model.load(toy_model)), read_video(tmp_path / "in.mp4")[0]
    samplings: dict[DiffusionStage, Sampling] = {
        "image": adjusted(pipeline.model.diffusion("image").sampling, "ddim", 10, 1.0),
        "video": adjusted(pipeline.model.diffusion("video").sampling, "ddim", 10, 1.0, 1.5),
    }
    noise, again, _ = round_trip(pipeline, frames, PROMPT, samplings)
    assert all(torch.equal(value, noise[stage]) for stage, value in load_file(out).items())
    assert sidecar(tmp_path / "again.json")["frames_sha256"] == hashlib.sha256(again.tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("none.png", "--prompt", PROMPT, "-o", "n.safetensors"), "none.png"),
        (("in.png", "-o", "n.safetensors"), "--prompt"),
        (("in.png", "--prompt", " ", "-o", "n.safetensors"), "--prompt is empty"),
        (("in.png", "--prompt", PROMPT, "-o", "n.png"), "end its name with .safetensors"),
        (("wide.png", "--prompt", PROMPT, "-o", "n.safetensors"), "is 48x32 pixels"),
        (("short.mp4", "--prompt", PROMPT, "-o", "n.safetensors"), "has 3 frames, the video stage makes 4"),
        (("in.png", "--prompt", PROMPT, "-o", "n.safetensors", "--steps", "1001"), "1000 steps"),
        (("in.png", "--prompt", PROMPT, "-o", "n.safetensors", "--text-guidance", "-1"), "text"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_led_back_is_refused(
    arguments: tuple[str, ...],
    problem: str,
    toy_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_png(tmp_path / "in.png", shown(1)[0])
    write_png(tmp_path / "wide.png", np.zeros((32, 48, 3), np.uint8))
    write_video(tmp_path / "short.mp4", shown(3), 8.0)
    assert run("invert", *arguments, "--model", toy_model) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1, errors
    assert problem in errors
    assert not (tmp_path / "n.safetensors").exists()
