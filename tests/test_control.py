"""ControlNet: nothing at the start, its own weights alone in training, and `generate --control` after it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_generate import altered
from tiny_stages import Clips, stage_config, trained, with_extras

from data_pipeline.world import Scene, render
from stages import control
from stages.cli import main
from stages.control import ControlStage
from videodiff.batch import Condition
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.guidance import ClassifierFree
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks.control import HINTS, ControlledUNet, ControlNet
from videodiff.networks.unet import UNet, UNetConfig
from videodiff.video_io import read_image, write_png

PROMPT = "a large red circle on a white background"
STABLE_DIFFUSION = UNetConfig(
    channels=4,
    model_channels=320,
    channel_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    attention_levels=(True, True, True, False),
    num_heads=8,
    projection="conv",
    norm_groups=32,
    time_embedding="add",
    context_dims=(768,),
)


def picture(x: float = 0.5, shape: str = "square", size: int = 32) -> np.ndarray:
    return render(Scene("blue", shape, "large", "white", "still", x, 0.5), size, 1, 8.0)[0]


def task_of(model: Path, folder: Path, steps: int = 2, **more: Any) -> tuple[ControlStage, Any]:
    torch.manual_seed(0)
    config = stage_config(ControlStage, folder, frames=1, **more)
    config = config.model_copy(update={"run": config.run.model_copy(update={"steps": steps, "save_every": 2})})
    return config, control.task(config, Model.load(model))


def answers(network: torch.nn.Module, task: Any) -> torch.Tensor:
    """With the guidance that runs text and no text in one stacked pass."""
    batch = Clips(1, 8.0).batch([0, 1])
    latents = task.latents(batch, seed=0)
    denoiser = Denoiser(network, task.schedule, task.prediction)
    denoise = ClassifierFree(text=2.0)(denoiser, task.condition(batch, latents))
    with torch.no_grad():
        return denoise(latents.flip(0), torch.tensor([900, 300])).x0


# --- the network ------------------------------------------------------------------------------------------------------


def test_stable_diffusions_has_thirteen_ways_in_and_its_published_size() -> None:
    """Zhang et al., figure 3: twelve skips and the middle. 361,279,120 parameters are published, 1,086,480 of them in
    the eight convolutions that bring in the hint, where ours differs."""
    with torch.device("meta"):
        network = ControlNet(STABLE_DIFFUSION, factor=8)
    widths = [layer.out_channels for layer in network.leave]  # type: ignore[union-attr]
    assert widths == [320] * 4 + [640] * 3 + [1280] * 6
    own = sum(p.numel() for p in network.parameters()) - sum(p.numel() for p in network.hint.parameters())
    assert own == 361_279_120 - 1_086_480


@pytest.mark.parametrize("resample", ["conv", "residual"])
def test_each_residual_fits_its_skip(resample: Any) -> None:
    config = UNetConfig(
        channels=3, model_channels=8, channel_mult=(1, 2, 2), num_res_blocks=(1, 2, 1), head_channels=8,
        attention_levels=(False, True, False), resample=resample,
    )  # fmt: skip
    base = UNet(config)
    network = ControlNet.copy_of(base, factor=4)
    for layer in network.leave:
        torch.nn.init.normal_(layer.weight)  # type: ignore[arg-type]
    x, time = torch.randn(2, 3, 1, 8, 8), torch.tensor([5.0, 900.0])
    told = Condition(hint=torch.rand(2, 1, 32, 32))
    _, skips, _ = base.encode(x, time, told)
    assert [skip.shape[1] for skip in skips] == list(config.skip_widths)
    added = network(x, time, told)
    assert [a.shape for a in added[:-1]] == [skip.shape for skip in skips]
    torch.nn.init.normal_(base.conv_out.spatial.weight)
    assert not torch.equal(base(x, time, told, added), base(x, time, told))
    assert torch.equal(base(x, time, told, [torch.zeros_like(a) for a in added]), base(x, time, told))


def test_a_hint_shows_where_a_picture_changes_and_nothing_else() -> None:
    plain = torch.full((1, 32, 32, 3), 77, dtype=torch.uint8)
    assert not HINTS["edges"](plain).any()
    hint = HINTS["edges"](torch.from_numpy(picture())[None])[0, 0]
    assert (float(hint.min()), float(hint.max())) == (0, 1)
    rows, columns = torch.nonzero(hint, as_tuple=True)
    outside = torch.maximum((rows - 15.5).abs(), (columns - 15.5).abs())
    half = 0.44 * 16  # of the square's side, in pixels
    assert bool((outside >= half - 2).all() & (outside <= half + 2).all())


def test_the_hint_must_fit(toy_model: Path) -> None:
    base = Model.load(toy_model).unet("image")
    network, x = ControlNet.copy_of(base, 8), torch.randn(2, 4, 1, 4, 4)
    for shape in ((2, 1, 16, 16), (1, 1, 32, 32), (2, 3, 32, 32)):
        with pytest.raises(ValueError, match=r"give \[2, 1, 32, 32\]"):
            network(x, torch.zeros(2), Condition(hint=torch.zeros(shape)))
    with pytest.raises(ValueError, match="the hint has shape None"):
        network(x, torch.zeros(2), Condition())


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_control_starts_as_nothing_and_trains_alone(toy_model: Path, tmp_path: Path) -> None:
    config, task = task_of(toy_model, tmp_path)
    base = Model.load(toy_model)
    plain = answers(base.unet("image"), task)
    assert torch.equal(answers(task.module, task), plain)
    state = task.module.control.encoder.state_dict()
    assert all(torch.equal(value, base.state("image")[name]) for name, value in state.items())
    assert {name.partition(".")[0] for name, _ in task.module.named_parameters() if task.trains(name)} == {"control"}
    model = trained(config, task, Clips(1, 8.0))
    assert model.config.stages() == [*base.config.stages(), "control"]
    for stage in base.config.stages():  # the very same bytes
        assert model.part(stage).weights.sha256 == base.part(stage).weights.sha256
    assert all(torch.equal(value, base.state("image")[name]) for name, value in task.module.base.state_dict().items())
    fresh = model.unet("image")
    assert torch.equal(answers(fresh, task), plain)
    assert not torch.equal(answers(ControlledUNet(fresh, model.control), task), plain)
    assert torch.equal(answers(ControlledUNet(fresh, model.control, scale=0.0), task), plain)


def test_an_interrupted_run_goes_on(toy_model: Path, tmp_path: Path) -> None:
    states = []
    for folder, parts in (("straight", (4,)), ("parts", (2, 4))):
        for steps in parts:
            config, task = task_of(toy_model, tmp_path / folder, steps, activation_checkpointing=folder == "parts")
            model = trained(config, task, Clips(1, 8.0))
        states.append(model.state("control"))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_half_of_the_texts_are_dropped_and_the_hint_never(toy_model: Path, tmp_path: Path) -> None:
    config, task = task_of(toy_model, tmp_path)
    text, image = config.dropout.draw(0, torch.arange(4000))
    assert abs(float(text.double().mean()) - 0.5) < 0.03
    assert not image.any()
    batch = Clips(1, 8.0).batch([0, 1])
    told = task.condition(batch, task.latents(batch, 0))
    dropped = told.without("text", "image")
    assert dropped.hint is not None
    assert torch.equal(dropped.hint, HINTS["edges"](batch.frames[:, 0]))


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"size": 64}, "data.size: 64, .* makes 32"), ({"frames": 4}, "data.frames: 4, .* makes 1")],
)
def test_data_that_does_not_fit_is_refused(
    change: dict[str, int], problem: str, toy_model: Path, tmp_path: Path
) -> None:
    data = {"shards": "none", "batch_size": 4, "fps": 8.0, "size": 32, "frames": 1, **change}
    with pytest.raises(UserError, match=problem):
        task_of(toy_model, tmp_path, data=data)


# --- generate ---------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def model(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_extras(toy_model, tmp_path_factory.mktemp("control") / "model")


@pytest.fixture
def generate(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Generate an image; returns the hash of its pixels."""
    monkeypatch.chdir(tmp_path)
    write_png("left.png", picture(0.3))
    write_png("right.png", picture(0.7))

    def call(name: str, *arguments: object) -> str:
        assert run("generate", PROMPT, "--model", model, "-o", f"{name}.png", "--image-only", *arguments) == 0
        return json.loads(Path(f"{name}.json").read_text())["frames_sha256"]

    return call


