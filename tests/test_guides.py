"""What `generate` follows besides its text: a classifier, a weaker model, rescale and interval, a noise to begin at."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_toy_classifier
from safetensors.torch import save_file
from test_generate import PROMPT, altered, run, sidecar

from stages.guides import Guides
from stages.pipeline import Pipeline, SampleKey, adjusted
from stages.requests import LATER
from videodiff import config as configs
from videodiff.diffusion.guidance import ClassifierGuidance, class_log_prob
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.model import Model
from videodiff.parts import DESCRIPTION, ModelConfig
from videodiff.video_io import write_png

Generate = Callable[..., dict[str, Any]]


@pytest.fixture
def generate(toy_model: Path, tmp_path: Path) -> Generate:
    """Generate a first image to a name in tmp_path; returns the side-car."""

    def call(name: str, *arguments: object, prompt: str = PROMPT, still: bool = True) -> dict[str, Any]:
        out = ("-o", tmp_path / f"{name}.mp4", *(("--image-only",) if still else ("--no-interpolation",)))
        assert run("generate", prompt, "--model", toy_model, *out, *arguments) == 0
        return sidecar(tmp_path / f"{name}.json")

    return call


@pytest.fixture(scope="module")
def weak_model(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model with another image stage."""

    def change(state: dict[str, torch.Tensor]) -> None:
        for name in sorted(state):
            state[name] += 0.05 * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(len(name)))

    return altered(toy_model, tmp_path_factory.mktemp("weak") / "model", "image", change)


def described(model: Path, folder: Path, **parts: Any) -> Path:
    """A copy of a model with other descriptions of some of its parts: {part: {field: value}}."""
    shutil.copytree(model, folder)
    description = configs.load(ModelConfig, folder / DESCRIPTION)
    changed = {name: getattr(description, name).model_copy(update=update) for name, update in parts.items()}
    configs.save(description.model_copy(update=changed), folder / DESCRIPTION)
    return folder


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["frames_sha256"] == other["frames_sha256"]


# --- the classifier ---------------------------------------------------------------------------------------------------


def test_a_classifier_guides_the_first_image_and_nothing_else(generate: Generate, toy_classifier: Path) -> None:
    plain = generate("plain", still=False)
    off = generate("off", "--classifier", toy_classifier, "--classifier-scale", 0, still=False)
    assert same(off, plain)  # to the last bit
    on = generate("on", "--classifier", toy_classifier, "--classifier-scale", 20, still=False)
    assert not same(on, plain)
    assert on["stages"]["image"]["classifier"] == {"attribute": "shape", "class": "circle", "scale": 20}
    assert on["stages"]["video"] == plain["stages"]["video"]
    assert set(on["inputs"]) == {"classifier"}
    assert plain["inputs"] == {}


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm_solver", "heun", "langevin", "predictor_corrector"])
def test_every_sampler_follows_the_classifier(sampler: str, toy_model: Path, toy_classifier: Path) -> None:
    """DDPM by its mean, the others by eps: what is made shows the class more and more, by the classifier's own word."""
    pipeline, judge = Pipeline(Model.load(toy_model)), Pipeline(Model.load(toy_classifier))
    keys, names = [SampleKey(0, PROMPT, i) for i in range(4)], ["square", "circle", "cross", "square"]
    sampling = adjusted(pipeline.model.diffusion("image").sampling, sampler, 12)
    part = judge.model.config.classifier
    assert part is not None
    sure = []
    for scale in (0.0, 1.0, 3.0):
        guides = Guides([PROMPT] * 4, judge, ClassifierGuidance(scale=scale), names)
        made = pipeline.image(keys, sampling, steering=guides)
        labels = [part.classes.index(name) for name in names]
        sure.append(float(class_log_prob(judge.classifier, labels)(made, torch.full((4,), 1)).mean()))
    assert sure[0] < sure[1] < sure[2]


def test_classes_go_by_name_whatever_their_order(
    generate: Generate, toy_model: Path, toy_classifier: Path, tmp_path: Path
) -> None:
    other = write_toy_classifier(toy_model, tmp_path / "other", ("triangle", "square", "circle", "cross"))
    scale = ("--classifier-scale", 20)
    shas = set()
    for name in ("square", "triangle"):
        one, two = (generate("one", "--classifier", c, "--class", name, *scale) for c in (toy_classifier, other))
        assert same(one, two)
        shas.add(one["frames_sha256"])
    assert len(shas) == 2
    named = generate("named", "--classifier", toy_classifier, "--class", "circle", *scale)
    assert same(named, generate("read", "--classifier", toy_classifier, *scale))  # the prompt names a circle


