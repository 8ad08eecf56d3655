"""Videos and captions become latents and text features once, so that training decodes nothing: `videodiff data encode`.

Window, crop and flip of a sample are fixed then, for each of K variants by itself; the posterior's mean and deviation
are kept, so that every training step still draws its own latents.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from data_pipeline.augmentation import Augmentation
from data_pipeline.bad_samples import BadSamples
from data_pipeline.clips import Clip
from data_pipeline.data_config import DataConfig
from data_pipeline.decoders import ClipError
from data_pipeline.decoding import DecodePool
from data_pipeline.features import Features, pack
from data_pipeline.index import INDEX, PLAN, Shard, fingerprint, open_shards
from data_pipeline.progress import bar
from data_pipeline.samples import FEATURES, RawSample, SampleError, try_sample
from data_pipeline.shards import started, write_index, write_shard
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.training.distributed import device

BAD_SAMPLES = "bad_samples.jsonl"
_Encoded = tuple[str, bytes, dict[str, Any]]  # key, bytes of safetensors, JSON


def encoder_digest(model: Model) -> str:
    """A hash of what makes a model's latents and text features: the autoencoder without its decoder, the text towers.

    Weights are compared in half precision, in which they may be stored, and by value, not by file. The same weights
    give other features under another configuration, which the hash has too, but for where files lie.
    """
    digest = hashlib.sha256()
    autoencoder, text = model.part("autoencoder"), model.part("text")
    places = {"vocabulary": True, "words": True, "pretrained": {"path"}}
    told = [
        autoencoder.network.model_dump(mode="json"),
        text.network.model_dump(mode="json", exclude=places),
        [file.sha256 if file else None for file in (text.vocabulary, text.words)],
        [tower.model_dump(mode="json", exclude={"weights"}) for tower in text.further],
    ]
    digest.update(json.dumps(told, sort_keys=True).encode())
    for network in (model.autoencoder, model.text):
        for name, value in sorted(network.state_dict().items()):
            if not name.startswith("decoder."):
                value = value.half() if value.is_floating_point() else value
                digest.update(f"{name} {tuple(value.shape)}".encode())
                digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def encode(
    config: DataConfig, model: Model, out: Path, variants: int, seed: int, progress: bool = False, processes: int = 1
) -> Path:
    """Encode the data set that ``config`` names into shards in ``out``, one for each of its own; returns their index.

    A sample becomes one of latents and text features in half precision, with its JSON. One that can't be decoded is
    left out, and listed in bad_samples.jsonl there. A run that was interrupted continues when asked again for the same.
    ``processes`` share the shards; the limit of bad samples holds for each. Raises UserError where a shard can't be
    read, or when too many samples are bad, or all of them.
    """
    assert isinstance(config.shards, str)
    shards = open_shards(config.shards)
    if any(shard.encoding for shard in shards):
        raise UserError(f"{config.shards}: these shards are encoded already; name those of videos")
    if config.size % model.autoencoder.factor:
        raise UserError(f"--size {config.size} is not a multiple of the autoencoder's {model.autoencoder.factor}")
    encoding = {"frames": config.frames, "fps": config.fps, "size": config.size, "variants": variants}
    plan = {
        "source": fingerprint(shards),
        "seed": seed,
        "crop": config.crop,
        "flip": config.flip,
        "encoding": {"encoder": encoder_digest(model), **encoding},
    }
    if started(out, plan):
        return out / INDEX
    job = _Job(config, model, out, variants, seed)
    count = sum(len(shard.offsets) for shard in shards)
    with bar(progress, "encode", count) as advance:
        if processes == 1:
            job.run(advance=advance)
        else:
            _side_by_side(job, min(processes, len(shards)), shards, advance)
    bad = BadSamples(out / BAD_SAMPLES, config.bad_limit, config.bad_floor)
    if len(bad.recorded) >= count:
        raise UserError(f"{config.shards}: none of its {count} samples can be encoded ({bad.told()})")
    write_index(out, [_name(number) for number in range(len(shards))], plan)
    for leftover in (*out.glob(".encoded-*.tar"), out / PLAN):
        leftover.unlink(missing_ok=True)
    return out / INDEX


def _name(number: int) -> str:
    return f"encoded-{number:06d}.tar"


@dataclass(frozen=True)
class _Job:
    """What several processes do together: each its own of the shards."""

    config: DataConfig
    model: Model
    out: Path
    variants: int
    seed: int

    def run(self, number: int = 0, processes: int = 1, advance: Callable[[int], None] = lambda count: None) -> None:
        """Encode the shards of process ``number`` that are not there yet."""
        config = self.config
        assert isinstance(config.shards, str)
        shards = open_shards(config.shards)
        encoder = _Encoder(config, self.model, self.variants, self.seed, sum(len(s.offsets) for s in shards))
        bad = BadSamples(self.out / BAD_SAMPLES, config.bad_limit, config.bad_floor)
        first = 0
        with DecodePool(config.workers, config.deadline_seconds) as pool:
            for place, shard in enumerate(shards):
                target = self.out / _name(place)
                if place % processes == number:
                    if not target.exists():  # else whole, since it was renamed into place
                        write_shard(target, encoder.samples(shard, first, pool, bad), FEATURES)
                    advance(len(shard.offsets))
                first += len(shard.offsets)


def _side_by_side(job: _Job, processes: int, shards: list[Shard], advance: Callable[[int], None]) -> None:
    """Run a job in so many processes, on the GPUs in turn; the first that fails ends the others."""
    problems = multiprocessing.get_context("spawn").SimpleQueue()
    model = job.model
    job = replace(job, model=Model(model.folder, model.config, model.weights))  # without the networks that are loaded
    threads = max(1, torch.get_num_threads() // processes)
    waiting = dict(enumerate(shards))
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # what is told is told below, in one line
    context = start_processes(_share, (job, processes, threads, problems), processes, join=False)
    try:
        done = False
        while not done:
            done = context.join(timeout=1)
            for number in [number for number in waiting if (job.out / _name(number)).exists()]:
                advance(len(waiting.pop(number).offsets))
    except ProcessExitedException as error:
        told = f"{job.out}: {error}; out of memory, where nothing above says more: try fewer --processes"
        raise UserError(told if problems.empty() else problems.get()) from None
    finally:
        for process in context.processes:
            process.terminate()
        for process in context.processes:
            process.join()


def _share(number: int, job: _Job, processes: int, threads: int, problems: Any) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _interrupt)
    os.environ.setdefault("LOCAL_RANK", str(number % max(1, torch.cuda.device_count())))
    torch.set_num_threads(threads)
    try:
        job.run(number, processes)
    except torch.OutOfMemoryError:
        problems.put(f"{job.out}: the GPU's memory is too small for {processes} processes; use fewer --processes")
        raise SystemExit(2) from None
    except (UserError, OSError) as error:
        problems.put(str(error))
        raise SystemExit(2) from None


def _interrupt(number: int, frame: object) -> None:
    """Once: files begun are cleaned up, and a second signal must not stop that."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: None)
    raise KeyboardInterrupt