def test_an_image_follows_its_control_picture(generate: Callable[..., str]) -> None:
    plain, left = generate("plain"), generate("one", "--control", "left.png")
    assert left != plain
    assert generate("two", "--control", "left.png") == left
    assert generate("three", "--control", "right.png") != left
    assert generate("four", "--control", "left.png", "--control-scale", 0.5) not in (left, plain)
    assert generate("five", "--control", "left.png", "--control-scale", 0) == plain
    assert run("generate", "--from", "one.json") == 0
    assert json.loads(Path("one-again.json").read_text())["frames_sha256"] == left
    write_png("left.png", picture(0.5))
    assert run("generate", "--from", "one.json") == 2


def test_the_first_image_carries_the_control_into_the_video(
    generate: Callable[..., str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate("image", "--control", "left.png")
    assert run("generate", PROMPT, "--model", model, "-o", "clip.mp4", "--control", "left.png") == 0
    assert np.array_equal(read_image("clip.png"), read_image("image.png"))
    requests = [{"prompt": PROMPT, "control": name, "image_only": True} for name in ("left.png", "right.png")]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, requests)))
    assert run("generate", "--prompts", "prompts.jsonl", "--model", model, "-o", "out") == 0  # in one batch
    one, two = (read_image(path) for path in sorted(Path("out").glob("*.png")))
    assert np.abs(one.astype(int) - read_image("image.png")).max() <= 1
    assert not np.array_equal(one, two)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--control", "wide.png"), "wide.png: is 48x32 pixels, this model takes 32x32"),
        (("--control", "none.png"), "none.png"),
        (("--control", "left.png", "--control-scale", "-1"), "control_scale"),
        (("--control", "left.png", "--control-scale", "nan"), "control_scale"),
        (("--control-scale", "2"), "name a picture"),
        (("--control", "left.png", "--image", "right.png"), "leave one of them out"),
        (("--control", "out.png"), "out.png: the result's picture would take its place"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...],
    problem: str,
    generate: Callable[..., str],
    model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_png("wide.png", np.zeros((32, 48, 3), np.uint8))
    write_png("out.png", picture())
    assert run("generate", PROMPT, "--model", model, "-o", "out.mp4", *arguments) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert problem in errors
    assert np.array_equal(read_image("out.png"), picture())


def test_a_weaker_model_that_hears_no_control_is_refused(
    generate: Callable[..., str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Led away from it, an image would follow the outlines more and its own faults no less."""
    weak = altered(model, tmp_path / "weak", "image", lambda state: state["conv_out.spatial.bias"].add_(1))
    given = ("generate", PROMPT, "--model", model, "-o", "out.png", "--image-only", "--control", "left.png")
    assert run(*given, "--weak-model", weak) == 2
    assert "does not follow --control's picture" in capsys.readouterr().err


def test_a_model_without_a_control_is_refused(
    generate: Callable[..., str], toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", PROMPT, "--model", toy_model, "-o", "out.mp4", "--control", "left.png") == 2
    errors = capsys.readouterr().err
    assert "holds no control stage" in errors
    assert len(errors.splitlines()) == 1


def test_impossible_controls_are_refused(toy_model: Path) -> None:
    network = Model.load(toy_model).diffusion("image").network
    for factor in (0, -1):
        with pytest.raises(ValueError, match=rf"factor {factor}.* give the autoencoder's"):
            ControlNet(network, factor)
    with pytest.raises(ValueError, match="scale nan is no number"):
        ControlledUNet(UNet(network), ControlNet(network, 2), float("nan"))
