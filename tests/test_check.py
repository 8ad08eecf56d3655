"""`data check` on sound sets, on each thing that can be wrong, and as the command that people run."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import picture, tar

from data_pipeline.check import check_shards, steps_per_epoch
from data_pipeline.shards import all_captions, open_shards, write_index, write_shard, write_world_shards
from videodiff.errors import UserError
from videodiff.video_io import encode_video

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """7 clips of half a second in 3 shards."""
    return write_world_shards(tmp_path / "world", 7, size=32, frames=4, fps=8, seed=0, samples_per_shard=3).parent


def videodiff(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stages", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_a_sound_set(world: Path) -> None:
    found = check_shards(str(world), 2, 60)
    assert (found.problems, found.num_shards, found.num_samples, found.num_good) == ([], 3, 7, 7)
    assert found.num_captions == len(list(all_captions(str(world))))
    assert found.seconds == pytest.approx(7 * 4 / 8)
    (world / "index.json").unlink()
    assert check_shards(str(world), 0, 60) == found


def test_everything_that_is_wrong_is_listed(world: Path) -> None:
    """One bit of one video, and an index's shard that is gone: the rest is checked all the same."""
    shard = open_shards(str(world))[0]
    data = bytearray(shard.path.read_bytes())
    data[shard.offsets[1] + 800] ^= 1
    shard.path.write_bytes(bytes(data))
    (world / "world-000002.tar").unlink()
    found = check_shards(str(world), 0, 60)
    assert dict(found.counts) == {"unusable shard": 1, "hash": 1, "torn": 1}
    assert (found.num_samples, found.num_good, len(found.problems)) == (6, 5, 3)
    assert "world-000002.tar" in found.problems[0]
    assert "world-000000.tar" in found.problems[1]


def test_a_video_that_ends_early_is_found(tmp_path: Path) -> None:
    """It decodes without an error; only what its JSON tells shows that a part is missing."""
    video = encode_video(np.zeros((5, 32, 32, 3), np.uint8), 8)
    meta = {"captions": ["black"], "frames": 8}
    write_shard(tmp_path / "a.tar", [("half", video, meta), ("whole", video, {**meta, "frames": 5})])
    write_index(tmp_path, ["a.tar"], {})
    found = check_shards(str(tmp_path), 0, 60)
    assert (dict(found.counts), found.num_good) == ({"incomplete": 1}, 1)
    assert "sample half has 5 of the 8 frames" in found.problems[0]


def test_members_of_others(tmp_path: Path) -> None:
    members = [
        ("1.jpg", picture(3, 20, 20)), ("1.txt", b"good"),
        ("2.jpg", b"\xff\xd8\xff junk"), ("2.txt", b"bad"),
        ("3.mp4", b""), ("3.txt", b"empty"),
        ("4.png", picture(3, 20, 20)),
        ("5.txt", b"alone"),
        ("6.png", picture(3, 20, 20)), ("6.txt", b"good"), ("6.pkl", b"x"),
        ("../7.png", picture(3, 20, 20)), ("../7.txt", b"x"),
        ("README", b"hello"),
    ]  # fmt: skip
    found = check_shards(str(tar(tmp_path / "a.tar", members)), 1, 60)
    assert dict(found.counts) == {
        "undecodable": 2, "no caption": 1, "no video": 1, "unread member": 2, "unsafe name": 1,
    }  # fmt: skip
    assert (found.num_samples, found.num_good) == (7, 2)


def test_what_a_run_could_not_use_is_found(world: Path, tmp_path: Path) -> None:
    """Clips of 4 frames at 8 a second, and a picture."""
    assert check_shards(str(world), 0, 60, wanted=(8.0, 4)).problems == []
    assert dict(check_shards(str(world), 0, 60, wanted=(8.0, 5)).counts) == {"too short": 7}
    assert dict(check_shards(str(world), 0, 60, wanted=(16.0, 2)).counts) == {"too slow": 7}
    picture_alone = tar(tmp_path / "a.tar", [("1.jpg", picture(3, 20, 20)), ("1.txt", b"good")])
    assert check_shards(str(picture_alone), 0, 60, wanted=(8.0, 1)).problems == []
    assert dict(check_shards(str(picture_alone), 0, 60, wanted=(8.0, 2)).counts) == {"too short": 1}
    done = videodiff("data", "check", str(world), "--frames", "5", "--fps", "8")
    assert done.returncode == 2
    assert "7 too short" in done.stderr
    assert "give both" in videodiff("data", "check", str(world), "--fps", "8").stderr


def test_the_command_exits_with_the_list(world: Path) -> None:
    done = videodiff("data", "check", str(world), "--batch-size", "4", "--world-size", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "7 of 7 samples in 3 shards are good (28 captions, 0.000972 hours)",
        "read by decord 7",
        "1.75 steps an epoch: batches of 4 = 2 x 2",
    ]
    with tarfile.open(world / "z.tar", "w") as opened:
        info = tarfile.TarInfo("1.mp4")
        opened.addfile(info, io.BytesIO())
    done = videodiff("data", "check", str(world / "z.tar"))
    assert done.returncode == 2
    assert "z.tar: sample 1 has no caption" in done.stdout
    assert done.stderr.strip().endswith("1 problems (1 no caption), listed above; mend or remove them")
    assert videodiff("data", "check", str(world), "--batch-size", "4", "--world-size", "3").returncode == 2


def test_an_epoch_has_equal_shares() -> None:
    assert steps_per_epoch(10, 4, 2) == 2.5
    with pytest.raises(UserError, match="equal shares"):
        steps_per_epoch(10, 4, 3)
