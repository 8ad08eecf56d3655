"""Which clips are kept: named limits on what is known of a clip, and near-duplicates. Nothing here decodes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from videodiff.config import Config

_HASH_BITS, _WORDS = 192, 3
_ONES = np.array([number.bit_count() for number in range(256)])
_PIECE = 2**18  # pairs compared at a time


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

    What differs in at most ``bits`` bits from one that is kept is dropped, and nothing else is compared with it.
    """
    keys, texts = zip(*hashes, strict=True) if (hashes := list(hashes)) else ((), ())
    words = np.frombuffer(bytes.fromhex("".join(texts)), ">u8").astype(np.uint64).reshape(-1, _WORDS)
    # Equal hashes have one fate: the later ones repeat whatever the first one is or repeats.
    _, first, inverse = np.unique(words, axis=0, return_index=True, return_inverse=True)
    groups = inverse.reshape(-1)
    order = np.sort(first)
    twins: dict[int, int] = {}
    for i, j in _near(words[order], bits):  # ascending by j, then i
        if i not in twins and j not in twins:
            twins[j] = i
    place = {int(number): rank for rank, number in enumerate(order)}
    found = {}
    for number, key in enumerate(keys):
        leader = int(first[groups[number]])
        twin = int(order[twins[place[leader]]]) if place[leader] in twins else leader
        if twin != number:
            found[key] = keys[twin]
    return found


def _near(words: npt.NDArray[np.uint64], bits: int) -> list[tuple[int, int]]:
    """All pairs i < j of hashes [N, words] that differ in at most ``bits`` bits, ascending by j, then i.

    Of bits + 2 bands such a pair agrees wholly in two at least: what agrees in no two is never compared.
    """
    count = max(bits + 2, 6)  # two of six are a word together
    edges = [round(band * _HASH_BITS / count) for band in range(count + 1)]
    bands = [_band(words, low, high) for low, high in itertools.pairwise(edges)]
    pairs = []
    for one, other in itertools.combinations(bands, 2):
        both = one | other << np.uint64(32)
        order = np.argsort(both, kind="stable")
        both = both[order]
        apart = 1
        while len(both) > apart and len(places := np.flatnonzero(both[apart:] == both[:-apart])):
            for piece in np.array_split(places, 1 + len(places) // _PIECE):
                i, j = order[piece], order[piece + apart]  # the sort is stable: i < j
                close = _bit_count(words[i] ^ words[j]) <= bits
                pairs.append(np.stack([j[close], i[close]], axis=1))
            apart += 1
    both_ways = np.unique(np.concatenate(pairs), axis=0) if pairs else np.empty((0, 2), int)
    return [(i, j) for j, i in both_ways.tolist()]


def _band(words: npt.NDArray[np.uint64], low: int, high: int) -> npt.NDArray[np.uint64]:
    """Bits low to high of numbers, of which ``words`` [N, words] has the highest first."""
    word, shift = low // 64, low % 64
    value = words[:, -1 - word] >> np.uint64(shift)
    if shift and word + 1 < _WORDS:
        value = value | words[:, -2 - word] << np.uint64(64 - shift)
    return value & np.uint64((1 << high - low) - 1)


def _bit_count(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Set bits of each row [N, words]."""
    return _ONES[np.ascontiguousarray(words).view(np.uint8)].sum(axis=1)
