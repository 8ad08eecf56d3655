"""Speed of the loader, side by side with what people use otherwise, on the same files and cores.

    python -m benchmarks.data [--cases decode encoded start memory] [--workers 2] [--pairs 7] [--batches 8]
                              [--samples 100000] [--clips 10000] [--out FILE]

decode: clips a second against bare decord in as many processes, and against plain webdataset in a torch DataLoader with
decord, PyAV and torchcodec. encoded: shards of latents and text features against those of videos, the loader alone.
start: seconds to the first batch of a set of so many samples, at its beginning, in its middle, after ten epochs.
memory: of this process and its helpers, after every tenth of so many clips.
Ratios are of paired calls in one run; above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data_peers import BATCH, DECODERS, FPS, FRAMES, SIZE, Bare, missing, plain_webdataset
from benchmarks.report import publish
from benchmarks.timing import MIB, paired
from data_pipeline.data_config import DataConfig
from data_pipeline.features import Features, pack
from data_pipeline.loader import ShardSource
from data_pipeline.shards import open_shards, read_sample, write_index, write_shard
from data_pipeline.world import render_clip
from videodiff.errors import mistakes_in_one_line
from videodiff.video_io import encode_video

CASES = ("decode", "encoded", "start", "memory")
HEAD = "| against | ratio (95 % interval) | ours, clips/s | theirs, clips/s | target | |\n|---|---|---|---|---|---|"
ENCODER = "0" * 64
START_SECONDS = 3.0  # the target
REST_SECONDS = 3.0  # in which the slowest loader makes all the batches that it holds ready
Clip = tuple[str, bytes, dict[str, Any]]


def write_clips(folder: Path, count: int = 16) -> Path:
    """Clips of moving shapes, 640x360 pixels, 40 frames at 16 a second: as short clips of the web, but plainer."""

    def clip(number: int) -> Clip:
        made = render_clip(0, number, 360, 40, 16.0)
        wide = np.pad(made.frames, ((0, 0), (0, 0), (140, 140), (0, 0)), mode="edge")
        return made.key, encode_video(wide, 16.0, crf=20), {"captions": list(made.captions)}

    return _write(folder, map(clip, range(count)), "mp4", {})


def write_features(folder: Path, count: int = 32) -> Path:
    """What an autoencoder of factor 8 with 4 channels and a CLIP of 77 x 768 make of such clips with 4 captions."""
    side = SIZE // 8

    def features(number: int) -> Clip:
        mean = torch.randn(1, 4, FRAMES, side, side)
        text, mask = torch.randn(4, 77, 768), torch.ones(4, 77, dtype=torch.bool)
        content = pack(Features(mean, torch.full_like(mean, 0.1), (text,), (mask,), torch.randn(4, 768)))
        return f"clip-{number:08d}", content, {"captions": [f"caption {i} of {number}" for i in range(4)]}

    encoding = {"encoder": ENCODER, "frames": FRAMES, "fps": FPS, "size": SIZE, "variants": 1}
    return _write(folder, map(features, range(count)), "safetensors", {"encoding": encoding})


def write_tiny(folder: Path, count: int) -> Path:
    """So many samples of one tiny clip, 2,000 in a shard."""
    video = encode_video(np.zeros((4, 16, 16, 3), np.uint8), FPS)
    for first in range(0, count, 2000):
        samples = ((f"{n:08d}", video, {"captions": ["a clip"]}) for n in range(first, min(first + 2000, count)))
        write_shard(folder / f"tiny-{first:08d}.tar", samples)
    return write_index(folder, sorted(path.name for path in folder.glob("*.tar")), {}).parent


def _write(folder: Path, samples: Iterator[Clip], suffix: str, facts: dict[str, Any]) -> Path:
    write_shard(folder / "a.tar", samples, suffix)
    return write_index(folder, ["a.tar"], facts).parent


def source(shards: Path, workers: int, **changes: Any) -> ShardSource:
    """Our loader as a run has it, but that it keeps no clip: the same ones come again and again."""
    values = {"frames": FRAMES, "fps": FPS, "size": SIZE, "batch_size": BATCH, "cache_gib": 0.0, "workers": workers}
    return ShardSource(DataConfig(shards=str(shards), **{**values, **changes}), 0, encoder=lambda: ENCODER)


class Stream:
    """A call takes ``count`` batches of an endless iterator."""

    def __init__(self, batches: Iterator[Any], count: int) -> None:
        self._batches, self._count = batches, count

    def __call__(self) -> None:
        for _ in range(self._count):
            next(self._batches)

    def close(self) -> None:
        """End its processes."""
        if callable(close := getattr(self._batches, "close", None)):
            close()


def steady(call: Callable[[], object]) -> None:
    """Let everybody's queues fill, so that nobody works beside what is timed, and take what this one made ahead."""
    time.sleep(REST_SECONDS)
    if isinstance(call, Stream):
        for _ in range(5):
            next(call._batches)


def decode(folder: Path, workers: int, pairs: int, batches: int) -> list[str]:
    """Rows of the table of decoded clips."""
    shards = write_clips(folder)
    videos = all_videos(shards)
    rows = [_row("bare decord", shards, workers, pairs, batches, Bare(videos, workers, batches * BATCH), 0.9)]
    for decoder in DECODERS:
        name, problem = f"webdataset + {decoder}, DataLoader", missing(decoder, videos[0])
        if problem is None:
            peer = Stream(plain_webdataset(shards, decoder, workers), batches)
            rows.append(_row(name, shards, workers, pairs, batches, peer, 1.0 if decoder == "decord" else None))
        else:
            rows.append(f"| {name} | skipped: {problem} | | | | |")
    return rows


