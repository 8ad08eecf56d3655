"""Parts of an evaluation held to truths: losses, frames between, LPIPS, sets, near copies, one that was killed."""

import io
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from data_pipeline.shards import write_world_shards
from stages.evaluation.figures import set_figures
from stages.evaluation.judging import Job, _by_the_model, _progress, evaluate
from stages.evaluation.kept import FeatureFiles
from stages.evaluation.losses import EIGHTHS, time_losses
from stages.evaluation.measures import Gauge
from stages.evaluation.neighbours import nearest_training_clips, training_questions
from stages.evaluation.questions import Clips, Prompt, WorldQuestions
from stages.evaluation.road import Plan, measure
from stages.pipeline import Pipeline
from tests.metric_peers import disc
from tests.test_evaluate import IDENTITY, QUIET, SAMPLING, Oracle
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.metrics.gaussian import frechet_distance
from videodiff.metrics.kernels import polynomial_mmd
from videodiff.metrics.manifold import support
from videodiff.metrics.scores import inception_score
from videodiff.model import Model
from videodiff.networks.features import FeatureExtractor

ASKED = [Prompt("data", number, 0, None, "a") for number in range(2)]


class Losses:
    """A road whose network knows nothing, or the noise itself: latents are zeros."""

    def __init__(self, knows: bool) -> None:
        self.schedule, self.knows = NoiseSchedule(), knows
        part = SimpleNamespace(schedule=self.schedule, prediction="eps")
        self.model = SimpleNamespace(diffusion=lambda stage: part)

    def encode(self, frames: np.ndarray) -> Tensor:
        return torch.zeros(len(frames), 4, frames.shape[1], 16, 16)

    def denoiser(self, stage: str) -> "Losses":
        return self

    def video_condition(self, texts: list[str], first: Tensor, fps: float) -> None:
        return None

    def output(self, x_t: Tensor, t: Tensor, condition: None) -> tuple[Tensor, None]:
        sigma = self.schedule.sigma(t).view(-1, 1, 1, 1, 1)
        return (x_t / sigma if self.knows else torch.zeros_like(x_t)), None


def test_losses_at_fixed_noise_are_those_of_a_network_that_knows_all_or_nothing() -> None:
    real = np.zeros((2, 3, 16, 16, 3), np.uint8)
    names = {f"loss_{place}" for place in range(1, EIGHTHS + 1)}
    for told in time_losses(Losses(True), "video", ASKED, real, 8.0, 5):  # type: ignore[arg-type]
        assert set(told) == names
        assert max(told.values()) < 1e-8  # type: ignore[type-var]
    nothing = time_losses(Losses(False), "video", ASKED, real, 8.0, 5)  # type: ignore[arg-type]
    values = [told[name] for told in nothing for name in names]
    assert values == pytest.approx([1.0] * len(values), abs=0.15)  # the noise's own variance
    assert len(set(values)) == len(values)  # another noise for each prompt and time
    again = time_losses(Losses(False), "video", ASKED[::-1], real, 8.0, 5)  # type: ignore[arg-type]
    assert again == nothing[::-1]  # by prompt, whatever the batch


class Between(Oracle):
    """Makes the middle frames as it is told: those of the real clip, or the frame before again."""

    def __init__(self, repeats: bool) -> None:
        super().__init__()
        self.repeats = repeats

    def interpolation(self, keys, clip, fps, sampling) -> Tensor:  # type: ignore[no-untyped-def]
        return clip.repeat_interleave(2, 2)[:, :, :-1] if self.repeats else self.encode(moving())


def moving() -> np.ndarray:
    """A disc that goes 2 pixels from frame to frame: uint8 [1,9,64,64,3]."""
    return np.stack([disc(20 + 2 * t, 30, 64, 10, (200, 60, 90)) for t in range(9)])[None].astype(np.uint8)


@pytest.mark.parametrize("repeats", [False, True])
def test_frames_between_are_held_against_blending_and_flow(repeats: bool) -> None:
    plan = Plan(("interpolation",), 64, 5, 8.0, 2, 5, SAMPLING)
    gauge = Gauge(flow=True, perceptual=lambda a, b: (a - b).abs().mean((1, 2, 3)))
    (made,), _ = measure(Between(repeats), plan, ASKED[:1], moving(), gauge)
    told = made.rows["interpolation"]["measures"]
    assert told["middle_by_flow_psnr"] > told["middle_blended_psnr"] + 5  # the disc is moved and not doubled
    assert told["middle_by_flow_lpips"] < told["middle_blended_lpips"]
    rivals = (told["middle_by_flow_psnr"], told["middle_rebuilt_psnr"])
    assert told["middle_psnr"] < min(rivals) if repeats else told["middle_psnr"] == told["middle_rebuilt_psnr"]
    assert (told["middle_psnr"] < told["middle_blended_psnr"]) == repeats


