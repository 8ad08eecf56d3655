"""Tar shards and their index, written whole or not at all. What others need of shards can be imported from here:
`data_pipeline/index.py` opens them, `data_pipeline/samples.py` reads what is in them.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline import world, world_two
from data_pipeline.index import INDEX, PLAN, VERSION, Shape, Shard, fingerprint, open_shards, read_index, scan_shard
from data_pipeline.progress import bar
from data_pipeline.samples import (
    VIDEO_SUFFIXES,
    RawSample,
    SampleError,
    all_captions,
    all_labels,
    label_of,
    read_sample,
    read_texts,
    shapes_of,
)
from data_pipeline.tars import write_tar
from data_pipeline.world import EDITION, RenderedClip
from data_pipeline.world_captions import CAPTIONS_PER_CLIP
from videodiff.errors import UserError
from videodiff.video_io import encode_video, write_json

__all__ = [
    "INDEX", "PLAN", "VIDEO_SUFFIXES", "RawSample", "SampleError", "Shape", "Shard", "all_captions", "all_labels",
    "fingerprint", "label_of", "open_shards", "read_sample", "read_texts", "scan_shard", "shapes_of", "started",
    "write_index", "write_shard", "write_world_shards",
]  # fmt: skip

Renderer = Callable[[int, int, int, int, float], RenderedClip]  # of seed, number, size, frames, fps
_Sample = tuple[str, bytes, dict[str, Any]]  # key, bytes of an mp4, JSON


def write_shard(path: Path, samples: Iterable[_Sample], suffix: str = "mp4") -> None:
    """Write samples (key, bytes of a file with ``suffix``, JSON with "captions") as one tar, whole or not at all.

    Equal samples give equal bytes. Raises UserError where the place cannot be written.
    """

    def members() -> Iterator[dict[str, bytes | str]]:
        for key, content, meta in samples:
            name = key.rpartition("/")[2]  # a member's suffix begins at the first dot after the last slash
            if "." in name or not name or not meta.get("captions"):
                raise ValueError(f"sample {key!r}: the name in a key has no dots, and a sample has captions")
            text = json.dumps(meta, sort_keys=True, ensure_ascii=False)
            # Half a surrogate pair, which no UTF-8 holds, is spelled as JSON does it.
            yield {"__key__": key, suffix: content, "json": text.encode(errors="backslashreplace")}

    write_tar(path, members())


def write_index(out: Path, names: Sequence[str], facts: dict[str, Any], shape: Shape | None = None) -> Path:
    """Write index.json of the finished shards ``names`` in the folder ``out``; ``facts`` go to its top as they are.

    Besides each sample's place it gets its checksum, and its shape: what the JSON tells, or else ``shape``. Returns the
    path of the index.
    """
    shards = [_summed(scan_shard(out / name, hash_file=True)) for name in names]
    entries = [
        {
            "file": name, "samples": len(shard.offsets), "bytes": shard.bytes, "sha256": shard.digest,
            "offsets": shard.offsets, "crc32": shard.crc32, "shapes": [told or shape for told in shapes_of(shard)],
        }
        for name, shard in zip(names, shards, strict=True)
    ]  # fmt: skip
    content = {"version": VERSION, **facts, "fingerprint": fingerprint(shards), "shards": entries}
    write_json(out / INDEX, content)
    return out / INDEX


def _summed(shard: Shard) -> Shard:
    sums = []
    with open(shard.path, "rb") as file:
        for number in range(len(shard.offsets)):
            start, stop = shard.extent(number)
            file.seek(start)
            sums.append(zlib.crc32(file.read(stop - start)))
    return replace(shard, crc32=tuple(sums))


def started(out: Path, plan: dict[str, Any]) -> bool:
    """Make the folder ready for shards that are written as ``plan`` says, or gone on with.

    True where all of them are there already; UserError where something else is.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        # A SIGKILL leaves what was not renamed yet.
        there = sorted(p.name for p in out.iterdir() if not p.match(".*-????????.json") or p.name in (INDEX, PLAN))
    except OSError as error:
        raise UserError(f"{out}: cannot be used as a folder ({error.strerror}); choose another") from None
    for name in (INDEX, PLAN):
        if name in there:
            try:
                known = json.loads((out / name).read_text(encoding="utf-8"))
                if not isinstance(known, dict):
                    raise ValueError("no object")
            except ValueError:
                raise UserError(f"{out / name}: not readable; delete the folder or choose another") from None
            different = [key for key in plan if known.get(key) != plan[key]]
            if different:
                what = ", ".join(f"{key} {known.get(key)} instead of {plan[key]}" for key in different)
                raise UserError(f"{out}: holds other shards ({what}); choose another folder or delete this one")
            if name == INDEX:
                read_index(out / INDEX)
                return True
            return False
    if there:
        raise UserError(f"{out}: holds other files ({there[0]}); choose an empty folder")
    write_json(out / PLAN, plan)
    return False