class _Encoder:
    def __init__(self, config: DataConfig, model: Model, variants: int, seed: int, num_samples: int) -> None:
        self.config, self.variants, self.seed, self.num_samples = config, variants, seed, num_samples
        self.autoencoder, self.text = model.autoencoder.to(device()), model.text.to(device())

    def samples(self, shard: Shard, first: int, pool: DecodePool, bad: BadSamples) -> Iterator[_Encoded]:
        """The good samples of a shard, the first of which is number ``first`` of all."""
        told: list[RawSample | SampleError] = []
        results = pool.map(self._jobs(shard, first, told))
        for place in range(len(shard.offsets)):
            clips = [next(results) for _ in range(self.variants)]
            raw, number = told[place], first + place
            told[place] = SampleError("done", "")  # the videos before this one are not needed any more
            error = next((clip for clip in clips if isinstance(clip, ClipError)), None)
            if isinstance(raw, SampleError):
                error = ClipError(raw.reason, str(raw))
            if number in bad.recorded or error is not None:
                key = raw.key
                bad.take(number, key, shard.path, None if number in bad.recorded else error)
                continue
            assert isinstance(raw, RawSample)
            try:
                packed = pack(self._features(raw, clips, number))
            except ClipError as error:
                bad.take(number, raw.key, shard.path, error)
                continue
            bad.good()
            yield raw.key, packed, {**raw.meta, "captions": list(raw.captions)}

    def _jobs(self, shard: Shard, first: int, told: list[RawSample | SampleError]) -> Iterator[dict[str, Any] | None]:
        config = self.config
        for place in range(len(shard.offsets)):
            raw = try_sample(shard, place)
            told.append(raw)
            for variant in range(self.variants):
                augmentation = self._augmentation(first + place, variant)
                yield (
                    None
                    if isinstance(raw, SampleError)
                    else {
                        "video": raw.video,
                        "suffix": raw.suffix,
                        "fps": config.fps,
                        "frames": config.frames,
                        "size": config.size,
                        "position": augmentation.position,
                        "crop": augmentation.crop,
                    }
                )

    def _augmentation(self, number: int, variant: int) -> Augmentation:
        return Augmentation.draw(self.config, self.seed, number + variant * self.num_samples)

    @torch.no_grad()
    def _features(self, raw: RawSample, clips: list[Any], number: int) -> Features:
        means, stds = [], []
        for variant, clip in enumerate(clips):
            assert isinstance(clip, Clip)
            frames = self._augmentation(number, variant).cut(clip, self.config.frames)
            posterior = self.autoencoder.encode_clip(torch.from_numpy(frames.copy())[None].to(device()))
            means.append(posterior.mean[0])
            stds.append(posterior.std[0])
        told = self.text.encode(list(raw.captions)).condition(torch.ones(len(raw.captions)))
        return Features(torch.stack(means), torch.stack(stds), told.text, told.text_mask, told.pooled)
