"""From shards to batches, in an order that depends on nothing but the seed (data_pipeline/order.py, mixture.py).

Ranks, micro-batches, helper processes and restarts change who decodes a sample, never which samples make a global
batch: rank r of W takes the numbers start + r, start + r + W, ... of the run's endless sequence. The whole state is one
number, that of the next sample. A number of the sequence is a sample in an epoch, so what is drawn for it (window,
crop, flip, caption) follows from (seed, sample, epoch).
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.augmentation import Augmentation
from data_pipeline.bad_samples import BadSamples
from data_pipeline.clips import Clip
from data_pipeline.data_config import Bucket, DataConfig
from data_pipeline.decoders import ClipError
from data_pipeline.decoding import DECODER, DecodePool
from data_pipeline.features import blank, check_encoding, check_finite, same_shapes, stack, unpack
from data_pipeline.index import fingerprint, open_shards
from data_pipeline.mixture import Mixture
from data_pipeline.prefetch import mapped, prefetched
from data_pipeline.samples import RawSample, SampleError, label_of, negatives_in, read_sample
from videodiff.batch import Encoded, VideoBatch
from videodiff.errors import UserError
from videodiff.seeding import uniform

__all__ = ["DataConfig", "ShardSource"]


@dataclass(frozen=True)
class _Slot:
    """One place in a batch: the number in the run, which sample it is, and unless cached or known to be bad its text,
    its features where it was encoded, or what is wrong with it."""

    number: int
    sample: int
    bucket: Bucket
    key: str = ""
    captions: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    label: str = ""
    encoded: Encoded | None = None
    error: ClipError | None = None


class ShardSource:
    """The samples of a data set as batches. Opening it checks that all shards are there and whole (UserError)."""

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        bad_samples: Path | None = None,
        decoder: str = DECODER,
        encoder: Callable[[], str] | None = None,
        more_texts: bool = True,
    ) -> None:
        """``bad_samples`` is the run's list of bad clips: appended to, and believed, so that a resumed run is the same.

        ``decoder`` names the function "module:name" that decodes, in place of ``data_pipeline.clips:decode_clip``.
        ``encoder`` tells the hash of the encoders whose features may stand in encoded shards; without it there may be
        none. ``more_texts``: whether batches have paraphrases and negatives.
        """
        self._config, self._seed, self._decoder = config, seed, decoder
        self._more_texts = more_texts
        named = config.data_sets()
        opened = [open_shards(data_set.shards) for data_set in named]
        self._encoding = check_encoding([shard for shards in opened for shard in shards], config, encoder)
        buckets = config.buckets or (Bucket(frames=config.frames, height=config.size, width=config.size),)
        weights = [data_set.weight for data_set in named]
        self._mixture = Mixture(opened, weights, buckets, config.fps, config.batch_size, config.streams, seed)
        self.num_samples = self._mixture.num_samples
        prints = [fingerprint(shards) for shards in opened]
        self.fingerprint = prints[0] if len(prints) == 1 else hashlib.sha256("".join(prints).encode()).hexdigest()[:32]
        self._bad = BadSamples(bad_samples, config.bad_limit, config.bad_floor)
        self._cache: dict[int, tuple[Clip, _Slot]] = {}  # by sample: whole clip, and its text
        self._cache_left = int(config.cache_gib * 2**30) if config.crop == "centre" else 0

    @property
    def bad_counts(self) -> dict[str, int]:
        """How many clips were bad, by reason, those of the run's former parts included."""
        return dict(self._bad.counts)

    def batches(self, start_sample: int, rank: int, world: int, micro_batch: int) -> Iterator[VideoBatch]:
        """Endless micro-batches of this rank, from the run's sample ``start_sample`` on. Closing it ends the helpers.

        Raises UserError where the global batch cannot be cut into equal micro-batches for all ranks. Warns of ranks
        that the streams do not divide by: the reading gets slower, nothing else changes.
        """
        size = self._config.batch_size
        if size % (world * micro_batch):
            raise UserError(
                f"data.batch_size={size} is not a multiple of {world} ranks x micro-batch "
                f"{micro_batch}; change the batch size, the micro-batch or the number of ranks"
            )
        if start_sample % (world * micro_batch) and len(self._mixture.buckets) > 1:
            raise ValueError(f"with buckets, micro-batches of {micro_batch} cannot start at sample {start_sample}")
        if self._config.streams % world and rank == 0:
            streams = self._config.streams
            warnings.warn(
                f"data.streams={streams} is not a multiple of {world} ranks: the samples are the same, but every rank "
                f"reads in all shards; a new run with data.streams={streams - streams % world + world} reads in few",
                stacklevel=1,
            )
        return self._prefetched(start_sample + rank, world, micro_batch)

    def samples(self, start: int, count: int) -> list[int]:
        """Which samples of the data set (counted through its shards) the run's numbers start, start + 1, ... are."""
        return [self._mixture.sample(number) for number in range(start, start + count)]

    def _prefetched(self, first: int, step: int, micro_batch: int) -> Iterator[VideoBatch]:
        workers = 0 if self._encoding else self._config.workers  # what is encoded needs no decoding
        with DecodePool(workers, self._config.deadline_seconds, self._decoder) as pool:
            yield from prefetched(self._batches(pool, first, step, micro_batch), self._config.prefetch, pool.close)

    def _batches(self, pool: DecodePool, first: int, step: int, micro_batch: int) -> Iterator[VideoBatch]:
        slots: list[_Slot] = []  # handed to the pool and not yet in a batch
        results = pool.map(self._jobs(first, step, slots))
        while True:
            clips = [next(results) for _ in range(micro_batch)]
            now = slots[:micro_batch]
            del slots[:micro_batch]
            yield self._batch(now, clips)

    def _jobs(self, number: int, step: int, slots: list[_Slot]) -> Iterator[dict[str, Any] | None]:
        """For each of the rank's samples what its decoding needs; None where nothing is to be decoded."""
        numbers = itertools.count(number, step)
        # Threads do for what is encoded what decoding helpers do for videos: most of it is copied outside of Python.
        threads = self._config.workers if self._encoding else 0
        for slot, raw in mapped(self._read, numbers, threads):
            slots.append(slot)
            yield None if raw is None else self._job(slot, raw)

    def _read(self, number: int) -> tuple[_Slot, RawSample | None]:
        """A number's slot with its text and, where there is something to decode, the sample."""
        slot = _Slot(number, self._mixture.sample(number), self._mixture.bucket(number))
        if number in self._bad.recorded or slot.sample in self._cache:
            return slot, None
        shard, place = self._mixture.place(slot.sample)
        try:
            raw = read_sample(shard, place)
            label = label_of(shard, raw.key, raw.meta, self._config.label) if self._config.label else ""
            negatives = negatives_in(raw.meta, raw.captions)
            slot = replace(slot, key=raw.key, captions=raw.captions, negatives=negatives, label=label)
            if self._encoding is None:
                return slot, raw
            return replace(slot, encoded=self._encoded(raw, slot.number)), None
        except SampleError as error:
            return replace(slot, key=error.key, error=ClipError(error.reason, str(error))), None
        except ClipError as error:
            return replace(slot, error=error), None

    def _job(self, slot: _Slot, raw: RawSample) -> dict[str, Any]:
        config, bucket = self._config, slot.bucket
        augmentation = Augmentation.draw(config, self._seed, slot.number)
        return {
            "video": raw.video,
            "suffix": raw.suffix,
            "fps": config.fps,
            "frames": bucket.frames,
            "size": (bucket.height, bucket.width),
            "position": augmentation.position,
            "crop": augmentation.crop,
            # A clip may take 1/64 of the cache: few long ones would fill it.
            "whole_bytes": min(self._cache_left, int(config.cache_gib * 2**24)),
        }

    def _batch(self, slots: list[_Slot], clips: list[Clip | ClipError | None]) -> VideoBatch:
        bucket = slots[0].bucket
        shape = (0, 0) if self._encoding else (bucket.height, bucket.width)
        frames = np.empty((len(slots), bucket.frames, *shape, 3), np.uint8)
        keys, captions, paraphrases, negatives, labels, weight = [], [], [], [], [], []
        encoded = []
        for row, (slot, clip) in enumerate(zip(slots, clips, strict=True)):
            told = slot
            if clip is None and slot.error is None and slot.encoded is None and slot.number not in self._bad.recorded:
                clip, told = self._cache[slot.sample]
            good = isinstance(clip, Clip) or slot.encoded is not None
            if good:
                self._bad.good()
                if isinstance(clip, Clip):
                    frames[row] = Augmentation.draw(self._config, self._seed, slot.number).cut(clip, bucket.frames)
                    self._keep(clip, told)
                first = self._first(len(told.captions), slot.number)
                caption = told.captions[first]
                paraphrase = told.captions[self._other(len(told.captions), first, slot.number)]
                negative = self._negative(told.negatives, slot.number)
                key, label = told.key, told.label
            else:
                assert not isinstance(clip, Clip)
                shard = self._mixture.place(slot.sample)[0].path
                key, caption, paraphrase = self._bad.take(slot.number, slot.key, shard, clip or slot.error), "", ""
                negative = label = ""
                frames[row] = 0
            keys.append(key)
            labels.append(label)
            captions.append(caption)
            paraphrases.append(paraphrase)
            negatives.append(negative)
            weight.append(float(good))
            if self._encoding:
                encoded.append(slot.encoded or self._blank)
        return VideoBatch(
            frames=torch.from_numpy(frames),
            captions=tuple(captions),
            fps=torch.full((len(slots),), self._config.fps),
            numbers=torch.tensor([slot.number for slot in slots], dtype=torch.int64),
            keys=tuple(keys),
            weight=torch.tensor(weight),
            paraphrases=tuple(paraphrases) if self._more_texts else (),
            negatives=tuple(negatives) if self._more_texts else (),
            labels=tuple(labels) if self._config.label else (),
            encoded=stack(encoded) if encoded else None,
        )

    def _encoded(self, raw: RawSample, number: int) -> Encoded:
        """One of the sample's variants, with the caption of the number. Raises ClipError."""
        assert self._encoding is not None
        features = unpack(raw.video, self._encoding.variants, len(raw.captions))
        variants = self._encoding.variants
        variant = int(uniform(self._seed, "variant", number) * variants) if variants > 1 else 0
        chosen = features.choose(variant, self._first(len(raw.captions), number))
        check_finite(chosen)
        if not same_shapes(chosen, self._blank):
            raise ClipError("features", "other shapes than those of the first sample")
        return chosen

    @cached_property
    def _blank(self) -> Encoded:
        """What the slot of a bad sample holds among encoded ones: as the first good sample says."""
        assert self._encoding is not None
        good = next((found for found in map(self._first_variant, range(self.num_samples)) if found), None)
        if good is None:
            raise UserError("data.shards: none of the encoded samples can be read; encode the videos again")
        return blank(good)

    def _first_variant(self, sample: int) -> Encoded | None:
        assert self._encoding is not None
        try:
            raw = read_sample(*self._mixture.place(sample))
            return unpack(raw.video, self._encoding.variants, len(raw.captions)).choose(0, 0)
        except (SampleError, ClipError):  # it is counted when its turn comes
            return None

    def _first(self, choices: int, number: int) -> int:
        """Which of a sample's captions it has."""
        return int(uniform(self._seed, "caption", number) * choices)

    def _other(self, choices: int, first: int, number: int) -> int:
        """Another one of its captions, the same again where it has only one."""
        if not self._more_texts or choices == 1:
            return first
        others = [index for index in range(choices) if index != first]
        return others[int(uniform(self._seed, "paraphrase", number) * len(others))]

    def _negative(self, negatives: Sequence[str], number: int) -> str:
        """One of the captions that are wrong about a sample, "" where it has none."""
        return negatives[int(uniform(self._seed, "negative", number) * len(negatives))] if negatives else ""

    def _keep(self, clip: Clip, told: _Slot) -> None:
        whole = len(clip.frames) == clip.total
        if whole and told.sample not in self._cache and clip.frames.nbytes <= self._cache_left:
            self._cache[told.sample] = clip, told
            self._cache_left -= clip.frames.nbytes
