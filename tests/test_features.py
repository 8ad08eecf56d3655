"""Feature extractors: networks against their peers with the same random weights, and files that are not theirs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from data_pipeline.world import clips
from videodiff.config import Config, ConfigError, build, differences, to_dict
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks.features import (
    BundledFeatures,
    FeatureConfig,
    I3DFeatures,
    InceptionFeatures,
    OpenClipFeatures,
    TorchScriptFeatures,
    VideoMAEFeatures,
    open_features,
)
from videodiff.networks.features.extractor import resized
from videodiff.networks.features.inception import make_inception
from videodiff.networks.text import PretrainedText
from videodiff.networks.tokenizer import declare_torchvision_ops
from videodiff.parts import sha256

NAME = "tiny-features"


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Smooth pictures, uint8 [..., H, W, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (*shape[:-3], 6, 6, 3), np.uint8)
    flat = [np.array(Image.fromarray(x).resize((shape[-2], shape[-3]))) for x in small.reshape(-1, 6, 6, 3)]
    return np.stack(flat).reshape(shape)


def one_line(error: pytest.ExceptionInfo[UserError]) -> bool:
    return len(str(error.value).splitlines()) == 1


# --- Inception v3 -----------------------------------------------------------------------------------------------------


def peer_inception(classes: int, auxiliary: bool) -> nn.Module:
    """torchvision's network with random weights under which activations keep their size."""
    declare_torchvision_ops()
    from torchvision.models import inception_v3

    with torch.device("meta"):
        peer = inception_v3(num_classes=classes, aux_logits=auxiliary, init_weights=False, transform_input=False)
    numbers = torch.Generator().manual_seed(classes)
    state = {}
    for name, value in peer.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif value.ndim > 1:
            state[name] = torch.randn(value.shape, generator=numbers) * (2 / value[0].numel()) ** 0.5
        else:
            state[name] = 0.1 * torch.randn(value.shape, generator=numbers)
            state[name] += 1.0 if name.endswith(("bn.weight", "running_var")) else 0.0
            state[name] = state[name].abs() if name.endswith("running_var") else state[name]
    peer.load_state_dict(state, assign=True)
    return peer.eval()


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@torch.inference_mode()
def test_inception_is_that_of_torchvision(tmp_path: Path) -> None:
    peer = peer_inception(1000, auxiliary=True)
    torch.save(peer.state_dict(), tmp_path / "inception.pth")
    extractor = open_features(InceptionFeatures(path=str(tmp_path / "inception.pth")), None, "cpu")
    pictures = noise(2, 299, 299, 3)
    features, probabilities = extractor.with_probabilities(pictures)
    pooled: list[Tensor] = []
    peer.avgpool.register_forward_hook(lambda _module, _given, found: pooled.append(found.flatten(1)))
    logits = peer(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1)
    assert float(pooled[0].std()) > 0.1
    close(features, pooled[0])
    close(probabilities, logits.softmax(dim=1))
    assert (extractor.name, extractor.dimension, extractor.classes) == ("Inception v3 (torchvision)", 2048, 1000)
    assert extractor.protocol()["sha256"] == sha256(tmp_path / "inception.pth")