def write_world_shards(
    out: str | os.PathLike[str],
    num_clips: int,
    size: int,
    frames: int,
    fps: float,
    seed: int,
    *,
    motion_captions: int = 0,
    objects: int = 1,
    samples_per_shard: int = 256,
    workers: int | None = None,
    progress: bool = False,
) -> Path:
    """Render ``num_clips`` clips of the built-in world (``frames`` of ``size`` x ``size`` pixels at ``fps``) into
    shards in ``out``, each with one object or two. Of ``motion_captions`` of each clip's captions the motion alone is
    true.

    The same arguments give the same bytes, whatever ``workers`` (threads, one per core by default). A run that was
    interrupted continues when asked again for the same; a folder that holds anything else is refused. Returns the path
    of the index.
    """
    numbers = {"clips": num_clips, "size": size, "frames": frames, "fps": float(fps)}
    numbers["samples_per_shard"] = samples_per_shard
    for name, value in numbers.items():
        if not value > 0:
            raise UserError(f"world shards: {name} is {value}; it must be positive")
    plan = {"source": "world", "edition": EDITION, "seed": seed, **numbers}
    if not 0 <= motion_captions <= CAPTIONS_PER_CLIP:
        raise UserError(f"world shards: motion_captions is {motion_captions}, a clip has {CAPTIONS_PER_CLIP} captions")
    if motion_captions:  # a source of its own, so that plain shards of earlier versions stay what they are
        plan["source"] = f"world with {motion_captions} captions of the motion alone, all else from all combinations"
    if objects not in (1, 2):
        raise UserError(f"world shards: objects is {objects}; a clip shows 1 or 2")
    if objects == 2:
        if motion_captions:
            raise UserError("world shards: captions of the motion alone can't tell two objects apart; leave one out")
        plan["source"] = "world of two objects, with captions that are wrong about them"
    if not fps < 1000:
        raise UserError(f"world shards: fps is {fps:g}; an mp4 holds rates below 1000")
    if size < 16:
        raise UserError(f"world shards: size is {size}; shapes are drawn from 16 pixels on")
    if size % 2:
        raise UserError(f"world shards: size {size} is odd, which mp4 players cannot show; use {size + 1}")
    out = Path(out)
    if started(out, plan):
        return out / INDEX
    names = [f"world-{number:06d}.tar" for number in range(-(-num_clips // samples_per_shard))]
    firsts = range(0, num_clips, samples_per_shard)
    renderer: Renderer = partial(world.render_clip, motion_captions=motion_captions)
    if objects == 2:
        renderer = world_two.render_clip
    workers = workers or os.cpu_count() or 1
    # Threads suffice: nearly all the time is spent in ffmpeg processes and inside numpy.
    pool = ThreadPoolExecutor(workers)
    try:
        with bar(progress, "world shards", num_clips) as advance:
            for name, first in zip(names, firsts, strict=True):
                part = range(first, min(first + samples_per_shard, num_clips))
                if (out / name).exists():  # whole, since it was renamed into place
                    advance(len(part))
                    continue
                samples = _world_samples(part, plan, renderer, pool, ahead=2 * workers)
                write_shard(out / name, _counted(samples, advance))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    write_index(out, names, plan, Shape(frames, float(fps), size, size))
    for leftover in (*out.glob(".world-*.tar"), out / PLAN):  # of runs that were killed
        leftover.unlink(missing_ok=True)
    return out / INDEX


def _counted(samples: Iterable[_Sample], advance: Callable[[int], None]) -> Iterator[_Sample]:
    for sample in samples:
        yield sample
        advance(1)


def _world_samples(
    numbers: Iterable[int], plan: dict[str, Any], renderer: Renderer, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[_Sample]:
    """Render and encode clips in ``pool``, give them back in order; never more than ``ahead`` wait at once."""

    def make(number: int) -> _Sample:
        clip = renderer(plan["seed"], number, plan["size"], plan["frames"], plan["fps"])
        return (
            clip.key,
            encode_video(clip.frames, plan["fps"]),
            {**clip.meta, "captions": clip.captions, "fps": plan["fps"]},
        )

    waiting: deque[Future[_Sample]] = deque()
    for number in numbers:
        waiting.append(pool.submit(make, number))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
