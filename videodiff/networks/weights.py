"""Names of weights here and in public checkpoints (diffusers' Stable Diffusion, transformers' CLIP text), both ways.

A map is {name here: name there} over every weight of a network; values pass unchanged, but for the text tower, whose
query, key and value are one matrix in open_clip and three in transformers.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, cat, nn

from videodiff.errors import UserError
from videodiff.networks.autoencoder import Autoencoder, AutoencoderConfig
from videodiff.networks.unet import UNet, UNetConfig

Names = dict[str, str]

_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "leave": "to_out.0"}
_RES_BLOCK = {
    "norm_in": "norm1",
    "conv_in.spatial": "conv1",
    "modulation": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out.spatial": "conv2",
    "skip": "conv_shortcut",
}
_TRANSFORMER_LAYER = {
    "norm_self": "norm1",
    **{f"attention.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    "norm_text.0": "norm2",
    **{f"text_attention.0.{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION.items()},
    "norm_feed": "norm3",
    "feed_forward.enter": "ff.net.0.proj",
    "feed_forward.leave": "ff.net.2",
}
# Attention of the autoencoder before diffusers 0.15; there its matrices may also be 1x1 convolutions.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _below(ours: str, theirs: str, modules: Mapping[str, str]) -> Names:
    return {f"{ours}.{inner}": f"{theirs}.{outer}" for inner, outer in modules.items()}


def _transformer(num_layers: int) -> Names:
    modules = {"norm": "norm", "enter": "proj_in", "leave": "proj_out"}
    for layer in range(num_layers):
        modules |= _below(f"layers.{layer}", f"transformer_blocks.{layer}", _TRANSFORMER_LAYER)
    return modules


def unet_names(config: UNetConfig, names: Iterable[str]) -> Names:
    """Names in diffusers' UNet2DConditionModel of the spatial weights `names` of a Stable-Diffusion-shaped UNet."""
    transformer = _transformer(config.num_transformer_layers)
    modules = {
        "time_embedding.0": "time_embedding.linear_1",
        "time_embedding.2": "time_embedding.linear_2",
        "conv_in.spatial": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out.spatial": "conv_out",
    }
    for side, resample in (("down", "downsamplers"), ("up", "upsamplers")):
        for level, count in enumerate(config.res_blocks if side == "down" else reversed(config.res_blocks)):
            theirs = f"{side}_blocks.{level}"
            for block in range(count + (side == "up")):
                ours = f"{side}.{level}.blocks.{block}"
                modules |= _below(f"{ours}.res", f"{theirs}.resnets.{block}", _RES_BLOCK)
                modules |= _below(f"{ours}.attention", f"{theirs}.attentions.{block}", transformer)
            modules[f"{side}.{level}.resize.spatial"] = f"{theirs}.{resample}.0.conv"
    for block in (0, 1):
        modules |= _below(f"middle.{block}.res", f"mid_block.resnets.{block}", _RES_BLOCK)
    modules |= _below("middle.0.attention", "mid_block.attentions.0", transformer)
    return _with_leaves(modules, names)


def autoencoder_names(config: AutoencoderConfig, names: Iterable[str]) -> Names:
    """Names in diffusers' AutoencoderKL of the weights `names` of an Autoencoder of layout "ldm"."""
    modules: Names = {}
    res_block = {"norm_in": "norm1", "conv_in": "conv1", "norm_out": "norm2", "conv_out": "conv2"}
    res_block["skip"] = "conv_shortcut"
    attention = {"norm": "group_norm", **_below("attention", "", _ATTENTION)}
    attention = {ours: theirs.lstrip(".") for ours, theirs in attention.items()}
    levels = len(config.widths)

    def middle(side: str, first: int) -> int:
        nonlocal modules
        modules |= _below(f"{side}.{first}", f"{side}.mid_block.resnets.0", res_block)
        modules |= _below(f"{side}.{first + 1}", f"{side}.mid_block.attentions.0", attention)
        modules |= _below(f"{side}.{first + 2}", f"{side}.mid_block.resnets.1", res_block)
        return first + 3

    def tail(side: str, first: int) -> None:
        modules[f"{side}.{first}"] = f"{side}.conv_norm_out"
        modules[f"{side}.{first + 2}"] = f"{side}.conv_out"

    # Positions in the sequences that `make_encoder` and `make_decoder` build.
    modules["encoder.1"], place = "encoder.conv_in", 2
    for level in range(levels):
        if level > 0:
            modules[f"encoder.{place + 1}"] = f"encoder.down_blocks.{level - 1}.downsamplers.0.conv"
            place += 2
        for block in range(config.num_res_blocks):
            modules |= _below(f"encoder.{place}", f"encoder.down_blocks.{level}.resnets.{block}", res_block)
            place += 1
    place = middle("encoder", place)
    tail("encoder", place)
    modules[f"encoder.{place + 3}"] = "quant_conv"

    modules["decoder.0"], modules["decoder.1"] = "post_quant_conv", "decoder.conv_in"
    place = middle("decoder", 2)
    for level in range(levels):
        for block in range(config.num_res_blocks + 1):
            modules |= _below(f"decoder.{place}", f"decoder.up_blocks.{level}.resnets.{block}", res_block)
            place += 1
        if level < levels - 1:
            modules[f"decoder.{place}.conv"] = f"decoder.up_blocks.{level}.upsamplers.0.conv"
            place += 1
    tail("decoder", place)
    return _with_leaves(modules, names)


