"""Which clips are kept: named limits on what is known of a clip, and near-duplicates. Nothing here decodes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field, model_validator

from videodiff.config import Config

_HASH_BITS = 192


class Limits(Config):
    """Rejects what is below ``min`` or above ``max``."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Limits:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}: nothing would be kept")
        return self


class Filters(Config):
    """The limits, by the name of what they limit; see `measures.measure` for units. A filter that is left out is off.

    The first that rejects a clip, in this order, is its reason: "<name> low" or "<name> high".
    """

    source_fps: Limits | None = None  # frames a second of the source, in the clip
    source_side: Limits | None = None  # pixels of the source's shorter side
    source_seconds: Limits | None = None  # of the whole source, or of its span
    aspect: Limits | None = None  # width / height of the source
    words: Limits | None = None  # of the longest caption
    motion: Limits | None = None
    motion_window: Limits | None = None  # Emu Video's filter
    sharpness: Limits | None = None
    brightness: Limits | None = None
    static: Limits | None = None
    black: Limits | None = None
    letterbox: Limits | None = None
    clip_similarity: Limits | None = None  # of the first frame and the caption; needs `scores`
    aesthetic: Limits | None = None  # of the first frame; needs `scores.aesthetic`
    duplicate_bits: int | None = Field(12, ge=0, lt=_HASH_BITS)  # hashes that differ in no more are of one clip


def verdict(filters: Filters, known: Mapping[str, Any]) -> str:
    """Why a clip is rejected, or "". What is not known of a clip (the motion of one frame) rejects none."""
    for name in type(filters).model_fields:
        limits, value = getattr(filters, name), known.get(name)
        if not isinstance(limits, Limits) or value is None:
            continue
        if limits.min is not None and value < limits.min:
            return f"{name} low"
        if limits.max is not None and value > limits.max:
            return f"{name} high"
    return ""


def duplicates(hashes: Iterable[tuple[str, str]], bits: int) -> dict[str, str]:
    """Key -> the earlier key that it repeats, for (key, hash in hexadecimal) in the order of preference.

    Two hashes that differ in at most ``bits`` bits agree wholly in one of bits + 1 bands, so only those that share a
    band are compared; and what is dropped is compared with no later one.
    """
    count = bits + 1
    edges = [round(band * _HASH_BITS / count) for band in range(count + 1)]
    bands: list[dict[int, list[int]]] = [{} for _ in range(count)]
    kept: list[tuple[str, int]] = []
    found: dict[str, str] = {}
    for key, text in hashes:
        value = int(text, 16)
        parts = [value >> low & (1 << high - low) - 1 for low, high in itertools.pairwise(edges)]
        near = {index for band, part in zip(bands, parts, strict=True) for index in band.get(part, ())}
        twin = next((index for index in sorted(near) if (kept[index][1] ^ value).bit_count() <= bits), None)
        if twin is not None:
            found[key] = kept[twin][0]
            continue
        for band, part in zip(bands, parts, strict=True):
            band.setdefault(part, []).append(len(kept))
        kept.append((key, value))
    return found
