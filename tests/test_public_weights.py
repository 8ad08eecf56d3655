"""Import and export of public weights: equal outputs, odd folders that are read, wrong ones that are refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from public_folders import (
    CAPTIONS,
    FULL_UNET,
    FULL_VAE,
    LENGTH,
    WIDTH,
    diffusers,
    make_unet,
    make_vae,
    text_hidden,
    text_weights,
    write_json,
    write_pipeline,
    write_text,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages import video
from stages.cli import main
from stages.pipeline import Pipeline, SampleKey, adjusted
from stages.public_configs import autoencoder_config, public_autoencoder, unet_config
from stages.public_export import export_diffusers
from stages.public_weights import import_model, read_weights
from videodiff import config as configs
from videodiff.batch import Condition, VideoBatch
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks import text as texts
from videodiff.networks.autoencoder import Autoencoder, AutoencoderConfig
from videodiff.networks.quantizer import QuantizerConfig
from videodiff.networks.tokenizer import import_open_clip
from videodiff.networks.unet import UNet, temporal_parameter_names
from videodiff.networks.weights import autoencoder_state, unet_state


@pytest.fixture(scope="module", params=[1, 2])
def generation(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("public")
    return {one: write_pipeline(root / f"sd{one}", one) for one in (1, 2)}


@pytest.fixture(scope="module")
def imported(pipelines: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("imported")
    for one, folder in pipelines.items():
        import_model(folder, None, None, None, root / f"sd{one}")
    return {one: root / f"sd{one}" for one in pipelines}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def told(tokens: Tensor) -> Condition:
    return Condition(text=(tokens,), text_mask=(torch.ones(tokens.shape[:2], dtype=torch.bool),))


def assert_equal(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Equal to `tolerance` of the greatest value."""
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


TIME = torch.tensor([999.0, 3.0])


@torch.no_grad()
def same_unet(peer: Any, ours: UNet) -> None:
    x, tokens = normal(2, 4, 8, 12), normal(2, LENGTH, WIDTH, seed=1)
    assert_equal(ours(x[:, :, None], TIME, told(tokens))[:, :, 0], peer(x, TIME, tokens).sample)


@torch.no_grad()
def same_autoencoder(peer: Any, ours: Any) -> None:
    """Ours normalises by itself what a pipeline multiplies by the scale."""
    frames = normal(2, 3, 16, 24).clamp(-1, 1)
    posterior, wanted = ours.encode(frames), peer.encode(frames).latent_dist
    assert_equal(posterior.mean, wanted.mean * peer.config.scaling_factor)
    assert_equal(posterior.std, wanted.std * peer.config.scaling_factor)
    latent = posterior.mean
    assert_equal(ours.decode(latent), peer.decode(latent / peer.config.scaling_factor).sample)


def test_networks_give_what_diffusers_gives(imported: dict[int, Path], generation: int) -> None:
    model = Model.load(imported[generation])
    same_unet(make_unet(generation), model.unet("image"))
    same_autoencoder(make_vae(), model.autoencoder)
    assert model.autoencoder.latent_std.tolist() == pytest.approx([1 / 0.18215] * 4)


def test_schedule_and_prediction_come_from_the_scheduler(imported: dict[int, Path], generation: int) -> None:
    part = Model.load(imported[generation]).diffusion("image")
    assert part.prediction == {1: "eps", 2: "v"}[generation]
    peer = diffusers().DDIMScheduler(
        beta_start=8.5e-4, beta_end=1.2e-2, beta_schedule="scaled_linear", rescale_betas_zero_snr=generation == 2
    )
    torch.testing.assert_close(part.schedule.alpha_bar[1:].float(), peer.alphas_cumprod, atol=1e-6, rtol=1e-4)
    assert part.size == 16


