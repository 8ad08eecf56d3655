"""Draws, buckets and mixtures as plain integers: properties over weights, shards, streams, ranks and resume points."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.data_config import Bucket
from data_pipeline.index import Shape, Shard
from data_pipeline.mixture import Draws, Mixture
from data_pipeline.order import Order
from videodiff.errors import UserError

SQUARE = Bucket(frames=4, height=32, width=32)
WIDE = Bucket(frames=4, height=32, width=64)
IMAGE = Bucket(frames=1, height=32, width=32)


def shard(shapes: list[Shape | None], name: str = "a") -> Shard:
    """As an index tells of it; nothing is read."""
    return Shard(Path(f"{name}.tar"), tuple(range(len(shapes))), 0, name, indexed=True, shapes=tuple(shapes))


def plain(sizes: list[int]) -> list[Shard]:
    return [shard([None] * size) for size in sizes]


def mixture(
    data_sets: list[list[Shard]], weights: list[float], buckets: list[Bucket], batch: int, streams: int, seed=0
):
    return Mixture(data_sets, weights, buckets, 8.0, batch, streams, seed)


@given(st.lists(st.fractions(Fraction(1, 20), 9, max_denominator=20), min_size=1, max_size=5), st.integers(0, 10**12))
def test_draws_are_in_proportion_and_found_anywhere(weights: list[Fraction], start: int) -> None:
    draws = Draws(weights)
    counts: Counter[int] = Counter()
    for n in range(60):
        choice, before = draws[n]
        assert before == counts[choice]
        counts[choice] += 1
        for index, weight in enumerate(weights):
            assert abs(counts[index] - (n + 1) * weight / sum(weights)) <= len(weights)
    window = [draws[start + n] for n in range(30)]
    for index in range(len(weights)):
        positions = [before for choice, before in window if choice == index]
        assert positions == list(range(positions[0], positions[0] + len(positions))) if positions else True


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    streams=st.integers(1, 9),
    ranks=st.integers(1, 4),
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 2),
    seed=st.integers(0, 5),
    resume=st.integers(0, 3),
    later_ranks=st.integers(1, 12),
)
def test_one_order_whoever_reads_it_and_wherever_it_is_resumed(
    sizes: list[int], streams: int, ranks: int, micro: int, accumulation: int, seed: int, resume: int, later_ranks: int
) -> None:
    """Each sample once an epoch, equal counts on all ranks, and the same global batches when other ranks go on."""
    batch, total = ranks * micro * accumulation, sum(sizes)
    alone = mixture([plain(sizes)], [1], [SQUARE], batch, streams, seed)
    order = Order(sizes, streams, seed)
    steps = -(-2 * total // batch) + resume
    expected = [order.sample(n) for n in range(steps * batch)]
    for epoch in range(2):
        assert sorted(expected[epoch * total : (epoch + 1) * total]) == list(range(total))
    for world in {ranks, *(w for w in (later_ranks,) if batch % w == 0)}:
        first = resume * batch if world != ranks else 0
        again = mixture([plain(sizes)], [1], [SQUARE], batch, streams, seed)  # a new process has no history
        read = [[again.sample(n) for n in range(first + rank, len(expected), world)] for rank in range(world)]
        assert len({len(samples) for samples in read}) == 1
        dealt = {first + rank + i * world: sample for rank, of in enumerate(read) for i, sample in enumerate(of)}
        assert [dealt[n] for n in range(first, len(expected))] == expected[first:]
    assert [alone.sample(n) for n in range(len(expected))] == expected


SHAPES = {SQUARE: Shape(9, 16.0, 100, 100), WIDE: Shape(9, 16.0, 50, 110), IMAGE: Shape(1, 0.0, 64, 64)}


@settings(max_examples=60)
@given(
    data_sets=st.lists(
        st.lists(st.lists(st.sampled_from([SQUARE, WIDE, IMAGE]), max_size=6), min_size=1, max_size=3).filter(any),
        min_size=1,
        max_size=3,
    ),
    weights=st.lists(st.sampled_from([0.3, 1.0, 2.5]), min_size=3, max_size=3),
    batch=st.integers(1, 6),
    streams=st.integers(1, 5),
    start=st.integers(0, 500),
)
def test_mixtures_of_buckets(
    data_sets: list[list[list[Bucket]]], weights: list[float], batch: int, streams: int, start: int
) -> None:
    """Batches are of one bucket, of samples that belong there; each data set's part of a bucket comes once an epoch."""
    weights = weights[: len(data_sets)]
    shards = [[shard([SHAPES[bucket] for bucket in of]) for of in data_set] for data_set in data_sets]
    flat = [(number, bucket) for number, data_set in enumerate(data_sets) for of in data_set for bucket in of]
    mixed = mixture(shards, weights, [SQUARE, WIDE, IMAGE], batch, streams)
    assert mixed.num_samples == len(flat)
    steps = 12 * len(flat)
    drawn: dict[tuple[int, Bucket], list[int]] = {}
    for number in range(steps * batch):
        sample, bucket = mixed.sample(number), mixed.bucket(number)
        assert bucket == mixed.bucket(number - number % batch) == flat[sample][1]
        drawn.setdefault(flat[sample], []).append(sample)
    for part, samples in drawn.items():
        own = [sample for sample, of in enumerate(flat) if of == part]
        for first in range(0, len(samples) - len(own) + 1, len(own)):
            assert sorted(samples[first : first + len(own)]) == own
        share = weights[part[0]] / sum(weights) * len(own) / sum(of[0] == part[0] for of in flat)
        assert abs(len(samples) - share * steps * batch) <= 3 * batch + 3
    again = mixture(shards, weights, [SQUARE, WIDE, IMAGE], batch, streams)
    assert [again.sample(n) for n in range(start, start + 9)] == [mixed.sample(n) for n in range(start, start + 9)]


def test_each_sample_goes_into_the_longest_bucket_it_fills_and_of_these_the_nearest() -> None:
    short, long = Bucket(frames=4, height=32, width=32), Bucket(frames=8, height=32, width=32)
    shapes = [
        Shape(16, 16.0, 48, 48),  # 8 frames at 8 a second
        Shape(14, 16.0, 48, 48),  # 7
        Shape(9, 16.0, 48, 80),
        Shape(9, 16.0, 80, 48),
        Shape(2, 16.0, 48, 48),  # too short for all: counted where it is decoded
        Shape(1, 0.0, 48, 100),
        None,  # torn: likewise
    ]
    buckets = [short, long, WIDE, IMAGE]
    found = mixture([[shard(shapes)]], [1], buckets, 1, 1)
    by_sample = {found.sample(n): found.bucket(n) for n in range(70)}
    assert [by_sample[n] for n in range(7)] == [long, short, WIDE, short, IMAGE, IMAGE, short]


def test_shapes_that_nothing_tells_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.tar: neither the index nor the JSON .* data.buckets"):
        mixture([[shard([None, None])]], [1], [SQUARE, IMAGE], 1, 1)


def test_the_frames_that_a_shape_promises_are_those_of_the_grid() -> None:
    import numpy as np

    from data_pipeline.clips import grid_frames

    for frames in (2, 3, 8, 31):
        for source in (8.0, 16.0, 24.0, 29.97):
            for fps in (4.0, 8.0, 16.0):
                if source * 1.1 >= fps:
                    grid = grid_frames(np.arange(frames) / source, fps, 1)
                    assert Shape(frames, source, 1, 1).frames_at(fps) == len(grid)