def all_videos(shards: Path) -> list[bytes]:
    """What the shards hold."""
    return [read_sample(shard, n).video for shard in open_shards(str(shards)) for n in range(len(shard.offsets))]


def encoded(folder: Path, workers: int, pairs: int, batches: int) -> list[str]:
    """The row of encoded shards against those of videos."""
    features = write_features(folder / "features")
    videos = Stream(source(write_clips(folder / "videos"), workers).batches(0, 0, 1, BATCH), batches)
    return [_row("encoded against video shards", features, workers, pairs, batches, videos, 20.0)]


def _row(
    name: str, shards: Path, workers: int, pairs: int, batches: int, theirs: Stream | Bare, target: float | None
) -> str:
    ours = Stream(source(shards, workers).batches(0, 0, 1, BATCH), batches)
    with closing(ours), closing(theirs):
        ratio = paired(theirs, ours, pairs, before=steady)  # of times, theirs first: a ratio of speeds, ours first
    speeds = [batches * BATCH / seconds for seconds in (ratio.theirs, ratio.ours)]
    aim = "- | -" if target is None else f"{target:g} | {'met' if ratio.median >= target else 'missed'}"
    return (
        f"| {name} | {ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f}) | {speeds[0]:.1f} | {speeds[1]:.1f} | "
        f"{aim} |"
    )


def start(folder: Path, workers: int, samples: int) -> list[str]:
    """Seconds to the first batch: opening the set, starting helpers, reading and decoding."""
    shards = write_tiny(folder, samples)
    lines = []
    for name, position in (("the beginning", 0), ("mid-epoch", samples // 2), ("after 10.5 epochs", 21 * samples // 2)):
        began = time.perf_counter()
        opened = source(shards, workers, frames=4, size=16)
        ready = time.perf_counter() - began
        with closing(opened.batches(position // BATCH * BATCH, 0, 1, BATCH)) as batches:  # type: ignore[type-var]
            next(batches)
        seconds = time.perf_counter() - began
        met = "met" if seconds <= START_SECONDS else "missed"
        lines.append(
            f"- {samples:,} samples, {name}: {seconds:.2f} s, of which opening {ready:.2f} s "
            f"(target {START_SECONDS:g} s: {met})"
        )
    return lines


def memory(folder: Path, workers: int, clips: int) -> list[str]:
    """MiB of this process and its helpers as clips go by, ours and decord alone."""
    shards = write_clips(folder)
    count = max(clips // 10 // BATCH, 1) * BATCH
    with closing(source(shards, workers).batches(0, 0, 1, BATCH)) as batches:  # type: ignore[type-var]
        sizes = []
        for tenth in range(11):
            for _ in range(count // BATCH if tenth else 8):  # first some to warm up
                next(batches)
            sizes.append(resident() / MIB)
    told = ", ".join(f"{size:.0f}" for size in sizes)
    with closing(Bare(all_videos(shards), workers, count)) as bare:
        bare()
        before = resident() / MIB
        bare()
        grown = resident() / MIB - before
    late = (sizes[-1] - sizes[1]) / (9 * count)  # the first tenth fills pools and caches
    return [
        f"- after 0, 10, ... 100 % of {10 * count:,} clips: {told} MiB; {1000 * late:+.1f} MiB a thousand clips after "
        "the first tenth",
        f"- decord alone, over {count:,} clips after as many: {1000 * grown / count:+.1f} MiB a thousand clips",
    ]


def resident() -> int:
    """Bytes in the memory of this process and its children."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:  # it has just ended
            continue
        mine = str(Path("/proc/self").resolve().name)
        if mine in (lines["Pid"].strip(), lines["PPid"].strip()) and "VmRSS" in lines:
            total += int(lines["VmRSS"].split()[0]) * 1024
    return total


def main(
    cases: Sequence[str], workers: int, pairs: int, batches: int, samples: int, clips: int, out: Path | None
) -> None:
    """Run the cases, print the report, and write it to ``out``."""
    lines = [
        "# Speed of the loader",
        "",
        f"`python -m benchmarks.data --workers {workers} --pairs {pairs} --batches {batches}`: {platform.machine()}, "
        f"PyTorch {torch.__version__}. Windows of {FRAMES} frames at {FPS:g} a second and {SIZE}x{SIZE} pixels from "
        "clips of 640x360, each from a random frame on. Ratios of paired calls in one run, above 1: ours is faster.",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if "decode" in cases:
            lines += ["", "## Decoded clips", "", HEAD, *decode(folder / "decode", workers, pairs, batches)]
        if "encoded" in cases:
            lines += ["", "## Encoded shards", "", HEAD, *encoded(folder / "encoded", workers, pairs, batches)]
        if "start" in cases:
            lines += ["", "## Time to the first batch", "", *start(folder / "start", workers, samples)]
        if "memory" in cases:
            lines += ["", "## Memory", "", *memory(folder / "memory", workers, clips)]
    publish(lines, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batches", type=int, default=8, help=f"of {BATCH} clips in each timing")
    parser.add_argument("--samples", type=int, default=100_000, help="of the set that is started")
    parser.add_argument("--clips", type=int, default=10_000, help="that memory is watched over")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    given = parser.parse_args()
    with mistakes_in_one_line():
        main(given.cases, given.workers, given.pairs, given.batches, given.samples, given.clips, given.out)
