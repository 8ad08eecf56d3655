"""What people read clips with otherwise, each giving the frames that our loader is asked for.

`bare` is decord alone (its VideoReader and get_batch), on files in memory; the others are plain webdataset in a torch
DataLoader with a decoder. All crop and resize as ours does, by Pillow's bicubic kernel, called as its manual has it.
"""

from __future__ import annotations

import importlib
import io
import multiprocessing
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

from data_pipeline.clips import grid_frames

FRAMES, FPS, SIZE, BATCH = 16, 8.0, 256, 8  # of what is asked for


def window(grid: np.ndarray) -> list[int]:
    """Frames of a clip's grid from a random one on, as training takes them: the later, the more is decoded."""
    first = random.randrange(len(grid) - FRAMES + 1)
    return grid[first : first + FRAMES].tolist()


def fitted(frames: np.ndarray) -> np.ndarray:
    """The centre square of [T,H,W,3], SIZE pixels wide."""
    height, width = frames.shape[1:3]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box, size = (left, top, left + side, top + side), (SIZE, SIZE)
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC, box=box)) for f in frames])


def by_decord(video: bytes) -> np.ndarray:
    """By decord as its README has it, without the checks that our loader makes."""
    import decord

    reader = decord.VideoReader(io.BytesIO(video), num_threads=1)
    times = np.arange(len(reader)) / reader.get_avg_fps()
    return fitted(reader.get_batch(window(grid_frames(times, FPS, FRAMES))).asnumpy())


def by_pyav(video: bytes) -> np.ndarray:
    """By PyAV: all frames are decoded, those of the grid converted."""
    import av

    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        decoded = list(container.decode(stream))
    grid = window(grid_frames(np.array([float(frame.time) for frame in decoded]), FPS, FRAMES))
    return fitted(np.stack([decoded[i].to_ndarray(format="rgb24") for i in grid]))


def by_torchcodec(video: bytes) -> np.ndarray:
    """By torchcodec."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(video, num_ffmpeg_threads=1, dimension_order="NHWC", seek_mode="approximate")
    times = np.arange(len(decoder)) / float(decoder.metadata.average_fps)
    grid = window(grid_frames(times, FPS, FRAMES))
    return fitted(decoder.get_frames_at(grid).data.numpy())


DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {
    "decord": by_decord,
    "av": by_pyav,
    "torchcodec": by_torchcodec,
}


def missing(decoder: str, video: bytes) -> str | None:
    """Why a decoder can't be compared here, None where it can: it is tried on one clip."""
    try:
        importlib.import_module(decoder)
        shape = DECODERS[decoder](video).shape
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return (str(error).partition(":")[0].splitlines() or [type(error).__name__])[0]
    return None if shape == (FRAMES, SIZE, SIZE, 3) else f"gives frames of {shape}"


def plain_webdataset(shards: Path, decoder: str, workers: int) -> Iterator[Any]:
    """webdataset and a decoder in a torch DataLoader, batched there, in endless epochs."""
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    # resampled: shards are drawn with replacement, which is webdataset's own way to keep all workers busy.
    data = (
        webdataset.WebDataset(urls, resampled=True, shardshuffle=False)
        .to_tuple("mp4", "json")
        .map_tuple(partial(_decoded, decoder=decoder), bytes)
        .batched(BATCH)
    )
    return iter(webdataset.WebLoader(data, batch_size=None, num_workers=workers))


def _decoded(video: bytes, decoder: str) -> torch.Tensor:
    return torch.from_numpy(DECODERS[decoder](video))


class Bare:
    """decord in ``workers`` processes, nothing else: no tar, no order, no batch, and no frames sent anywhere.

    A call decodes ``count`` clips, shared equally.
    """

    def __init__(self, videos: list[bytes], workers: int, count: int) -> None:
        self._pool = multiprocessing.get_context("spawn").Pool(workers, _keep, (videos,))
        self._shares = [range(worker, count, workers) for worker in range(workers)]

    def __call__(self) -> None:
        self._pool.map(_decode_all, self._shares, chunksize=1)

    def close(self) -> None:
        """End the processes."""
        self._pool.terminate()


_videos: list[bytes] = []


def _keep(videos: list[bytes]) -> None:
    _videos[:] = videos


def _decode_all(numbers: range) -> None:
    for number in numbers:
        by_decord(_videos[number % len(_videos)])