@torch.inference_mode()
def test_the_variant_of_the_frechet_distance_pools_as_tensorflow_did(tmp_path: Path) -> None:
    """Hooks make the peer that network: means without padding, a maximum in the last block, no bias at the end."""
    peer = peer_inception(1008, auxiliary=False)
    torch.save(peer.state_dict(), tmp_path / "pt_inception-2015-12-05-6726825d.pth")

    def without_padding(_module: nn.Module, given: tuple[Tensor]) -> Tensor:
        share = F.avg_pool2d(torch.ones_like(given[0][:1, :1]), 3, 1, 1)
        return given[0] / share

    for name, block in peer.named_children():
        if name.startswith("Mixed") and hasattr(block, "branch_pool") and name != "Mixed_7c":
            block.branch_pool.register_forward_pre_hook(without_padding)
    entered: list[Tensor] = []
    peer.Mixed_7c.register_forward_pre_hook(lambda _module, given: entered.append(given[0]))
    peer.Mixed_7c.branch_pool.register_forward_pre_hook(lambda _module, _given: F.max_pool2d(entered[0], 3, 1, 1))
    pooled: list[Tensor] = []
    peer.avgpool.register_forward_hook(lambda _module, _given, found: pooled.append(found.flatten(1)))
    pictures = noise(1, 299, 299, 3)
    logits = peer((torch.from_numpy(pictures).permute(0, 3, 1, 2).float() - 128) / 128) - peer.fc.bias

    path = str(tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    extractor = open_features(InceptionFeatures(path=path), None, "cpu")
    features, probabilities = extractor.with_probabilities(pictures)
    close(features, pooled[0])
    close(probabilities, logits.softmax(dim=1))
    assert (extractor.name, extractor.classes, extractor.size) == ("Inception v3 (FID)", 1008, 299)
    other = open_features(InceptionFeatures(path=path, variant="torchvision"), None, "cpu")
    assert (other(pictures) - features).abs().max() > 0.01 * features.abs().max()

    state = peer.state_dict()
    bare = {name: value for name, value in state.items() if not name.startswith("fc.")}
    with pytest.raises(ValueError, match="no last layer"):
        make_inception(bare, None)
    assert make_inception(bare, "fid")[0].fc is None
    for change, problem in (
        (
            {"Mixed_6b.branch1x1.conv.weight": None},
            "Mixed_6b.branch1x1.conv.weight is missing; take the file that belongs to it",
        ),
        ({"fc.bias": torch.zeros(3)}, r"fc.bias is \[3\], not \[1008\]"),
        (dict.fromkeys("abcde", torch.zeros(1)), "a is unknown, b is unknown, c is unknown, and 2 more"),
        ({"fc.weight": torch.zeros(7, 2048)}, "features.variant: .* has 7 classes, so it may be either.*state"),
    ):
        changed = {name: value for name, value in {**state, **change}.items() if value is not None}
        torch.save(changed, tmp_path / "changed.pth")
        with pytest.raises(UserError, match=problem) as error:
            open_features(InceptionFeatures(path=str(tmp_path / "changed.pth")), None, "cpu")
        assert one_line(error)


class _Detector(nn.Module):
    """Called as inception-2015-12-05.pt is."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(12, 5)

    def forward(self, x: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        features = F.adaptive_avg_pool2d(x / 128 - 1, 2).flatten(1)
        if return_features:
            return features
        bias = torch.zeros_like(self.output.bias) if no_output_bias else self.output.bias
        return F.linear(features, self.output.weight, bias).softmax(dim=1)


def saved_script(module: nn.Module, path: Path) -> dict[str, str]:
    torch.jit.script(module.eval()).save(str(path))
    return {"path": str(path), "sha256": sha256(path)}


def test_inception_as_torchscript(tmp_path: Path) -> None:
    detector = _Detector()
    told = saved_script(detector, tmp_path / "inception.pt")
    extractor = open_features(InceptionFeatures(**told), None, "cpu")
    pictures = noise(3, 40, 56, 3)
    seen = resized(torch.from_numpy(pictures)[:, None], 299)[:, 0]
    features, probabilities = extractor.with_probabilities(pictures)
    with torch.no_grad():
        torch.testing.assert_close(features, detector(seen, return_features=True))
        torch.testing.assert_close(probabilities, detector(seen, no_output_bias=True))
    torch.testing.assert_close(extractor.probabilities(pictures), probabilities)
    assert (extractor.dimension, extractor.classes, extractor.sha256) == (12, 5, told["sha256"])
    with pytest.raises(UserError, match="sha256: missing"):
        open_features(InceptionFeatures(path=told["path"]), None, "cpu", key="image_features")


# --- resizing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [24, 150])
def test_resizing_is_pillows_antialiased_one_without_rounding(size: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    channels = [Image.fromarray(picture[..., i].astype(np.float32)) for i in range(3)]

    def pillow(width: int, height: int) -> np.ndarray:
        bicubic = Image.Resampling.BICUBIC
        return np.stack([np.array(x.resize((width, height), bicubic)) for x in channels]).clip(0, 255)

    given = torch.from_numpy(picture)[None, None]
    np.testing.assert_allclose(resized(given, size)[0, 0], pillow(size, size), atol=2e-3)
    wide, left = int(size * 1.5), round(size * 0.25)
    cropped = pillow(wide, size)[:, :, left : left + size]
    np.testing.assert_allclose(resized(given, size, crop=True)[0, 0], cropped, atol=2e-3)
    np.testing.assert_array_equal(resized(given, None)[0, 0].permute(1, 2, 0), picture)


# --- text-image towers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> Model:
    return Model.load("demo")


@pytest.fixture(scope="module")
def world() -> tuple[np.ndarray, list[str], list[str]]:
    """64 clips of the built-in world that no training saw, with a caption and the colour of each."""
    found = list(clips(64, 987654321, 64, 16, 8.0))
    frames = np.stack([clip.frames for clip in found])
    return frames, [clip.captions[0] for clip in found], [clip.meta["scene"]["colour"] for clip in found]


def test_the_bundled_tower_sees_what_it_was_trained_on(demo: Model) -> None:
    frames = torch.from_numpy(noise(2, 16, 64, 64, 3))
    of_clips = open_features(BundledFeatures(), demo, "cpu")
    of_pictures = open_features(BundledFeatures(takes="pictures"), demo, "cpu")
    still = frames[:, :1].expand(-1, 16, -1, -1, -1)
    torch.testing.assert_close(of_pictures(frames[:, 0]), of_clips(still))
    assert (of_clips(frames) - of_clips(still)).abs().max() > 0.01
    told, other = of_clips.protocol(), of_pictures.protocol()
    assert {name for name in told if told[name] != other[name]} == {"name", "takes"}
    assert told["sha256"] == sha256(demo.folder / "text.safetensors")
    assert json.loads(json.dumps(told)) == told


def test_the_bundled_tower_tells_worlds_apart(demo: Model, world: tuple[np.ndarray, list[str], list[str]]) -> None:
    frames, captions, colours = world
    extractor = open_features(BundledFeatures(), demo, "cpu")
    features, texts = extractor(frames), extractor.texts(captions)
    assert features.shape == texts.shape == (64, extractor.dimension)
    assert features.dtype == torch.float32
    for vectors in (features, texts):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(64))
    cosines = texts @ features.T
    assert (cosines.argmax(dim=1) == torch.arange(64)).float().mean() > 0.5  # 1/64 by chance
    still = open_features(BundledFeatures(takes="pictures"), demo, "cpu")(frames[:, 0])
    assert ((texts @ still.T).argmax(dim=1) == torch.arange(64)).float().mean() > 0.4  # a first frame shows no motion
    same = torch.tensor([[a == b for b in colours] for a in colours])
    between = features @ features.T
    assert between[same & ~torch.eye(64, dtype=torch.bool)].mean() > between[~same].mean() + 0.1
    # In other batches, and again.
    single = open_features(BundledFeatures(batch=5), demo, "cpu")
    torch.testing.assert_close(single(frames[:12]), features[:12], rtol=0, atol=1e-5)
    torch.testing.assert_close(single.texts(captions[:12]), texts[:12], rtol=0, atol=1e-5)
    assert torch.equal(extractor(torch.from_numpy(frames)), features)
    features -= 1  # a tensor like any other
    assert extractor(frames[:0]).shape == (0, extractor.dimension)


def test_the_bundled_tower_may_be_missing(demo: Model, tmp_path: Path) -> None:
    public = PretrainedText(name="ViT-B-32", path="somewhere.safetensors")
    part = demo.config.text
    assert part is not None
    adopted = part.model_copy(update={"network": part.network.model_copy(update={"pretrained": public})})
    half = part.model_copy(update={"network": part.network.model_copy(update={"image_layers": 4})})
    for model, problem in (
        (None, "bundled needs a model"),
        (Model(tmp_path, demo.config.model_copy(update={"text": None})), "holds no text stage"),
        (
            Model(demo.folder, demo.config.model_copy(update={"text": adopted})),
            "public tower, which saw no film strips",
        ),
        (Model(demo.folder, demo.config.model_copy(update={"text": half})), "clip.visual.transformer.* is missing"),
    ):
        with pytest.raises(UserError, match=problem) as error:
            open_features(BundledFeatures(), model, "cpu")
        assert one_line(error)
    extractor = open_features(BundledFeatures(), demo, "cpu")
    with pytest.raises(UserError, match=r"takes clips \[N,T,H,W,3\], not \[2, 64, 64, 3\]"):
        extractor(noise(2, 64, 64, 3))
    with pytest.raises(UserError, match="tells no class probabilities"):
        extractor.probabilities(noise(2, 4, 64, 64, 3))


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of an architecture that is registered as NAME."""
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
    return folder / "clip.safetensors"


@torch.inference_mode()
def test_open_clip_gives_what_open_clip_does(tiny_clip: Path) -> None:
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    model = open_clip.create_model(NAME, pretrained=str(tiny_clip)).eval()
    brought = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    config = OpenClipFeatures(name=NAME, path=str(tiny_clip), sha256=sha256(tiny_clip), batch=2)
    extractor = open_features(config, None, "cpu")
    captions = ["a red fox in the snow", "something else", "a third"]
    texts = model.encode_text(open_clip.get_tokenizer(NAME)(captions), normalize=True)
    torch.testing.assert_close(extractor.texts(captions), texts)
    # What it rounds in resizing is not rounded here.
    for shape, tolerance in (((32, 32), 1e-5), ((60, 41), 5e-3)):
        pictures = noise(3, *shape, 3)
        seen = torch.stack([brought(Image.fromarray(picture)) for picture in pictures])
        images = model.encode_image(seen, normalize=True)
        torch.testing.assert_close(extractor(pictures), images, rtol=0, atol=tolerance)
    assert (extractor.dimension, extractor.size, extractor.takes) == (12, 32, "pictures")
    with pytest.raises(UserError, match=r"features.path .*not the weights of ViT-B-32"):
        open_features(config.model_copy(update={"name": "ViT-B-32"}), None, "cpu")


# --- clips ------------------------------------------------------------------------------------------------------------


class _StyleGANV(nn.Module):
    """Called as i3d_torchscript.pt is."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        assert x.dtype == torch.uint8
        assert return_features
        y = x.float()
        if resize:
            y = F.interpolate(y, (y.shape[2], 8, 8), mode="trilinear", align_corners=False)
        return (y * 2 / 255 - 1 if rescale else y).mean(dim=4).flatten(1)


class _Mean(nn.Module):
    """The mean of each channel, whatever stands behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(dim=2)


class _Scalar(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


def test_i3d_is_called_both_ways(tmp_path: Path) -> None:
    told = saved_script(_StyleGANV(), tmp_path / "i3d.pt")
    extractor = open_features(I3DFeatures(**told, frames=4, batch=2), None, "cpu")
    given = noise(3, 4, 20, 30, 3)
    seen = torch.from_numpy(given).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(extractor(given), _StyleGANV()(seen, True, True, True))
    assert (extractor.dimension, extractor.frames, extractor.size, extractor.has_texts) == (96, 4, None, False)
    with pytest.raises(UserError, match="takes clips of 4 frames, these have 3"):
        extractor(given[:, :3])
    with pytest.raises(UserError, match="knows no texts"):
        extractor.texts(["a"])
    plain = saved_script(_Mean(), tmp_path / "plain.pt")
    other = open_features(I3DFeatures(**plain, frames=4, call="plain"), None, "cpu")
    torch.testing.assert_close(other(given), seen.float().mean(dim=(2, 3, 4)) / 127.5 - 1, rtol=0, atol=1e-2)
    assert (other.dimension, other.size) == (3, 224)
    with pytest.raises(
        UserError, match=r"can't be called as f\(\[1, 3, 4, 224, 224\], rescale=True.*check features.kind"
    ):
        open_features(I3DFeatures(**plain, frames=4), None, "cpu")


def test_any_torchscript_with_its_size_range_and_length(tmp_path: Path) -> None:
    told = saved_script(_Mean(), tmp_path / "mean.pt")
    pictures = noise(2, 16, 16, 3)
    mean = torch.from_numpy(pictures).float().mean(dim=(1, 2))
    config = TorchScriptFeatures(**told, name="mean colour", takes="pictures", size=None, range=(0.0, 1.0))
    torch.testing.assert_close(open_features(config, None, "cpu")(pictures), mean / 255)
    ranged = config.model_copy(update={"range": (-2.0, 2.0), "size": 8})
    extractor = open_features(ranged, None, "cpu")
    torch.testing.assert_close(extractor(pictures), mean / 63.75 - 2, rtol=0, atol=0.02)
    told_apart = extractor.protocol().items() - open_features(config, None, "cpu").protocol().items()
    assert {name for name, _ in told_apart} == {"size", "resize", "values"}
    moving = TorchScriptFeatures(**told, takes="clips", size=8, range=(0.0, 1.0), frames=3)
    assert open_features(moving, None, "cpu")(noise(2, 3, 16, 16, 3)).shape == (2, 3)
    with pytest.raises(UserError, match="takes clips of 3 frames, these have 5"):
        open_features(moving, None, "cpu")(noise(2, 5, 16, 16, 3))
    assert open_features(moving.model_copy(update={"frames": None}), None, "cpu")(noise(2, 5, 16, 16, 3)).shape == (
        2,
        3,
    )
    scalar = config.model_copy(update=saved_script(_Scalar(), tmp_path / "scalar.pt"))
    with pytest.raises(UserError, match=r"gives \[\] for f\(\[1, 3, 64, 64\]\); it must give one vector"):
        open_features(scalar, None, "cpu")


@pytest.mark.parametrize("kind", ["VideoMAEModel", "VideoMAEForVideoClassification", "VideoMAEForPreTraining"])
@torch.inference_mode()
def test_videomae_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    declare_torchvision_ops()
    import transformers

    told: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
    }
    told |= {
        "image_size": 32,
        "patch_size": 8,
        "num_frames": 4,
        "decoder_hidden_size": 24,
        "decoder_num_hidden_layers": 1,
    }
    told["use_mean_pooling"] = kind == "VideoMAEForVideoClassification"
    torch.manual_seed(0)
    peer = getattr(transformers, kind)(transformers.VideoMAEConfig(**told)).eval()
    for parameter in peer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    peer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    extractor = open_features(VideoMAEFeatures(path=str(tmp_path)), None, "cpu")
    given = noise(2, 4, 32, 32, 3)
    pixels = (torch.from_numpy(given).permute(0, 1, 4, 2, 3) / 255 - 0.5) / 0.25
    tokens = (peer if kind == "VideoMAEModel" else peer.videomae)(pixels).last_hidden_state.mean(dim=1)
    wanted = peer.fc_norm(tokens) if told["use_mean_pooling"] else tokens
    torch.testing.assert_close(extractor(given), wanted, rtol=1e-4, atol=1e-5)


def test_videomae_reads_a_folder_and_nothing_else(tmp_path: Path) -> None:
    settings = {
        "model_type": "videomae", "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "num_frames": 2,
        "intermediate_size": 8, "image_size": 16, "patch_size": 8, "tubelet_size": 2, "use_mean_pooling": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    numbers = torch.Generator().manual_seed(0)
    layer = "videomae.encoder.layer.0."
    shapes = {
        "videomae.embeddings.patch_embeddings.projection.weight": (12, 3, 2, 8, 8),
        "videomae.embeddings.patch_embeddings.projection.bias": (12,),
        **{f"{layer}attention.attention.{name}.weight": (12, 12) for name in ("query", "key", "value")},
        **{f"{layer}attention.attention.{name}_bias": (12,) for name in "qv"},  # as older files name them
        f"{layer}attention.output.dense.weight": (12, 12),
        f"{layer}attention.output.dense.bias": (12,),
        f"{layer}intermediate.dense.weight": (8, 12),
        f"{layer}intermediate.dense.bias": (8,),
        f"{layer}output.dense.weight": (12, 8),
        f"{layer}output.dense.bias": (12,),
        **{f"{layer}layernorm_{w}.{leaf}": (12,) for w in ("before", "after") for leaf in ("weight", "bias")},
        **{f"videomae.layernorm.{leaf}": (12,) for leaf in ("weight", "bias")},
        "decoder.norm.weight": (12,),
    }
    state = {name: torch.randn(shape, generator=numbers) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = VideoMAEFeatures(path=str(tmp_path))
    extractor = open_features(config, None, "cpu")
    assert extractor(noise(3, 2, 20, 30, 3)).shape == (3, extractor.dimension) == (3, 12)
    assert (extractor.frames, extractor.size, extractor.takes) == (2, 16, "clips")
    with pytest.raises(UserError, match="takes clips of 2 frames, these have 4"):
        extractor(noise(3, 4, 20, 30, 3))
    save_file({**state, "videomae.odd": torch.zeros(1)}, tmp_path / "model.safetensors")
    for change, problem in (
        ({}, "odd is unknown"),
        ({"num_hidden_layers": 2}, "encoder.layer.1.layernorm_before.weight is missing, .* and 13 more"),
        ({"model_type": "vit"}, "model_type is 'vit', not 'videomae'"),
        ({"hidden_size": None}, "not the settings of a VideoMAE"),
        ({"num_attention_heads": 5}, "not a multiple"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(UserError, match=problem) as error:
            open_features(config, None, "cpu")
        assert one_line(error)
    with pytest.raises(UserError, match=r"holds neither model.safetensors nor"):
        open_features(VideoMAEFeatures(path=str(tmp_path / "none")), None, "cpu")


# --- what is refused --------------------------------------------------------------------------------------------------


class _NotFinite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        means = x.flatten(1).mean(dim=1, keepdim=True)
        return torch.where(means > 0.5, torch.nan, means)


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    told = saved_script(_NotFinite(), tmp_path / "nan.pt")
    config = TorchScriptFeatures(**told, takes="pictures", size=None, range=(0.0, 1.0), batch=2)
    extractor = open_features(config, None, "cpu")
    pictures = np.zeros((5, 8, 8, 3), np.uint8)
    assert not extractor(pictures).any()
    pictures[3] = 255
    with pytest.raises(UserError, match="TorchScript: the features of picture 3 are not finite") as error:
        extractor(pictures)
    assert one_line(error)


def test_other_files_are_refused_in_one_line(tmp_path: Path, tiny_clip: Path) -> None:
    text, pickle, listed = tmp_path / "text.pth", tmp_path / "pickle.pth", tmp_path / "list.pth"
    text.write_text("no weights")
    torch.save(nn.Linear(2, 2), pickle)  # a pickled module would run code
    torch.save([torch.zeros(2)], listed)
    of = {"takes": "pictures", "size": 8, "range": (0.0, 1.0)}
    none, other = str(tmp_path / "none.pt"), "0" * 64
    for config, problem in (
        (InceptionFeatures(path=none), "judge.path: .*none.pt is no file; name a local one"),
        (I3DFeatures(path=none, sha256=other), "judge.path: .*none.pt is no file"),
        (OpenClipFeatures(name=NAME, path=none), "judge.path: .*none.pt is no file"),
        (OpenClipFeatures(name=NAME, path=str(tiny_clip), sha256=other), "judge.sha256: .* not 000000000000"),
        (InceptionFeatures(path=str(text), sha256=other), "judge.sha256: .* not 000000000000.*name the right file"),
        (I3DFeatures(path=str(text), sha256=other), "judge.sha256: .* not 000000000000"),
        (TorchScriptFeatures(path=str(text), sha256=other, **of), "judge.sha256: .* not 000000000000"),
        (TorchScriptFeatures(path=str(text), sha256=sha256(text).upper(), **of), "is no TorchScript"),
        (InceptionFeatures(path=str(text)), "holds no named weights that can be read"),
        (InceptionFeatures(path=str(pickle)), "holds no named weights that can be read"),
        (InceptionFeatures(path=str(listed)), "holds no named weights that can be read"),
        (InceptionFeatures(path=str(tiny_clip), variant="fid"), "Conv2d_1a_3x3.conv.weight is missing, .* more; take"),
    ):
        with pytest.raises(UserError, match=problem) as error:
            open_features(config, None, "cpu", key="judge")
        assert one_line(error)


class _Judges(Config):
    features: FeatureConfig = BundledFeatures()


def test_the_kind_tells_the_configuration() -> None:
    found = build(_Judges, {"features": {"kind": "inception", "path": "a.pth"}}, "a test").features
    assert found == InceptionFeatures(path="a.pth")
    assert build(_Judges, {"features": to_dict(found)}, "a test").features == found
    larger = _Judges(features=found.model_copy(update={"batch": 2}))
    assert [d.operational for d in differences(_Judges(features=found), larger)] == [True]
    of = {"kind": "torchscript", "path": "a.pt", "sha256": "0" * 64, "takes": "pictures", "size": 8, "range": [0, 1]}
    for change, problem in (
        ({"kind": "fid"}, "expected one of"),
        ({"sha256": "abc"}, "sha256"),
        ({"range": [1, 1]}, "the value of black comes first"),
        ({"frames": 4}, "takes is pictures, which have none"),
    ):
        with pytest.raises(ConfigError, match=problem):
            build(_Judges, {"features": {**of, **change}}, "a test")
    for kind in ("i3d", "torchscript"):
        with pytest.raises(ConfigError, match="sha256: is required"):
            build(_Judges, {"features": {"kind": kind, "path": "a.pt"}}, "a test")
