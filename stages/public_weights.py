"""`videodiff import`: folders in diffusers' format become a model with the stages autoencoder, text and image."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stages import public_configs
from stages.public_configs import read_json
from videodiff import config as configs
from videodiff.diffusion.guidance import ClassifierFree
from videodiff.diffusion.prediction import check_pair
from videodiff.diffusion.samplers import DDIM
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.model_folder import new_folder, place, write_weights
from videodiff.networks.autoencoder import Autoencoder
from videodiff.networks.text import PretrainedText, TextConfig, TextTower, public_settings, text_shapes
from videodiff.networks.tokenizer import Tokenizer, write_vocabulary
from videodiff.networks.unet import UNet, UNetConfig
from videodiff.networks.weights import autoencoder_state, text_state, unet_state
from videodiff.parts import (
    DESCRIPTION,
    VOCABULARY,
    AutoencoderPart,
    DiffusionPart,
    File,
    ModelConfig,
    Sampling,
    TextPart,
    sha256,
)

Padding = Literal["zero", "end"]
START, END = "<|startoftext|>", "<|endoftext|>"
OPEN_CLIP = "open_clip:"
# How Stable Diffusion 1 and 2 read their text, told from the width of the tokens: layer, what follows the end, and
# whether their CLIP, OpenAI's and OpenCLIP's, has quick GELU, with the name of its architecture.
_READING: dict[int, tuple[Literal[-1, -2], Padding, bool, str]] = {
    768: (-1, "end", True, "ViT-L-14-quickgelu"),
    1024: (-2, "zero", False, "ViT-H-14"),
}


def import_model(
    image_model: Path,
    autoencoder: Path | None,
    text: str | None,
    text_weights: Path | None,
    out: Path,
) -> None:
    """Write the model folder `out` from a Stable Diffusion 1.x or 2.x model.

    image_model: a pipeline's folder, or its unet/ folder; the scheduler lies beside the latter. autoencoder: a folder
    of an AutoencoderKL or of a pipeline that has one, None for the image model's own. text: a pipeline's folder, a
    text_encoder/ folder with tokenizer/ beside it, or open_clip:NAME with the file `text_weights`; None for the image
    model's own. Only safetensors are read. Raises UserError, naming what does not fit, before `out` is there.
    """
    unet_folder = component(image_model, "unet")
    try:
        network, latent_size = public_configs.unet_config(unet_folder / "config.json")
        schedule, prediction = public_configs.schedule_config(
            component(image_model, "scheduler", beside=True) / "scheduler_config.json"
        )
        vae_folder = component(autoencoder or image_model, "vae", beside=autoencoder is None)
        vae_config, mean, std = public_configs.autoencoder_config(vae_folder / "config.json")
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{image_model}: {problem['msg']}; such a network can't be built here") from None
    check_pair(prediction, schedule)
    if vae_config.latent_channels != network.channels:
        raise UserError(
            f"{vae_folder}: latents of {vae_config.latent_channels} channels, but {unet_folder} takes "
            f"{network.channels}; name the autoencoder that the image model was trained with"
        )
    vae = Autoencoder(vae_config)
    channels = vae_config.latent_channels
    vae.set_latent_statistics(torch.full((channels,), mean), torch.full((channels,), std))
    with new_folder(out) as draft:
        with torch.device("meta"):
            shapes = UNet(network)
        state = unet_state(shapes, read_weights(unet_folder, "diffusion_pytorch_model"), str(unet_folder))
        image = DiffusionPart(
            network=network,
            schedule=schedule,
            prediction=prediction,
            size=latent_size * vae.factor,
            frames=1,
            fps=1.0,
            sampling=Sampling(sampler=DDIM(steps=50), guidance=ClassifierFree(text=7.5)),
            weights=write_weights(draft, "image.safetensors", state),
        )
        state = autoencoder_state(vae, read_weights(vae_folder, "diffusion_pytorch_model"), str(vae_folder))
        weights = write_weights(draft, "autoencoder.safetensors", state)
        part = _text(text, text_weights, image_model, network, draft)
        description = ModelConfig(
            autoencoder=AutoencoderPart(network=vae_config, weights=weights), text=part, image=image
        )
        configs.save(description, draft / DESCRIPTION)
        width = Model.load(draft).text.width
        if network.context_dims != (width,):
            raise UserError(
                f"{text or image_model}: text tokens are {width} wide, but {unet_folder} takes "
                f"{network.context_dims[0]}; name the text encoder that the image model was trained with"
            )


def component(folder: Path, name: str, beside: bool = False) -> Path:
    """The folder of a component: in a pipeline's folder, `folder` itself, or (`beside`) its neighbour."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one in diffusers' format, nothing is downloaded")
    if (folder / name).is_dir():
        return folder / name
    if beside and (folder.resolve().parent / name).is_dir():
        return folder.resolve().parent / name
    if not beside and (folder / "config.json").is_file():
        return folder
    raise UserError(f"{folder}: holds no {name}/; name the folder of a whole pipeline, or put {name}/ beside it")


