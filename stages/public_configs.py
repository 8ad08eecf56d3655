"""Settings of public checkpoints (diffusers' JSON files) and ours, both ways.

What a file sets beyond what our networks can be is refused by its name, never passed over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from videodiff.diffusion.prediction import Prediction
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError
from videodiff.networks.autoencoder import AutoencoderConfig
from videodiff.networks.text import TextConfig
from videodiff.networks.unet import UNetConfig

Settings = dict[str, Any]

# Settings that must have one of these values; any other key that we don't read must be None or false.
_UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type_num_heads": (64,),
    "attention_type": ("default",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "upcast_attention": (True, False, None),  # a matter of precision
}
_UNET_DEFAULTS: Settings = {
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1280,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "sample_size": 64,
    "transformer_layers_per_block": 1,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "use_linear_projection": False,
}
_AUTOENCODER_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "force_upcast": (True, False),
    "in_channels": (3,),
    "mid_block_add_attention": (True,),
    "out_channels": (3,),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
_AUTOENCODER_DEFAULTS: Settings = {
    "block_out_channels": [64],
    "down_block_types": ["DownEncoderBlock2D"],
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "up_block_types": ["UpDecoderBlock2D"],
}
_TEXT_DEFAULTS: Settings = {
    "hidden_act": "quick_gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
}
_ATTENTION_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP_BLOCKS = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


def read_json(path: Path) -> Settings:
    """The object in a JSON file; UserError when there is none."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a folder in diffusers' format") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read as JSON ({error}); copy it again") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds a {type(settings).__name__} where settings should be; copy it again")
    return settings


def _complete(path: Path, kind: str, defaults: Settings, fixed: dict[str, tuple[Any, ...]]) -> Settings:
    """The settings in `path` with the defaults of their class; refuses those that our networks don't have."""
    settings = read_json(path)
    if settings.get("_class_name", kind) != kind:
        raise UserError(f"{path}: describes a {settings['_class_name']}, not a {kind}; name another folder")
    for key, value in settings.items():
        if key in defaults or key.startswith("_"):
            continue
        allowed = fixed.get(key, (None, False))
        if value not in allowed:
            what = " or ".join(json.dumps(one) for one in allowed)
            raise UserError(f"{path}: {key} is {json.dumps(value)}, which our networks don't have (only {what})")
    return {**defaults, **settings}


def _same(path: Path, key: str, value: Any) -> Any:
    """`value`, or the one value of a list whose entries are all equal."""
    if isinstance(value, list):
        if len({json.dumps(one) for one in value}) != 1:
            raise UserError(f"{path}: {key} is {json.dumps(value)}; our network takes one value for all levels")
        return value[0]
    return value


