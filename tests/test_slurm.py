"""The job scripts on a real Slurm of two and three nodes: `make test-slurm`.

A run that meets its limit, is told to requeue, or loses a node or a cable ends with the weights and the curve of a run
that nothing happened to.
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_toy_model
from safetensors.torch import load_file
from slurm_lab import Lab
from test_data_road import captioned
from tiny_training import PACE

from data_pipeline.shards import write_world_shards

ROOT = Path(__file__).resolve().parents[1]
STEPS = 90
# Steps of about a second on a core: what happens to a job must happen in the middle.
IMAGE = [
    str(ROOT / "configs/demo/image.yaml"),
    "data.batch_size=4", "data.size=32", "data.workers=0", "network.channels=4", "network.model_channels=16",
    "network.channel_mult=[1]", "network.attention_levels=[true]", "network.head_channels=8", "engine.precision=fp32",
    "engine.zero_stage=2", "engine.decay=constant", "engine.decay_steps=null", "run.sample_every=0",
    f"run.steps={STEPS}", "run.save_every=5",
]  # fmt: skip
SLOW = ["data.batch_size=8", "data.size=64", "network.model_channels=128", "network.num_res_blocks=3"]

pytestmark = pytest.mark.slurm


class Cluster:
    """A lab in which the job scripts find this checkout, a toy model and shards."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.variables = {"VIDEODIFF_VENV": sys.prefix, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
        log = f"--output={self.folder}/%x-%j.log"
        command = ["sbatch", "--parsable", f"--chdir={ROOT}", log, *options, str(ROOT / "slurm" / script), *arguments]
        return self.lab.run(*command, **self.variables).strip()

    def train(self, name: str, *overrides: str, options: tuple[str, ...] = ("--nodes=2",)) -> str:
        given = [
            f"run.dir={self.folder / name}",
            f"model={self.folder / 'model'}",
            f"data.shards={self.folder / 'shards'}",
        ]
        return self.submit("train.sbatch", *IMAGE, *SLOW, *given, *overrides, options=options)

    def records(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name / "metrics.jsonl"
        if not path.is_file():
            return []
        lines = path.read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in PACE} for line in lines if line.endswith("}")]

    def reach(self, name: str, step: int, seconds: float = 240) -> None:
        """Until the run has done a step."""
        self.lab.wait(lambda: len(self.records(name)) >= step, seconds)

    def end(self, job: str, seconds: float = 400) -> str:
        """The state that a job ends in."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        try:
            self.lab.wait(lambda: self.lab.job(job)["JobState"] in ended, seconds)
        except TimeoutError:
            raise AssertionError(f"{self.lab.job(job)}\n{self.log(job)}") from None
        return self.lab.job(job)["JobState"]

    def log(self, job: str) -> str:
        return "\n".join(path.read_text() for path in self.folder.glob(f"[!a]*-{job}.log"))

    def assert_as_if_nothing_happened(self, name: str, job: str, seconds: float = 400) -> None:
        assert self.end(job, seconds) == "COMPLETED", self.log(job)
        assert self.records(name) == self.records("straight")
        assert len(self.records(name)) == STEPS
        for kind in ("raw", "ema"):
            one, other = (
                load_file(self.folder / run / f"checkpoints/step-{STEPS:08d}" / f"{kind}.safetensors")
                for run in (name, "straight")
            )
            assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    write_toy_model(folder / "model")
    write_world_shards(folder / "shards", num_clips=16, size=32, frames=1, fps=8, seed=1)
    return folder


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    """Two nodes, and a run of two ranks on them that nothing happens to."""
    with Lab(nodes=2) as lab:
        cluster = Cluster(lab, folder)
        job = cluster.train("straight")
        assert cluster.end(job) == "COMPLETED", cluster.log(job)
        yield cluster


def test_two_nodes_share_one_run(cluster: Cluster) -> None:
    log = cluster.log("1")
    assert "batch 8 = 2 processes x 1 x 4 samples; ZeRO 2" in log
    assert len(list((cluster.folder / f"straight/checkpoints/step-{STEPS:08d}/engine").iterdir())) == 2
    assert len(cluster.records("straight")) == STEPS
    command = [sys.prefix + "/bin/videodiff", "status", str(cluster.folder / "straight")]
    text = cluster.lab.run(*command, host="n2", **cluster.variables)
    assert f"complete\n  step {STEPS} of {STEPS} (100 %)" in text


def test_a_warned_job_saves_and_comes_back_by_itself(cluster: Cluster) -> None:
    job = cluster.train("warned")
    for round_, step in enumerate((7, 19), start=1):
        cluster.reach("warned", step)
        cluster.lab.run("scancel", "--batch", "--signal=USR1", job)
        cluster.lab.wait(lambda round_=round_: int(cluster.lab.job(job)["Restarts"]) == round_, 120)
        assert cluster.log(job).count("stopped by SIGUSR1, saved") == round_
    cluster.assert_as_if_nothing_happened("warned", job)
    assert cluster.log(job).count("resumed after step") == 2


def test_a_requeued_job_goes_on(cluster: Cluster) -> None:
    job = cluster.train("requeued")
    cluster.reach("requeued", 12)
    cluster.lab.run("scontrol", "requeue", job)
    cluster.assert_as_if_nothing_happened("requeued", job)
    assert cluster.lab.job(job)["Restarts"] == "1"


def test_a_preempted_job_saves_and_comes_back(cluster: Cluster) -> None:
    """Jobs of a partition of higher priority take both its nodes. The ranks hear of it by TERM, and have the grace."""
    job = cluster.train("preempted", options=("--nodes=2", "--partition=spot"))
    cluster.reach("preempted", 12)
    command = ["sbatch", "--parsable", "--nodes=2", "--exclusive", f"--output={cluster.folder}/urgent-%j.log"]
    urgent = cluster.lab.run(*command, "--wrap", "sleep 3", **cluster.variables).strip()
    assert cluster.end(urgent) == "COMPLETED"
    cluster.assert_as_if_nothing_happened("preempted", job)
    assert cluster.lab.job(job)["Restarts"] == "1"
    assert "stopped by SIGTERM, saved" in cluster.log(job)


def test_a_rank_that_hangs_is_named_and_the_job_goes_on(cluster: Cluster) -> None:
    job = cluster.train("hung", "run.patience=30")
    cluster.reach("hung", 12)
    cluster.lab.run("pkill", "-STOP", "-f", "run.dir=.*/hung", host="n2")
    cluster.assert_as_if_nothing_happened("hung", job)
    assert cluster.lab.job(job)["Restarts"] == "1"
    assert re.search(r"nothing moved for 30 s \(run.patience\); .*rank 1 \(process \d+ on n2\)", cluster.log(job))


def test_a_job_of_limited_time_finishes_over_several_requeues(cluster: Cluster) -> None:
    """A minute's limit, and the warning early in it (Slurm is not exact to the half minute): the ranks are not done.
    A busy machine takes a few steps each time, and comes back twenty times."""
    job = cluster.train("limited", options=("--nodes=2", "--time=1", "--signal=B:USR1@45"))
    cluster.assert_as_if_nothing_happened("limited", job, 1200)
    assert int(cluster.lab.job(job)["Restarts"]) >= 2, cluster.log(job)
    assert cluster.log(job).count("stopped by SIGUSR1, saved") >= 2


def test_a_job_that_can_not_succeed_stops_with_its_reason(cluster: Cluster) -> None:
    job = cluster.train("hopeless", "data.batch_size=5")
    assert cluster.end(job) == "FAILED"
    assert "data.batch_size=5 can't be shared by 2 processes" in cluster.log(job)
    assert cluster.lab.job(job)["Restarts"] == "0"
    assert "hopeless: " in cluster.log(job)


def test_two_jobs_on_one_run_the_second_refuses(cluster: Cluster) -> None:
    first = cluster.train("shared", options=("--nodes=1", "--ntasks-per-node=2"))
    cluster.reach("shared", 1)
    second = cluster.train("shared", options=("--nodes=1", "--ntasks-per-node=2"))
    assert cluster.end(second) == "FAILED"
    assert f"job {first}, attempt 0, process" in cluster.log(second)
    assert "trains in it" in cluster.log(second)
    assert cluster.end(first) == "COMPLETED", cluster.log(first)


PREPARED = ["clip={frames: 4, fps: 8, size: 64}", "scenes=null", "workers=0", "filters.duplicate_bits=null"]


def some_videos(folder: Path, count: int) -> Path:
    """A folder of videos of a clip each, with captions."""
    folder.mkdir()
    for number in range(count):
        captioned(folder / f"{number}.mp4", 14, 64, 96, first=20 * number)
    return folder


def test_videos_are_prepared_in_an_array_and_merged(cluster: Cluster) -> None:
    videos = some_videos(cluster.folder / "videos", 4)
    out = cluster.folder / "prepared"
    log = f"--output={cluster.folder}/array-%A-%a.log"
    array = cluster.submit(
        "data.sbatch", str(videos), "--out", str(out), *PREPARED, options=("--array=1-2", "--cpus-per-task=1", log)
    )
    merge = f"bash -c '. slurm/env.sh; once videodiff data merge {out}'"  # --wrap is run by sh, perhaps not bash
    command = [
        "sbatch",
        "--parsable",
        f"--chdir={ROOT}",
        f"--dependency=afterok:{array}",
        f"--output={cluster.folder}/merge-%j.log",
    ]
    merged = cluster.lab.run(*command, "--wrap", merge, **cluster.variables).strip()
    assert cluster.end(merged) == "COMPLETED", cluster.log(merged)
    assert "kept 4 of 4 clips" in cluster.log(merged)


def test_a_warned_part_of_an_array_comes_back_and_goes_on(cluster: Cluster) -> None:
    videos = some_videos(cluster.folder / "many videos", 60)
    out = cluster.folder / "prepared-late"
    options = ("--array=1-1", "--cpus-per-task=1", f"--output={cluster.folder}/late-%A-%a.log")
    array = cluster.submit("data.sbatch", str(videos), "--out", str(out), *PREPARED, options=options)
    cluster.lab.wait(lambda: any(out.rglob("*.jsonl")), 240)  # it has begun to write down what it finds
    cluster.lab.run("scancel", "--batch", "--signal=USR1", f"{array}_1")
    cluster.lab.wait(lambda: cluster.lab.job(f"{array}_1")["Restarts"] == "1", 120)
    assert cluster.end(f"{array}_1", 600) == "COMPLETED", (cluster.folder / f"late-{array}-1.log").read_text()
    assert "kept 60 of 60 clips" in (cluster.folder / f"late-{array}-1.log").read_text()


def test_an_evaluation_follows_a_training(cluster: Cluster) -> None:
    job = cluster.train("judged", "run.steps=2")
    options = ("--nodes=2", f"--dependency=afterok:{job}")
    judge = cluster.submit(
        "evaluate.sbatch", str(cluster.folder / "judged"), "--stage", "image", "--num-prompts", "4",
        "--num-held-out", "0", "--out", str(cluster.folder / "judgement"), options=options,
    )  # fmt: skip
    assert cluster.end(job) == "COMPLETED", cluster.log(job)
    assert cluster.end(judge) == "COMPLETED", cluster.log(judge)
    assert (cluster.folder / "judgement/evaluation.json").is_file()
    assert {"samples.jsonl", "samples-1.jsonl"} <= {path.name for path in (cluster.folder / "judgement").iterdir()}


def test_a_warned_evaluation_comes_back_and_goes_on(cluster: Cluster) -> None:
    out = cluster.folder / "patient"
    judge = cluster.submit(
        "evaluate.sbatch", str(cluster.folder / "straight"), "--stage", "image", "--num-prompts", "64",
        "--num-held-out", "0", "--batch-size", "2", "--out", str(out), options=("--nodes=1", "--ntasks-per-node=2"),
    )  # fmt: skip

    def finished() -> int:
        return sum(path.read_text().count("\n") for path in out.glob("samples*.jsonl"))

    cluster.lab.wait(lambda: finished() >= 4, 240)
    cluster.lab.run("scancel", "--batch", "--signal=USR1", judge)
    cluster.lab.wait(lambda: cluster.lab.job(judge)["Restarts"] == "1", 120)
    kept = finished()
    assert 4 <= kept < 64
    assert cluster.end(judge, 600) == "COMPLETED", cluster.log(judge)
    assert finished() <= 64 + 2 * 2  # only the batch of each rank that was not done yet is made again
    assert json.loads((out / "evaluation.json").read_text())["rows"][0]["n"] == 64


def test_an_evaluation_judges_each_checkpoint_of_a_run_that_trains(cluster: Cluster) -> None:
    job = cluster.train("followed", "run.steps=20", "run.keep_last=10", options=("--nodes=1", "--ntasks-per-node=2"))
    out = cluster.folder / "following"
    judge = cluster.submit(
        "evaluate.sbatch", str(cluster.folder / "followed"), "--stage", "image", "--num-prompts", "2",
        "--num-held-out", "0", "--checkpoints", "all", "--watch", "--out", str(out), options=("--nodes=1",),
    )  # fmt: skip
    assert cluster.end(job) == "COMPLETED", cluster.log(job)
    assert cluster.end(judge) == "COMPLETED", cluster.log(judge)
    told = json.loads((out / "checkpoints.json").read_text())
    assert [entry["step"] for entry in told["checkpoints"]] == [5, 10, 15, 20]
    assert "complete at step 20" in cluster.log(judge)
    assert (out / "report.html").is_file()


@pytest.mark.parametrize("fault", ["power", "cable"])
def test_a_lost_node_with_a_spare(folder: Path, cluster: Cluster, fault: str) -> None:
    """The node of rank 0 or of rank 1 goes, and the run goes on on the spare one; the old attempt publishes nothing."""
    name = f"lost-{fault}"
    with Lab(nodes=3) as lab:
        third = Cluster(lab, folder)
        job = third.train(name, "run.patience=60", options=("--nodes=2", "--job-name=spare" + fault))
        third.reach(name, 12)
        lost = "n2" if fault == "power" else "n1"
        if fault == "power":
            lab.power_off(lost)
        else:
            lab.cut(lost)
        third.assert_as_if_nothing_happened(name, job)
        assert int(lab.job(job)["Restarts"]) >= 1


@pytest.mark.parametrize("fault", ["power", "cable"])
def test_a_lost_node_without_a_spare_is_waited_for(folder: Path, cluster: Cluster, fault: str) -> None:
    name = f"waiting-{fault}"
    with Lab(nodes=2) as lab:
        second = Cluster(lab, folder)
        job = second.train(name, "run.patience=60", options=("--nodes=2", "--job-name=nospare" + fault))
        second.reach(name, 12)
        fall, rise = (lab.power_off, lab.power_on) if fault == "power" else (lab.cut, lab.mend)
        fall("n2")
        lab.wait(lambda: lab.job(job)["JobState"] == "PENDING", 120)
        time.sleep(2)
        assert lab.job(job)["JobState"] == "PENDING"
        rise("n2")
        second.assert_as_if_nothing_happened(name, job)


def test_all_stages_as_one_chain_end_in_a_video(cluster: Cluster) -> None:
    """`slurm/pipeline.sh` on small stages, then a prompt."""
    import yaml

    chain = cluster.folder / "chain"
    chain.mkdir()
    before, small = None, {"batch_size": 2, "size": 32, "frames": 4, "fps": 8, "workers": 0}
    for stage in ("autoencoder", "text", "image", "video", "interpolation"):
        tree = yaml.safe_load((ROOT / f"configs/demo/{stage}.yaml").read_text())
        tree["run"] |= {"dir": str(chain / "runs" / stage), "steps": 2, "sample_every": 0}
        tree["data"] = {
            **small,
            "shards": str(cluster.folder / "clips"),
            "frames": 7 if stage == "interpolation" else 4,
        }
        tree["data"]["fps"] = 16 if stage == "interpolation" else 8
        if before is not None:
            tree["model"] = str(chain / "runs" / before)
        if stage == "text":
            tree["network"]["image_size"] = 32
        before = stage
        (chain / f"{stage}.yaml").write_text(yaml.safe_dump(tree))
    write_world_shards(cluster.folder / "clips", num_clips=8, size=32, frames=8, fps=16, seed=1)
    log = f"--output={cluster.folder}/%x-%j.log"
    script = str(ROOT / "slurm/pipeline.sh")
    output = cluster.lab.run("bash", script, str(chain), "--", f"--chdir={ROOT}", log, **cluster.variables)
    jobs = [line.rpartition(" ")[2] for line in output.splitlines()]
    assert len(jobs) == 5
    for job in jobs:
        assert cluster.end(job) == "COMPLETED", cluster.log(job)
    video = cluster.folder / "chain.mp4"
    command = [sys.prefix + "/bin/videodiff", "generate", "a red circle", "--model", str(chain / "runs/interpolation")]
    cluster.lab.run(*command, "-o", str(video), "--steps", "2", host="n1", **cluster.variables)
    assert video.stat().st_size > 1000
