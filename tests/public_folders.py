"""Small Stable Diffusion folders with random weights, as diffusers and transformers write them, and a CLIP text model
after transformers' formulas, for where transformers is not installed.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from videodiff.networks.tokenizer import Tokenizer, build_vocabulary, declare_torchvision_ops

WIDTH, LAYERS, HEADS, LENGTH = 24, 2, 2, 12
CAPTIONS = ["a large red circle moving left on a white background", "a small blue square stands still on black"]


def diffusers() -> Any:
    declare_torchvision_ops()
    return pytest.importorskip("diffusers")


def make_unet(generation: int, width: int = WIDTH) -> Any:
    """Two levels of Stable Diffusion 1 (heads by count, convolutions) or 2 (by channels, linear projections)."""
    torch.manual_seed(generation)
    return (
        diffusers()
        .UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=8,
            cross_attention_dim=width,
            attention_head_dim=4 if generation == 1 else (2, 4),
            use_linear_projection=generation == 2,
            upcast_attention=generation == 2,
            transformer_layers_per_block=generation,
        )
        .eval()
    )


# The published configurations: what unet/config.json and vae/config.json of Stable Diffusion 1.5 and 2.1 set.
FULL_UNET: dict[int, dict[str, Any]] = {
    1: {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    2: {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
}
FULL_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def make_vae() -> Any:
    torch.manual_seed(3)
    return (
        diffusers()
        .AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=2,
            norm_num_groups=4,
        )
        .eval()
    )


def text_weights(vocabulary_size: int, width: int = WIDTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "embeddings.token_embedding.weight": (vocabulary_size, width),
        "embeddings.position_embedding.weight": (LENGTH, width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    for layer in range(LAYERS):
        part = f"encoder.layers.{layer}"
        for name, rows, columns in (
            *((f"self_attn.{letter}_proj", width, width) for letter in ("q", "k", "v", "out")),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes |= {f"{part}.{name}.weight": (rows, columns), f"{part}.{name}.bias": (rows,)}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{part}.{norm}.weight": (width,), f"{part}.{norm}.bias": (width,)}
    return {f"text_model.{name}": 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def text_hidden(weights: dict[str, Tensor], ids: Tensor, activation: str) -> Tensor:
    """CLIP's text transformer (Radford et al. 2021) with the weights' names: ids [B,L] -> last hidden state [B,L,D]."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"text_model.{name}.weight"].T + weights[f"text_model.{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"text_model.{name}.weight"] + weights[f"text_model.{name}.bias"]

    embeddings = "text_model.embeddings"
    x = weights[f"{embeddings}.token_embedding.weight"][ids]
    x = x + weights[f"{embeddings}.position_embedding.weight"][: ids.shape[1]]
    future = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
    for layer in range(LAYERS):
        part = f"encoder.layers.{layer}"
        normed = norm(x, f"{part}.layer_norm1")
        query, key, value = (
            linear(normed, f"{part}.self_attn.{letter}_proj").unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for letter in "qkv"
        )
        scores = query @ key.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
        x = x + linear(mixed.transpose(1, 2).flatten(2), f"{part}.self_attn.out_proj")
        hidden = linear(norm(x, f"{part}.layer_norm2"), f"{part}.mlp.fc1")
        hidden = hidden * torch.sigmoid(1.702 * hidden) if activation == "quick_gelu" else F.gelu(hidden)
        x = x + linear(hidden, f"{part}.mlp.fc2")
    return norm(x, "final_layer_norm")


def write_pipeline(folder: Path, generation: int) -> Path:
    """A pipeline's folder: generation 1 pads with the end and has quick_gelu and eps, 2 token 0, gelu and v."""
    make_unet(generation).save_pretrained(folder / "unet")
    make_vae().save_pretrained(folder / "vae")
    write_text(folder, generation)
    diffusers().DDIMScheduler(
        beta_start=8.5e-4,
        beta_end=1.2e-2,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="epsilon" if generation == 1 else "v_prediction",
        rescale_betas_zero_snr=generation == 2,
    ).save_pretrained(folder / "scheduler")
    return folder


def write_text(folder: Path, generation: int, width: int = WIDTH) -> None:
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    build_vocabulary(CAPTIONS, folder / "own.gz", folder / "own.txt", num_merges=100)
    own = Tokenizer(str(folder / "own.gz"), None, LENGTH)
    (folder / "own.gz").unlink()
    (folder / "own.txt").unlink()
    tokens = [*own.tokens()[:-2], "<|startoftext|>", "<|endoftext|>"]
    write_json(tokenizer / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *own.merges(), ""]), encoding="utf-8")
    added = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False}
    pad = {**added, "single_word": False} if generation == 1 else "!"
    write_json(tokenizer / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "pad_token": pad})
    encoder = folder / "text_encoder"
    encoder.mkdir()
    settings = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": "quick_gelu" if generation == 1 else "gelu",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": LENGTH,
        "vocab_size": own.size,
        "bos_token_id": own.size - 2,
        "eos_token_id": own.size - 1,
    }
    write_json(encoder / "config.json", settings)
    weights = text_weights(own.size, width)
    if generation == 1:  # files of transformers before 4.31 hold this table
        weights["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    save_file(weights, encoder / "model.safetensors", metadata={"format": "pt"})


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