def unet_config(path: Path) -> tuple[UNetConfig, int]:
    """From the config.json of a UNet2DConditionModel: the network, and its latent height and width."""
    given = _complete(path, "UNet2DConditionModel", _UNET_DEFAULTS, _UNET_FIXED)
    widths, down, up = given["block_out_channels"], given["down_block_types"], given["up_block_types"]
    base, levels = widths[0], len(widths)
    if odd := [name for name in down if name not in _ATTENTION_BLOCKS]:
        raise UserError(f"{path}: down_block_types has {odd[0]}; only {' and '.join(_ATTENTION_BLOCKS)} can be read")
    attention = tuple(_ATTENTION_BLOCKS[name] for name in down)
    if up != [_UP_BLOCKS[here] for here in reversed(attention)]:
        raise UserError(f"{path}: up_block_types {json.dumps(up)} are not the mirror image of down_block_types")
    if given["in_channels"] != given["out_channels"]:
        raise UserError(
            f"{path}: in_channels {given['in_channels']} is not out_channels {given['out_channels']}: an inpainting or "
            "editing model; name a text-to-image model"
        )
    if odd := [width for width in widths if width % base]:
        raise UserError(f"{path}: block_out_channels has {odd[0]}, no multiple of the first, {base}")
    if any(given["only_cross_attention"] if isinstance(given["only_cross_attention"], list) else [False]):
        raise UserError(f"{path}: only_cross_attention is set, which our networks don't have")
    blocks = given["layers_per_block"]
    # diffusers' attention_head_dim is the number of heads, a slip of its first release kept for old files.
    heads = given["num_attention_heads"] or given["attention_head_dim"]
    told: Settings = {"num_heads": heads}
    if isinstance(heads, list):
        per_head = {width / count for width, count in zip(widths, heads, strict=len(heads) == levels)}
        told = {"num_heads": tuple(heads)}
        if len(per_head) == 1 and (head_channels := per_head.pop()).is_integer():
            told = {"head_channels": int(head_channels)}
    config = UNetConfig(
        channels=given["in_channels"],
        model_channels=base,
        channel_mult=tuple(width // base for width in widths),
        num_res_blocks=tuple(blocks) if isinstance(blocks, list) else blocks,
        attention_levels=attention,
        num_transformer_layers=_same(path, "transformer_layers_per_block", given["transformer_layers_per_block"]),
        context_dims=(_same(path, "cross_attention_dim", given["cross_attention_dim"]),),
        projection="linear" if given["use_linear_projection"] else "conv",
        transformer_norm_eps=1e-6,
        norm_groups=given["norm_num_groups"],
        time_embedding="add",
        **told,
    )
    return config, _same(path, "sample_size", given["sample_size"]) or 64


def _check_exportable(
    where: str, config: UNetConfig | AutoencoderConfig, wanted: Settings, further: dict[str, bool]
) -> None:
    """Refuse (UserError) settings that are not as `wanted` or not well by `further`, and norms without groups."""
    holds = {key: getattr(config, key) == value for key, value in wanted.items()}
    holds |= {"norm_groups": config.norm_groups is not None, **further}
    if odd := [f"{key} {getattr(config, key)}" for key, well in holds.items() if not well]:
        raise UserError(
            f"{where}: {', '.join(odd)}: not the shape of Stable Diffusion, which --format diffusers writes; "
            "leave --format out"
        )


def public_unet(config: UNetConfig, sample_size: int) -> Settings:
    """The config.json of a UNet2DConditionModel; UserError for a network that it can't be."""
    wanted = {
        "time_embedding": "add",
        "transformer_norm_eps": 1e-6,
        "attention": "transformer",
        "resample": "conv",
        "feed_forward_factor": 4.0,
        "pooled_dim": None,
        "known_channels": False,
        "learn_variance": False,
        "temporal": None,
    }
    _check_exportable("image.network", config, wanted, {"context_dims": len(config.context_dims) == 1})
    widths = [config.model_channels * mult for mult in config.channel_mult]
    heads: Any = config.num_heads
    if config.num_heads is None:
        heads = [width // config.head_channels for width in widths]
    down = {here: name for name, here in _ATTENTION_BLOCKS.items()}
    return {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": heads,
        "block_out_channels": widths,
        "cross_attention_dim": config.context_dims[0],
        "down_block_types": [down[here] for here in config.attention_levels],
        "in_channels": config.channels,
        "layers_per_block": config.num_res_blocks,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_num_groups": config.norm_groups,
        "out_channels": config.channels,
        "sample_size": sample_size,
        "transformer_layers_per_block": config.num_transformer_layers,
        "up_block_types": [_UP_BLOCKS[here] for here in reversed(config.attention_levels)],
        "use_linear_projection": config.projection == "linear",
    }


def autoencoder_config(path: Path) -> tuple[AutoencoderConfig, float, float]:
    """From the config.json of an AutoencoderKL: the network, and mean and standard deviation of its latents."""
    given = _complete(path, "AutoencoderKL", _AUTOENCODER_DEFAULTS, _AUTOENCODER_FIXED)
    for key, name in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if odd := [one for one in given[key] if one != name]:
            raise UserError(f"{path}: {key} has {odd[0]}; only {name} can be read")
    config = AutoencoderConfig(
        layout="ldm",
        latent_channels=given["latent_channels"],
        patch=1,
        widths=tuple(given["block_out_channels"]),
        num_res_blocks=given["layers_per_block"],
        norm_groups=given["norm_num_groups"],
    )
    return config, given["shift_factor"] or 0.0, 1 / given["scaling_factor"]


def public_autoencoder(config: AutoencoderConfig, mean: float, std: float, sample_size: int) -> Settings:
    """The config.json of an AutoencoderKL; UserError for a network that it can't be."""
    wanted = {"layout": "ldm", "patch": 1, "attention": True, "quantizer": None}
    _check_exportable("autoencoder.network", config, wanted, {})
    levels = len(config.widths)
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "sample_size": sample_size,
        "scaling_factor": 1 / std,
        "shift_factor": mean or None,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def schedule_config(path: Path) -> tuple[NoiseSchedule, Prediction]:
    """From a scheduler_config.json: betas and what the network predicts. How it samples is not taken over."""
    given = read_json(path)
    for key in ("beta_schedule", "beta_start", "beta_end"):
        if key not in given:
            raise UserError(f"{path}: names no {key}: not a scheduler with betas; name a Stable Diffusion model")
    if given.get("trained_betas"):
        raise UserError(f"{path}: trained_betas are a table of their own, which no schedule of ours is")
    for key, known, value in (
        ("beta_schedule", _SCHEDULES, given["beta_schedule"]),
        ("prediction_type", _PREDICTIONS, given.get("prediction_type", "epsilon")),
    ):
        if value not in known:
            raise UserError(f"{path}: {key} is {json.dumps(value)}; only {', '.join(known)} can be read")
    kind = _SCHEDULES[given["beta_schedule"]]
    betas = {} if kind == "cosine" else {"beta_start": given["beta_start"], "beta_end": given["beta_end"]}
    schedule = NoiseSchedule(
        kind=kind,  # type: ignore[arg-type]
        num_steps=given.get("num_train_timesteps", 1000),
        zero_terminal_snr=given.get("rescale_betas_zero_snr", False),
        **betas,
    )
    return schedule, _PREDICTIONS[given.get("prediction_type", "epsilon")]


def public_schedule(schedule: NoiseSchedule, prediction: Prediction) -> Settings:
    """The scheduler_config.json of a DDIMScheduler; UserError for a schedule that it can't be."""
    if schedule.snr_shift != 1:
        raise UserError(
            f"image.schedule: snr_shift {schedule.snr_shift:g}, which no scheduler of Stable Diffusion has; leave "
            "--format out"
        )
    names = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": schedule.beta_end,
        "beta_schedule": names[schedule.kind],
        "beta_start": schedule.beta_start,
        "clip_sample": False,
        "num_train_timesteps": schedule.num_steps,
        "prediction_type": {ours: theirs for theirs, ours in _PREDICTIONS.items()}[prediction],
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "timestep_spacing": "trailing",
    }


def text_config(path: Path, padding: str) -> TextConfig:
    """From the config.json of transformers' CLIPTextModel; `padding` is the tokenizer's."""
    given = {**_TEXT_DEFAULTS, **read_json(path)}
    if given.get("model_type", "clip_text_model") not in ("clip_text_model", "clip"):
        raise UserError(f"{path}: model_type is {given['model_type']}; only CLIP's text model can be read")
    width = given["hidden_size"]
    for key, allowed in (
        ("intermediate_size", (4 * width,)),
        ("layer_norm_eps", (1e-5,)),
        ("hidden_act", ("quick_gelu", "gelu")),
    ):
        if given[key] not in allowed:
            raise UserError(f"{path}: {key} is {given[key]}; our text tower takes {' or '.join(map(str, allowed))}")
    return TextConfig(
        width=width,
        layers=given["num_hidden_layers"],
        heads=given["num_attention_heads"],
        context_length=given["max_position_embeddings"],
        embed_dim=width,
        quick_gelu=given["hidden_act"] == "quick_gelu",
        padding=padding,  # type: ignore[arg-type]
    )
