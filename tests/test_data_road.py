"""Files of people become shards that train: prepare, check, show, encode and train, as commands on real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from tiny_stages import ENGINE

from data_pipeline.loader import DataConfig, ShardSource
from data_pipeline.shards import open_shards, read_sample
from stages.assemble import train_stage
from stages.cli import main
from tests.numbered_videos import KINDS, X264, encode, numbered, numbers
from videodiff.config import build

ROOT = Path(__file__).resolve().parents[1]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What `videodiff data ...` prints; it must succeed."""
    with pytest.raises(SystemExit) as stop:
        main(["data", *map(str, arguments)])
    printed = capsys.readouterr()
    assert not stop.value.code, printed.out + printed.err
    return printed.out


def captioned(path: Path, frames: int, height: int, width: int, *options: str, first: int = 0) -> None:
    encode(path, numbered(frames, height, width, first), *(options or X264))
    path.with_suffix(".txt").write_text(f"a clip named {path.stem}")


def test_prepared_shards_have_shapes_for_buckets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wide and a tall video keep their aspects; each goes uncropped into the bucket of its shape."""
    (tmp_path / "in").mkdir()
    captioned(tmp_path / "in" / "wide.mp4", 26, 64, 96)
    captioned(tmp_path / "in" / "tall.mp4", 26, 96, 64, first=100)
    out = tmp_path / "out"
    settings = ("clip={frames: 4, fps: 8, size: 64}", "scenes=null", "workers=0", "filters.duplicate_bits=null")
    run(capsys, "prepare", tmp_path / "in", "--out", out, *settings)
    found = [(shape, read_sample(shard, n)) for shard in open_shards(str(out)) for n, shape in enumerate(shard.shapes)]
    assert {(sample.key.split("-")[0], shape) for shape, sample in found} == {
        ("wide", (4, 8.0, 64, 96)), ("tall", (4, 8.0, 96, 64)),
    }  # fmt: skip
    assert run(capsys, "check", out, "--workers", 0).splitlines()[1] == f"read by decord {len(found)}"
    tree = {
        "shards": str(out), "batch_size": 2, "frames": 4, "fps": 8, "size": 64, "workers": 0, "prefetch": 0,
        "buckets": [
            {"frames": 4, "height": 64, "width": 96}, {"frames": 4, "height": 96, "width": 64},
            {"frames": 8, "height": 64, "width": 96}, {"frames": 1, "height": 64, "width": 96},
        ],
    }  # fmt: skip
    seen = set()
    for batch in islice(ShardSource(build(DataConfig, tree, "a test"), 0).batches(0, 0, 1, 2), 12):
        for key, clip in zip(batch.keys, batch.frames.numpy(), strict=True):
            name = key.split("-")[0]
            seen.add((name, clip.shape))
            shown = numbers(clip)
            assert [number - shown[0] for number in shown] == [0, 3, 6, 9]
            assert (shown[0] >= 100) == (name == "tall"), "nothing was cut off"
    assert seen == {("wide", (4, 64, 96, 3)), ("tall", (4, 96, 64, 3))}


def test_from_a_folder_of_videos_to_training_steps(
    toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, encoded = tmp_path / "in", tmp_path / "out", tmp_path / "encoded"
    source.mkdir()
    captioned(source / "h264.mp4", 24, 64, 96)
    captioned(source / "av1.webm", 24, 64, 64, *KINDS["av1.webm"], first=60)
    captioned(source / "hevc.mov", 24, 96, 64, *KINDS["hevc.mov"], first=120)
    (source / "broken.mp4").write_bytes((source / "h264.mp4").read_bytes()[:500])
    (source / "broken.txt").write_text("not to be read")
    settings = ("clip={frames: 4, fps: 8, size: 32}", "scenes=null", "workers=0", "filters.duplicate_bits=null")
    assert "kept 6 of 7 clips" in run(capsys, "prepare", source, "--out", out, *settings)
    assert run(capsys, "check", out, "--workers", 0, "--batch-size", 2).splitlines() == [
        "6 of 6 samples in 1 shards are good (6 captions, 0.000833 hours)",
        "read by decord 6",
        "3 steps an epoch: batches of 2 = 1 x 2",
    ]
    run(capsys, "show", out, "--out", tmp_path / "page.html", "--workers", 0)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img ") == 6
    assert "a clip named av1" in page
    shape = ("--frames", 4, "--fps", 8, "--size", 32, "--workers", 0)
    run(capsys, "encode", out, "--model", toy_model, "--out", encoded, *shape)
    assert run(capsys, "check", encoded, "--workers", 0).startswith("6 of 6 samples")
    tree = {
        "stage": "video", "model": str(toy_model), "engine": ENGINE,
        "run": {"dir": str(tmp_path / "run"), "steps": 2, "save_every": 2, "sample_every": 2},
        "data": {"shards": str(encoded), "batch_size": 4, "frames": 4, "fps": 8, "size": 32, "workers": 0},
    }  # fmt: skip
    (tmp_path / "video.yaml").write_text(json.dumps(tree))
    train_stage(tmp_path / "video.yaml")
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps] == [1, 2]
    assert all(0 < entry["loss"] < 100 for entry in steps)


def test_an_array_of_jobs_prepares_in_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The job script as Slurm runs it, which tells it of its array by variables."""
    if not (Path(sys.prefix) / "bin" / "activate").is_file():
        pytest.skip("this Python is not a virtual environment")
    (tmp_path / "in").mkdir()
    captioned(tmp_path / "in" / "a b.mp4", 14, 64, 96)
    captioned(tmp_path / "in" / "c.mp4", 14, 64, 96, first=50)
    out = tmp_path / "out"
    command = ["bash", str(ROOT / "slurm" / "data.sbatch"), str(tmp_path / "in"), "--out", str(out)]
    command += ["clip={frames: 4, fps: 8, size: 64}", "scenes=null", "workers=0", "filters.duplicate_bits=null"]
    known = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    known |= {"SLURM_SUBMIT_DIR": str(ROOT), "VIDEODIFF_VENV": sys.prefix, "PYTHONPATH": str(ROOT)}

    def start(**variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=known | variables, capture_output=True, text=True, check=False)

    alone = start()
    assert alone.returncode
    assert "submit this script as an array" in alone.stderr
    for task in "12":
        done = start(SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_COUNT="2")
        assert (done.returncode, f"part {task}/2 is done" in done.stdout) == (0, True), done.stderr
    assert "kept 2 of 2 clips" in run(capsys, "merge", out)