def _with_leaves(modules: Names, names: Iterable[str]) -> Names:
    """From names of modules to those of their weights and biases."""
    split = {name: name.rpartition(".") for name in names}
    return {name: f"{modules[module]}.{leaf}" for name, (module, _, leaf) in split.items()}


# --- there to here ----------------------------------------------------------------------------------------------------


def take(names: Names, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights `given`, under names there, as a state of ours; `wanted` has our names and shapes.

    Raises UserError with the first names, as they are there, that are missing, in excess or of another shape.
    """
    problems = []
    missing = [theirs for theirs in names.values() if theirs not in given]
    extra = sorted(set(given) - set(names.values()))
    shapes = [
        f"{theirs} is {list(given[theirs].shape)}, the configuration asks {list(wanted[ours].shape)}"
        for ours, theirs in names.items()
        if theirs in given and given[theirs].shape != wanted[ours].shape
    ]
    for what, found in (("missing", missing), ("unknown", extra), ("of another shape", shapes)):
        if found:
            problems.append(f"{len(found)} weights {what}: {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}")
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}; copy the whole folder again, or name another")
    return {ours: given[theirs] for ours, theirs in names.items()}


def unet_state(network: UNet, given: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Weights of a UNet2DConditionModel as the state of `network`; see `take` for what is refused."""
    wanted = network.state_dict()
    return take(unet_names(network.config, wanted), wanted, given, where)


def autoencoder_state(network: Autoencoder, given: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Weights of an AutoencoderKL as the state of `network`, older names of the attention included; with the latent
    statistics that `network` has."""
    statistics = dict(network.named_buffers())
    wanted = {name: value for name, value in network.state_dict().items() if name not in statistics}
    names = autoencoder_names(network.config, wanted)
    given = {_new_attention(name): value for name, value in given.items()}
    matrices = {theirs for ours, theirs in names.items() if wanted[ours].ndim == 2}
    given = {
        name: value.flatten(1) if name in matrices and value.shape[2:] == (1, 1) else value
        for name, value in given.items()
    }
    return {**take(names, wanted, given, where), **statistics}


def _new_attention(name: str) -> str:
    head, _, leaf = name.rpartition(".")
    module, _, last = head.rpartition(".")
    if ".attentions." in name and last in _OLD_ATTENTION:
        return f"{module}.{_OLD_ATTENTION[last]}.{leaf}"
    return name


# --- the text tower ---------------------------------------------------------------------------------------------------

_TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_TEXT_LAYER = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _text_names(layers: int) -> tuple[Names, dict[str, tuple[str, str, str]]]:
    """The plain part of the map, and for each joint matrix here the three there."""
    plain, joint = dict(_TEXT), {}
    for layer in range(layers):
        ours, theirs = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        for leaf in ("weight", "bias"):
            for inner, outer in _TEXT_LAYER.items():
                plain[f"{ours}.{inner}.{leaf}"] = f"{theirs}.{outer}.{leaf}"
            query, key, value = (f"{theirs}.self_attn.{letter}_proj.{leaf}" for letter in "qkv")
            joint[f"{ours}.attn.in_proj_{leaf}"] = (query, key, value)
    return plain, joint


def text_state(text: nn.Module, layers: int, given: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Weights of transformers' CLIPTextModel as the state of open_clip's TextTransformer `text` of `layers` layers.

    The prefix `text_model.` may be there or not; the table `position_ids` of older files, a mere count, is left out.
    """
    plain, joint = _text_names(layers)
    given = {name.removeprefix("text_model."): value for name, value in given.items()}
    given = {name: value for name, value in given.items() if not name.endswith("position_ids")}
    wanted = dict(text.state_dict())
    names = dict(plain)
    for ours, parts in joint.items():
        for theirs, piece in zip(parts, wanted.pop(ours).chunk(3), strict=True):
            names[theirs], wanted[theirs] = theirs, piece
    state = take(names, wanted, given, where)
    for ours, parts in joint.items():
        state[ours] = cat([state.pop(theirs) for theirs in parts])
    return state


def public_text_state(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The first `layers` layers of an open_clip text tower under the names of transformers' CLIPTextModel."""
    plain, joint = _text_names(layers)
    public = {f"text_model.{theirs}": state[ours] for ours, theirs in plain.items()}
    for ours, parts in joint.items():
        public |= {f"text_model.{name}": piece for name, piece in zip(parts, state[ours].chunk(3), strict=True)}
    return public
