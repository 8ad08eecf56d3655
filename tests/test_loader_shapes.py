"""Several data sets, shapes and kinds of file in one run: on real shards, decoded for real."""

from __future__ import annotations

import io
import json
import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_shards import clip, picture, tar

from data_pipeline.loader import DataConfig, ShardSource
from data_pipeline.shards import write_index, write_shard, write_world_shards
from videodiff.batch import VideoBatch
from videodiff.config import ConfigError, build
from videodiff.errors import UserError
from videodiff.video_io import encode_video

BUCKETS = [
    {"frames": 1, "height": 32, "width": 32},
    {"frames": 4, "height": 32, "width": 32},
    {"frames": 4, "height": 16, "width": 48},
]


def config(shards: Any, **changes: Any) -> DataConfig:
    tree = {"shards": shards, "batch_size": 4, "frames": 4, "fps": 8, "size": 32, "streams": 4, "workers": 0}
    return build(DataConfig, {**tree, "prefetch": 0, **changes}, "data")


def take(opened: ShardSource, count: int, start: int = 0, rank: int = 0, world: int = 1, micro: int = 4):
    iterator = opened.batches(start, rank, world, micro)
    taken = list(islice(iterator, count))
    iterator.close()  # type: ignore[attr-defined]
    return taken


def rows(batches: list[VideoBatch]) -> dict[int, tuple[str, str, bytes]]:
    return {
        number: (batch.keys[row], batch.captions[row], batch.frames[row].numpy().tobytes())
        for batch in batches
        for row, number in enumerate(batch.numbers.tolist())
    }


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 square clips, 4 wide ones, and 7 images of three kinds; the images in a tar of others, without an index."""
    folder = tmp_path_factory.mktemp("mixed")
    square = [(f"s{n}", *clip(10 * n, 48, 48)) for n in range(5)]
    wide = [(f"w{n}", *clip(100 + 10 * n, 96, 32)) for n in range(4)]
    for name, samples in (("clips", [*square[:3], *wide[:2]]), ("more", [*wide[2:], *square[3:]])):
        write_shard(folder / f"{name}.tar", [(key, video, meta) for key, video, meta in samples])
    write_index(folder, ["clips.tar", "more.tar"], {})
    members = []
    for n in range(7):
        suffix, form = (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))[n % 3]
        members += [(f"i{n}.{suffix}", picture(200 + n, 40 + n, 50, form)), (f"i{n}.txt", f"image {n}".encode())]
    (folder / "images").mkdir()
    tar(folder / "images" / "a.tar", members)
    return folder


def test_images_and_clips_of_all_shapes_come_in_batches_that_stack(mixed: Path) -> None:
    shards = [{"shards": str(mixed), "weight": 9}, {"shards": str(mixed / "images"), "weight": 7}]
    opened = ShardSource(config(shards, buckets=BUCKETS), 3)
    assert opened.num_samples == 16
    batches = take(opened, 160)
    wanted = {"i": (1, 32, 32), "s": (4, 32, 32), "w": (4, 16, 48)}
    seen: Counter[str] = Counter()
    for batch in batches:
        assert batch.weight.tolist() == [1] * 4
        (kind,) = {key[0] for key in batch.keys}
        assert tuple(batch.frames.shape) == (4, *wanted[kind], 3)
        for key, caption, frames in zip(batch.keys, batch.captions, batch.frames, strict=True):
            n = int(key[1:])
            value = {"i": 200 + n, "s": 10 * n, "w": 100 + 10 * n}[kind]
            assert caption == (f"image {n}" if kind == "i" else f"number {value}")
            assert abs(float(frames[..., 0].float().mean()) - value) < 4
        seen.update(batch.keys)
    assert len(seen) == 16
    assert max(seen.values()) - min(seen.values()) <= 4, "all in equal shares, up to a batch of each bucket"
    for world, micro in ((2, 2), (4, 1), (1, 2)):
        again = ShardSource(config(shards, buckets=BUCKETS), 3)
        found: dict[int, tuple[str, str, bytes]] = {}
        for rank in range(world):
            found |= rows(take(again, 10 * 4 // (world * micro), 80, rank, world, micro))
        assert found == {n: row for n, row in rows(batches).items() if 80 <= n < 120}


def test_a_mixture_draws_by_weight(mixed: Path, tmp_path: Path) -> None:
    world = write_world_shards(tmp_path, 5, size=32, frames=4, fps=8, seed=0).parent
    one = {"shards": str(mixed / "images"), "weight": 3}
    other = {"shards": str(world), "weight": 1}
    opened = ShardSource(config([one, other], frames=1), 0)
    keys = [key for batch in take(opened, 35) for key in batch.keys]
    images = [key for key in keys if key[0] == "i"]
    assert len(images) == 105
    assert set(Counter(images).values()) == {15}
    assert set(Counter(key for key in keys if key[0] != "i").values()) == {7}
    prints = {
        ShardSource(config(shards, frames=1), 0).fingerprint
        for shards in (str(world), str(mixed / "images"), [one, other], [other, one])
    }
    assert len(prints) == 4
    assert (
        ShardSource(config([{"shards": str(world)}]), 0).fingerprint == ShardSource(config(str(world)), 0).fingerprint
    )


@pytest.mark.parametrize("shards", [[], [{"shards": "a", "weight": 0}], [{"shards": "a", "wait": 1}], "", 7])
def test_wrong_mixtures_are_refused(shards: Any) -> None:
    with pytest.raises((ConfigError, UserError), match="shards"):
        ShardSource(config(shards), 0)


def test_buckets_need_aligned_starts(mixed: Path) -> None:
    with pytest.raises(ValueError, match="cannot start at sample 3"):
        ShardSource(config(str(mixed), buckets=BUCKETS), 0).batches(3, 0, 1, 4)


def test_an_image_is_upright_and_lies_on_white(tmp_path: Path) -> None:
    tall = Image.new("RGB", (20, 40), "red")
    tall.paste((0, 0, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter to the right: blue comes to the right
    file = io.BytesIO()
    tall.save(file, "JPEG", exif=exif, quality=95)
    clear = io.BytesIO()
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(clear, "PNG")
    tar(tmp_path / "a.tar", [("1.jpg", file.getvalue()), ("1.txt", b"x"), ("2.PNG", clear.getvalue()), ("2.txt", b"x")])
    shape = [{"frames": 1, "height": 16, "width": 32}, {"frames": 1, "height": 32, "width": 16}]
    found = {
        batch.keys[0]: batch.frames[0, 0]
        for batch in take(ShardSource(config(str(tmp_path), batch_size=1, buckets=shape), 0), 8, micro=1)
    }
    turned = found["1"].float()
    assert tuple(turned.shape) == (16, 32, 3)
    assert float(turned[:, :12, 0].mean()) > 240 > 15 > float(turned[:, 20:, 0].mean())
    assert int(found["2"].min()) == 255


def test_crop_and_flip_follow_from_sample_and_epoch(tmp_path: Path) -> None:
    """A ramp from left to right: its left edge tells the crop, its direction the flip."""
    ramp = np.broadcast_to(np.linspace(0, 254, 96).astype(np.uint8)[None, None, :, None], (4, 32, 96, 3))
    write_shard(tmp_path / "a.tar", [(f"r{n}", encode_video(ramp, 8, crf=4), {"captions": ["x"]}) for n in range(3)])
    plain = take(ShardSource(config(str(tmp_path), batch_size=3), 0), 20, micro=3)
    assert {batch.frames[row].numpy().tobytes() for batch in plain for row in range(3)} == {
        plain[0].frames[0].numpy().tobytes()
    }
    drawn = config(str(tmp_path), batch_size=3, crop="random", flip=True)
    batches = take(ShardSource(drawn, 0), 40, micro=3)
    edges, mirrored = [], 0
    for batch in batches:
        for frames in batch.frames.float():
            left, right = float(frames[0, :, 0].mean()), float(frames[0, :, -1].mean())
            mirrored += left > right
            edges.append(min(left, right))
    assert 40 < mirrored < 80  # of 120, within 4 deviations of a half
    assert min(edges) < 15
    assert max(edges) > 150
    assert 70 < float(np.mean(edges)) < 100  # uniform in 0 .. 170
    again = ShardSource(config(str(tmp_path), batch_size=3, crop="random", flip=True, workers=1, cache_gib=0), 0)
    found = {}
    for rank in range(3):
        found |= rows(take(again, 5, 30, rank, 3, 1))
    assert found == {n: row for n, row in rows(batches).items() if 30 <= n < 45}


def test_flips_of_cached_clips(tmp_path: Path) -> None:
    world = write_world_shards(tmp_path, 5, size=32, frames=8, fps=8, seed=0).parent
    cached, fresh = (ShardSource(config(str(world), flip=True, cache_gib=gib), 0) for gib in (1, 0))
    assert rows(take(cached, 10)) == rows(take(fresh, 10))


def test_shapes_of_others_come_from_their_jsons(tmp_path: Path) -> None:
    members = []
    for n, told in enumerate([{"duration": 0.5}, {"frames": 4}, {"num_frames": 4}]):
        video, meta = clip(50, 96, 32)
        meta = {name: value for name, value in meta.items() if name != "frames"} | told
        members += [(f"{n}.mp4", video), (f"{n}.json", json.dumps(meta).encode())]
    tar(tmp_path / "a.tar", members)
    for batch in take(ShardSource(config(str(tmp_path), buckets=BUCKETS), 0), 3):
        assert tuple(batch.frames.shape) == (4, 4, 16, 48, 3)
    video, meta = clip(50, 96, 32)
    tar(tmp_path / "a.tar", [("1.mp4", video), ("1.txt", b"x")])
    with pytest.raises(UserError, match=r"tells their width, height, fps and frames"):
        ShardSource(config(str(tmp_path), buckets=BUCKETS), 0)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    streams=st.integers(1, 5),
    world=st.integers(1, 3),
    later_world=st.integers(1, 3),
    workers=st.sampled_from([0, 0, 1, 2]),
    resume=st.integers(0, 3),
)
def test_real_shards_come_in_one_order_whoever_reads_them(
    sizes: list[int], streams: int, world: int, later_world: int, workers: int, resume: int, tmp_path: Path
) -> None:
    """Some ranks read `resume` batches of 6, others go on: each image once an epoch, as one process reads them."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    for shard, size in enumerate(sizes):
        members = [(f"{shard}-{n}.png", picture(40 * shard + n, 8, 8)) for n in range(size)]
        tar(folder / f"{shard}.tar", [m for name, data in members for m in ((name, data), (name[:-3] + "txt", b"x"))])
    data = config(str(folder), batch_size=6, frames=1, size=8, streams=streams, workers=workers, cache_gib=0)
    steps = resume + -(-sum(sizes) // 6)
    alone = rows(take(ShardSource(data.model_copy(update={"workers": 0}), 1), steps, micro=6))
    first = [alone[n][0] for n in range(sum(sizes))]
    assert sorted(first) == sorted(f"{shard}-{n}" for shard, size in enumerate(sizes) for n in range(size))
    found: dict[int, tuple[str, str, bytes]] = {}
    for ranks, start, count in ((world, 0, resume), (later_world, resume, steps - resume)):
        for rank in range(ranks if count else 0):
            mine = take(ShardSource(data, 1), count, 6 * start, rank, ranks, 6 // ranks)
            assert [len(batch) for batch in mine] == [6 // ranks] * count
            found |= rows(mine)
    assert found == alone
