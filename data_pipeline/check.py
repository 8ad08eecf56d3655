"""Is a data set fit to train on? Looks at every shard's hash, and at every sample's members, captions and frames."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data_pipeline import locations, tars
from data_pipeline.clips import IMAGE_SUFFIXES, Preview
from data_pipeline.decoders import ClipError
from data_pipeline.decoding import DecodePool
from data_pipeline.features import check_finite, unpack
from data_pipeline.index import Shard, open_shards
from data_pipeline.progress import bar
from data_pipeline.samples import FEATURES, TEXT_SUFFIXES, VIDEO_SUFFIXES, RawSample, SampleError, try_sample
from videodiff.errors import UserError

PREVIEW = "data_pipeline.clips:preview_clip"
_READ = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, *TEXT_SUFFIXES, FEATURES)


@dataclass
class Findings:
    """What a check found. ``problems`` are lines for people, each counted once in ``counts`` by its reason."""

    num_shards: int = 0
    num_samples: int = 0
    num_good: int = 0
    num_captions: int = 0
    seconds: float = 0.0  # of video
    decoders: Counter[str] = field(default_factory=Counter)  # how many samples each has read
    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str, line: str) -> None:
        self.counts[reason] += 1
        self.problems.append(line)


def check_shards(
    location: str,
    workers: int,
    deadline_seconds: float,
    progress: bool = False,
    wanted: tuple[float, int] | None = None,
) -> Findings:
    """Read and decode every sample of the shards at ``location`` (see `open_shards`).

    ``wanted``: the rate and the number of frames that training will ask for; what can't give them is a finding.
    Raises UserError only where there is nothing to check; all that is wrong with the shards is in the findings.
    """
    found, unopened = Findings(), list[str]()
    shards = open_shards(location, unopened)
    for line in unopened:
        found.add("unusable shard", line)
    found.num_shards = len(shards) + len(unopened)
    found.num_samples = sum(len(shard.offsets) for shard in shards)
    with (
        bar(progress, "check", found.num_samples) as advance,
        DecodePool(workers, deadline_seconds, PREVIEW) as pool,
    ):
        for shard in shards:
            try:
                _check_file(shard, found)
            except UserError as error:
                found.add("unusable shard", str(error))
                continue
            for raw, result in _decoded(shard, pool, wanted):
                _judge(shard, raw, result, found)
                advance(1)
    return found


def steps_per_epoch(num_samples: int, batch_size: int, world_size: int) -> float:
    """Steps in which every sample comes once; the epoch's tail carries into the next one's first batch.

    Raises UserError where the batch can't be shared equally.
    """
    if batch_size % world_size:
        raise UserError(
            f"--batch-size {batch_size} is not a multiple of --world-size {world_size}; all ranks must get equal shares"
        )
    return num_samples / batch_size


def _check_file(shard: Shard, found: Findings) -> None:
    """The hash that the index tells, and members that nothing reads."""
    path = shard.path
    try:
        with shard.open() as file:
            if shard.indexed and locations.sha256(file) != shard.digest:
                found.add(
                    "hash", f"{path}: not the shard that its index names (sha256 differs); write or copy it again"
                )
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                known = {member.name for _, suffix, member in tars.members(tar) if suffix in _READ}
                odd = [m.name for m in tar.getmembers() if m.name not in known and not m.isdir()]
    except (OSError, tarfile.TarError, EOFError) as error:
        found.add("torn", f"{path}: torn ({error}); write or copy the shard again")
        return
    for name in odd:
        found.add("unread member", f"{path}: nothing reads its member {name!r}; leave it out")


def _decoded(
    shard: Shard, pool: DecodePool, wanted: tuple[float, int] | None
) -> Iterator[tuple[RawSample | SampleError, Any]]:
    told: list[RawSample | SampleError] = []

    def jobs() -> Iterator[dict[str, Any] | None]:
        for number in range(len(shard.offsets)):
            raw = try_sample(shard, number)
            told.append(raw)
            if isinstance(raw, SampleError) or shard.encoding is not None:
                yield None
            else:
                yield {"video": raw.video, "suffix": raw.suffix, "frames": 1, "height": 16, "wanted": wanted}

    for number, result in enumerate(pool.map(jobs())):
        raw, told[number] = told[number], SampleError("done", "")  # its video is not needed any more
        yield raw, result


def _judge(shard: Shard, raw: RawSample | SampleError, result: Any, found: Findings) -> None:
    if isinstance(raw, SampleError):
        found.add(raw.reason, str(raw))
        return
    if shard.encoding is not None:
        try:
            features = unpack(raw.video, shard.encoding.variants, len(raw.captions))
            for variant in range(shard.encoding.variants):
                check_finite(features.choose(variant, variant % len(raw.captions)))
        except ClipError as error:
            result = error
    if isinstance(result, ClipError):
        found.add(result.reason, f"{shard.path}: sample {raw.key} is {result}; remove it or write it again")
        return
    said = raw.meta.get("frames") if shard.indexed else None  # elsewhere the word may mean anything
    if isinstance(result, Preview) and isinstance(said, int) and result.total < said:
        line = (
            f"sample {raw.key} has {result.total} of the {said} frames that its JSON tells; remove it or write it again"
        )
        found.add("incomplete", f"{shard.path}: {line}")
        return
    found.num_good += 1
    found.num_captions += len(raw.captions)
    if isinstance(result, Preview):
        found.decoders[result.decoder] += 1
        found.seconds += result.total / result.fps if result.fps else 0.0