def test_text_is_read_as_stable_diffusion_reads_it(imported: dict[int, Path], generation: int) -> None:
    tower = Model.load(imported[generation]).text
    ids = tower.tokenizer(["a red circle", ""])
    start, end = tower.tokenizer.size - 2, tower.tokenizer.size - 1
    filling = {1: end, 2: 0}[generation]
    assert ids[1].tolist() == [start, end] + [filling] * (LENGTH - 2)
    features = tower.encode(["a red circle", ""])
    activation = {1: "quick_gelu", 2: "gelu"}[generation]
    weights = text_weights(tower.tokenizer.size)
    assert_equal(features.tokens, text_hidden(weights, ids, activation))
    # The other activation would not pass.
    other = text_hidden(weights, ids, {"gelu": "quick_gelu", "quick_gelu": "gelu"}[activation])
    assert (features.tokens - other).abs().max() > 1e-3 * other.abs().max()
    # No text is the empty caption, padding is attended to, nothing is pooled.
    condition = features.condition(torch.ones(2))
    assert condition.text_mask[0].all()
    assert condition.pooled is None
    torch.testing.assert_close(condition.without("text").text[0][0], features.tokens[1], atol=1e-5, rtol=1e-5)
    half = condition.drop(torch.tensor([True, False]), torch.tensor([False])).text[0]
    assert torch.equal(half[1], features.tokens[1])
    torch.testing.assert_close(half[0], features.tokens[1], atol=1e-5, rtol=1e-5)


def test_transformers_gives_the_same_tokens_and_hidden_states(
    pipelines: dict[int, Path], imported: dict[int, Path], generation: int
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(pipelines[generation] / "tokenizer")
    peer = transformers.CLIPTextModel.from_pretrained(pipelines[generation] / "text_encoder").eval()
    tower = Model.load(imported[generation]).text
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, tower.tokenizer(CAPTIONS))
    with torch.no_grad():
        assert_equal(tower.encode(CAPTIONS).tokens, peer(ids).last_hidden_state)


