"""The autoencoder stage with a codebook, a discriminator and a perceptual distance; as a script, one of two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_perceptual import vgg
from tiny_training import PACE

from data_pipeline.loader import ShardSource
from data_pipeline.shards import write_world_shards
from stages.adversarial import Contest
from stages.autoencoder import AutoencoderStage, AutoencoderTask
from stages.cli import main
from videodiff import config as configs
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.model_folder import carry, export
from videodiff.networks.autoencoder import Autoencoder, AutoencoderLoss, kl_divergence, to_float
from videodiff.networks.discriminator import adaptive_weight, generator_loss
from videodiff.parts import DESCRIPTION, ModelConfig
from videodiff.training import distributed
from videodiff.training.fragments import Fragments
from videodiff.training.trainer import train

SCRIPT = Path(__file__)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
TORCHRUN += ["--rdzv-endpoint=localhost:0"]
GAUSSIAN = {"latent_channels": 4, "patch": 4, "widths": [8, 8]}
QUANTISED = {**GAUSSIAN, "quantizer": {"codebook_size": 16}}
DISCRIMINATOR = {"width": 4, "num_layers": 2, "start": 1}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world_shards(tmp_path_factory.mktemp("shards"), num_clips=8, size=32, frames=2, fps=8, seed=1).parent


@pytest.fixture(autouse=True)
def _few_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoencoderTask, "CALIBRATION_FRAMES", 16)


def stage(folder: Path, shards: Path, steps: int = 4, **more: Any) -> AutoencoderStage:
    """A configuration; `engine` adds to the defaults here, other keys replace them."""
    engine = {"precision": "fp32", "learning_rate": 3e-3, "micro_batch": 2, **more.pop("engine", {})}
    tree = {
        "stage": "autoencoder",
        "run": {"dir": str(folder), "steps": steps, "save_every": 2, "sample_every": 0},
        "data": {"shards": str(shards), "batch_size": 4, "frames": 2, "fps": 8.0, "size": 32, "workers": 0},
        "engine": engine,
        "network": QUANTISED,
        "loss": {"edge_weight": 7.0},
        **more,
    }
    return configs.build(AutoencoderStage, tree, "the test")


def trained(config: AutoencoderStage) -> AutoencoderTask:
    torch.manual_seed(0)
    task = AutoencoderTask(config, None if config.model is None else Model.load(config.model))
    source = ShardSource(config.data, config.run.seed)
    train(config.run, config.engine, config.data.batch_size, lambda: (task, source), config)
    return task


def lines(config: AutoencoderStage) -> list[dict[str, Any]]:
    text = Path(config.run.dir, "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in PACE} for line in text.splitlines()]


def adversary(config: AutoencoderStage, step: int) -> list[torch.Tensor]:
    """All that a checkpoint holds of the discriminator: fp32 masters and moments."""
    state = Fragments(Path(config.run.dir, "checkpoints", f"step-{step:08d}", "adversary", "engine"))
    return [state.read(kind, name, 0, state.size(kind, name)) for kind, name in state.contents]


def assert_same_run(one: AutoencoderStage, other: AutoencoderStage) -> None:
    assert lines(one) == lines(other)
    for kind in ("raw", "ema"):
        left, right = (
            load_file(Path(config.run.dir, "checkpoints", "step-00000004", f"{kind}.safetensors"))
            for config in (one, other)
        )
        assert all(torch.equal(left[name], right[name]) for name in left)
    pairs = list(zip(adversary(one, 4), adversary(other, 4), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert sum(a.is_floating_point() and a.numel() > 100 for a, _ in pairs) >= 3  # weights and both moments at least


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "zero", "precision", "start"),
    [(QUANTISED, 0, "fp32", 1), (QUANTISED, 1, "bf16", 1), (QUANTISED, 2, "bf16", 3), (GAUSSIAN, 0, "fp32", 1)],
)
def test_four_steps_are_two_and_a_restart_and_two(
    shards: Path, tmp_path: Path, network: dict[str, Any], zero: int, precision: str, start: int
) -> None:
    more = {
        "network": network,
        "engine": {"zero_stage": zero, "precision": precision},
        "discriminator": {**DISCRIMINATOR, "start": start, "learning_rate": 1e-2},
    }
    straight = stage(tmp_path / "straight", shards, **more)
    trained(straight)
    trained(stage(tmp_path / "parts", shards, steps=2, **more))
    parts = stage(tmp_path / "parts", shards, **more)
    trained(parts)
    assert_same_run(straight, parts)
    records = lines(straight)
    assert ["discriminator" in record for record in records] == [step >= start for step in range(4)]
    assert all(record["adversary_grad_norm"] > 0 and record["adaptive_weight"] > 0 for record in records[start:])
    if network is GAUSSIAN:
        assert all(record["kl"] > 0 for record in records)
    else:
        assert all(1 <= record["perplexity"] <= 16 and 0 < record["codes_used"] <= 1 for record in records)
    assert not all(torch.equal(a, b) for a, b in zip(adversary(straight, 2), adversary(straight, 4), strict=True))


def test_until_it_joins_the_discriminator_is_not_there(shards: Path, tmp_path: Path) -> None:
    without = stage(tmp_path / "without", shards)
    late = stage(tmp_path / "late", shards, discriminator={**DISCRIMINATOR, "start": 2})
    alone, contested = trained(without), trained(late)
    assert alone.adversary is None
    assert contested.adversary is not None
    before = [record["loss"] for record in lines(without)]
    after = [record["loss"] for record in lines(late)]
    assert before[:2] == after[:2]
    assert before[2:] != after[2:]
    assert not Path(without.run.dir, "checkpoints", "step-00000004", "adversary").exists()


def test_a_codebook_alone_trains_at_every_stage_of_zero(shards: Path, tmp_path: Path) -> None:
    runs = [stage(tmp_path / str(zero), shards, steps=2, engine={"zero_stage": zero}) for zero in (0, 3)]
    for config in runs:
        trained(config)
    for one, other in zip(*map(lines, runs), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["codes_used"] == one["codes_used"] > 0


def worker(folder: Path, shards: Path) -> None:
    """One of two ranks: ZeRO 1 and 2 in one go, and ZeRO 2 with a restart."""
    AutoencoderTask.CALIBRATION_FRAMES = 16
    for name, zero, steps in (("zero-1", 1, 4), ("zero-2", 2, 4), ("parts", 2, 2), ("parts", 2, 4)):
        engine = {"zero_stage": zero, "micro_batch": 1}
        trained(stage(folder / name, shards, steps=steps, discriminator=DISCRIMINATOR, engine=engine))
    distributed.cleanup()


def test_two_processes_follow_one_and_resume_exactly(shards: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [*TORCHRUN, str(SCRIPT), str(tmp_path), str(shards)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = stage(tmp_path / "alone", shards, discriminator=DISCRIMINATOR)
    trained(alone)
    for name in ("zero-1", "zero-2"):
        for one, two in zip(lines(alone), lines(stage(tmp_path / name, shards)), strict=True):
            assert one["samples"] == two["samples"]
            compared = {"loss", "adaptive_weight", "discriminator", "grad_norm", "adversary_grad_norm", "perplexity"}
            for key in compared & one.keys():  # Adam magnifies rounding
                assert two[key] == pytest.approx(one[key], rel=1e-3), key
    assert_same_run(stage(tmp_path / "zero-2", shards), stage(tmp_path / "parts", shards))


# --- the parts of the loss --------------------------------------------------------------------------------------------


def test_the_discriminators_pull_is_the_quotient_of_gradients_at_the_last_layer() -> None:
    """Against autograd through the whole network; of two good frames, the third is of a bad clip."""
    torch.manual_seed(0)
    config = configs.build(AutoencoderStage, {**_tree(), "discriminator": DISCRIMINATOR}, "the test")
    assert config.discriminator is not None
    network = Autoencoder(config.network)
    contest = Contest(config.discriminator, network)
    frames, weight = torch.rand(3, 3, 32, 32) * 2 - 1, torch.tensor([1.0, 1.0, 0.0])
    with contest.watched() as hidden:
        made, *_ = network(frames)
    pictures = made.view_as(made)
    error = AutoencoderLoss().error(pictures, frames)
    term, metrics = contest.term(pictures, error, weight, hidden[0])
    last = network.decoder[-2].weight
    assert last.shape[0] == 3 * 4**2
    adversarial = generator_loss(contest.module(made))
    gradients = [torch.autograd.grad(loss[:2].mean(), last, retain_graph=True)[0] for loss in (error, adversarial)]
    wanted = adaptive_weight(*gradients)
    torch.testing.assert_close(metrics["adaptive_weight"], wanted)
    torch.testing.assert_close(term, 0.5 * wanted * adversarial)
    assert not metrics["adaptive_weight"].requires_grad
    (error + term).sum().backward()
    assert last.grad is not None
    assert all(parameter.grad is None for parameter in contest.module.parameters())  # it learns by its own loss alone
    against = contest.against(frames, pictures, num_clips=3)(contest.module)
    before = last.grad.clone()
    against.per_sample.sum().backward()
    assert all(parameter.grad is not None for parameter in contest.module.parameters())
    assert torch.equal(last.grad, before)  # and teaches the autoencoder nothing by it
    assert against.per_sample.shape == (3,)


def _tree() -> dict[str, Any]:
    return configs.to_dict(stage(Path("x"), Path("none")))


def test_kl_and_perceptual_distance_count_by_their_weights(shards: Path, tmp_path: Path) -> None:
    save_file(vgg(), tmp_path / "vgg.safetensors")
    batch = next(ShardSource(stage(tmp_path, shards).data, 0).batches(0, 0, 1, 4))
    losses, seen = [], {}
    for weight, kl in ((None, 0.0), (0.5, 0.0), (2.0, 0.0), (None, 300.0)):
        given = None if weight is None else {"path": str(tmp_path / "vgg.safetensors"), "weight": weight}
        config = stage(tmp_path, shards, network=GAUSSIAN, perceptual=given, loss={"kl_weight": kl})
        torch.manual_seed(0)
        task = AutoencoderTask(config)
        output = task.loss(task.module, batch, seed=0)
        losses.append(output.per_sample.detach().mean())
        seen |= output.metrics
    assert seen["perceptual"] > 0
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * seen["perceptual"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(losses[2] - losses[0], 2.0 * seen["perceptual"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        losses[3] - losses[0], kl / batch.frames[0, 0].numel() * seen["kl"], atol=1e-4, rtol=1e-4
    )
    moments = task.module._moments(to_float(batch.frames))
    torch.testing.assert_close(seen["kl"], kl_divergence(*moments).mean().detach())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"discriminator": DISCRIMINATOR, "engine": {"zero_stage": 3}},
            r"zero_stage 3 .*set engine\.zero_stage to 0, 1",
        ),
        ({"discriminator": {"num_layers": 4}}, r"discriminator\.num_layers 4 .*data\.size 32.* at least 48"),
        ({"discriminator": {"start": -1}}, r"discriminator\.start"),
        ({"discriminator": {"weight": 0.0}}, r"discriminator\.weight"),
        ({"loss": {"kl_weight": 1e-4}}, r"loss\.kl_weight 0\.0001 .*network\.quantizer"),
        ({"perceptual": {"path": "x", "sha256": "abc"}}, r"perceptual\.sha256"),
        ({"perceptual": {"path": "x", "weight": -1.0}}, r"perceptual\.weight"),
    ],
)
def test_what_can_not_be_is_refused_when_built(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem) as refused:
        stage(Path("x"), Path("none"), **change)
    assert len(str(refused.value).splitlines()) == 1


def test_a_missing_perceptual_file_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"perceptual\.path: .*none\.pth is no file"):
        AutoencoderTask(stage(tmp_path, tmp_path, perceptual={"path": str(tmp_path / "none.pth")}))


# --- what comes of it -------------------------------------------------------------------------------------------------


def test_a_trained_codebook_becomes_a_model_that_generates_and_trains_on(
    shards: Path, toy_model: Path, tmp_path: Path
) -> None:
    config = stage(tmp_path / "run", shards, steps=2, discriminator=DISCRIMINATOR)
    trained(config)
    model = Model.load(config.run.dir)
    network = model.autoencoder
    assert network.quantizer is not None
    frames = next(ShardSource(config.data, 0).batches(0, 0, 1, 4)).frames
    posterior = network.encode_clip(frames)
    assert not posterior.std.any()
    assert posterior.mean.transpose(0, 1).flatten(1).std(1).tolist() == pytest.approx([1.0] * 4, rel=0.5)
    pictures = network.decode_clip(posterior.mean)
    export(model, tmp_path / "exported")
    assert torch.equal(Model.load(tmp_path / "exported").autoencoder.decode_clip(posterior.mean), pictures)

    whole = tmp_path / "whole"
    whole.mkdir()
    carried = carry(Model.load(toy_model), whole)
    (whole / "autoencoder.safetensors").unlink()
    part = carry(model, whole).autoencoder
    configs.save(ModelConfig(**{**dict(carried), "autoencoder": part}), whole / DESCRIPTION)
    with pytest.raises(SystemExit) as stop:
        main(["generate", "a small blue square", "--model", str(whole), "-o", str(tmp_path / "x.mp4"), "--image-only"])
    assert not stop.value.code

    further = stage(tmp_path / "further", shards, steps=2, model=str(config.run.dir), network={}, discriminator=None)
    before, task = model.state("autoencoder"), trained(further)
    after = Model.load(further.run.dir).state("autoencoder")
    assert task.module.quantizer is not None
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"decoder"}  # latents and codes stay, and with them what stands on them


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]))
