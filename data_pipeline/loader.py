"""From shards to batches, in an order that depends on nothing but the seed (data_pipeline/order.py).

Ranks, micro-batches, helper processes and restarts change who decodes a sample, never which samples make a global
batch: rank r of W takes the numbers start + r, start + r + W, ... of the run's endless sequence. The whole state is one
number, that of the next sample.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import Field

from data_pipeline.clips import Clip, ClipError
from data_pipeline.decoding import DECODER, DecodePool
from data_pipeline.order import Order
from data_pipeline.shards import fingerprint, label_of, open_shards, read_sample
from videodiff.batch import VideoBatch
from videodiff.config import Config, operational
from videodiff.errors import UserError
from videodiff.seeding import uniforms

Item = TypeVar("Item")


class DataConfig(Config):
    """Which clips a stage sees, and in what batches."""

    shards: str  # a folder of shards, an index.json, a tar, or a {000..012} or * pattern
    batch_size: int = Field(ge=1)  # of the whole run: over all ranks and accumulated micro-batches
    frames: int = Field(ge=1)  # 1 for images: a random frame of each clip
    fps: float = Field(gt=0)  # of the clip as the network sees it
    size: int = Field(ge=8)  # pixels, square
    label: str | None = None  # a field of each sample's JSON that goes with it, e.g. scene.shape
    streams: int = Field(64, ge=1)  # best a multiple of every number of ranks
    workers: int = operational(2, ge=0)  # helpers of each rank; 0 decodes in the training process, without a deadline
    deadline_seconds: float = operational(30.0, gt=0)  # for one clip
    cache_gib: float = operational(2.0, ge=0)  # decoded clips kept in the memory of each rank
    prefetch: int = operational(2, ge=0)  # micro-batches made ahead
    bad_limit: float = operational(0.01, ge=0, le=1)  # the run stops beyond this share of bad clips ...
    bad_floor: int = operational(10, ge=0)  # ... once there are more than this many


class _Slot(NamedTuple):
    """One place in a batch: the number in the run, which sample it is,
    and its text unless cached or known to be bad.
    """

    number: int
    sample: int
    key: str = ""
    captions: tuple[str, ...] = ()
    label: str = ""


class ShardSource:
    """The samples of a data set as batches. Opening it checks that all shards are there and whole (UserError)."""

    def __init__(self, config: DataConfig, seed: int, bad_samples: Path | None = None, decoder: str = DECODER) -> None:
        """``bad_samples`` is the run's list of bad clips: appended to, and believed, so that a resumed run is the same.

        ``decoder`` names the function "module:name" that decodes, in place of ``data_pipeline.clips:decode_clip``.
        """
        self._config, self._seed, self._decoder = config, seed, decoder
        self._shards = open_shards(config.shards)
        self._order = Order([len(shard.offsets) for shard in self._shards], config.streams, seed)
        self.num_samples = self._order.num_samples
        self.fingerprint = fingerprint(self._shards)
        self._bad = _BadSamples(bad_samples, config)
        self._cache: dict[int, tuple[Clip, _Slot]] = {}  # by sample: whole clip, and its text
        self._cache_left = int(config.cache_gib * 2**30)

    @property
    def bad_counts(self) -> dict[str, int]:
        """How many clips were bad, by reason, those of the run's former parts included."""
        return dict(self._bad.counts)

    def batches(self, start_sample: int, rank: int, world: int, micro_batch: int) -> Iterator[VideoBatch]:
        """Endless micro-batches of this rank, from the run's sample ``start_sample`` on. Closing it ends the helpers.

        Raises UserError where the global batch cannot be cut into equal micro-batches for all ranks.
        """
        if self._config.batch_size % (world * micro_batch):
            raise UserError(
                f"data.batch_size={self._config.batch_size} is not a multiple of {world} ranks x micro-batch "
                f"{micro_batch}; change the batch size, the micro-batch or the number of ranks"
            )
        return self._prefetched(start_sample + rank, world, micro_batch)

    def samples(self, start: int, count: int) -> list[int]:
        """Which samples of the data set (counted through its shards) the run's numbers start, start + 1, ... are."""
        return [self._order.sample(number) for number in range(start, start + count)]

    def _prefetched(self, first: int, step: int, micro_batch: int) -> Iterator[VideoBatch]:
        with DecodePool(self._config.workers, self._config.deadline_seconds, self._decoder) as pool:
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
        config = self._config
        while True:
            sample = self._order.sample(number)
            if number in self._bad.recorded or sample in self._cache:
                slots.append(_Slot(number, sample))
                yield None
            else:
                shard, place = self._order.place(sample)
                raw = read_sample(self._shards[shard], place)
                label = label_of(self._shards[shard], raw.key, raw.meta, config.label) if config.label else ""
                slots.append(_Slot(number, sample, raw.key, raw.captions, label))
                yield {
                    "video": raw.video,
                    "fps": config.fps,
                    "frames": config.frames,
                    "size": config.size,
                    "position": self._position(number),
                    # A clip may take 1/64 of the cache: few long ones would fill it.
                    "whole_bytes": min(self._cache_left, int(config.cache_gib * 2**24)),
                }
            number += step

    def _batch(self, slots: list[_Slot], clips: list[Clip | ClipError | None]) -> VideoBatch:
        config = self._config
        frames = np.zeros((len(slots), config.frames, config.size, config.size, 3), np.uint8)
        keys, captions, paraphrases, labels, weight = [], [], [], [], []
        for row, (slot, clip) in enumerate(zip(slots, clips, strict=True)):
            told = slot
            if clip is None and slot.number not in self._bad.recorded:
                clip, told = self._cache[slot.sample]
            if isinstance(clip, Clip):
                self._bad.seen += 1
                frames[row] = clip.window(config.frames, self._position(slot.number))
                self._keep(clip, told)
                caption, paraphrase = self._two(told.captions, slot.number)
                key, label = told.key, told.label
            else:
                shard = self._shards[self._order.place(slot.sample)[0]].path
                key, caption, paraphrase = self._bad.take(slot.number, slot.key, shard, clip), "", ""
                label = ""
            keys.append(key)
            labels.append(label)
            captions.append(caption)
            paraphrases.append(paraphrase)
            weight.append(float(isinstance(clip, Clip)))
        return VideoBatch(
            frames=torch.from_numpy(frames),
            captions=tuple(captions),
            fps=torch.full((len(slots),), config.fps),
            numbers=torch.tensor([slot.number for slot in slots], dtype=torch.int64),
            keys=tuple(keys),
            weight=torch.tensor(weight),
            paraphrases=tuple(paraphrases),
            labels=tuple(labels) if config.label else (),
        )

    def _two(self, choices: tuple[str, ...], number: int) -> tuple[str, str]:
        """A sample's caption and another one of its captions, the same again where it has only one."""
        first = int(float(uniforms(self._seed, "caption", [number])[0]) * len(choices))
        others = choices[:first] + choices[first + 1 :] or choices
        return choices[first], others[int(float(uniforms(self._seed, "paraphrase", [number])[0]) * len(others))]

    def _keep(self, clip: Clip, told: _Slot) -> None:
        whole = len(clip.frames) == clip.total
        if whole and told.sample not in self._cache and clip.frames.nbytes <= self._cache_left:
            self._cache[told.sample] = clip, told
            self._cache_left -= clip.frames.nbytes

    def _position(self, number: int) -> float:
        return float(uniforms(self._seed, "window", [number])[0])