def read_weights(folder: Path, name: str, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """The tensors of a component whose names start with one of `prefixes`, from one safetensors file or the shards of
    an index, full precision before fp16.

    Raises UserError where there are none, and for pickles, which are never opened.
    """
    for variant in ("", ".fp16"):
        single = folder / f"{name}{variant}.safetensors"
        if single.is_file():
            return _read(single, prefixes)
        index = folder / f"{name}.safetensors.index{variant}.json"
        if index.is_file():
            table = read_json(index).get("weight_map")
            if not isinstance(table, dict) or any(Path(str(file)).name != file for file in table.values()):
                raise UserError(f"{index}: its weight_map is missing or points out of the folder; copy it again")
            state: dict[str, Tensor] = {}
            for file in sorted(set(table.values())):
                state |= _read(folder / file, prefixes)
            if lost := sorted({name for name in table if name.startswith(prefixes)} - set(state)):
                raise UserError(f"{index}: {len(lost)} weights are in no shard, {lost[0]} first; copy the shards again")
            return state
    if pickles := sorted(file.name for pattern in ("*.bin", "*.ckpt", "*.pt") for file in folder.glob(pattern)):
        raise UserError(f"{folder}: only pickles ({pickles[0]}), which may run code; get the safetensors files")
    raise UserError(f"{folder}: no {name}.safetensors, alone, as fp16 or with an index; copy the weights there")


def _read(path: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: missing, but the index names it; copy all shards") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy it again") from None


# --- text -------------------------------------------------------------------------------------------------------------


def _text(text: str | None, weights: Path | None, image_model: Path, network: UNetConfig, draft: Path) -> TextPart:
    if text is not None and text.startswith(OPEN_CLIP):
        return _from_open_clip(text.removeprefix(OPEN_CLIP), weights, network.context_dims[0], draft)
    if weights is not None:
        raise UserError(f"--text-weights {weights}: goes with --text open_clip:NAME; leave it out")
    folder = image_model if text is None else Path(text)
    encoder = component(folder, "text_encoder", beside=text is None)
    tokenizer = component(folder, "tokenizer", beside=True)
    merges, ids = _read_tokenizer(tokenizer)
    padding = _padding(tokenizer, ids)
    config = public_configs.text_config(encoder / "config.json", padding)
    write_vocabulary(merges, draft / VOCABULARY)
    ours = Tokenizer(str(draft / VOCABULARY), None, config.context_length)
    wanted = [*ours.tokens()[:-2], START, END]
    odd = [token for number, token in enumerate(wanted) if ids.get(token) != number]
    if odd or len(ids) != len(wanted):
        raise UserError(
            f"{tokenizer}: not CLIP's order of tokens ({len(ids)} tokens, {len(wanted)} expected"
            f"{f', {odd[0]!r} differs first' if odd else ''}); name CLIP's own tokenizer"
        )
    shapes = text_shapes(config, ours.size)
    state = text_state(shapes, config.layers, read_weights(encoder, "model"), str(encoder))
    file = write_weights(draft, "text.safetensors", state)
    vocabulary = File(name=VOCABULARY, sha256=sha256(draft / VOCABULARY))
    return TextPart(network=config, weights=file, vocabulary=vocabulary)


def _from_open_clip(name: str, weights: Path | None, width: int, draft: Path) -> TextPart:
    if weights is None:
        raise UserError(
            f"--text {OPEN_CLIP}{name}: nothing is downloaded; give the weights with --text-weights FILE "
            "(.safetensors, or .pt that loads without pickled code)"
        )
    if width not in _READING:
        raise UserError(
            f"--text {OPEN_CLIP}{name}: the image model takes tokens of width {width}, not Stable Diffusion 1's 768 "
            "nor 2's 1024, so how it read its text is not known; name a text_encoder folder"
        )
    layer, padding, quick_gelu, usual = _READING[width]
    if public_settings(name)[1] != quick_gelu:
        raise UserError(
            f"--text {OPEN_CLIP}{name}: {'has no' if quick_gelu else 'has'} quick GELU, unlike the CLIP that Stable "
            f"Diffusion reads at width {width}, so its tokens would be others; name {OPEN_CLIP}{usual}"
        )
    public = PretrainedText(name=name, path=str(weights))
    config = TextConfig(pretrained=public, layer=layer, padding=padding)
    TextTower(config)
    return TextPart(network=config, weights=place(weights.resolve(), draft, f"text{weights.suffix}"))


def _read_tokenizer(folder: Path) -> tuple[list[str], dict[str, int]]:
    """Merges and ids of a CLIP tokenizer, from vocab.json and merges.txt or from tokenizer.json."""
    merges_file = folder / "merges.txt"
    if merges_file.is_file():
        lines = merges_file.read_text(encoding="utf-8").split("\n")
        return [line for line in lines[1:] if line], read_json(folder / "vocab.json")
    whole = folder / "tokenizer.json"
    if not whole.is_file():
        raise UserError(f"{folder}: neither merges.txt with vocab.json nor tokenizer.json; copy the tokenizer there")
    model = read_json(whole).get("model", {})
    if not {"merges", "vocab"} <= set(model):
        raise UserError(f"{whole}: no byte-pair tokenizer (no merges); name CLIP's own tokenizer")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return merges, model["vocab"]


def _padding(folder: Path, ids: dict[str, int]) -> Padding:
    """What fills a caption up: the end again (Stable Diffusion 1, CLIP's default) or token 0 (Stable Diffusion 2)."""
    token = END
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file() and (named := read_json(folder / file).get("pad_token")) is not None:
            token = named["content"] if isinstance(named, dict) else named
    if token == END:
        return "end"
    if ids.get(token) == 0:
        return "zero"
    raise UserError(f"{folder}: pad_token is {token!r}; only the end of the text and token 0 can be used")
