"""Encoded shards: the same training step as from videos, up to half precision; and what is refused of them."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from tiny_shards import clip
from tiny_stages import ENGINE
from typer.testing import CliRunner

from data_pipeline.data_config import DataConfig
from data_pipeline.decoders import ClipError
from data_pipeline.features import check_finite, pack, unpack
from data_pipeline.loader import ShardSource
from data_pipeline.samples import read_sample
from data_pipeline.shards import open_shards, write_index, write_shard, write_world_shards
from stages import image, video
from stages.assemble import train_stage
from stages.cli import app
from stages.encode import _Job, encode, encoder_digest
from videodiff import config as configs
from videodiff.batch import Encoded, VideoBatch
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.model_folder import export, write_weights
from videodiff.parts import DESCRIPTION, ModelConfig
from videodiff.video_io import encode_video

DATA = {"batch_size": 4, "fps": 8, "size": 32, "streams": 4, "workers": 0, "prefetch": 0}
NETWORK = {
    "channels": 4, "model_channels": 16, "channel_mult": [1], "num_res_blocks": 1, "attention_levels": [True],
    "head_channels": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(toy_model: Path) -> Model:
    return Model.load(toy_model)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Sets whose clips have just as many frames as are asked for, so that there is one window only: 1, and 4."""
    root = tmp_path_factory.mktemp("videos")
    return {
        frames: write_world_shards(root / str(frames), 7, 32, frames, 8, seed=frames, samples_per_shard=3).parent
        for frames in (1, 4)
    }


def config(shards: Path, frames: int, **changes: Any) -> DataConfig:
    return DataConfig(shards=str(shards), frames=frames, **{**DATA, **changes})


