"""The benchmark's parts give what they compare: the same frames from every decoder, and a report for each case."""

from __future__ import annotations

import random
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data, data_peers
from data_pipeline.shards import open_shards, read_sample


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.write_clips(tmp_path_factory.mktemp("clips"), 2)


def test_all_decoders_give_the_same_frames(clips: Path) -> None:
    video = read_sample(open_shards(str(clips))[0], 1).video
    random.seed(0)  # of the window's start
    expected = data_peers.by_decord(video).astype(int)
    assert expected.shape == (16, 256, 256, 3)
    for name, decode in data_peers.DECODERS.items():
        if (problem := data_peers.missing(name, video)) is not None:
            assert problem
            continue
        random.seed(0)
        assert np.abs(decode(video).astype(int) - expected).mean() < 2, name
    assert data_peers.missing("decord", b"junk")


def test_ours_gives_that_too(clips: Path) -> None:
    with closing(data.source(clips, 0).batches(0, 0, 1, 8)) as batches:  # type: ignore[type-var]
        assert tuple(next(batches).frames.shape) == (8, 16, 256, 256, 3)


def test_encoded_batches(tmp_path: Path) -> None:
    batches = data.source(data.write_features(tmp_path, 3), 2).batches(0, 0, 1, 8)
    with closing(batches):  # type: ignore[type-var]
        batch = next(islice(batches, 1))
    assert batch.weight.tolist() == [1] * 8
    assert batch.encoded is not None
    assert tuple(batch.encoded.mean.shape) == (8, 4, 16, 32, 32)


def test_a_start_is_timed_at_three_places(tmp_path: Path) -> None:
    lines = data.start(tmp_path, 0, 2100)
    assert len(lines) == 3
    assert all(line.startswith("- 2,100 samples") for line in lines)


def test_memory_counts_children() -> None:
    assert data.resident() > 50 * data.MIB
