"""`videodiff evaluate` on real model folders: what it writes, twice the same, and what it says of missing stages."""

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.world import combinations, rng
from data_pipeline.world_captions import caption
from stages.evaluation.command import STAGE_ROWS, Request, main, plan_for
from stages.evaluation.statistics import ROWS
from videodiff import config as configs
from videodiff.diffusion.samplers import DDIM
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.model_folder import write_weights
from videodiff.networks.autoencoder import Autoencoder, AutoencoderConfig
from videodiff.networks.text import ContrastiveTextModel, TextConfig
from videodiff.networks.tokenizer import build_vocabulary
from videodiff.networks.unet import TemporalConfig, UNet, UNetConfig
from videodiff.parts import (
    VOCABULARY,
    WORDS,
    AutoencoderPart,
    DiffusionPart,
    File,
    ModelConfig,
    Sampling,
    TextPart,
    sha256,
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of all five stages, 32x32 and 4 frames."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = AutoencoderConfig(latent_channels=4, patch=2, widths=(8, 8, 8))
    captions = [caption(c, rng("words", i)) for i, c in enumerate(combinations()[:300])]
    build_vocabulary(captions, folder / VOCABULARY, folder / WORDS)
    text = TextConfig(width=16, layers=1, heads=2, context_length=32, embed_dim=16)
    paths = {"vocabulary": str(folder / VOCABULARY), "words": str(folder / WORDS)}
    tower = ContrastiveTextModel(text.model_copy(update=paths))
    state = {name.removeprefix("clip."): value for name, value in tower.state_dict().items()}
    parts: dict = {
        "autoencoder": AutoencoderPart(
            network=config, weights=write_weights(folder, "autoencoder.safetensors", Autoencoder(config).state_dict())
        ),
        "text": TextPart(
            network=text,
            weights=write_weights(folder, "text.safetensors", state),
            vocabulary=File(name=VOCABULARY, sha256=sha256(folder / VOCABULARY)),
            words=File(name=WORDS, sha256=sha256(folder / WORDS)),
        ),
    }
    small = {
        "channels": 4, "model_channels": 8, "channel_mult": (1,), "num_res_blocks": 1, "attention_levels": (True,),
        "head_channels": 8, "context_dims": (16,), "pooled_dim": 16,
    }  # fmt: skip
    spatial = UNet(UNetConfig(**small)).state_dict()
    for stage, frames, fps, factor in (("image", 1, 8.0, 1), ("video", 4, 8.0, 1), ("interpolation", 5, 16.0, 2)):
        image = stage == "image"
        network = UNetConfig(**small) if image else UNetConfig(**small, known_channels=True, temporal=TemporalConfig())
        own = {name: value for name, value in UNet(network).state_dict().items() if image or name not in spatial}
        parts[stage] = DiffusionPart(
            network=network,
            schedule=NoiseSchedule(zero_terminal_snr=True),
            prediction="v",
            size=32,
            frames=frames,
            fps=fps,
            factor=factor,
            sampling=Sampling(sampler=DDIM(steps=2)),
            weights=write_weights(folder, f"{stage}.safetensors", spatial if image else own),
        )
    configs.save(ModelConfig(**parts), folder / "model.yaml")
    return folder


def shortened(model: Path, folder: Path, *stages: str) -> Path:
    """The model without the stages that are not named."""
    full = configs.load(ModelConfig, model / "model.yaml")
    folder.mkdir()
    for file in model.iterdir():
        if file.name != "model.yaml":
            (folder / file.name).symlink_to(file)
    configs.save(ModelConfig(**{stage: getattr(full, stage) for stage in stages}), folder / "model.yaml")
    return folder


def test_the_command_judges_a_whole_model(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(Request(str(tiny_model), "all", 1, 3, tmp_path / "a"))
    shown = capsys.readouterr().out
    assert all(ROWS[row].split(",")[0] in shown for rows in STAGE_ROWS.values() for row in rows)
    assert "loses" in shown
    assert str(tmp_path / "a" / "evaluation.json") in shown
    told = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    protocol = told["protocol"]
    assert protocol["model"] == sha256(tiny_model / "model.yaml")
    assert (protocol["size"], protocol["frames"], protocol["fps"], protocol["factor"]) == (32, 4, 8.0, 2)
    assert protocol["sampling"]["video"]["sampler"]["steps"] == 2
    assert protocol["software"]["torch"] == torch.__version__
    assert {e["n"] for e in told["rows"]} == {1}
    assert told["skipped"] == {}
    main(Request(str(tiny_model), "all", 1, 3, tmp_path / "b"))
    for name in ("evaluation.json", "samples.jsonl", "whole.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_missing_stage_is_named(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    short = shortened(tiny_model, tmp_path / "short", "autoencoder", "text")
    with pytest.raises(UserError, match="holds no video stage"):
        main(Request(str(short), "video", 1, 0, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    plan, skipped = plan_for(Model.load(short), "all", 0)
    assert plan.rows == ("real", "autoencoder")
    assert (plan.size, plan.frames, plan.fps, plan.factor) == (64, 16, 8.0, 1)
    assert skipped == {
        "image": "the model has no stage image",
        "video": "the model has no stage image, video",
        "interpolation": "the model has no stage image, video, interpolation",
    }
    assert plan_for(Model.load(short), "all", 0, size=48)[0].size == 48
    with pytest.raises(UserError, match="--size 30: the autoencoder needs a multiple of 8"):
        plan_for(Model.load(short), "all", 0, size=30)
    with pytest.raises(UserError, match="--size 48: the image stage makes 32 x 32; leave --size out"):
        plan_for(Model.load(tiny_model), "all", 0, size=48)
    words = Model.load(shortened(tiny_model, tmp_path / "words", "text"))
    assert plan_for(words, "all", 0)[0].rows == ("real",)
    with pytest.raises(UserError, match="holds no autoencoder stage"):
        plan_for(words, "autoencoder", 0)
    with pytest.raises(UserError, match="--num-prompts 0"):
        main(Request(str(short), "autoencoder", 0, 0, tmp_path / "out"))
