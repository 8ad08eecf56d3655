"""The order is proved on plain integers, the rest on real shards with real helpers, some of which misbehave."""

import json
import resource
import time
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline import decoding
from data_pipeline.clips import Clip, ClipError
from data_pipeline.decoding import DecodePool
from data_pipeline.loader import DataConfig, ShardSource
from data_pipeline.order import Order
from data_pipeline.shards import all_labels, write_shard, write_world_shards
from data_pipeline.world import clips
from videodiff.batch import VideoBatch
from videodiff.config import ConfigError, build
from videodiff.errors import UserError
from videodiff.video_io import encode_video

# The order


@pytest.mark.parametrize("sizes", [[1], [5, 3, 0, 9, 1], [7] * 6, [100]])
@pytest.mark.parametrize("streams", [1, 4, 64])
def test_each_sample_comes_once_an_epoch(sizes: list[int], streams: int) -> None:
    order = Order(sizes, streams, seed=1)
    total = sum(sizes)
    epochs = [[order.sample(epoch * total + i) for i in range(total)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    if total > 5:
        assert epochs[0] != epochs[1] != epochs[2]
        assert [Order(sizes, streams, seed=2).sample(i) for i in range(total)] != epochs[0]
    again = Order(sizes, streams, seed=1)
    assert [again.sample(2 * total + i) for i in reversed(range(total))] == epochs[2][::-1], "no history"
    flat = [(shard, number) for shard, size in enumerate(sizes) for number in range(size)]
    assert [order.place(sample) for sample in range(total)] == flat


def test_a_rank_reads_its_own_streams_only() -> None:
    """16 streams over 8 shards of 10: rank 1 of 4 touches 20 of 80 samples, in few shards."""
    order = Order([10] * 8, 16, seed=0)
    dealt = [[order.sample(n) for n in range(rank, 80, 4)] for rank in range(4)]
    ranges = [{order.sample(n) for n in range(stream, 80, 16)} for stream in range(16)]
    for rank, samples in enumerate(dealt):
        assert set(samples) == set().union(*ranges[rank::4])
        assert len({order.place(sample)[0] for sample in samples}) < 8


def test_every_place_in_the_epoch_is_equally_likely() -> None:
    """300 seeds: the sample that comes first, chi-square over 12 samples (p = 0.001 at 31.3)."""
    counts = Counter(Order([4, 4, 4], 3, seed).sample(0) for seed in range(300))
    chi_square = sum((counts[sample] - 25) ** 2 / 25 for sample in range(12))
    assert chi_square < 31.3


# Batches


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 clips of 8 frames at 16 a second in shards of 4."""
    folder = tmp_path_factory.mktemp("world")
    return write_world_shards(folder, 11, size=32, frames=8, fps=16, seed=0, samples_per_shard=4).parent


def source(shards: Path, bad_samples: Path | None = None, decoder: str | None = None, **changes: Any) -> ShardSource:
    values = {"batch_size": 4, "frames": 4, "fps": 8, "size": 32, "streams": 4, "workers": 0, "prefetch": 0, **changes}
    config = DataConfig(shards=str(shards), **values)
    return ShardSource(config, 7, bad_samples, **({"decoder": decoder} if decoder else {}))


def take(batches: Iterator[VideoBatch], count: int) -> list[VideoBatch]:
    taken = list(islice(batches, count))
    batches.close()  # type: ignore[attr-defined]
    return taken


def by_number(batches: list[VideoBatch]) -> dict[int, tuple[str, str, bytes]]:
    rows = {}
    for batch in batches:
        for row, number in enumerate(batch.numbers.tolist()):
            rows[number] = batch.keys[row], batch.captions[row], batch.frames[row].numpy().tobytes()
    return rows


def test_a_batch_has_the_promised_shape(world: Path) -> None:
    batch = take(source(world).batches(0, 0, 1, 4), 1)[0]
    assert (batch.frames.dtype, tuple(batch.frames.shape)) == (torch.uint8, (4, 4, 32, 32, 3))
    assert (batch.fps.tolist(), batch.weight.tolist(), batch.numbers.tolist()) == ([8] * 4, [1] * 4, [0, 1, 2, 3])
    assert batch.fps.dtype == batch.weight.dtype == torch.float32
    assert batch.numbers.dtype == torch.int64
    assert all(batch.captions)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (1, 2), (2, 2), (2, 1), (4, 1)])
@pytest.mark.parametrize("start", [0, 8, 20])
def test_any_ranks_and_any_start_see_the_same_global_batches(
    world: Path, world_size: int, micro_batch: int, start: int
) -> None:
    """Batches 0..8 of 4 cross two epochs of 11 samples: numbers, keys, captions and pixels are those of one rank."""
    reference = by_number(take(source(world).batches(0, 0, 1, 4), 9))
    assert Counter(key for key, _, _ in (reference[n] for n in range(33))) == {
        key: 3 for key, _, _ in reference.values()
    }
    opened = source(world)
    for rank in range(world_size):
        count = (36 - start) // (world_size * micro_batch)
        batches = take(opened.batches(start, rank, world_size, micro_batch), count)
        per_step = 4 // (world_size * micro_batch)
        for step in range((36 - start) // 4):
            mine = {n for batch in batches[step * per_step : (step + 1) * per_step] for n in batch.numbers.tolist()}
            assert mine == set(range(start + 4 * step + rank, start + 4 * step + 4, world_size))
        rows = by_number(batches)
        assert rows == {number: reference[number] for number in rows}
    assert opened.samples(0, 11) == source(world, streams=4, workers=2).samples(0, 11)


def test_ranks_that_the_streams_do_not_divide_by_get_the_same_samples_and_a_line(world: Path) -> None:
    opened = source(world, batch_size=6, streams=4)
    reference = by_number(take(source(world, batch_size=6, streams=4).batches(0, 0, 1, 6), 4))
    words = r"data.streams=4 is not a multiple of 3 ranks: .* a new run with data.streams=6 reads"
    with pytest.warns(UserWarning, match=words) as told:
        rows = [by_number(take(opened.batches(0, rank, 3, 2), 4)) for rank in range(3)]
    assert len(told) == 1  # by rank 0
    assert {number: row for mine in rows for number, row in mine.items()} == reference


def test_helpers_cache_and_prefetch_change_nothing(world: Path) -> None:
    plain = by_number(take(source(world, cache_gib=0).batches(0, 0, 1, 4), 8))
    for changes in (
        {"cache_gib": 1},
        {"cache_gib": 4e-5},
        {"workers": 2, "prefetch": 2},
        {"workers": 1, "cache_gib": 0},
    ):
        assert by_number(take(source(world, **changes).batches(0, 0, 1, 4), 8)) == plain


def test_images_are_random_frames_and_windows_random_starts(world: Path) -> None:
    """Of 8 frames at 16 a second: in 40 epochs each of the 8 frames, and each of the 5 starts of 4, has its turn."""
    whole = {
        key: frames
        for key, _, frames in by_number(take(source(world, frames=8, fps=16).batches(0, 0, 1, 1), 11)).values()
    }
    for frames, starts in ((1, 8), (4, 5)):
        size = 32 * 32 * 3
        seen: Counter[int] = Counter()
        rows = by_number(take(source(world, frames=frames, fps=16, batch_size=44).batches(0, 0, 1, 44), 10))
        for key, _, data in rows.values():
            places = [start for start in range(starts) if whole[key][start * size : (start + frames) * size] == data]
            assert places, "a window of the clip"
            if len(places) == 1:  # a clip that stands still looks the same anywhere
                seen[places[0]] += 1
        assert set(seen) == set(range(starts))
        mean = sum(seen.values()) / starts
        assert sum((count - mean) ** 2 / mean for count in seen.values()) < 24.3  # p = 0.001 with 7 degrees


def test_all_captions_of_a_clip_are_used(world: Path) -> None:
    captions: dict[str, set[str]] = {}
    for key, caption, _ in by_number(take(source(world, batch_size=44).batches(0, 0, 1, 44), 10)).values():
        captions.setdefault(key, set()).add(caption)
    assert all(len(choices) >= 2 for choices in captions.values())


def test_a_paraphrase_is_another_caption_of_the_same_clip(world: Path) -> None:
    captions = {clip.key: clip.captions for clip in clips(11, 0, 32, 8, 16)}
    drawn = set()
    for batch in take(source(world).batches(0, 0, 1, 4), 40):
        for key, caption, paraphrase in zip(batch.keys, batch.captions, batch.paraphrases, strict=True):
            assert {caption, paraphrase} <= set(captions[key])
            assert caption != paraphrase or captions[key].count(caption) > 1
            drawn.add((key, caption, paraphrase))
    assert len(drawn) > 60  # of 11 x 12 pairs


def test_wrong_captions_are_drawn_where_a_sample_tells_some(tmp_path: Path) -> None:
    told = {"a": ["no", " not so ", "yes"], "b": [], "c": "one text", "d": [3, ""]}
    video = encode_video(np.zeros((4, 32, 32, 3), np.uint8), 8)
    samples = [(key, video, {"captions": ["yes"], "negatives": wrong}) for key, wrong in told.items()]
    write_shard(tmp_path / "wrong.tar", samples)
    config = DataConfig(shards=str(tmp_path / "wrong.tar"), batch_size=4, frames=4, fps=8, size=32, workers=0)
    drawn = {key: set() for key in told}
    for batch in take(ShardSource(config, 0).batches(0, 0, 1, 4), 10):
        for key, negative in zip(batch.keys, batch.negatives, strict=True):
            drawn[key].add(negative)
    assert drawn == {"a": {"no", "not so"}, "b": {""}, "c": {"one text"}, "d": {""}}
    (batch,) = take(ShardSource(config, 0, more_texts=False).batches(0, 0, 1, 4), 1)
    assert batch.negatives == batch.paraphrases == ()


def test_another_data_set_has_another_fingerprint(world: Path, tmp_path: Path) -> None:
    other = write_world_shards(tmp_path, 11, size=32, frames=8, fps=16, seed=1, samples_per_shard=4).parent
    assert source(world).fingerprint == source(world / "index.json", batch_size=2).fingerprint
    assert source(world).fingerprint != source(other).fingerprint


def test_wrong_numbers_are_refused(world: Path) -> None:
    for world_size, micro_batch in ((3, 1), (1, 3), (2, 4)):
        with pytest.raises(UserError, match="not a multiple"):
            source(world).batches(0, 0, world_size, micro_batch)
    with pytest.raises(ConfigError, match="frames"):
        build(DataConfig, {"shards": "x", "batch_size": 4, "frames": 0, "fps": 8, "size": 32}, "data")
    with pytest.raises(ConfigError, match="frames"):
        build(DataConfig, {"shards": "x", "batch_size": 4, "frames": 7.5, "fps": 8, "size": 32}, "data")


# Bad clips


@lru_cache
def plain_clip(value: int, frames: int = 4) -> bytes:
    return encode_video(np.full((frames, 16, 16, 3), value, np.uint8), 8)


def some_bad(folder: Path, bad: dict[int, bytes], count: int = 12) -> Path:
    samples = [
        (f"s{n:02}", plain_clip(10 * n) if n not in bad else bad[n], {"captions": [f"number {n}"]})
        for n in range(count)
    ]
    write_shard(folder / "a.tar", samples)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_clips_keep_their_slot_are_counted_and_listed(tmp_path: Path, workers: int) -> None:
    short = plain_clip(0, frames=2)
    shards = some_bad(tmp_path, {3: b"", 5: b"junk" * 99, 8: short})
    listed = tmp_path / "run" / "bad_samples.jsonl"
    opened = source(shards, listed, size=16, workers=workers)
    batches = take(opened.batches(0, 0, 1, 4), 3)
    weights = {key: weight for batch in batches for key, weight in zip(batch.keys, batch.weight.tolist(), strict=True)}
    assert weights == {f"s{n:02}": float(n not in (3, 5, 8)) for n in range(12)}
    for batch in batches:
        for row, weight in enumerate(batch.weight.tolist()):
            n = int(batch.keys[row][1:])
            assert batch.captions[row] == (f"number {n}" if weight else "")
            assert abs(float(batch.frames[row].float().mean()) - (10 * n if weight else 0)) < 2, "each clip in its slot"
    assert opened.bad_counts == {"undecodable": 2, "too short": 1}
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {(e["key"], e["reason"]) for e in entries} == {
        ("s03", "undecodable"),
        ("s05", "undecodable"),
        ("s08", "too short"),
    }
    assert all(e["shard"].endswith("a.tar") and opened.samples(e["number"], 1) == [int(e["key"][1:])] for e in entries)
    # A resumed run believes the list, even about clips that would decode now, and does not list them again.
    with listed.open("a") as file:
        good = next(n for n in range(12) if opened.samples(n, 1)[0] == 0)
        file.write(json.dumps({"number": good, "key": "s00", "reason": "deadline"}) + '\n{"number": 1')
    resumed = source(shards, listed, size=16, workers=workers)
    again = {
        key: w for b in take(resumed.batches(0, 0, 1, 4), 3) for key, w in zip(b.keys, b.weight.tolist(), strict=True)
    }
    assert again == {**weights, "s00": 0.0}
    assert resumed.bad_counts == {"undecodable": 2, "too short": 1, "deadline": 1}
    assert len(listed.read_text().splitlines()) == 5


def test_too_many_bad_clips_stop_the_run(tmp_path: Path) -> None:
    shards = some_bad(tmp_path, dict.fromkeys(range(4), b"junk"))
    listed = tmp_path / "bad.jsonl"
    with pytest.raises(
        UserError, match=r"bad \(\d undecodable, listed in .*bad.jsonl\).*bad_limit=0.2.*a\.tar"
    ) as error:
        take(source(shards, listed, size=16, bad_limit=0.2, bad_floor=2).batches(0, 0, 1, 4), 9)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="bad"):
        take(source(shards, size=16, prefetch=2, bad_floor=0).batches(0, 0, 1, 4), 9)
    assert take(source(shards, size=16, bad_limit=0.5, bad_floor=4).batches(0, 0, 1, 4), 9)
    assert take(source(shards, size=16, bad_limit=0, bad_floor=12).batches(0, 0, 1, 4), 9)


MISBEHAVE = "misbehaving_decoder:decode"


def test_hanging_and_dying_decoders_cost_one_clip_each() -> None:
    words = ["fine", "hang", "slow", "die", "fine", "bad", "die", "slow", "hang", "alive", *["fine"] * 20]
    jobs: list[dict[str, Any] | None] = [{"video": f"{word} {n}".encode()} for n, word in enumerate(words)]
    jobs.insert(4, None)
    with DecodePool(2, deadline_seconds=2, function=MISBEHAVE) as pool:
        results = list(pool.map(jobs))
    assert results.pop(4) is None
    reasons = {"hang": "deadline", "die": "crash", "bad": "too short"}
    for number, (word, result) in enumerate(zip(words, results, strict=True)):
        if word in reasons:
            assert isinstance(result, ClipError)
            assert result.reason == reasons[word]
        else:
            assert isinstance(result, Clip)
            assert result.frames[0, 0, 0, 0] == number, "results are in the order of the jobs"


def test_results_of_any_size_come_back_whole_and_may_be_written_to() -> None:
    """Through memory that grows as the results do: two arrays in one, one, empty ones, larger than before."""
    sizes: list[tuple[int, ...]] = [(1,), (200_000, 3), (0,), (5, 0), (300_000, 300_000), (10,)]
    with DecodePool(2, 60, function="misbehaving_decoder:arrays") as pool:
        for lengths, result in zip(sizes, pool.map({"lengths": each} for each in sizes), strict=True):
            assert result.name == "a" * len(lengths)
            found = [array for array in (result.first, result.second) if array is not None]
            assert [array.shape for array in found] == [(length, 3) for length in lengths]
            for place, array in enumerate(found):
                assert (array == 0.5 + place).all()
                array += 1


def test_a_helper_without_memory_accuses_no_clip() -> None:
    """Here by a limit that a job may have; what it can't hand over is not the clip's fault, and ends the run."""
    with DecodePool(1, 60, function="misbehaving_decoder:arrays") as pool:
        results = pool.map({"lengths": (length,)} for length in (1, *range(300_000, 300_009)))
        assert next(results).first.shape == (1, 3)
        process = pool._helpers[0]._process.pid
        resource.prlimit(process, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        with pytest.raises(UserError, match="no memory to hand over"):
            list(results)  # the first of them may be done already; each needs more than the one before


def test_a_hanging_clip_holds_up_neither_the_loader_nor_its_end(tmp_path: Path) -> None:
    words = ["fine"] * 8
    words[2] = "hang"
    write_shard(tmp_path / "a.tar", [(f"s{n}", f"{w} {n}".encode(), {"captions": ["x"]}) for n, w in enumerate(words)])
    opened = source(tmp_path, decoder=MISBEHAVE, workers=2, prefetch=1, deadline_seconds=2, size=8)
    batches = take(opened.batches(0, 0, 1, 4), 2)
    assert sum(float(batch.weight.sum()) for batch in batches) == 7
    assert opened.bad_counts["deadline"] >= 1
    endless = source(tmp_path, decoder=MISBEHAVE, workers=2, prefetch=1, deadline_seconds=500, size=8)
    # The first batch is fine, and the thread is waiting for the second one when the iterator is closed.
    first = next(n for n in range(99) if 2 in endless.samples(n + 4, 4) and 2 not in endless.samples(n, 4))
    start = time.monotonic()
    iterator = endless.batches(first, 0, 1, 4)
    take(iterator, 1)
    assert time.monotonic() - start < 120, "closing does not wait for the deadline"


def test_a_helper_that_hangs_while_starting_gets_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job larger than a socket's buffer would otherwise wait in it for ever."""
    (tmp_path / "never_up.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(decoding, "_START_SECONDS", 2.0)
    began = time.monotonic()
    with DecodePool(1, 5, function="never_up:decode") as pool, pytest.raises(UserError, match="did not start in 2 s"):
        list(pool.map([{"video": bytes(2**24)}]))
    assert time.monotonic() - began < 60


def test_a_decoder_that_cannot_start_is_told() -> None:
    with (
        DecodePool(1, 5, function="data_pipeline.no_such_module:decode") as pool,
        pytest.raises(UserError, match="cannot start"),
    ):
        list(pool.map([{"video": b""}]))


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_are_what_the_jsons_say(world: Path) -> None:
    shapes = {clip.key: clip.meta["scene"]["shape"] for clip in clips(11, 0, 32, 8, 16)}
    assert len(set(shapes.values())) > 1
    for cache in (0.0, 1.0):  # decoded anew, and from memory
        batches = take(source(world, label="scene.shape", cache_gib=cache).batches(0, 0, 1, 4), 9)
        assert all(batch.labels == tuple(shapes[key] for key in batch.keys) for batch in batches)
    assert all(batch.select(slice(1, 3)).labels == batch.labels[1:3] for batch in batches)
    assert take(source(world).batches(0, 0, 1, 4), 1)[0].labels == ()
    assert all_labels(str(world), "scene.shape") == set(shapes.values())
    assert all_labels(str(world), "number") == {str(number) for number in range(11)}


@pytest.mark.parametrize("field", ["shape", "scene", "scene.x", "scene.shape.name", "captions"])
def test_a_field_that_is_no_label_is_refused(world: Path, field: str) -> None:
    with pytest.raises(UserError, match=f"data.label={field}"):
        take(source(world, label=field).batches(0, 0, 1, 4), 1)
