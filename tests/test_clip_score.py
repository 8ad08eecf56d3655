"""Scores against open_clip's own functions, on a tiny architecture with random weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.prepare import prepare
from data_pipeline.prepare_config import PrepareConfig
from tests.numbered_videos import X264, encode
from tests.test_measures import moving, texture
from videodiff.config import ConfigError, build
from videodiff.errors import UserError
from videodiff.networks.clip_score import ClipScorer
from videodiff.networks.tokenizer import declare_torchvision_ops

NAME = "tiny-for-tests"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registered architecture, its random weights, and predictors of one and of three layers."""
    declare_torchvision_ops()
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (folder / f"{NAME}.json").write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder / f"{NAME}.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(open_clip.create_model(NAME, pretrained=None).state_dict(), folder / "clip.safetensors")
        save_file({"weight": torch.randn(1, 12), "bias": torch.randn(1)}, folder / "one.safetensors")
        layers = {f"layers.{i}.weight": torch.randn(o, n) for i, n, o in ((0, 12, 6), (2, 6, 4), (10, 4, 1))}
        save_file({**layers, "layers.2.bias": torch.randn(4)}, folder / "three.safetensors")
    return folder


def test_they_are_those_of_open_clip(weights: Path) -> None:
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image

    model = open_clip.create_model(NAME, pretrained=str(weights / "clip.safetensors")).eval()
    picture = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    captions = ["a red fox in the snow", "something else"]
    for seed, shape in enumerate(((48, 80), (80, 48), (32, 32))):
        frame = texture(seed)[: shape[0], : shape[1]].copy()
        with torch.no_grad():
            image = model.encode_image(picture(Image.fromarray(frame))[None], normalize=True)
            text = model.encode_text(open_clip.get_tokenizer(NAME)(captions), normalize=True)
        scorer = ClipScorer(NAME, str(weights / "clip.safetensors"))
        scores = scorer(frame, captions)
        assert scores == {"clip_similarity": pytest.approx(float((image @ text.T).max()), abs=1e-4)}
        assert -1 <= scores["clip_similarity"] <= 1


def test_a_predictor_is_linear_on_the_features(weights: Path) -> None:
    from safetensors.torch import load_file

    frame = texture(1)[:64, :64].copy()
    plain = ClipScorer(NAME, str(weights / "clip.safetensors"))
    features = plain._model.encode_image(plain._prepared(frame), normalize=True)
    one, three = load_file(weights / "one.safetensors"), load_file(weights / "three.safetensors")
    deep = (features @ three["layers.0.weight"].T) @ three["layers.2.weight"].T + three["layers.2.bias"]
    expected = {
        "one": features @ one["weight"].T + one["bias"],
        "three": deep @ three["layers.10.weight"].T,
    }
    for name, value in expected.items():
        scorer = ClipScorer(NAME, str(weights / "clip.safetensors"), str(weights / f"{name}.safetensors"))
        assert scorer(frame, ["a"])["aesthetic"] == pytest.approx(float(value.squeeze()), rel=1e-4)


def test_what_does_not_fit_is_one_line(weights: Path, tmp_path: Path) -> None:
    good = str(weights / "clip.safetensors")
    save_file({"weight": torch.zeros(2, 12)}, tmp_path / "two.safetensors")
    for arguments, problem in (
        (("no-such-model", good), "open_clip knows no such model"),
        ((NAME, str(tmp_path / "nowhere.safetensors")), "scores.path .*no such file"),
        ((NAME, str(weights / "one.safetensors")), "scores.path .*not the weights of"),
        ((NAME, good, str(tmp_path / "two.safetensors")), "scores.aesthetic=.*not linear layers from 12"),
        ((NAME, good, str(tmp_path / "nowhere")), "scores.aesthetic=.*cannot be read"),
        ((NAME, good, None, "toaster"), "scores.device=toaster"),
    ):
        with pytest.raises(UserError, match=problem) as error:
            ClipScorer(*arguments)
        assert len(str(error.value).splitlines()) == 1


def test_prepare_measures_and_filters_by_them(weights: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    source = tmp_path / "in"
    source.mkdir()
    for seed in range(2):
        encode(source / f"{seed}.mp4", moving([1] * 11, texture(seed)), *X264)
        (source / f"{seed}.txt").write_text(f"caption {seed}")
    settings = {
        "clip": {"frames": 4, "fps": 8, "size": 64},
        "workers": 0,
        "scenes": None,
        "scores": {
            "name": NAME,
            "path": str(weights / "clip.safetensors"),
            "aesthetic": str(weights / "one.safetensors"),
        },
    }
    prepare(str(source), tmp_path / "out", build(PrepareConfig, settings, "a test"))
    rows = parquet.read_table(tmp_path / "out" / "clips.parquet").to_pylist()
    values = [row["clip_similarity"] for row in rows]
    assert len(set(values)) == 2
    assert all(np.isfinite(row["aesthetic"]) for row in rows)
    limit = {"filters": {"clip_similarity": {"min": sum(values) / 2}}}
    prepare(str(source), tmp_path / "fewer", build(PrepareConfig, {**settings, **limit}, "a test"))
    fewer = parquet.read_table(tmp_path / "fewer" / "clips.parquet").to_pylist()
    assert sorted(row["reason"] for row in fewer) == ["", "clip_similarity low"]
    for name in ("clip_similarity", "aesthetic"):
        with pytest.raises(ConfigError, match=f"filters.{name} needs scores"):
            build(PrepareConfig, {"filters": {name: {"min": 0}}}, "a test")
