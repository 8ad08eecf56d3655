"""Encoded samples: what frozen encoders made of a clip and its captions, in one safetensors member of a shard.

``mean`` and ``std`` are the posteriors of K variants of the clip, float16 [K,C,T,H,W]; ``text.0`` and ``mask.0``, and
so on for each tower, the features of its N captions, float16 [N,L,D] and bool [N,L]; ``pooled`` float16 [N,E] where
the text is pooled. safetensors holds numbers only: nothing is unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from data_pipeline.data_config import DataConfig
from data_pipeline.decoders import ClipError
from data_pipeline.index import Encoding, Shard
from videodiff.batch import Encoded
from videodiff.errors import UserError


@dataclass(frozen=True)
class Features:
    """What one sample holds. Leading sizes: K variants of mean and std, N captions of everything else."""

    mean: Tensor
    std: Tensor
    text: tuple[Tensor, ...]
    text_mask: tuple[Tensor, ...]
    pooled: Tensor | None

    def choose(self, variant: int, caption: int) -> Encoded:
        """One variant with one caption, with a batch of one."""
        v, c = slice(variant, variant + 1), slice(caption, caption + 1)
        text, mask = (tuple(values[c] for values in towers) for towers in (self.text, self.text_mask))
        return Encoded(self.mean[v], self.std[v], text, mask, None if self.pooled is None else self.pooled[c])


def pack(features: Features) -> bytes:
    """The bytes of the member; numbers are rounded to half precision. Raises ClipError "features" where one is not
    finite then."""
    tensors = {"mean": features.mean.half(), "std": features.std.half()}
    for number, (tokens, mask) in enumerate(zip(features.text, features.text_mask, strict=True)):
        tensors |= {f"text.{number}": tokens.half(), f"mask.{number}": mask.bool()}
    if features.pooled is not None:
        tensors["pooled"] = features.pooled.half()
    if not all(bool(value.isfinite().all()) for value in tensors.values()):
        raise ClipError("features", "not finite in half precision")
    return save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def unpack(data: bytes, variants: int, captions: int) -> Features:
    """The inverse of `pack`. Raises ClipError "features" where they are not those of so many variants and captions."""
    try:
        tensors = load(data)
        towers = range(sum(name.startswith("text.") for name in tensors))
        text, mask = (tuple(tensors[f"{part}.{number}"] for number in towers) for part in ("text", "mask"))
        found = Features(tensors["mean"], tensors["std"], text, mask, tensors.get("pooled"))
    except (SafetensorError, KeyError, ValueError) as error:
        raise ClipError("features", f"not what encode writes ({error})") from None
    told = [*found.text, *found.text_mask, *([] if found.pooled is None else [found.pooled])]
    if (
        found.mean.shape != found.std.shape
        or found.mean.ndim != 5
        or len(found.mean) != variants
        or not towers
        or any(len(values) != captions for values in told)
    ):
        raise ClipError("features", f"not those of {variants} variants and {captions} captions")
    return found


def check_finite(sample: Encoded) -> None:
    """Raises ClipError "features" where a number is not one: nan would spread from it over the whole step."""
    # A sum is nan or infinite where one of its parts is, and takes a thirtieth of the time of looking at each; but that
    # of finite halves may be too large for one.
    pooled = [] if sample.pooled is None else [sample.pooled]
    for values in (sample.mean, sample.std, *sample.text, *pooled):
        if not math.isfinite(values.sum().item()) and not bool(values.isfinite().all()):
            raise ClipError("features", "not finite")


def stack(samples: Sequence[Encoded]) -> Encoded:
    """One batch of several; they have equal shapes."""
    towers = range(len(samples[0].text))
    pooled = [sample.pooled for sample in samples if sample.pooled is not None]
    return Encoded(
        mean=torch.cat([sample.mean for sample in samples]),
        std=torch.cat([sample.std for sample in samples]),
        text=tuple(torch.cat([sample.text[number] for sample in samples]) for number in towers),
        text_mask=tuple(torch.cat([sample.text_mask[number] for sample in samples]) for number in towers),
        pooled=torch.cat(pooled) if pooled else None,
    )


def blank(like: Encoded) -> Encoded:
    """What a bad sample's slot holds: zeros, and masks that keep the first token (attention needs one)."""
    masks = tuple((torch.arange(mask.shape[1]) == 0).expand_as(mask) for mask in like.text_mask)
    text = tuple(torch.zeros_like(tokens) for tokens in like.text)
    pooled = None if like.pooled is None else torch.zeros_like(like.pooled)
    return Encoded(torch.zeros_like(like.mean), torch.zeros_like(like.std), text, masks, pooled)


def same_shapes(one: Encoded, other: Encoded) -> bool:
    """Whether both stack."""

    def shapes(sample: Encoded) -> list[torch.Size]:
        parts = [sample.mean, sample.std, *sample.text, *sample.text_mask]
        return [part.shape for part in (*parts, *([] if sample.pooled is None else [sample.pooled]))]

    return shapes(one) == shapes(other)


def check_encoding(shards: list[Shard], config: DataConfig, encoder: Callable[[], str] | None) -> Encoding | None:
    """How the shards were encoded, None for those of videos; UserError where it is not as the run needs it.

    ``encoder`` tells the hash of the run's own encoders, None where a run needs pictures.
    """
    encodings = {shard.encoding for shard in shards}
    if len(encodings) > 1:
        raise UserError(
            "data.shards: encoded shards of one model, shape and number of variants stack with their like only; "
            "encode all of them alike, or none"
        )
    encoding = next(iter(encodings))
    if encoding is None:
        return None
    where = shards[0].path.parent
    if encoder is None:
        raise UserError(f"{where}: encoded shards hold no pictures, which this stage learns from; name those of videos")
    if (config.crop, config.flip, config.buckets, config.label) != ("centre", False, (), None):
        raise UserError(f"{where}: encoded shards have fixed shapes: leave out data.crop, flip, buckets and label")
    for name in ("frames", "fps", "size"):
        if (given := getattr(config, name)) != (made := getattr(encoding, name)):
            raise UserError(f"{where}: encoded with {name} {made:g}, data.{name} is {given:g}; encode the videos again")
    if encoder() != encoding.encoder:
        raise UserError(
            f"{where}: encoded by another model's autoencoder or text tower; name that one, or encode the videos again"
        )
    return encoding