class _BadSamples:
    """Counts bad clips by reason, lists them in a file, and stops the run when they become too many."""

    def __init__(self, path: Path | None, config: DataConfig) -> None:
        self._path, self._limit, self._floor = path, config.bad_limit, config.bad_floor
        self.seen = self._bad = 0  # by this rank since it started
        self.counts: Counter[str] = Counter()
        self.recorded: dict[int, str] = {}  # number in the run -> key
        for line in path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else ():
            try:
                entry = json.loads(line)
                number, key, reason = int(entry["number"]), str(entry["key"]), str(entry["reason"])
            except (ValueError, KeyError, TypeError):
                continue  # a line cut by a kill: its clip is judged again
            self.recorded[number] = key
            self.counts[reason] += 1

    def take(self, number: int, key: str, shard: Path, error: ClipError | None) -> str:
        """Count a bad clip, list it unless it is listed (error None), return its key. UserError beyond the limit."""
        self.seen += 1
        self._bad += 1
        if error is None:
            key = self.recorded[number]
        else:
            self.recorded[number] = key
            self.counts[error.reason] += 1
            entry = {"number": number, "key": key, "shard": str(shard), "reason": error.reason, "detail": error.detail}
            self._write(json.dumps(entry, ensure_ascii=False) + "\n")
        if self._bad > max(self._floor, self._limit * self.seen):
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
            where = f", listed in {self._path}" if self._path else ""
            raise UserError(
                f"{self._bad} of {self.seen} clips are bad ({reasons}{where}), "
                f"more than data.bad_limit={self._limit:g}; the last is {key} in {shard}; mend them or raise the limit"
            )
        return key

    def _write(self, line: str) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # One write in append mode, so that the lines of several ranks do not mix.
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, line.encode())
            finally:
                os.close(file)
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written ({error.strerror}); check rights and disk space"
            ) from None


def prefetched(items: Iterator[Item], depth: int, close: Callable[[], None]) -> Iterator[Item]:
    """The same items, up to ``depth`` of them made ahead in a thread, whose errors are raised here, in their place.

    ``close`` must make the thread's work end soon: it is called before waiting for it.
    """
    if depth == 0:
        yield from items
        return
    made: queue.Queue[tuple[Item] | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()

    def put(what: tuple[Item] | BaseException | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                made.put(what, timeout=0.1)
                return

    def make() -> None:
        try:
            for item in items:
                put((item,))
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # whatever it is, the consumer has to see it
            put(error)

    thread = threading.Thread(target=make, name="videodiff-data", daemon=True)
    thread.start()
    try:
        while (what := made.get()) is not None:
            if isinstance(what, BaseException):
                raise what
            yield what[0]
    finally:
        stop.set()
        close()
        thread.join()