def test_a_whole_diffusers_pipeline_gives_the_same_latents(
    imported: dict[int, Path], generation: int, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    model = Model.load(imported[generation])
    export_diffusers(model, tmp_path / "out")
    peer = diffusers().StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    sampling = adjusted(model.diffusion("image").sampling, steps=4, text=3.0)
    key = SampleKey(0, CAPTIONS[0])
    made = Pipeline(model).image([key], sampling)
    noise = torch.randn(4, 1, 8, 8, generator=key.generator("image"))
    latents = noise.transpose(0, 1)
    told = {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "latent"}
    wanted = peer(CAPTIONS[0], height=16, width=16, latents=latents, **told).images
    assert_equal(made[:, :, 0], wanted, 1e-3)


def test_export_is_loaded_by_diffusers_and_equal(imported: dict[int, Path], generation: int, tmp_path: Path) -> None:
    export_diffusers(Model.load(imported[generation]), tmp_path / "out")
    library = diffusers()
    unet = library.UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")
    vae = library.AutoencoderKL.from_pretrained(tmp_path / "out" / "vae")
    for peer, first in ((unet, make_unet(generation)), (vae, make_vae())):
        wanted = first.state_dict()
        assert {name: value.shape for name, value in peer.state_dict().items()} == {
            name: value.shape for name, value in wanted.items()
        }
        assert all(torch.equal(value, wanted[name]) for name, value in peer.state_dict().items())
    model = Model.load(imported[generation])
    same_unet(unet, model.unet("image"))
    same_autoencoder(vae, model.autoencoder)
    schedule = library.DDIMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert schedule.config.prediction_type == {1: "epsilon", 2: "v_prediction"}[generation]
    # What was written is read again, and is the same model to the last bit.
    import_model(tmp_path / "out", None, None, None, tmp_path / "again")
    again = Model.load(tmp_path / "again")
    assert again.diffusion("image") == model.diffusion("image")
    assert again.part("autoencoder") == model.part("autoencoder")
    assert again.part("text") == model.part("text")


def test_a_video_stage_gives_the_image_models_frames_at_the_start(
    imported: dict[int, Path], generation: int, tmp_path: Path
) -> None:
    model = Model.load(imported[generation])
    image = model.unet("image")
    tree = {
        "stage": "video",
        "run": {"dir": str(tmp_path), "steps": 1},
        "data": {"shards": "none", "batch_size": 2, "frames": 3, "fps": 8, "size": 16},
    }
    task = video.task(configs.build(video.VideoStage, tree, "the test"), model)
    frames = torch.randint(0, 256, (2, 3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    batch = VideoBatch(frames, tuple(CAPTIONS), torch.full((2,), 8.0), torch.arange(2), ("a", "b"), torch.ones(2))
    condition = task.condition(batch, task.latents(batch, seed=0))
    assert condition.known is not None
    x = normal(2, 4, 3, 8, 8)
    with torch.no_grad():
        made = task.module(x, TIME, condition)
        alone = replace(condition, known=None, known_mask=None)
        for frame in range(3):
            assert_equal(made[:, :, frame : frame + 1], image(x[:, :, frame : frame + 1], TIME, alone), 1e-5)
    # And it trains: what is new gets gradients, among them the projections that start at zero.
    task.loss(task.module, batch, seed=0).per_sample.sum().backward()
    moved = {name for name, parameter in task.module.named_parameters() if parameter.grad is not None}
    assert temporal_parameter_names(task.module) <= moved
    assert task.module.get_parameter("middle.0.temporal.leave.weight").grad.any()


# --- full size --------------------------------------------------------------------------------------------------------


def test_full_size_names_and_shapes_fit(tmp_path: Path, generation: int) -> None:
    library = diffusers()
    with torch.device("meta"):
        peer = library.UNet2DConditionModel(**FULL_UNET[generation])
        peer_vae = library.AutoencoderKL(**FULL_VAE)
    for one, name in ((peer, "unet"), (peer_vae, "vae")):
        one.save_config(tmp_path / name)
    config, size = unet_config(tmp_path / "unet" / "config.json")
    assert size == FULL_UNET[generation]["sample_size"]
    with torch.device("meta"):
        network = UNet(config)
        autoencoder = Autoencoder(autoencoder_config(tmp_path / "vae" / "config.json")[0])
    unet_state(network, peer.state_dict(), "unet")
    autoencoder_state(autoencoder, peer_vae.state_dict(), "vae")


@pytest.mark.slow
def test_full_size_models_give_what_diffusers_gives_and_go_back(
    pipelines: dict[int, Path], tmp_path: Path, generation: int
) -> None:
    """The text encoder is a stub of the right width. 3.5 GB a copy of the weights: two at a time in memory."""
    library = diffusers()
    torch.manual_seed(0)
    folder, width = tmp_path / "pipeline", FULL_UNET[generation]["cross_attention_dim"]
    write_text(folder, generation, width)
    shutil.copytree(pipelines[generation] / "scheduler", folder / "scheduler")
    with torch.no_grad():
        unet = library.UNet2DConditionModel(**FULL_UNET[generation]).eval()
        unet.save_pretrained(folder / "unet", max_shard_size="1GB")
        x, tokens = normal(1, 4, 16, 16), normal(1, 77, width, seed=1)
        wanted = unet(x, TIME[:1], tokens).sample
        del unet
        vae = library.AutoencoderKL(**FULL_VAE).eval()
        vae.save_pretrained(folder / "vae")
        import_model(folder, None, None, None, tmp_path / "model")
        model = Model.load(tmp_path / "model")
        network = model.unet("image")
        assert_equal(network(x[:, :, None], TIME[:1], told(tokens))[:, :, 0], wanted)
        del network
        same_autoencoder(vae, model.autoencoder)
        export_diffusers(model, tmp_path / "out")
    for part, kind in (("unet", library.UNet2DConditionModel), ("vae", library.AutoencoderKL)):
        given = read_weights(folder / part, "diffusion_pytorch_model")
        found = kind.from_pretrained(tmp_path / "out" / part).state_dict()
        assert found.keys() == given.keys()
        assert all(torch.equal(found[name], value) for name, value in given.items())
    for written in ("pipeline", "model", "out"):  # pytest keeps the folders of three runs
        shutil.rmtree(tmp_path / written)


# --- folders that are odd and right -----------------------------------------------------------------------------------


def older_attention(folder: Path) -> None:
    """The autoencoder's attention as diffusers wrote it before 0.15, its matrices as convolutions."""
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in load_file(file).items():
        if ".attentions." in name:
            for theirs, older in names.items():
                name = name.replace(theirs, older)
            value = value[:, :, None, None] if value.ndim == 2 and "value" in name else value
        old[name] = value.contiguous()
    assert any("proj_attn" in name for name in old)
    save_file(old, file)


def sharded(folder: Path, variant: str = "") -> None:
    file = folder / "unet" / f"diffusion_pytorch_model{variant}.safetensors"
    state = load_file(file)
    names = sorted(state)
    table = {}
    for number in (1, 2):
        shard = f"diffusion_pytorch_model{variant}-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in names[number - 1 :: 2]}, file.with_name(shard))
        table |= dict.fromkeys(names[number - 1 :: 2], shard)
    index = f"diffusion_pytorch_model.safetensors.index{variant}.json"
    write_json(file.with_name(index), {"metadata": {}, "weight_map": table})
    file.unlink()


def sharded_fp16(folder: Path) -> None:
    fp16(folder)
    sharded(folder, ".fp16")


def fp16(folder: Path) -> None:
    for part in ("unet", "vae", "text_encoder"):
        name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        file = folder / part / f"{name}.safetensors"
        state = load_file(file)
        save_file({key: value.half() for key, value in state.items()}, file.with_name(f"{name}.fp16.safetensors"))
        file.unlink()


def fast_tokenizer(folder: Path) -> None:
    tokenizer = folder / "tokenizer"
    merges = (tokenizer / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    vocabulary = json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8"))
    model = {"type": "BPE", "vocab": vocabulary, "merges": [merge.split() for merge in merges]}
    write_json(tokenizer / "tokenizer.json", {"model": model})
    (tokenizer / "merges.txt").unlink()
    (tokenizer / "vocab.json").unlink()


@pytest.mark.parametrize("change", [older_attention, sharded, fp16, sharded_fp16, fast_tokenizer])
def test_folders_of_other_times_and_forms_are_read(
    pipelines: dict[int, Path], imported: dict[int, Path], change: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(pipelines[1], folder)
    change(folder)
    import_model(folder, None, None, None, tmp_path / "model")
    ours, plain = Model.load(tmp_path / "model"), Model.load(imported[1])
    for stage in ("autoencoder", "text", "image"):
        wanted, found = plain.state(stage), ours.state(stage)
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            half = change in (fp16, sharded_fp16) and name not in ("latent_mean", "latent_std")
            assert torch.equal(value, wanted[name].half().float() if half else wanted[name]), name
    assert ours.text.tokenizer.merges() == plain.text.tokenizer.merges()


def test_components_may_lie_apart(pipelines: dict[int, Path], tmp_path: Path) -> None:
    one, two = pipelines[1], pipelines[2]
    import_model(one / "unet", two / "vae", str(two), None, tmp_path / "model")
    model = Model.load(tmp_path / "model")
    assert model.diffusion("image").prediction == "eps"
    assert model.text.config.padding == "zero"
    same_unet(make_unet(1), model.unet("image"))


# --- folders that are wrong -------------------------------------------------------------------------------------------


def change_json(file: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **values})

    return change


def drop_weights(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["mid_block.resnets.0.conv1.weight"]
    state["odd.weight"] = torch.zeros(1)
    state["conv_in.bias"] = torch.zeros(3)
    save_file(state, file)


def only_pickles(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")


def lose_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


def broken_weights(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"no weights")


def other_order(folder: Path) -> None:
    path = folder / "tokenizer" / "vocab.json"
    ids = json.loads(path.read_text(encoding="utf-8"))
    ids["a"], ids["b"] = ids["b"], ids["a"]
    write_json(path, ids)


def no_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_weights, r"1 weights missing: mid_block\.resnets\.0\.conv1\.weight; 1 weights unknown: odd\.weight; 1 "
         r"weights of another shape: conv_in\.bias is \[3\], the configuration asks \[16\]"),
        (only_pickles, "only pickles"),
        (lose_shard, "00002-of-00002.*missing"),
        (broken_weights, "not a readable safetensors"),
        (other_order, "'a' differs first"),
        (no_scheduler, "holds no scheduler/"),
        (change_json("unet/config.json", in_channels=9), "inpainting"),
        (change_json("unet/config.json", class_embed_type="timestep"), "class_embed_type"),
        (change_json("unet/config.json", freq_shift=1), "freq_shift is 1"),
        (change_json("unet/config.json", norm_num_groups=5), "norm_groups 5 does not divide"),
        (change_json("unet/config.json", cross_attention_dim=[8, 24]), "one value for all levels"),
        (change_json("unet/config.json", down_block_types=["DownBlock2D", "AttnDownBlock2D"]), "AttnDownBlock2D"),
        (change_json("unet/config.json", up_block_types=["UpBlock2D", "UpBlock2D"]), "mirror image"),
        (change_json("vae/config.json", latent_channels=8), "8 channels"),
        (change_json("vae/config.json", use_quant_conv=False), "use_quant_conv"),
        (change_json("vae/config.json", _class_name="AutoencoderTiny"), "AutoencoderTiny"),
        (change_json("scheduler/scheduler_config.json", prediction_type="flow"), "prediction_type"),
        (change_json("scheduler/scheduler_config.json", trained_betas=[0.1]), "trained_betas"),
        (change_json("scheduler/scheduler_config.json", rescale_betas_zero_snr=True), "zero_terminal_snr"),
        (change_json("text_encoder/config.json", hidden_act="relu"), "hidden_act"),
        (change_json("text_encoder/config.json", model_type="t5"), "t5"),
        (change_json("text_encoder/config.json", num_hidden_layers=3), "encoder.layers.2"),
        (change_json("tokenizer/tokenizer_config.json", pad_token="a"), "pad_token"),
    ],
)  # fmt: skip
def test_wrong_folders_are_refused_and_leave_nothing(
    pipelines: dict[int, Path], change: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(pipelines[1], folder)
    change(folder)
    with pytest.raises(UserError, match=words):
        import_model(folder, None, None, None, tmp_path / "out" / "model")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_an_open_clip_tower_needs_a_file_and_a_known_width(pipelines: dict[int, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--text-weights"):
        import_model(pipelines[1], None, "open_clip:ViT-L-14", None, tmp_path / "model")
    with pytest.raises(UserError, match="width 24"):
        import_model(pipelines[1], None, "open_clip:ViT-L-14", tmp_path / "w.safetensors", tmp_path / "model")
    with pytest.raises(UserError, match="leave it out"):
        import_model(pipelines[1], None, None, tmp_path / "w.safetensors", tmp_path / "model")
    with pytest.raises(UserError, match="no such folder"):
        import_model(tmp_path / "none", None, None, None, tmp_path / "model")


@pytest.mark.parametrize(
    ("width", "name", "words"),
    [
        (768, "ViT-L-14", "has no quick GELU, .* name open_clip:ViT-L-14-quickgelu$"),
        (1024, "ViT-H-14-quickgelu", "has quick GELU, .* name open_clip:ViT-H-14$"),
    ],
)
def test_an_open_clip_tower_with_the_other_activation_is_refused(
    pipelines: dict[int, Path], width: int, name: str, words: str, tmp_path: Path
) -> None:
    folder = image_model_of_width(pipelines, width, tmp_path)
    with pytest.raises(UserError, match=words):
        import_model(folder, None, f"open_clip:{name}", tmp_path / "never-read.safetensors", tmp_path / "out" / "model")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("width", "name"), [(768, "ViT-L-14-quickgelu"), (1024, "ViT-H-14")])
def test_an_open_clip_tower_reads_as_stable_diffusions_own(
    pipelines: dict[int, Path], width: int, name: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    (settings, quick_gelu), open_clip = texts.public_settings(name), import_open_clip().transformer
    torch.manual_seed(0)
    whole = open_clip.TextTransformer(
        vocab_size=settings["vocab_size"],
        width=settings["width"],
        heads=settings["heads"],
        layers=settings["layers"],
        output_dim=settings["embed_dim"],
        act_layer=open_clip.QuickGELU if quick_gelu else torch.nn.GELU,
    )
    state = {key: value.contiguous() for key, value in whole.state_dict().items()}
    save_file(state, tmp_path / "clip.safetensors")
    del whole, state
    folder = image_model_of_width(pipelines, width, tmp_path)
    import_model(folder, None, f"open_clip:{name}", tmp_path / "clip.safetensors", tmp_path / "model")
    model = Model.load(tmp_path / "model")
    export_diffusers(model, tmp_path / "out")
    # What text_encoder/config.json of the published folders says.
    told = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    layers, activation = {768: (12, "quick_gelu"), 1024: (23, "gelu")}[width]
    assert (told["hidden_size"], told["num_hidden_layers"], told["hidden_act"]) == (width, layers, activation)
    peer = transformers.CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, model.text.tokenizer(CAPTIONS))
    assert ids[0, -1] == {768: 49407, 1024: 0}[width]
    with torch.no_grad():
        assert_equal(model.text.encode(CAPTIONS).tokens, peer(ids).last_hidden_state)


def image_model_of_width(pipelines: dict[int, Path], width: int, tmp_path: Path) -> Path:
    """A small pipeline whose network takes tokens as wide as those of Stable Diffusion 1 or 2."""
    generation = {768: 1, 1024: 2}[width]
    folder = Path(shutil.copytree(pipelines[generation], tmp_path / "pipeline"))
    make_unet(generation, width).save_pretrained(folder / "unet")
    return folder


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("schedule", {"snr_shift": 3.0}, r"image\.schedule: snr_shift 3, .* --format out"),
        ("network", {"learn_variance": True}, r"image\.network: learn_variance True: .* --format out"),
    ],
)
def test_what_diffusers_has_no_setting_for_is_not_exported(
    imported: dict[int, Path], part: str, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = Model.load(imported[1])
    image = model.diffusion("image")
    image = image.model_copy(update={part: getattr(image, part).model_copy(update=change)})
    model = Model(model.folder, model.config.model_copy(update={"image": image}))
    with pytest.raises(UserError, match=words):
        export_diffusers(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layout": "light", "patch": 2}, "layout light, patch 2"),
        ({"attention": False}, "attention False"),
        ({"norm_groups": None}, "norm_groups None"),
        ({"quantizer": QuantizerConfig(codebook_size=4)}, "quantizer codebook_size=4 commitment=0.25"),
    ],
)
def test_an_autoencoder_of_another_shape_is_not_exported(change: dict[str, Any], words: str) -> None:
    config = AutoencoderConfig(layout="ldm", patch=1, norm_groups=32)
    assert public_autoencoder(config, 0.0, 1.0, 64)["norm_num_groups"] == 32
    with pytest.raises(UserError, match=rf"autoencoder\.network: {words}: .* --format out"):
        public_autoencoder(config.model_copy(update=change), 0.0, 1.0, 64)


def test_a_model_of_another_shape_is_not_exported(toy_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="time_embedding scale_shift"):
        export_diffusers(Model.load(toy_model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_from_public_weights_to_a_picture_by_commands(
    pipelines: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str) -> None:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code, capsys.readouterr().err

    folder = str(pipelines[2])
    call("import", "--image-model", folder, "--autoencoder", folder, "--text", folder, "--out", str(tmp_path / "model"))
    model = str(tmp_path / "model")
    picture = tmp_path / "picture.png"
    call(
        "generate",
        "a red circle",
        "--model",
        model,
        "--image-only",
        "--steps",
        "2",
        "-o",
        str(tmp_path / "picture.mp4"),
    )
    assert picture.is_file()
    call("export", model, "--format", "diffusers", "--half", "--out", str(tmp_path / "public"))
    assert load_file(tmp_path / "public" / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.bias"].dtype == (
        torch.float16
    )
