"""The evaluation tells an oracle from stages that err, keeps what is finished, and never mixes two protocols."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from data_pipeline.world import COLOURS, Combination, combinations, render, sample_scene, split
from data_pipeline.world_captions import parse
from stages.evaluation.command import STAGE_ROWS
from stages.evaluation.judging import Job, evaluate
from stages.evaluation.kept import Samples
from stages.evaluation.measures import Gauge
from stages.evaluation.questions import WorldQuestions, planned_prompts
from stages.evaluation.road import Plan, blend, measure
from stages.evaluation.sheets import table
from videodiff.diffusion.samplers import DDIM
from videodiff.errors import UserError
from videodiff.metrics.pictures import EQUAL_DB
from videodiff.parts import Sampling
from videodiff.video_io import read_image

EVERY_ROW = tuple(row for rows in STAGE_ROWS.values() for row in rows)
IDENTITY = {"model": "oracle", "software": {"torch": torch.__version__}}
SAMPLING = dict.fromkeys(("image", "video", "interpolation"), Sampling())
PLAN = Plan(EVERY_ROW, size=64, frames=16, fps=8.0, factor=2, seed=5, sampling=SAMPLING)
QUIET = Console(quiet=True)


def judge(road: "Oracle", plan: Plan, folder: Path, num: int, num_held_out: int) -> dict:
    report = evaluate(Job(road, plan, WorldQuestions(num, num_held_out, 5), Gauge(), IDENTITY, folder), QUIET)
    assert report is not None
    return report


class Oracle:
    """Latents are pixels; each stage renders what the prompt asks for."""

    def __init__(self) -> None:
        self.prompts = 0

    def encode(self, frames: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(frames.astype(np.float32)).permute(0, 4, 1, 2, 3)

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        return latents.permute(0, 2, 3, 4, 1).round().clamp(0, 255).numpy().astype(np.uint8)

    def decode_checked(self, latents: torch.Tensor) -> tuple[np.ndarray, list[bool]]:
        return self.decode(latents), [True] * len(latents)

    def clip(self, key, frames: int, fps: float) -> np.ndarray:
        combination = Combination(**parse(key.prompt))
        return render(sample_scene(combination, key.seed, key.prompt), 64, frames, fps)

    def image(self, keys, sampling) -> torch.Tensor:
        self.prompts += len(keys)
        return self.encode(np.stack([self.clip(key, 1, 8.0) for key in keys]))

    def video(self, keys, first, fps, sampling) -> torch.Tensor:
        return self.encode(np.stack([self.clip(key, 16, fps) for key in keys]))

    def interpolation(self, keys, clip, fps, sampling) -> torch.Tensor:
        return self.encode(np.stack([blend(frames, 2) for frames in self.decode(clip)]))


class WrongColour(Oracle):
    """Stage 1 draws everything in the next colour; the other stages do as they are told."""

    def image(self, keys, sampling) -> torch.Tensor:
        clips = []
        for key in keys:
            told = parse(key.prompt)
            names = list(COLOURS)
            told["colour"] = names[(names.index(told["colour"]) + 1) % len(names)]
            clips.append(render(sample_scene(Combination(**told), key.seed, key.prompt), 64, 1, 8.0))
        return self.encode(np.stack(clips))


class Shuffled(Oracle):
    """The frames of each clip come in another order."""

    def video(self, keys, first, fps, sampling) -> torch.Tensor:
        return super().video(keys, first, fps, sampling)[:, :, [0, 9, 3, 14, 1, 12, 7, 5, 15, 2, 10, 4, 13, 6, 11, 8]]


class Flicker(Oracle):
    """One frame of each clip has its red and green exchanged: the vote over frames does not see it."""

    def video(self, keys, first, fps, sampling) -> torch.Tensor:
        clip = super().video(keys, first, fps, sampling)
        clip[:, :, 7] = clip[:, [2, 0, 1], 7]
        return clip


class Broken(Oracle):
    """The video stage gives no finite numbers."""

    def video(self, keys, first, fps, sampling) -> torch.Tensor:
        return super().video(keys, first, fps, sampling) * float("nan")


def shares(report: dict, row: str) -> dict[str, float]:
    """Attribute -> share right over all splits."""
    entries = [e for e in report["rows"] if e["row"] == row]
    total = sum(e["n"] for e in entries)
    return {name: sum(e["shares"][name]["right"] for e in entries) / total for name in entries[0]["shares"]}


def test_an_oracle_is_right_and_loses_nothing(tmp_path: Path) -> None:
    report = judge(Oracle(), PLAN, tmp_path, 2, 2)
    assert [(e["row"], e["split"]) for e in report["rows"]] == [
        (row, name) for row in EVERY_ROW for name in ("seen", "held_out", "held_out_pair")
    ]
    for row in ("autoencoder", "image", "video_real", "video_generated"):
        assert set(shares(report, row).values()) == {1.0}, row
    first = report["rows"][0]
    assert first["measures"]["reconstruction_psnr"]["mean"] == EQUAL_DB
    assert first["not_finite"] == 0
    told = {name: value["mean"] for name, value in first["measures"].items()}
    for channel, colour in enumerate(("red", "green", "blue")):  # what the latents are here
        assert told[f"latent_mean_{channel}"] == pytest.approx(255 * told[colour], rel=0.02)
    assert told["latent_mean"] == pytest.approx(np.mean([told[f"latent_mean_{channel}"] for channel in range(3)]))
    assert 0 < told["latent_deviation_0"] < 128
    assert ("motion" in first["shares"], "motion" in report["rows"][3]["shares"]) == (True, False)
    generated = next(e for e in report["rows"] if e["row"] == "video_generated")
    assert generated["measures"]["first_frame_psnr"]["mean"] == EQUAL_DB
    ignored = next(e for e in report["rows"] if e["row"] == "video_real")  # it starts where it likes
    assert ignored["measures"]["first_frame_psnr"]["mean"] < 40
    # Blending made the frames between: so both rivals have one PSNR, below that of the autoencoder.
    middle = {name: value["mean"] for name, value in next(
        e for e in report["rows"] if e["row"] == "interpolation"
    )["measures"].items()}  # fmt: skip
    assert middle["middle_psnr"] == middle["middle_rebuilt_blended_psnr"]
    assert middle["middle_psnr"] == middle["middle_blended_psnr"] < middle["middle_rebuilt_psnr"] == EQUAL_DB
    for row in EVERY_ROW:
        assert read_image(tmp_path / f"{row}.png").shape[1] > 300
    assert report["losses"]["seen"]["steps"]["video"] == 0
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
    ("road", "row", "wrong", "kept"),
    [
        (WrongColour(), "image", {"colour", "all"}, {"shape", "size", "background"}),
        (Shuffled(), "video_real", {"motion", "all"}, {"colour", "shape", "background"}),
        (Flicker(), "video_generated", {"all"}, {"colour", "shape", "size", "background", "motion"}),
        (Broken(), "video_generated", {"colour", "shape", "size", "background", "motion", "all"}, set()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Oracle) else None,
)
def test_a_stage_that_errs_is_found_out(tmp_path: Path, road: Oracle, row: str, wrong: set, kept: set) -> None:
    plan = Plan(("image", "video_real", "video_generated"), 64, 16, 8.0, 1, 5, SAMPLING)
    report = judge(road, plan, tmp_path, 3, 3)
    got = shares(report, row)
    # Of shuffled frames, a clip that stands still is right all the same.
    limit = 0.35 if isinstance(road, Shuffled) else 0.0
    assert all(got[name] <= limit for name in wrong), got
    assert all(got[name] == 1 for name in kept), got
    finite = [e["not_finite"] for e in report["rows"] if e["row"] == row]
    assert finite == ([3, 3, 3] if isinstance(road, Broken) else [0, 0, 0])
    if isinstance(road, WrongColour):
        assert set(shares(report, "video_real").values()) == {1.0}  # judged apart from stage 1
        confused = next(e for e in report["rows"] if e["row"] == "image")["confusions"]["colour"]
        names = list(COLOURS)
        for true, seen in confused.items():
            assert set(seen) <= {names[(names.index(true) + 1) % len(names)]}


def test_a_stopped_run_goes_on_and_gives_the_same(tmp_path: Path) -> None:
    plan = Plan(("image", "video_generated"), 64, 16, 8.0, 1, 5, SAMPLING)
    whole = judge(Oracle(), plan, tmp_path / "whole", 9, 9)

    class Stopped(Oracle):
        def image(self, keys, sampling) -> torch.Tensor:
            if self.prompts >= 16:
                raise KeyboardInterrupt
            return super().image(keys, sampling)

    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        judge(Stopped(), plan, folder, 9, 9)
    lines = (folder / "samples.jsonl").read_bytes()
    assert lines.count(b"\n") == 1 + 16
    (folder / "samples.jsonl").write_bytes(lines[:-25])  # and the last line is torn
    road = Oracle()
    assert judge(road, plan, folder, 9, 9) == whole
    assert road.prompts == 27 - 8
    assert (folder / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    again = Oracle()
    assert judge(again, plan, folder, 9, 9) == whole
    assert again.prompts == 0


LATE = """
import sys
from pathlib import Path
from data_pipeline.decoders import ClipError
from stages.evaluation.judging import Job, evaluate
from stages.evaluation.measures import Gauge
from stages.evaluation.questions import WorldQuestions
from tests.test_evaluate import IDENTITY, QUIET, SAMPLING, Oracle, Plan
from videodiff.errors import UserError
from videodiff.training import distributed