def test_a_guided_picture_is_repeated_and_made_from_files_of_prompts(
    generate: Generate, toy_model: Path, toy_classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = generate("out", "--classifier", toy_classifier, "--classifier-scale", 20, "--sampler", "ddpm")
    assert run("generate", "--from", tmp_path / "out.json") == 0
    assert same(sidecar(tmp_path / "out-again.json"), told)
    shutil.copytree(toy_classifier, tmp_path / "moved")
    assert run("generate", "--from", tmp_path / "out.json", "--classifier", tmp_path / "moved") == 0
    other = described(toy_classifier, tmp_path / "else", classifier={"attribute": "form"})
    capsys.readouterr()
    assert run("generate", "--from", tmp_path / "out.json", "--classifier", other) == 2
    assert str(other) in capsys.readouterr().err

    shared = {"prompt": PROMPT, "image_only": True, "classifier_scale": 20.0, "sampler": "ddpm"}
    lines = [shared | {"classifier": str(toy_classifier)}, shared | {"classifier": str(toy_classifier),
             "class_name": "cross", "guidance_interval": [0.1, None]}]  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ("--prompts", tmp_path / "prompts.jsonl", "--model", toy_model, "-o", tmp_path / "many")
    assert run("generate", *command) == 0
    first, second = (sidecar(path) for path in sorted((tmp_path / "many").glob("*.json")))
    assert same(first, told)
    assert second["stages"]["image"]["classifier"]["class"] == "cross"


def test_side_cars_from_before_these_options_still_repeat(generate: Generate, tmp_path: Path) -> None:
    told = generate("old")
    options = {name: value for name, value in told["options"].items() if name not in LATER}
    counted = {name: value for name, value in options.items() if name not in ("num_samples", "model")}
    text = {"options": counted, "sample": 0, "model": told["model"]["sha256"]}
    told["request"] = hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
    del told["inputs"]
    (tmp_path / "old.json").write_text(json.dumps({**told, "options": options}))
    assert run("generate", "--from", tmp_path / "old.json") == 0
    assert same(sidecar(tmp_path / "old-again.json"), told)


# --- a weaker model, rescale, interval --------------------------------------------------------------------------------


def test_a_weaker_model_is_led_away_from(generate: Generate, toy_model: Path, weak_model: Path, tmp_path: Path) -> None:
    plain = generate("plain", still=False)
    assert same(generate("one", "--weak-model", weak_model, "--weak-scale", 1, still=False), plain)  # to the last bit
    two = generate("two", "--weak-model", weak_model, still=False)
    assert not same(two, plain)
    assert two["stages"]["image"]["autoguidance"] == two["stages"]["video"]["autoguidance"] == {"scale": 2.0}
    zero = generate("zero", "--weak-model", weak_model, "--weak-scale", 0)
    assert same(zero, generate("weak", "--model", weak_model))  # nothing but the weaker one
    assert run("generate", "--from", tmp_path / "two.json") == 0
    assert same(sidecar(tmp_path / "two-again.json"), two)


def test_rescale_and_interval_are_obeyed_written_down_and_repeated(generate: Generate, tmp_path: Path) -> None:
    plain = generate("plain", still=False)
    rescaled = generate("rescaled", "--guidance-rescale", 0.7, still=False)
    within = generate("within", "--guidance-interval", 0.2, 5, still=False)
    assert len({told["frames_sha256"] for told in (plain, rescaled, within)}) == 3
    for stage in ("image", "video"):
        assert rescaled["stages"][stage]["guidance"]["rescale"] == 0.7
        assert within["stages"][stage]["guidance"]["interval"] == [0.2, 5]
    everywhere = generate("everywhere", "--guidance-interval", 0, "inf", still=False)
    assert everywhere["stages"]["image"]["guidance"]["interval"] == [0, None]
    assert same(everywhere, plain)
    off = generate("off", "--text-guidance", 1, "--image-guidance", 1, still=False)
    nowhere = "--guidance-interval", 0, 1e-9
    assert same(generate("nowhere", *nowhere, "--image-guidance", 1, still=False), off)
    assert not same(generate("image", *nowhere, "--image-guidance", 3, still=False), off)  # that of the image stays
    for name, told in (("rescaled", rescaled), ("within", within)):
        assert run("generate", "--from", tmp_path / f"{name}.json") == 0
        assert same(sidecar(tmp_path / f"{name}-again.json"), told)


# --- a noise to begin at ----------------------------------------------------------------------------------------------


def test_noise_is_where_a_stage_begins(generate: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = SampleKey(3, PROMPT).generator("image")
    noise = {"image": torch.randn(4, 1, 4, 4, generator=drawn), "video": torch.ones(4, 4, 4, 4)}
    save_file(noise, tmp_path / "n.safetensors")
    begun = generate("begun", "--noise", tmp_path / "n.safetensors")
    assert same(begun, generate("drawn", "--seed", 3))  # what seed 3 draws, given to seed 0
    assert begun["stages"]["image"]["noise"] == "given"
    clip = generate("clip", "--noise", tmp_path / "n.safetensors", still=False)
    assert not same(clip, generate("other", "--seed", 3, still=False))
    assert run("generate", "--from", tmp_path / "clip.json") == 0
    assert same(sidecar(tmp_path / "clip-again.json"), clip)
    save_file({"image": noise["image"] + 1}, tmp_path / "n.safetensors")
    capsys.readouterr()
    assert run("generate", "--from", tmp_path / "clip.json") == 2
    assert "n.safetensors has changed" in capsys.readouterr().err


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf(
    toy_model: Path, toy_classifier: Path, weak_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Things that fit the toy model, and things that don't."""
    folder = tmp_path_factory.mktemp("shelf")
    part = Model.load(toy_classifier).config.classifier
    assert part is not None
    wide = part.network.model_copy(update={"encoder": part.network.encoder.model_copy(update={"channels": 8})})
    plain = NoiseSchedule()
    write_png(folder / "picture.png", np.zeros((32, 32, 3), np.uint8))
    save_file({"image": torch.zeros(4, 1, 8, 8)}, folder / "large.safetensors")
    save_file({"image": torch.zeros(4, 1, 4, 4)}, folder / "image.safetensors")
    save_file({"video": torch.zeros(4, 4, 4, 4)}, folder / "video.safetensors")
    (folder / "torn.safetensors").write_bytes(b"torn")
    pixels = described(toy_classifier, folder / "pixels")
    description = configs.load(ModelConfig, pixels / DESCRIPTION)
    configs.save(ModelConfig(classifier=description.classifier), pixels / DESCRIPTION)

    def shift(state: dict[str, torch.Tensor]) -> None:
        state["latent_mean"] += 1

    return {
        "good": toy_classifier,
        "toy": toy_model,
        "weak": weak_model,
        "pixels": pixels,
        "wide": described(toy_classifier, folder / "wide", classifier={"network": wide}),
        "other_size": described(toy_classifier, folder / "other_size", classifier={"size": 64}),
        "other_noise": described(toy_classifier, folder / "other_noise", classifier={"schedule": plain}),
        "other_latents": altered(toy_classifier, folder / "other_latents", "autoencoder", shift),
        "weak_noise": described(weak_model, folder / "weak_noise", image={"schedule": plain}),
        "weak_blind": described(weak_model, folder / "weak_blind", video={"first_image": False}),
        "weak_latents": altered(weak_model, folder / "weak_latents", "autoencoder", shift),
        **{path.name: path for path in folder.iterdir() if path.is_file()},
        "none.safetensors": folder / "none.safetensors",
    }


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--classifier", "toy"), "holds no classifier"),
        (("--classifier", "nowhere"), "nowhere"),
        (("--classifier", "good", "--class", "oval"), "circle, cross, square, triangle"),
        (("--classifier", "good", "PROMPT", "a red thing"), "names none"),
        (("--classifier", "good", "PROMPT", "a circle or a Square"), "circle and square"),
        (("--classifier", "good", "PROMPT", "encircled crosses"), "names none"),
        (("--classifier", "good", "--classifier-scale", "-1"), "classifier_scale"),
        (("--classifier", "good", "--image", "picture.png"), "leave one out"),
        (("--classifier", "pixels"), "reads pixels"),
        (("--classifier", "wide"), "latent channels 8"),
        (("--classifier", "other_size"), "picture size 64"),
        (("--classifier", "other_noise"), "another noise schedule"),
        (("--classifier", "other_latents"), "another autoencoder"),
        (("--classifier-scale", "2"), "--classifier-scale goes with --classifier"),
        (("--class", "circle"), "--class goes with --classifier"),
        (("--weak-scale", "2"), "--weak-scale goes with --weak-model"),
        (("--weak-model", "weak", "--weak-scale", "-1"), "weak_scale"),
        (("--weak-model", "toy"), "nothing to amplify"),
        (("--weak-model", "weak_noise"), "schedule"),
        (("--weak-model", "weak_blind"), "the first_image of its video stage"),
        (("--weak-model", "weak_latents"), "another autoencoder"),
        (("--guidance-rescale", "1.5"), "guidance_rescale"),
        (("--guidance-interval", "5", "1"), "interval"),
        (("--guidance-interval", "nan", "1"), "interval"),
        (("--noise", "none.safetensors"), "none.safetensors"),
        (("--noise", "torn.safetensors"), "torn.safetensors"),
        (("--noise", "picture.png"), "picture.png"),
        (("--noise", "large.safetensors"), "[4, 1, 8, 8]"),
        (("--noise", "video.safetensors", "--image-only"), "holds noise of video"),
        (("--noise", "image.safetensors", "--image", "picture.png"), "holds noise of image"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_guide_is_refused(
    arguments: tuple[str, ...],
    problem: str,
    shelf: dict[str, Path],
    toy_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(shelf.get(argument, argument)) for argument in arguments]
    prompt = PROMPT
    if "PROMPT" in given:
        place = given.index("PROMPT")
        _, prompt = given.pop(place), given.pop(place)
    assert run("generate", prompt, "--model", toy_model, "-o", tmp_path / "out.mp4", *given) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1, errors
    assert problem in errors
    assert not list(tmp_path.iterdir())