def test_lpips_is_the_mean_of_the_distance_over_all_frames() -> None:
    """More frames than are looked at together, on pictures in [-1, 1]."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 2, 19, 16, 16, 3)).astype(np.uint8)
    gauge = Gauge(perceptual=lambda x, y: (x - y).square().mean((1, 2, 3)))
    for told, x, y in zip(gauge.likeness("reconstruction", a, b), a, b, strict=True):
        wanted = np.mean(((x.astype(float) - y) / 127.5) ** 2)
        assert told["reconstruction_lpips"] == pytest.approx(wanted, rel=1e-5)
    assert "reconstruction_lpips" not in Gauge().likeness("reconstruction", a, b)[0]


def test_captions_that_the_tower_cuts_are_counted(toy_model: Path) -> None:
    road = Pipeline(Model.load(toy_model))
    plan = Plan(("real",), 32, 4, 8.0, 1, 0, {})
    asked = [Prompt("data", i, 0, None, text) for i, text in enumerate(("a red circle", "a red circle " * 9))]
    found = dict(_by_the_model(road, plan, asked, np.zeros((2, 1, 32, 32, 3), np.uint8)))
    assert found["real"] == [{"captions_cut": 0.0}, {"captions_cut": 1.0}]


def test_figures_of_sets_are_those_of_the_features() -> None:
    generator = torch.Generator().manual_seed(0)
    real, made = torch.randn(2, 20, 3, 5, generator=generator)
    classes = torch.softmax(3 * torch.randn(20, 4, generator=generator), 1)
    whole = torch.ones(20)
    whole[7] = 0
    features = {
        "0/real": real, "0/video_real": made + 0.5, "finite/real": torch.ones(20), "finite/video_real": whole,
        "0/video_real/classes": classes,
    }  # fmt: skip
    network = SimpleNamespace(name="network", kind="torchscript", takes="pictures", has_texts=False)
    told = {f["figure"]: f for f in set_figures(["real", "video_real"], features, ["a"] * 20, [network], "k")}
    assert {(f["n"], f["not_finite"]) for f in told.values()} == {(19, 1)}
    kept = whole.bool()
    x, y = real[kept].flatten(0, 1), made[kept].flatten(0, 1) + 0.5
    assert told["frechet"]["value"] == pytest.approx(frechet_distance(x, y), rel=1e-6)
    assert told["kernel"]["value"] == pytest.approx(polynomial_mmd(x, y, of_one=3), rel=1e-6)
    wanted = support(x, y)
    for name in ("precision", "recall", "density", "coverage"):
        assert told[name]["value"] == pytest.approx(getattr(wanted, name))
        low, high = told[name]["interval"]
        assert low < told[name]["value"] < high or wanted.precision in (0, 1)
        assert name == "density" or 0 <= low < high <= 1
    assert told["inception"]["value"] == pytest.approx(inception_score(classes[kept], 1)[0], rel=1e-6)


def test_an_inception_score_is_marked_by_what_few_samples_do_to_it() -> None:
    """1000 classes of which a set shows two surely: 40 samples are enough; of all of them they are not."""
    generator = torch.Generator().manual_seed(0)
    sure = torch.full((40, 1000), 1e-9)
    sure[torch.arange(40), torch.arange(40) % 2] = 1.0
    many = torch.softmax(30 * torch.rand(40, 1000, generator=generator), 1)
    network = SimpleNamespace(name="network", kind="inception", takes="pictures", has_texts=False)
    marks = []
    for classes in (sure / sure.sum(1, keepdim=True), many):
        features = {"0/image": torch.zeros(40, 1, 2), "finite/image": torch.ones(40), "0/image/classes": classes}
        (told,) = set_figures(["image"], features, ["a"] * 40, [network], "k")
        marks.append(told.get("caution", ""))
    assert marks[0] == ""
    assert marks[1].startswith("biased downward: by about ")


def means(takes: Any = "clips") -> FeatureExtractor:
    """Mean colours of 4x4 fields of each frame."""
    return FeatureExtractor(
        kind="torchscript", name="fields", sha256="", takes=takes, size=None, resize="", values="", dimension=192,
        device=torch.device("cpu"), batch=8, prepare=lambda frames: frames.float(),
        look=lambda x, _: (x.unflatten(3, (4, -1)).unflatten(2, (4, -1)).mean((3, 5)).flatten(1), None),
    )  # fmt: skip


@pytest.mark.parametrize("learned", [True, False])
def test_clips_that_were_learned_by_heart_are_caught(learned: bool, tmp_path: Path) -> None:
    """A model that gives its training clips back with a little noise, and one that draws new ones of the same kind."""
    write_world_shards(tmp_path / "shards", num_clips=12, size=32, frames=4, fps=8, seed=1)
    questions, asked = training_questions(str(tmp_path / "shards"), 0), WorldQuestions(24, 0, 5)
    plan = Plan(("real", "video_generated"), 32, 4, 8.0, 1, 5, SAMPLING)
    extractor, clips = means(), Clips(32, 4, 8.0)
    real = np.stack([asked.clip(prompt, clips) for prompt in asked.prompts])
    try:
        training = np.stack([questions.clip(prompt, clips) for prompt in questions.prompts])
        if learned:
            noise = np.random.default_rng(0).integers(-2, 3, (24, 4, 32, 32, 3))
            made = (training[np.arange(24) % 12].astype(int) + noise).clip(0, 255).astype(np.uint8)
        else:
            other = WorldQuestions(24, 0, 6)
            made = np.stack([other.clip(prompt, clips) for prompt in other.prompts])
        job = Job(Oracle(), plan, asked, Gauge([extractor]), IDENTITY, tmp_path / "out")
        features = {"0/real": extractor(real)[:, None], "0/video_generated": extractor(made)[:, None]}
        finite = {f"finite/{row}": torch.ones(24) for row in plan.rows}
        FeatureFiles(job.out, job.protocol).keep(0, asked.prompts, features | finite)
        told = nearest_training_clips(job, questions, tmp_path)
    finally:
        questions.close()
    assert told is not None
    assert (told["training_clips"], told["made"]["n"]) == (12, 24)
    near = told["nearer_than_usual"]
    if learned:
        assert near["right"] == 24
        assert told["made"]["interval"][1] < 0.2 * told["unseen"]["interval"][0]
    else:
        assert near["interval"][0] < 2 * told["usual"]


def slow(out: Path, seconds: float) -> dict[str, Any] | None:
    class Slow(Oracle):
        def image(self, keys, sampling) -> Tensor:  # type: ignore[no-untyped-def]
            time.sleep(seconds)
            return super().image(keys, sampling)

    plan = Plan(("image",), 64, 16, 8.0, 1, 5, SAMPLING, batch=1)
    return evaluate(Job(Slow(), plan, WorldQuestions(6, 0, 5), Gauge(), IDENTITY, out), QUIET)


def test_an_evaluation_that_was_killed_goes_on_to_the_same(tmp_path: Path) -> None:
    whole = slow(tmp_path / "whole", 0.0)
    child = multiprocessing.get_context("fork").Process(target=slow, args=(tmp_path / "killed", 1.0))
    child.start()
    file, end = tmp_path / "killed/samples.jsonl", time.monotonic() + 120
    while time.monotonic() < end and not (file.is_file() and file.read_bytes().count(b"\n") >= 3):
        time.sleep(0.02)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert 3 <= file.read_bytes().count(b"\n") < 1 + 6
    with open(file, "ab") as torn:
        torn.write(b'{"split": "train", "num')  # in the midst of a line
    told = slow(tmp_path / "killed", 0.0)
    assert json.dumps(told, sort_keys=True) == json.dumps(whole, sort_keys=True)
    assert file.read_bytes() == (tmp_path / "whole/samples.jsonl").read_bytes()


def test_who_waits_sees_how_far_it_is() -> None:
    shown, piped = io.StringIO(), io.StringIO()
    for file, is_terminal in ((shown, True), (piped, False)):
        console = Console(file=file, force_terminal=is_terminal, width=80)
        with _progress(console, 3) as advance:
            advance(1)
            advance(2)
    assert "3/3" in shown.getvalue()
    assert piped.getvalue() == "3 of 3 prompts\n"