class Late(WorldQuestions):
    def clip(self, prompt, clips):
        if distributed.rank() == 1:
            raise ClipError("deadline", "no answer in 60 s")
        return super().clip(prompt, clips)

distributed.start()
try:
    plan = Plan(("image",), 64, 16, 8.0, 1, 5, SAMPLING, batch=1)
    evaluate(Job(Oracle(), plan, Late(3, 0, 5), Gauge(), IDENTITY, Path(sys.argv[1])), QUIET)
except UserError as error:
    print(error)
"""


def test_what_one_rank_meets_is_told_by_all(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LATE, str(tmp_path)], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True, stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        assert "deadline: no answer in 60 s (this machine is busy" in rank.communicate(timeout=120)[0]
    # What the other rank had to do is done.
    assert (tmp_path / "samples.jsonl").read_bytes().count(b"\n") == 1 + 2


def test_a_full_disk_is_a_plain_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "samples.jsonl"))

    monkeypatch.setattr(Samples, "keep", full)
    with pytest.raises(UserError, match=r"samples\.jsonl: No space left on device; mend that"):
        judge(Oracle(), Plan(("image",), 64, 16, 8.0, 1, 5, SAMPLING), tmp_path, 1, 0)


def test_samples_of_another_protocol_are_refused(tmp_path: Path) -> None:
    Samples(tmp_path, {"model": "a", "seed": 1})
    Samples(tmp_path, {"model": "a", "seed": 1})
    with pytest.raises(UserError, match=r"samples\.jsonl: holds samples of another evaluation \(differs in model\)"):
        Samples(tmp_path, {"model": "b", "seed": 1})
    plan = Plan(("image",), 64, 16, 8.0, 1, 5, SAMPLING)
    judge(Oracle(), plan, tmp_path / "plan", 1, 1)
    for change, name in (
        ({"seed": 6}, "seed"),
        ({"sampling": {"image": Sampling(sampler=DDIM(steps=3))}}, "sampling"),
    ):
        with pytest.raises(UserError, match=f"differs in {name}"):
            judge(Oracle(), Plan(**{**vars(plan), **change}), tmp_path / "plan", 1, 1)
    with pytest.raises(UserError, match="differs in num_prompts"):
        judge(Oracle(), plan, tmp_path / "plan", 2, 1)
    (tmp_path / "samples.jsonl").write_text("words\n")
    with pytest.raises(UserError, match="line 1 is not one that evaluate wrote"):
        Samples(tmp_path, {})


def test_prompts_cover_the_splits_with_distinct_noise() -> None:
    found = planned_prompts(2000, 2000, seed=0)
    held = {which: sum(split(c) == which for c in combinations()) for which in ("train", "held_out", "held_out_pair")}
    for which, members in held.items():
        chosen = [p for p in found if p.split == which]
        assert len(chosen) == (2000 if which == "train" else min(2000, members))
        assert all(split(p.combination) == which and parse(p.text) == vars(p.combination) for p in chosen)
    assert len({(p.text, p.turn) for p in found}) == len(found)
    fewer = Counter(p.split for p in planned_prompts(20, 7, seed=0))
    assert fewer == {"train": 20, "held_out": 7, "held_out_pair": 7}


def test_the_table_has_a_row_for_each_entry(tmp_path: Path) -> None:
    plan = Plan(("image",), 64, 16, 8.0, 1, 5, SAMPLING)
    report = judge(Oracle(), plan, tmp_path, 1, 1)
    assert table(report["rows"]).row_count == len(report["rows"]) == 3
    assert report["verdict"] is None


def test_an_unwritable_folder_is_a_plain_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        Samples(tmp_path / "file" / "out", {})


def test_measure_keeps_the_order_of_the_batch() -> None:
    plan = Plan(("image",), 64, 16, 8.0, 1, 5, SAMPLING)
    batch = planned_prompts(4, 0, 5)
    real = np.zeros((4, 1, 64, 64, 3), np.uint8)
    for prompt, measured in zip(batch, measure(Oracle(), plan, batch, real, Gauge())[0], strict=True):
        assert measured.rows["image"]["read"]["colour"] == prompt.combination.colour
