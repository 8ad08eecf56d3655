"""What the run's endless sequence draws from: data sets with weights, and buckets of samples that stack.

Everything is a function of the number in the sequence. A global batch is of one bucket, so that all its micro-batches
stack, however many ranks share it; within a bucket every number draws from one data set. Both are fixed sequences of
draws in exact proportion: after n draws none is off its share by more than one for each choice. Each data set's part of
a bucket has an `Order` of its own, so each of its samples comes once in each of its epochs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.data_config import Bucket
from data_pipeline.index import Shard
from data_pipeline.order import Order
from data_pipeline.samples import shapes_of
from videodiff.errors import UserError


class Draws:
    """An endless sequence of choices with the given weights; draw n is found without those before it."""

    def __init__(self, weights: Sequence[Fraction]) -> None:
        scale = math.lcm(*(weight.denominator for weight in weights))
        self._weights = [int(weight * scale) for weight in weights]

    def __getitem__(self, n: int) -> tuple[int, int]:
        """Which choice draw n is, and how many of the draws before it were that one too."""
        rest = sum(self._weights)
        for choice, weight in enumerate(self._weights[:-1]):
            # Of the draws that are left to this choice and those after it, each 1 in rest / weight is this one's.
            before = n * weight // rest
            if (n + 1) * weight // rest > before:
                return choice, before
            n -= before
            rest -= weight
        return len(self._weights) - 1, n


class _Part(NamedTuple):
    """The samples of one data set in one bucket: their own order, and each one's number among all samples."""

    order: Order
    ids: npt.NDArray[np.int64]


class Mixture:
    """Which sample each number of the run is. Samples count through the shards of all data sets in their given order.

    ``fps`` is the rate at which a bucket's frames are counted. With one data set and one bucket it is that `Order`.
    """

    def __init__(
        self,
        data_sets: Sequence[Sequence[Shard]],
        weights: Sequence[float],
        buckets: Sequence[Bucket],
        fps: float,
        batch_size: int,
        streams: int,
        seed: int,
    ) -> None:
        self.shards = [shard for shards in data_sets for shard in shards]
        self._ends = np.cumsum([len(shard.offsets) for shard in self.shards], dtype=np.int64)
        self.num_samples = int(self._ends[-1])
        self._batch_size = batch_size
        by_bucket: list[list[tuple[Fraction, _Part]]] = [[] for _ in buckets]
        first = 0
        for shards, weight in zip(data_sets, weights, strict=True):
            chosen = [_choose(shard, buckets, fps) for shard in shards]
            flat = np.concatenate(chosen)
            for number, parts in enumerate(by_bucket):
                ids = np.flatnonzero(flat == number) + first
                if len(ids):
                    sizes = [int((of_shard == number).sum()) for of_shard in chosen]
                    share = Fraction(weight).limit_denominator(10**6) * Fraction(len(ids), len(flat))
                    parts.append((share, _Part(Order(sizes, streams, seed), ids)))
            first += len(flat)
        # An empty bucket is never drawn.
        self.buckets = [bucket for bucket, parts in zip(buckets, by_bucket, strict=True) if parts]
        self._parts = [[part for _, part in parts] for parts in by_bucket if parts]
        shares = [[share for share, _ in parts] for parts in by_bucket if parts]
        self._of_bucket = [Draws(of_parts) for of_parts in shares]
        self._of_batch = Draws([sum(of_parts, Fraction()) for of_parts in shares])

    def sample(self, number: int) -> int:
        """The sample that number n of the run is."""
        bucket, n = self._locate(number)
        which, position = self._of_bucket[bucket][n]
        part = self._parts[bucket][which]
        return int(part.ids[part.order.sample(position)])

    def bucket(self, number: int) -> Bucket:
        """The bucket that number n of the run, and so its global batch, is from."""
        return self.buckets[self._locate(number)[0]]

    def place(self, sample: int) -> tuple[Shard, int]:
        """The shard of a sample, and its number there."""
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return self.shards[shard], sample - (int(self._ends[shard - 1]) if shard else 0)

    def _locate(self, number: int) -> tuple[int, int]:
        """The bucket of a number, and how many numbers before it were of that bucket."""
        batch, row = divmod(number, self._batch_size)
        bucket, before = self._of_batch[batch]
        return bucket, before * self._batch_size + row


def _choose(shard: Shard, buckets: Sequence[Bucket], fps: float) -> npt.NDArray[np.int64]:
    """The bucket of each sample of a shard: of those that are short enough the longest, of these the nearest aspect.
    A sample that is too short for all goes into the shortest, where its decoding finds it and counts it."""
    if len(buckets) == 1 or not shard.offsets:
        return np.zeros(len(shard.offsets), np.int64)
    shapes = shapes_of(shard)
    if not any(shapes):
        raise UserError(
            f"{shard.path}: neither the index nor the JSON of its samples tells their width, height, fps and frames, "
            "by which data.buckets are chosen; write them, or leave data.buckets out"
        )
    fits = [[bucket.takes(shape, fps) for bucket in buckets] for shape in shapes]
    return np.array([max(range(len(buckets)), key=fit.__getitem__) for fit in fits], np.int64)
