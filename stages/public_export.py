"""`videodiff export --format diffusers`: image stage, autoencoder and text tower as a diffusers pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stages import public_configs
from stages.public_weights import END, START
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.model_folder import new_folder
from videodiff.networks.text import TextTower
from videodiff.networks.weights import autoencoder_names, public_text_state, unet_names

_PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export_diffusers(model: Model, out: Path, half: bool = False) -> None:
    """Write the image stage of `model` into the new folder `out`, as diffusers' StableDiffusionPipeline loads it.

    Video and interpolation have no form there and stay behind. Raises UserError, naming the settings, for a model that
    is not of Stable Diffusion's shape.
    """
    image, vae, text = model.diffusion("image"), model.autoencoder, model.text
    if not isinstance(text, TextTower):
        raise UserError(
            f"{model.folder}: reads its text with {len(text.widths)} towers, and Stable Diffusion has one; leave "
            "--format out"
        )
    statistics = (vae.latent_mean, vae.latent_std)
    if any((values != values[0]).any() for values in statistics):
        raise UserError(
            f"{model.folder}: the latents' statistics differ from channel to channel, and Stable Diffusion has "
            "one scale for all; leave --format out"
        )
    mean, std = (float(values[0]) for values in statistics)
    latent_size = image.size // vae.factor
    unet = public_configs.public_unet(image.network, latent_size)
    autoencoder = public_configs.public_autoencoder(vae.config, mean, std, image.size)
    schedule = public_configs.public_schedule(image.schedule, image.prediction)
    if text.config.padding == "masked":
        raise UserError(
            f"{model.folder}: its text tower masks what follows a caption, which Stable Diffusion does not; leave "
            "--format out"
        )
    dtype = torch.float16 if half else torch.float32
    with new_folder(out) as draft:
        _write_json(draft / "model_index.json", _PIPELINE)
        state = model.state("image")
        _component(draft / "unet", unet, _renamed(state, unet_names(image.network, state)), dtype)
        state = {name: value for name, value in vae.state_dict().items() if not name.startswith("latent_")}
        _component(draft / "vae", autoencoder, _renamed(state, autoencoder_names(vae.config, state)), dtype)
        _text_encoder(draft / "text_encoder", text, dtype)
        _tokenizer(draft / "tokenizer", text)
        (draft / "scheduler").mkdir()
        _write_json(draft / "scheduler" / "scheduler_config.json", schedule)


def _renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {names[name]: value for name, value in state.items()}


def _component(
    folder: Path, settings: dict[str, Any], state: dict[str, Tensor], dtype: torch.dtype, name: str = ""
) -> None:
    folder.mkdir()
    _write_json(folder / "config.json", settings)
    state = {key: value.to(dtype).contiguous() for key, value in state.items()}
    # transformers and diffusers refuse a file that does not say whose tensors it holds.
    save_file(state, folder / f"{name or 'diffusion_pytorch_model'}.safetensors", metadata={"format": "pt"})


def _text_encoder(folder: Path, text: TextTower, dtype: torch.dtype) -> None:
    # Stable Diffusion 2's folders leave out the last layer where the one before is read.
    layers = text.num_layers + 1 + text.config.layer
    size = text.tokenizer.size
    settings = {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
        "hidden_act": "quick_gelu" if text.quick_gelu else "gelu",
        "hidden_size": text.width,
        "intermediate_size": 4 * text.width,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": text.tokenizer.context_length,
        "model_type": "clip_text_model",
        "num_attention_heads": text.num_heads,
        "num_hidden_layers": layers,
        "pad_token_id": size - 1 if text.tokenizer.pad_with_end else 0,
        "projection_dim": text.width,
        "vocab_size": size,
    }
    _component(folder, settings, public_text_state(text.text.state_dict(), layers), dtype, "model")


def _tokenizer(folder: Path, text: TextTower) -> None:
    folder.mkdir()
    tokens = [*text.tokenizer.tokens()[:-2], START, END]
    _write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    lines = ["#version: 0.2", *text.tokenizer.merges()]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {
        "bos_token": START,
        "eos_token": END,
        "pad_token": END if text.tokenizer.pad_with_end else tokens[0],
        "unk_token": END,
    }
    _write_json(folder / "special_tokens_map.json", special)
    settings = {
        **special,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": text.tokenizer.context_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
