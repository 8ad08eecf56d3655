"""The order of samples: a function of (shard sizes, number of streams, seed), and of nothing else.

A run meets an endless sequence of samples: number n is position n % N of epoch n // N, and every epoch holds each of
the N samples once, so an epoch's tail shares a batch with the next epoch's head. For an epoch the shards are permuted,
their samples cut into equal ranges, the virtual streams, and each stream permuted; positions are dealt from the streams
in turn. A rank that takes every W-th number therefore reads, within an epoch, only its own streams (and few shards)
where W divides their number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from videodiff.seeding import generator


class Order:
    """Which sample of the data set each number of the run is. Samples count through the shards in their given order."""

    def __init__(self, sizes: Sequence[int], streams: int, seed: int) -> None:
        self._ends = np.cumsum(np.asarray(sizes, np.int64))
        self._streams, self._seed = streams, seed
        # Of one epoch at a time: its number, the range of each stream, and the streams permuted so far. Replaced as a
        # whole, so that threads in different epochs never mix theirs.
        self._made: tuple[int, list[npt.NDArray[np.int64]], dict[int, npt.NDArray[np.int64]]] | None = None
        self.num_samples = int(self._ends[-1])

    def sample(self, number: int) -> int:
        """The sample that number n of the run is."""
        epoch, position = divmod(number, self.num_samples)
        # array_split gives the first N % S streams one sample more: just those that the last, shorter round deals from.
        return int(self._stream(epoch, position % self._streams)[position // self._streams])

    def place(self, sample: int) -> tuple[int, int]:
        """Its shard, and its number in the shard."""
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return shard, sample - (int(self._ends[shard - 1]) if shard else 0)

    def _stream(self, epoch: int, stream: int) -> npt.NDArray[np.int64]:
        made = self._made
        if made is None or made[0] != epoch:
            self._made = made = epoch, self._ranges(epoch), {}
        _, ranges, streams = made
        if stream not in streams:
            samples = ranges[stream]
            permutation = torch.randperm(len(samples), generator=generator(self._seed, "stream", epoch, stream))
            streams[stream] = samples[permutation.numpy()]
        return streams[stream]

    def _ranges(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        starts = np.concatenate([[0], self._ends])
        shards = torch.randperm(len(self._ends), generator=generator(self._seed, "shards", epoch)).tolist()
        samples = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])
        return np.array_split(samples, self._streams)
