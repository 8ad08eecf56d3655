"""VideoMAE's encoder (Tong et al. 2022) from a folder in transformers' format: clips become one vector each.

Shapes: N clips, T frames, S picture size, L tokens (tubes of t frames x p x p pixels), D width. The folder is
read here as data, config.json and weights, so that nothing of it is run and transformers need not be installed.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videodiff.errors import UserError
from videodiff.networks.features.files import fill

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Without a preprocessor_config.json: ImageNet's mean and deviation, of pictures in [0,1].
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Names of parts here and in transformers, those of a layer behind its own.
_NAMES = {
    "tubes": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "pooled_norm": "fc_norm",
    "norm_attention": "layernorm_before",
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "leave": "attention.output.dense",
    "norm_feed": "layernorm_after",
    "widen": "intermediate.dense",
    "narrow": "output.dense",
}
# What only training or classification uses.
_UNUSED = ("decoder.", "encoder_to_decoder.", "mask_token", "position_embeddings", "classifier.")


class _Layer(nn.Module):
    """Self-attention and feed-forward, each behind its norm and added: [N,L,D] -> [N,L,D]."""

    def __init__(self, width: int, heads: int, feed: int, bias: bool, epsilon: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width, epsilon)
        self.query, self.value = nn.Linear(width, width, bias), nn.Linear(width, width, bias)
        self.key = nn.Linear(width, width, bias=False)
        self.leave = nn.Linear(width, width)
        self.norm_feed = nn.LayerNorm(width, epsilon)
        self.widen, self.narrow = nn.Linear(width, feed), nn.Linear(feed, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_attention(x)
        parts = (part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        x = x + self.leave(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.norm_feed(x))))


class VideoMAE(nn.Module):
    """Clips [N,3,T,S,S] of bytes (0 to 255) -> the mean of their tokens [N,D] behind the last norm.

    A model that was trained to classify has its norm behind the mean; it sees what its classifier would.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, told: dict[str, Any], pooled_norm: bool) -> None:
        """told: config.json. pooled_norm: whether the file has a norm behind the mean. KeyError, TypeError, ValueError
        where a setting is missing or odd."""
        super().__init__()
        width, heads = told["hidden_size"], told["num_attention_heads"]
        self.size, self.frames, self.width = told["image_size"], told["num_frames"], width
        tube = (told["tubelet_size"], told["patch_size"], told["patch_size"])
        for name, value in (("model_type", "videomae"), ("hidden_act", "gelu"), ("num_channels", 3)):
            if told.get(name, value) != value:
                raise ValueError(f"{name} is {told[name]!r}, not {value!r}")
        if width % (2 * heads):  # half of each token's position is sines
            raise ValueError(f"hidden_size {width} is not a multiple of twice num_attention_heads {heads}")
        epsilon = told.get("layer_norm_eps", 1e-12)
        self.tubes = nn.Conv3d(3, width, tube, tube)
        layer = (width, heads, told["intermediate_size"], told.get("qkv_bias", told.get("qv_bias", True)), epsilon)
        self.layers = nn.ModuleList(_Layer(*layer) for _ in range(told["num_hidden_layers"]))
        self.norm = nn.Identity() if told.get("use_mean_pooling", True) else nn.LayerNorm(width, epsilon)
        self.pooled_norm = nn.LayerNorm(width) if pooled_norm else nn.Identity()

    def place(self, mean: tuple[float, ...], deviation: tuple[float, ...]) -> None:
        """Set what no file of weights holds: the positions of tokens, and what pictures are normalised by."""
        tokens = math.prod(
            side // kernel
            for side, kernel in zip((self.frames, self.size, self.size), self.tubes.kernel_size, strict=True)
        )
        even = torch.arange(0, self.width, 2, dtype=torch.float64)
        angle = torch.arange(tokens, dtype=torch.float64)[:, None] / 10_000 ** (even / self.width)
        positions = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1, 1), persistent=False)
        self.register_buffer("deviation", 255 * torch.tensor(deviation).view(3, 1, 1, 1), persistent=False)

    def forward(self, clips: Tensor) -> Tensor:
        x = self.tubes((clips - self.mean) / self.deviation).flatten(2).transpose(1, 2) + self.get_buffer("positions")
        for layer in self.layers:
            x = layer(x)
        return self.pooled_norm(self.norm(x).mean(dim=1))


def weights_of(folder: Path, key: str) -> Path:
    """The file of weights in a folder; UserError where there is none."""
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise UserError(f"{key}.path: {folder} holds neither {' nor '.join(WEIGHTS)}; name a VideoMAE's local folder")
    return found[0]


def load_videomae(folder: Path, state: dict[str, Tensor], key: str) -> tuple[VideoMAE, str]:
    """The frozen encoder of a folder with the weights of its file, and in words how pictures are normalised.

    Weights are those of the encoder alone, of one trained to rebuild or of one trained to classify. UserError for
    settings and weights that are not a VideoMAE's.
    """
    settings, pictures = folder / "config.json", folder / "preprocessor_config.json"
    told, shown = _read_json(settings, key), _read_json(pictures, key) if pictures.is_file() else {}
    state = {_usual(name): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not name.startswith(_UNUSED)}
    try:
        with torch.device("meta"):
            network = VideoMAE(told, "fc_norm.weight" in state)
        mean, deviation = (
            tuple(shown.get(f"image_{name}", usual)) for name, usual in (("mean", MEAN), ("std", DEVIATION))
        )
        network.place(mean, deviation)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(
            f"{key}.path: {settings}: not the settings of a VideoMAE ({what}); copy the folder again"
        ) from None
    names = {name: _theirs(name) for name in network.state_dict()}
    fill(network, state, f"{key}.path", folder, "the VideoMAE of its config.json", names)
    return network, f"mean {list(mean)}, deviation {list(deviation)} of [0, 1]"


def _usual(name: str) -> str:
    """A weight's name as transformers has it since version 5, without the part that holds the encoder."""
    name = name.removeprefix("videomae.")
    return re.sub(r"\.(q|v)_bias$", lambda found: {"q": ".query.bias", "v": ".value.bias"}[found[1]], name)


def _theirs(name: str) -> str:
    """The name in transformers of one of our weights."""
    module, _, leaf = name.rpartition(".")
    layer, _, part = module.rpartition(".")
    before = layer.replace("layers.", "encoder.layer.") + "." if layer else ""
    return f"{before}{_NAMES[part]}.{leaf}"


def _read_json(path: Path, key: str) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(told, dict):
            raise ValueError("no settings by name")
    except (OSError, ValueError) as error:
        raise UserError(f"{key}.path: {path} can't be read ({error}); name a VideoMAE's local folder") from None
    return told
