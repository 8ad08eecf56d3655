"""Super-resolution: what it is told, what it trains, `generate --upscale`, and that frames are made independently."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_stages import Clips, stage_config, trained, with_extras

from stages import pipeline, upscale
from stages.cli import main
from stages.pipeline import Pipeline, SampleKey
from stages.upscale import UpscaleStage, enlarge, shrink, to_squares, with_difference
from videodiff import config as configs
from videodiff.diffusion.samplers import DDPM
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.model_folder import export, write_weights
from videodiff.parts import DESCRIPTION
from videodiff.video_io import read_image, read_video

PROMPT = "a large red circle moving left on a white background"
LARGE = Clips(1, 8.0, size=64)


@pytest.fixture(scope="module")
def model(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_extras(toy_model, tmp_path_factory.mktemp("upscale") / "model")


def task_of(
    model: Path, folder: Path, steps: int = 2, size: int = 64, channels: int = 48, **more: Any
) -> tuple[UpscaleStage, Any]:
    torch.manual_seed(0)
    base = Model.load(model)
    network = {**configs.to_dict(base.diffusion("image").network), "channels": channels, "pooled_dim": None}
    data = {"shards": "none", "batch_size": 4, "frames": 1, "fps": 8.0, "size": size}
    config = stage_config(UpscaleStage, folder, frames=1, data=data, network=network, **more)
    config = config.model_copy(update={"run": config.run.model_copy(update={"steps": steps, "save_every": 2})})
    return config, upscale.task(config, base)


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_shrinking_takes_means_and_enlarging_keeps_slopes() -> None:
    small = torch.randint(0, 256, (2, 3, 8, 8, 3), dtype=torch.uint8)
    doubled = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(shrink(doubled, 2), small)
    slope = torch.arange(0, 240, 30, dtype=torch.uint8).view(1, 8, 1, 1).expand(1, 8, 8, 3)
    for mode in ("bilinear", "bicubic"):
        large = enlarge(slope, 3, mode)  # type: ignore[arg-type]
        assert large.shape == (1, 24, 24, 3)
        inner = large[0, 6:-6, 0, 0].float()
        assert (inner - (torch.arange(24)[6:-6] - 1) * 10).abs().max() <= 1
    assert torch.equal(enlarge(small, 2)[1, 2], enlarge(small[1], 2)[2])


# --- training ---------------------------------------------------------------------------------------------------------


def test_squares_and_differences_go_there_and_back() -> None:
    frames = torch.randint(0, 256, (2, 3, 8, 8, 3), dtype=torch.uint8)
    squares = to_squares(frames, 4)
    assert squares.shape == (2, 48, 3, 2, 2)
    assert (float(squares.min()), float(squares.max())) == (-1, 1)
    corner = frames[1, 2, 4:, :4].float() / 127.5 - 1  # lower left
    assert torch.equal(squares[1, :, 2, 1, 0].sort().values, corner.flatten().sort().values)
    other = torch.randint(0, 256, frames.shape, dtype=torch.uint8)
    difference = (to_squares(other, 4) - squares) / 0.05
    assert torch.equal(with_difference(squares, difference, 0.05), other)


def test_the_network_is_told_the_small_picture_everywhere(toy_model: Path, tmp_path: Path) -> None:
    batch = Clips(3, 8.0, size=64).batch([0, 1])
    known = {}
    for share in (0.0, 1.0):
        _, task = task_of(toy_model, tmp_path, rebuilt=share, deviation=0.1)
        x0 = task.latents(batch, 0)
        told = task.condition(batch, x0)
        assert told.known_mask is not None
        assert told.known_mask.shape == (2, 1, 3, 16, 16)
        assert bool((told.known_mask == 1).all())
        known[share] = told.known
        assert torch.equal(task.frames(x0, batch), batch.frames)  # what is made makes the picture whole
        assert torch.equal(task.frames(torch.zeros_like(x0), batch), with_difference(told.known, 0 * x0, 1.0))
    small = shrink(batch.frames, 2)
    assert torch.equal(known[0.0], to_squares(enlarge(small, 2), 4))
    again = task.autoencoder.decode_clip(task.autoencoder.encode_clip(small).mean)
    assert torch.equal(known[1.0], to_squares(enlarge(again, 2), 4))
    _, wider = task_of(toy_model, tmp_path, rebuilt=1.0, deviation=0.2)
    torch.testing.assert_close(2 * wider.latents(batch, 0), x0)
    _, task = task_of(toy_model, tmp_path, rebuilt=0.5)
    numbers = torch.arange(400)
    changed = (task._flawed(small[:1].expand(400, -1, -1, -1, -1), numbers) != small[0]).flatten(1).any(1)
    assert abs(float(changed.double().mean()) - 0.5) < 0.1


def test_an_upscaler_trains_and_goes_on(toy_model: Path, tmp_path: Path) -> None:
    """Two steps, a restart and two more are four steps; and nothing of the model it stands on changes."""
    base, states = Model.load(toy_model), []
    for folder, parts in (("straight", (4,)), ("parts", (2, 4))):
        for steps in parts:
            config, task = task_of(toy_model, tmp_path / folder, steps)
            assert all(task.trains(name) for name, _ in task.module.named_parameters())
            model = trained(config, task, LARGE)
        states.append(model.state("upscale"))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert states[0]["known_conv.weight"].abs().max() > 0
    part = model.diffusion("upscale")
    assert (part.size, part.factor, part.network.pooled_dim) == (64, 2, 16)  # the width is the text tower's
    assert model.config.stages() == [*base.config.stages(), "upscale"]
    for stage in base.config.stages():
        assert model.part(stage).weights.sha256 == base.part(stage).weights.sha256
    (tmp_path / "pictures").mkdir()
    task.sample(model.unet("upscale"), LARGE.batch([0, 1]), tmp_path / "pictures", 4)
    assert list((tmp_path / "pictures").glob("*.png"))


MISTAKES = {
    "equal size": ({"size": 32}, "data.size: 32 is no multiple of 32, .* use 64"),
    "odd size": ({"size": 48}, "data.size: 48 is no multiple of 32, .* use 64"),
    "no squares": ({"channels": 8}, r"network.channels 8 is not 3 x p x p .* use 48"),
    "squares that do not fit": ({"channels": 75}, r"data.size: 64 is not a multiple of 5 \(squares of 5"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_fit_is_refused(mistake: str, toy_model: Path, tmp_path: Path) -> None:
    change, problem = MISTAKES[mistake]
    with pytest.raises(UserError, match=problem):
        task_of(toy_model, tmp_path, **change)


def test_what_stands_beside_the_road_keeps_its_neighbours(model: Path, tmp_path: Path) -> None:
    """A stage trained on a model with extras replaces its own alone; raw weights are those of what was trained last."""
    config, task = task_of(model, tmp_path)
    with_own = trained(config, task, LARGE)
    assert with_own.config.stages() == Model.load(model).config.stages()
    assert with_own.part("control").weights == Model.load(model).part("control").weights
    raw = Model.load(with_own.folder, "raw")
    assert not torch.equal(raw.state("upscale")["known_conv.weight"], with_own.state("upscale")["known_conv.weight"])
    export(raw, tmp_path / "exported")
    exported = Model.load(tmp_path / "exported")
    assert torch.equal(exported.state("upscale")["known_conv.weight"], raw.state("upscale")["known_conv.weight"])
    assert torch.equal(exported.control.leave[0].weight, with_own.control.leave[0].weight)


# --- generate ---------------------------------------------------------------------------------------------------------


def test_frames_do_not_depend_on_those_beside_them(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipeline(Model.load(model))
    sampling = pipe.model.diffusion("upscale").sampling
    random = sampling.model_copy(update={"sampler": DDPM(steps=3)})
    clip = Clips(5, 8.0).batch([0]).frames[0]
    frames = torch.cat([clip, clip[:1]]).numpy()
    for chosen in (sampling, random):
        made = {}
        for together in (1, 4, 8):
            monkeypatch.setattr(pipeline, "UPSCALE_FRAMES", together)
            made[together] = pipe.upscale(SampleKey(0, PROMPT), frames, chosen)
            assert made[together].shape == (6, 64, 64, 3)
            assert np.abs(made[together].astype(int) - made[1]).max() <= 1  # rounding
        assert np.array_equal(made[1][0], made[1][5])  # equal frames stay equal: one noise for the clip
        other = pipe.upscale(SampleKey(1, PROMPT), frames, chosen)
        assert np.abs(other.astype(int) - made[8]).max() > 2


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def test_a_video_comes_out_larger(
    model: Path, toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("generate", PROMPT, "--model", model, "-o", "out.mp4", "--upscale") == 0
    assert read_video("out.mp4")[0].shape == (7, 64, 64, 3)
    assert read_image("out.png").shape == (32, 32, 3)  # the first image, as --image takes it
    told = json.loads(Path("out.json").read_text())
    assert told["result"] == {"frames": 7, "fps": 16.0, "height": 64, "width": 64}
    assert told["stages"]["upscale"]["sampler"]["steps"] == 2
    assert run("generate", "--from", "out.json") == 0
    assert json.loads(Path("out-again.json").read_text())["frames_sha256"] == told["frames_sha256"]
    assert run("generate", PROMPT, "--model", model, "-o", "one.mp4", "--upscale", "--image", "out.png") == 0
    assert read_video("one.mp4")[0].shape == (7, 64, 64, 3)
    assert run("generate", PROMPT, "--model", model, "-o", "two.png", "--upscale", "--image-only") == 0
    assert read_image("two.png").shape == (64, 64, 3)
    capsys.readouterr()
    assert run("generate", PROMPT, "--model", toy_model, "-o", "none.mp4", "--upscale") == 2
    errors = capsys.readouterr().err
    assert "holds no upscale stage" in errors
    assert len(errors.splitlines()) == 1


def test_each_video_of_a_batch_is_enlarged_as_if_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text(f"{PROMPT}\na small blue square")
    assert run("generate", "--prompts", "prompts.txt", "--model", model, "-o", "out", "--upscale", "--image-only") == 0
    assert run("generate", PROMPT, "--model", model, "-o", "alone.png", "--upscale", "--image-only") == 0
    together, alone = read_image(sorted(Path("out").glob("*.png"))[0]), read_image("alone.png")
    assert np.abs(together.astype(int) - alone).max() <= 2


def test_what_is_not_finite_is_not_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    opened = Model.load(shutil.copytree(model, "broken"))
    state = opened.state("upscale")
    state["conv_out.spatial.bias"][0] = torch.nan
    weights = write_weights(Path("broken"), "upscale.safetensors", state)
    part = opened.part("upscale").model_copy(update={"weights": weights})
    configs.save(opened.config.model_copy(update={"upscale": part}), Path("broken") / DESCRIPTION)
    assert run("generate", PROMPT, "--model", "broken", "-o", "out.png", "--upscale", "--image-only") == 2
    assert "the result is not finite" in capsys.readouterr().err
    assert not Path("out.png").exists()