@pytest.fixture(scope="module")
def encoded(videos: dict[int, Path], model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("encoded")
    return {
        frames: encode(config(folder, frames), model, root / str(frames), 1, seed=0).parent
        for frames, folder in videos.items()
    }


def batches(data: DataConfig, model: Model | None, count: int, seed: int = 5) -> list[VideoBatch]:
    source = ShardSource(data, seed, encoder=None if model is None else lambda: encoder_digest(model))
    iterator = source.batches(0, 0, 1, data.batch_size)
    taken = list(islice(iterator, count))
    iterator.close()  # type: ignore[attr-defined]
    return taken


@pytest.mark.parametrize("stage", ["image", "video"])
def test_a_step_from_encoded_shards_is_that_from_videos(
    stage: str, videos: dict[int, Path], encoded: dict[int, Path], model: Model, tmp_path: Path
) -> None:
    """Loss per sample and gradients, for the same samples, captions, noise and posterior draws."""
    frames = 1 if stage == "image" else 4
    tree = {
        "stage": stage, "run": {"dir": str(tmp_path), "steps": 1}, "data": {"shards": "x", "frames": frames, **DATA},
        "engine": ENGINE, **({"network": NETWORK} if stage == "image" else {}),
    }  # fmt: skip
    schema, make = (image.ImageStage, image.task) if stage == "image" else (video.VideoStage, video.task)
    torch.manual_seed(0)
    task = make(configs.build(schema, tree, "the test"), model)  # type: ignore[operator]
    for parameter in task.module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    plain = batches(config(videos[frames], frames), None, 3)
    stored = batches(config(encoded[frames], frames), model, 3)
    for one, other in zip(plain, stored, strict=True):
        assert (one.keys, one.captions, one.numbers.tolist()) == (other.keys, other.captions, other.numbers.tolist())
        assert tuple(other.frames.shape) == (4, frames, 0, 0, 3)
        grads, losses = [], []
        for batch in (one, other):
            task.module.zero_grad()
            output = task.loss(task.module, batch, seed=5)
            output.per_sample.sum().backward()
            losses.append(output.per_sample.detach())
            grads.append(torch.cat([p.grad.flatten() for p in task.module.parameters() if p.grad is not None]))
        assert torch.allclose(*losses, rtol=2e-3, atol=1e-4)
        assert not torch.equal(*losses), "half precision is no identity: the features were used"
        assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 5e-3


def test_latents_are_drawn_anew_each_epoch(encoded: dict[int, Path], model: Model, tmp_path: Path) -> None:
    tree = {"stage": "video", "run": {"dir": str(tmp_path), "steps": 1}, "engine": ENGINE}
    data = {"shards": "x", "frames": 4, **DATA}
    task = video.task(configs.build(video.VideoStage, {**tree, "data": data}, "the test"), model)
    drawn: dict[str, list[torch.Tensor]] = {}
    for batch in batches(config(encoded[4], 4), model, 6):
        for key, latents in zip(batch.keys, task.latents(batch, seed=5), strict=True):
            drawn.setdefault(key, []).append(latents)
    assert all(not torch.equal(found[0], found[1]) for found in drawn.values())


def test_encoding_goes_on_after_an_interruption_and_gives_the_same_bytes(
    videos: dict[int, Path], encoded: dict[int, Path], model: Model, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(encoded[4], out)
    expected = {path.name: path.read_bytes() for path in out.iterdir()}
    plan = {k: v for k, v in json.loads((out / "index.json").read_text()).items() if k not in ("shards", "version")}
    (out / ".making.json").write_text(json.dumps(plan))
    for name in ("index.json", "encoded-000001.tar"):
        (out / name).unlink()
    (out / ".encoded-000001-abcd.tar").write_bytes(b"half")
    with pytest.raises(UserError, match="never finished"):
        open_shards(str(out))
    encode(config(videos[4], 4), model, out, 1, seed=0)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
    with pytest.raises(UserError, match="holds other shards"):
        encode(config(videos[4], 4), model, out, 2, seed=0)


def test_several_processes_encode_what_one_does(
    videos: dict[int, Path], encoded: dict[int, Path], model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others than this one, which here could not; and they go on with what is there already."""

    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError("encoded by the parent")

    monkeypatch.setattr(_Job, "run", refuse)
    out, theirs = tmp_path / "out", encoded[4]
    shutil.copytree(theirs, out)
    kept = (out / "encoded-000001.tar").read_bytes()
    plan = {k: v for k, v in json.loads((out / "index.json").read_text()).items() if k not in ("shards", "version")}
    (out / ".making.json").write_text(json.dumps(plan))
    for name in ("index.json", "encoded-000000.tar", "encoded-000002.tar"):
        (out / name).unlink()
    encode(config(videos[4], 4), model, out, 1, seed=0, processes=8)  # more than there are shards
    assert {path.name for path in out.iterdir()} == {path.name for path in theirs.iterdir()}
    assert (out / "encoded-000001.tar").read_bytes() == kept
    for mine, other in zip(open_shards(str(out)), open_shards(str(theirs)), strict=True):
        assert len(mine.offsets) == len(other.offsets)
        for number in range(len(mine.offsets)):
            one, two = read_sample(mine, number), read_sample(other, number)
            assert (one.key, one.captions) == (two.key, two.captions)
            a, b = unpack(one.video, 1, len(one.captions)), unpack(two.video, 1, len(two.captions))
            torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=2e-3)  # threads may round otherwise
            torch.testing.assert_close(a.text[0], b.text[0], rtol=0, atol=2e-3)


def test_the_first_process_that_fails_ends_the_others_in_one_line(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    for name in ("a.tar", "b.tar"):
        write_shard(folder / name, [(f"bad {name[0]}", b"junk", {"captions": ["x"]})])
    write_index(folder, ["a.tar", "b.tar"], {})
    with pytest.raises(UserError, match=r"1 of 1 clips are bad \([12] undecodable"):
        encode(config(folder, 4, bad_floor=0), model, tmp_path / "strict", 1, seed=0, processes=2)
    assert not (tmp_path / "strict" / "index.json").exists()
    assert not multiprocessing.active_children()


def test_variants_have_windows_crops_and_flips_of_their_own(model: Model, tmp_path: Path) -> None:
    """Of 6 variants of a wide, moving ramp hardly two are alike, and training meets all of them."""
    ramp = np.broadcast_to(np.linspace(0, 200, 96).astype(np.uint8)[None, None, :, None], (8, 32, 96, 3)).copy()
    for t in range(8):
        ramp[t] += 5 * t
    write_shard(tmp_path / "v" / "a.tar", [("r", encode_video(ramp, 8), {"captions": ["one", "two"]})])
    data = config(tmp_path / "v", 4, crop="random", flip=True, batch_size=1)
    out = encode(data, model, tmp_path / "out", 6, seed=0).parent
    shard = open_shards(str(out))[0]
    raw = read_sample(shard, 0)
    features = unpack(raw.video, 6, 2)
    assert tuple(features.mean.shape) == (6, 4, 4, 4, 4)
    assert len({mean.numpy().tobytes() for mean in features.mean}) == 6
    seen = {
        (batch.encoded.mean.numpy().tobytes(), batch.captions, batch.encoded.text[0].numpy().tobytes())
        for batch in batches(config(out, 4, batch_size=1), model, 90)
        if batch.encoded is not None
    }
    assert len(seen) == 12, "6 variants with 2 captions each, and each caption with its own features"
    assert encode(config(tmp_path / "v", 4), model, tmp_path / "centre", 1, seed=0)
    centre = unpack(read_sample(open_shards(str(tmp_path / "centre"))[0], 0).video, 1, 2)
    assert not any(torch.equal(centre.mean[0], mean) for mean in features.mean)


def test_bad_videos_are_left_out_and_listed(model: Model, tmp_path: Path) -> None:
    video, meta = clip(90, 32, 32)
    folder = tmp_path / "v"
    write_shard(
        folder / "a.tar", [("good", video, meta), ("bad", b"junk", meta), ("short", clip(1, 32, 32, 2)[0], meta)]
    )
    write_index(folder, ["a.tar"], {})
    out = encode(config(folder, 4), model, tmp_path / "out", 2, seed=0).parent
    assert [len(shard.offsets) for shard in open_shards(str(out))] == [1]
    listed = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert {(entry["key"], entry["reason"]) for entry in listed} == {("bad", "undecodable"), ("short", "too short")}
    arguments = ["data", "encode", str(folder), "--model", str(model.folder), "--out", str(out)]
    told = CliRunner().invoke(app, [*arguments, "--frames", "4", "--fps", "8", "--size", "32", "--variants", "2"])
    assert "left out: 1 undecodable, 1 too short, listed in" in told.output, told.output
    write_shard(tmp_path / "junk/a.tar", [("bad", b"junk", meta)])
    write_index(tmp_path / "junk", ["a.tar"], {})
    with pytest.raises(UserError, match=r"none of its 1 samples can be encoded \(1 undecodable, listed in"):
        encode(config(tmp_path / "junk", 4), model, tmp_path / "none", 1, seed=0)
    assert not (tmp_path / "none/index.json").exists()
    with pytest.raises(UserError, match="2 of 3 clips are bad"):
        encode(config(folder, 4, bad_floor=1), model, tmp_path / "strict", 1, seed=0)
    with pytest.raises(UserError, match="encoded already"):
        encode(config(out, 4), model, tmp_path / "twice", 1, seed=0)
    with pytest.raises(UserError, match="size 30 is not a multiple"):
        encode(config(folder, 4, size=30), model, tmp_path / "odd", 1, seed=0)


def changed(model: Model, folder: Path, stage: str, name: str) -> Model:
    """A copy of the model with other weights in one stage, in parameters whose name starts with `name`."""
    export(model, folder)
    state = {k: v + 0.1 if k.startswith(name) else v for k, v in model.state(stage).items()}
    description = configs.load(ModelConfig, folder / DESCRIPTION)
    part = getattr(description, stage)
    weights = write_weights(folder, part.weights.name, state)
    update = {stage: part.model_copy(update={"weights": weights})}
    configs.save(description.model_copy(update=update), folder / DESCRIPTION)
    return Model.load(folder)


def test_features_of_another_model_are_refused(encoded: dict[int, Path], model: Model, tmp_path: Path) -> None:
    data = config(encoded[4], 4)
    for number, (stage, name) in enumerate([("autoencoder", "encoder."), ("text", "")]):
        other = changed(model, tmp_path / str(number), stage, name)
        with pytest.raises(UserError, match="by another model's autoencoder or text tower"):
            batches(data, other, 1)
    export(model, tmp_path / "layer")
    description = configs.load(ModelConfig, tmp_path / "layer" / DESCRIPTION)
    network = description.text.network.model_copy(update={"layer": -2})
    other = description.text.model_copy(update={"network": network})
    configs.save(description.model_copy(update={"text": other}), tmp_path / "layer" / DESCRIPTION)
    with pytest.raises(UserError, match="by another model's autoencoder or text tower"):
        batches(data, Model.load(tmp_path / "layer"), 1)
    assert batches(data, changed(model, tmp_path / "decoder", "autoencoder", "decoder."), 1)
    export(model, tmp_path / "half", half=True)
    assert batches(data, Model.load(tmp_path / "half"), 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": 2}, "encoded with frames 4, data.frames is 2"),
        ({"fps": 16}, "encoded with fps 8"),
        ({"size": 64}, "encoded with size 32"),
        ({"flip": True}, "fixed shapes"),
        ({"crop": "random"}, "fixed shapes"),
        ({"label": "scene.shape"}, "fixed shapes"),
    ],
)
def test_another_shape_is_refused(encoded: dict[int, Path], model: Model, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        batches(config(encoded[4], **{"frames": 4, **changes}), model, 1)
    with pytest.raises(UserError, match="hold no pictures"):
        batches(config(encoded[4], 4), None, 1)


def test_encoded_sets_mix_with_their_like_only(encoded: dict[int, Path], videos: dict[int, Path], model: Model) -> None:
    mixed = DataConfig(shards=[{"shards": str(encoded[4])}, {"shards": str(encoded[4])}], frames=4, **DATA)
    assert batches(mixed, model, 1)
    for other in (videos[4], encoded[1]):
        mixed = DataConfig(shards=[{"shards": str(encoded[4])}, {"shards": str(other)}], frames=4, **DATA)
        with pytest.raises(UserError, match="stack with their like"):
            batches(mixed, model, 1)


def test_broken_features_are_counted(encoded: dict[int, Path], model: Model, tmp_path: Path) -> None:
    """No safetensors, other captions, not finite, other shapes: each costs its sample; a step of them has weight 0."""
    shards = open_shards(str(encoded[4]))
    raws = [read_sample(shard, n) for shard in shards for n in range(len(shard.offsets))]
    tensors = [load(raw.video) for raw in raws]
    broken = {
        1: b"junk",
        2: save({**tensors[2], "text.0": tensors[2]["text.0"][:1].contiguous()}),
        3: save({**tensors[3], "mean": torch.full_like(tensors[3]["mean"], torch.nan)}),
        4: save({**tensors[4], **{k: tensors[4][k][..., :2].contiguous() for k in ("mean", "std")}}),
        5: save({k: v for k, v in tensors[5].items() if k != "mean"}),
    }
    samples = [(raw.key, broken.get(n, raw.video), {**raw.meta}) for n, raw in enumerate(raws)]
    write_shard(tmp_path / "a.tar", samples, "safetensors")
    facts = json.loads((encoded[4] / "index.json").read_text())
    write_index(tmp_path, ["a.tar"], {"encoding": facts["encoding"]})
    source = ShardSource(config(tmp_path, 4, batch_size=7), 0, encoder=lambda: encoder_digest(model))
    batch = next(source.batches(0, 0, 1, 7))
    assert {key for key, weight in zip(batch.keys, batch.weight.tolist(), strict=True) if weight} == {
        raws[n].key for n in (0, 6)
    }
    assert source.bad_counts == {"features": 5}
    assert batch.encoded is not None
    bad = batch.weight == 0
    assert float(batch.encoded.mean[bad].abs().sum()) == 0
    assert batch.encoded.text_mask[0][bad].sum(1).tolist() == [1] * 5


def test_what_is_not_finite_is_not_written(encoded: dict[int, Path]) -> None:
    raw = read_sample(open_shards(str(encoded[4]))[0], 0)
    features = unpack(raw.video, 1, len(raw.captions))
    assert features.pooled is not None
    for broken in (replace(features, pooled=features.pooled.float() + 1e6), replace(features, mean=features.mean / 0)):
        with pytest.raises(ClipError, match="not finite"):
            pack(broken)


def test_packing_is_exact_up_to_half_precision(encoded: dict[int, Path]) -> None:
    shard = open_shards(str(encoded[4]))[0]
    raw = read_sample(shard, 0)
    assert pack(unpack(raw.video, 1, len(raw.captions))) == raw.video
    assert raw.suffix == "safetensors"
    assert set(load(raw.video)) == {"mean", "std", "text.0", "mask.0", "pooled"}


def test_a_run_trains_from_encoded_shards(encoded: dict[int, Path], toy_model: Path, tmp_path: Path) -> None:
    """The command's road, resumed half-way; and a stage that needs pictures says so."""
    tree = {
        "stage": "video", "model": str(toy_model), "engine": ENGINE,
        "run": {"dir": str(tmp_path / "run"), "steps": 2, "save_every": 2, "sample_every": 2},
        "data": {"shards": str(encoded[4]), "frames": 4, **DATA},
    }  # fmt: skip
    path = tmp_path / "video.yaml"
    path.write_text(json.dumps(tree))
    train_stage(path)
    train_stage(path, ["run.steps=4"])
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 2
    path.write_text(
        json.dumps({**tree, "stage": "autoencoder", "model": None, "run": {"dir": str(tmp_path / "x"), "steps": 1}})
    )
    with pytest.raises(UserError, match="hold no pictures"):
        train_stage(path)


def test_finite_numbers_whose_sum_is_too_large_for_half_precision_are_good() -> None:
    most = torch.full((1, 4, 1, 8, 8), 60000.0).half()
    assert most.sum().isinf()
    check_finite(Encoded(most, most, (most[:, 0, 0],), (torch.ones(1, 8, dtype=torch.bool),), None))
    for broken in (float("nan"), float("inf")):
        mean = most.clone()
        mean[0, 1, 0, 2, 3] = broken
        with pytest.raises(ClipError, match="not finite"):
            check_finite(Encoded(mean, most, (most[:, 0, 0],), (torch.ones(1, 8, dtype=torch.bool),), None))
