"""Stage classifier: labels from the shards' JSON, latents or pixels, the folder that it leaves, and guiding by it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.shards import write_shard, write_world_shards
from data_pipeline.world import BACKGROUNDS, COLOURS, SHAPES, render_clip
from stages.assemble import make_task
from stages.classifier import ClassifierStage, ClassifierTask
from stages.cli import main
from stages.guides import classifier_part
from videodiff import config as configs
from videodiff.batch import VideoBatch
from videodiff.diffusion.guidance import class_logits
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.training.trainer import train

NETWORK = {"channels": 4, "model_channels": 16, "channel_mult": [1], "num_res_blocks": 1, "attention_levels": [False],
           "head_channels": 8}  # fmt: skip


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world_shards(tmp_path_factory.mktemp("data") / "shards", 24, 32, 1, 8.0, 0).parent


def stage(shards: Path, folder: Path, **more: Any) -> ClassifierStage:
    data = {"shards": str(shards), "batch_size": 8, "frames": 1, "fps": 8.0, "size": 32, "label": "scene.shape"}
    tree = {
        "stage": "classifier",
        "run": {"dir": str(folder / "run"), "steps": 60, "save_every": 60, "sample_every": 0},
        "data": {**data, "workers": 0, **more.pop("data", {})},
        "engine": {"precision": "fp32", "learning_rate": 1e-2, "weight_decay": 0.0, "ema_decay": 0.9},
        "network": NETWORK,
        **more,
    }
    return configs.build(ClassifierStage, tree, "the test")


def made(config: ClassifierStage) -> ClassifierTask:
    task = make_task(config)
    assert isinstance(task, ClassifierTask)
    return task


@dataclass
class Clips:
    """First frames of the world, in memory, with one of their attributes."""

    label: str = "shape"
    fingerprint: str = "clips"

    def batch(self, numbers: list[int], bad: tuple[int, ...] = ()) -> VideoBatch:
        clips = [render_clip(0, number % 16, 32, 1, 8.0) for number in numbers]
        return VideoBatch(
            frames=torch.from_numpy(np.stack([clip.frames for clip in clips])),
            captions=tuple(clip.captions[0] for clip in clips),
            fps=torch.full((len(clips),), 8.0),
            numbers=torch.tensor(numbers),
            keys=tuple(clip.key for clip in clips),
            weight=torch.tensor([float(number not in bad) for number in numbers]),
            labels=tuple("" if n in bad else c.meta["scene"][self.label] for n, c in zip(numbers, clips, strict=True)),
        )

    def batches(self, start_sample: int, rank: int, world: int, micro_batch: int) -> Iterator[VideoBatch]:
        while True:
            yield self.batch([start_sample + rank + world * i for i in range(micro_batch)])
            start_sample += world * micro_batch


def test_classes_are_those_of_the_shards_or_those_named(shards: Path, toy_model: Path, tmp_path: Path) -> None:
    task = made(stage(shards, tmp_path, model=str(toy_model)))
    assert (task.attribute, task.classes) == ("shape", tuple(sorted(SHAPES)))
    colours = made(stage(shards, tmp_path, model=str(toy_model), data={"label": "scene.colour"}))
    assert (colours.attribute, colours.classes) == ("colour", tuple(sorted(COLOURS)))
    named = made(stage(shards, tmp_path, model=str(toy_model), classes=list(SHAPES)))
    batch = Clips().batch([0, 1, 2, 3, 4, 5])
    for known in (task, named):
        assert [known.classes[place] for place in known.labels(batch).tolist()] == list(batch.labels)
    few = made(stage(shards, tmp_path, model=str(toy_model), classes=["circle", "square"]))
    with pytest.raises(UserError, match="none of the classes circle, square"):
        few.labels(batch)


@pytest.mark.parametrize("pixels", [False, True])
def test_it_learns_on_latents_and_on_pixels_and_opens_as_a_model(
    pixels: bool, shards: Path, toy_model: Path, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"model": str(toy_model)}
    if pixels:
        more = {"schedule": {"kind": "cosine", "num_steps": 50}, "network": {**NETWORK, "channels": 3}}
    config = stage(shards, tmp_path, data={"label": "scene.background"}, **more)
    task, source = made(config), Clips("background")
    batch = source.batch(list(range(16)))
    data = task.data(batch, seed=0)
    assert data.shape == ((16, 3, 1, 32, 32) if pixels else (16, 4, 1, 4, 4))
    if pixels:
        assert (data.min(), data.max()) == (-1, 1)
    before = task.loss(task.module, batch, seed=0)
    torch.testing.assert_close(before.per_sample.detach(), torch.full((16,), float(np.log(4))))  # knows nothing yet
    train(config.run, config.engine, config.data.batch_size, lambda: (task, source), config)
    after = task.loss(task.module, batch, seed=0)
    assert after.per_sample.detach().mean() < 0.7 * before.per_sample.detach().mean()

    model = Model.load(tmp_path / "run")
    part = classifier_part(model)
    assert (part.attribute, part.classes, part.size) == ("background", tuple(sorted(BACKGROUNDS)), 32)
    assert part.schedule == (config.schedule if pixels else Model.load(toy_model).diffusion("image").schedule)
    assert model.config.stages() == [*([] if pixels else Model.load(toy_model).config.stages()), "classifier"]
    raw = Model.load(tmp_path / "run", "raw").classifier
    t = torch.full((16,), 10)
    with torch.no_grad():
        logits = class_logits(raw, data, t)
        torch.testing.assert_close(logits, class_logits(task.module, data, t))
        assert not torch.equal(logits, class_logits(model.classifier, data, t))  # the average is another one
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 60
    assert all(0 <= line["accuracy"] <= 1 for line in lines)


def test_accuracies_are_by_level_and_bad_clips_count_for_nothing(shards: Path, toy_model: Path, tmp_path: Path) -> None:
    task = made(stage(shards, tmp_path, model=str(toy_model)))
    batch, bad = Clips().batch(list(range(12)), bad=(3, 5)), torch.tensor([3, 5])
    truth, steps = task.labels(batch), task.schedule.num_steps
    assert truth[bad].tolist() == [0, 0]
    told: list[torch.Tensor] = []

    def right_where_there_is_little_noise(x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        told.append(time)
        answer = torch.where(time < steps / 3, truth, (truth + 1) % 4)
        return torch.nn.functional.one_hot(answer, 4).float()

    tallies = task.loss(right_where_there_is_little_noise, batch, seed=0).tallies
    low = told[0] < steps / 3
    usable = torch.ones(12, dtype=torch.bool)
    usable[bad] = False
    assert tallies["accuracy"].tolist() == [int((low & usable).sum()), int(usable.sum())]
    hits, counts = zip(*(tallies[f"accuracy_{third}"].tolist() for third in ("low", "middle", "high")), strict=True)
    assert hits == (counts[0], 0, 0)
    assert sum(counts) == int(usable.sum())
    assert min(counts) > 0


def test_a_loss_follows_the_sample_not_its_batch(shards: Path, toy_model: Path, tmp_path: Path) -> None:
    task = made(stage(shards, tmp_path, model=str(toy_model)))
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    together = task.loss(task.module, Clips().batch([3, 4, 5]), seed=1).per_sample
    alone = [task.loss(task.module, Clips().batch([number]), seed=1).per_sample for number in (3, 4, 5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"data": {"label": None}}, r"data\.label"),
        ({"classes": ["circle", "circle"]}, "name one twice"),
        ({"data": {"label": "scene.name"}}, r"data\.label=scene\.name"),
        ({"classes": ["circle"]}, "nothing to tell apart"),
        ({"network": {**NETWORK, "channels": 8}}, r"network\.channels: 8, but the latents of .* have 4"),
        ({"model": None, "schedule": {}}, r"network\.channels: 4, but pixels have 3"),
        ({"model": None}, "schedule: there is no image stage"),
        ({"schedule": {"kind": "cosine"}}, "schedule: differs from that of the image stage"),
        ({"data": {"size": 36}}, r"data\.size: 36"),
        ({"network": {**NETWORK, "pooled_dim": 16}}, "pooled_dim"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_training(
    change: dict[str, Any], problem: str, shards: Path, toy_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=problem) as refusal:
        make_task(stage(shards, tmp_path, **{"model": str(toy_model), **change}))
    assert "\n" not in str(refusal.value)


def test_one_label_for_all_is_refused(toy_model: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [(n, b"never read", {"captions": ["a"], "kind": "cat"}) for n in "ab"])
    with pytest.raises(UserError, match="nothing to tell apart"):
        make_task(stage(tmp_path / "a.tar", tmp_path, model=str(toy_model), data={"label": "kind"}))


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def test_from_shards_to_a_guided_picture(
    shards: Path, toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's own YAML at toy size, through the commands."""
    monkeypatch.chdir(tmp_path)
    toy = [f"model={toy_model}", f"data.shards={shards}", "run.dir=run", "run.steps=3", "run.save_every=3",
           "data.size=32", "data.batch_size=8", "data.workers=0", "engine.learning_rate=0.01", "engine.warmup_steps=0",
           "network={model_channels: 16, channel_mult: [1], attention_levels: [false], head_channels: 8}",
    ]  # fmt: skip
    assert run("train", "configs/demo/classifier.yaml", *toy) == 0
    shas = []
    for scale in (0, 1000):
        guide = ("--classifier", "run", "--classifier-scale", scale, "--image-only", "--text-guidance", 0)
        assert run("generate", "a square", "--model", toy_model, "-o", f"{scale}.mp4", *guide) == 0
        told = json.loads((tmp_path / f"{scale}.json").read_text())
        assert told["stages"]["image"]["classifier"] == {"attribute": "shape", "class": "square", "scale": scale}
        shas.append(told["frames_sha256"])
    assert shas[0] != shas[1]
    assert run("evaluate", "run", "--stage", "classifier", "--num-prompts", 1, "--num-held-out", 0, "--out", "ev") == 0
    rows = json.loads((tmp_path / "ev" / "evaluation.json").read_text())["rows"]
    assert [row["row"] for row in rows][-2:] == ["unguided", "guided"]
    assert rows[0]["row"] == "real"
    assert all(set(row["shares"]) == {"shape", "all"} for row in rows[1:])
