"""slurm/train.sbatch where no Slurm is: `scontrol` and `srun` are played, the ranks are real (and test_slurm.py)."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_slurm import IMAGE

from data_pipeline.shards import write_world_shards

ROOT = Path(__file__).resolve().parents[1]
SCONTROL = """#!/bin/bash
echo "$@" >> "$PLAY/scontrol.log"
if [[ $1 == show ]]; then echo 127.0.0.1; fi
"""
SRUN = """#!{python}
import os, signal, subprocess, sys, time
ranks = []
signal.signal(signal.SIGUSR1, lambda *_: [rank.send_signal(signal.SIGUSR1) for rank in ranks])
command = sys.argv[1:]
open(os.environ["PLAY"] + "/srun.log", "a").write(" ".join(command) + "\\n")
if "PLAY_CRASH" in os.environ:
    sys.exit(1)
if "PLAY_HANG" in os.environ:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(300)
while command[0].startswith("-"):
    command.pop(0)
for i in range(int(os.environ["SLURM_NTASKS"])):
    variables = {{**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}}
    ranks.append(subprocess.Popen(command, env=variables))
sys.exit(max(abs(rank.wait()) for rank in ranks))
"""


@pytest.fixture
def play(tmp_path: Path, toy_model: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start train.sbatch with overrides, as attempt `attempt` of job 7 with `ranks` tasks."""
    if not (Path(sys.prefix) / "bin" / "activate").is_file():
        pytest.skip("this Python is not a virtual environment")
    (tmp_path / "bin").mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN.format(python=sys.executable))):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    shards = write_world_shards(tmp_path / "shards", num_clips=8, size=32, frames=1, fps=8, seed=1).parent
    given = [f"run.dir={tmp_path / 'run'}", f"model={toy_model}", f"data.shards={shards}"]

    def start(*overrides: str, ranks: int = 1, attempt: int = 0, **more: str) -> subprocess.Popen[str]:
        known = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        known |= {"PLAY": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VIDEODIFF_VENV": sys.prefix}
        known |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(attempt)}
        known |= {"SLURM_NTASKS": str(ranks), "SLURM_JOB_NODELIST": "n[1-2]"}
        # The script's activation puts the environment first on the PATH; what is played must stay before it.
        prefix = f'PATH="{tmp_path / "bin"}:$PATH"; '
        script = (ROOT / "slurm/train.sbatch").read_text().replace("code=0\n", f"{prefix}\ncode=0\n", 1)
        (tmp_path / "train.sbatch").write_text(script)
        command = ["bash", str(tmp_path / "train.sbatch"), *IMAGE, *given, *overrides]
        return subprocess.Popen(
            command, env=known | more, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT
        )

    return start


def done(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=500)
    return process.returncode, output


def requeued(folder: Path) -> bool:
    log = folder / "scontrol.log"
    return log.is_file() and "requeue 7" in log.read_text()


def test_two_ranks_train_and_the_job_is_complete(tmp_path: Path, play: Callable[..., subprocess.Popen[str]]) -> None:
    code, output = done(play("run.steps=2", ranks=2))
    assert code == 0, output
    assert "2 processes x 1 x" in output
    assert "complete: all 2 steps are done" in output
    assert not requeued(tmp_path)
    assert "show hostnames n[1-2]" in (tmp_path / "scontrol.log").read_text()
    assert (tmp_path / "srun.log").read_text().startswith("--kill-on-bad-exit=1 bash -c")


def test_a_warning_is_passed_on_and_the_job_comes_back(
    tmp_path: Path, play: Callable[..., subprocess.Popen[str]]
) -> None:
    """Sent before the ranks listen, even."""
    process = play("run.steps=100000", "run.save_every=1000000")
    while not (tmp_path / "srun.log").is_file():
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    code, output = done(process)
    assert code == 0, output
    assert "stopped by SIGUSR1, saved after step" in output
    assert requeued(tmp_path)
    saved = len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
    code, output = done(play(f"run.steps={saved + 1}", "run.save_every=1000000", attempt=1))
    assert code == 0, output
    assert f"resumed after step {saved}" in output


def test_what_can_not_succeed_does_not_come_back(tmp_path: Path, play: Callable[..., subprocess.Popen[str]]) -> None:
    code, output = done(play("data.shards=" + str(tmp_path / "nowhere")))
    assert code
    assert "hopeless: " in output
    code, output = done(play("run.stops=3"))
    assert code
    assert "run.stops: unknown key" in output
    # A rank that dies before it opens the run: again, up to the cap.
    assert not requeued(tmp_path)
    crash, run = {"PLAY_CRASH": "1"}, f"run.dir={tmp_path / 'other'}"
    code, output = done(play(run, "run.max_fruitless=2", **crash))
    assert (code, requeued(tmp_path)) == (0, True), output
    (tmp_path / "scontrol.log").unlink()
    code, output = done(play(run, "run.max_fruitless=2", attempt=1, **crash))
    assert code
    assert "over the cap: " in output
    assert not requeued(tmp_path)


@pytest.mark.parametrize("early", [False, True])
def test_ranks_that_hang_are_ended_in_time_and_the_job_comes_back(
    tmp_path: Path, play: Callable[..., subprocess.Popen[str]], early: bool
) -> None:
    """Warned while they hang, or before there are any (srun, which starts, may then end of it)."""
    hang = {"PLAY_HANG": "1", "VIDEODIFF_SAVE_SECONDS": "6"}
    if early:
        (tmp_path / "venv/bin").mkdir(parents=True)
        (tmp_path / "venv/bin/activate").write_text(f"kill -USR1 $$\nsource {sys.prefix}/bin/activate\n")
        hang["VIDEODIFF_VENV"] = str(tmp_path / "venv")
    process = play("run.steps=2", **hang)
    while process.poll() is None and not (tmp_path / "srun.log").is_file():
        time.sleep(0.1)
    began = time.monotonic()
    if not early:
        process.send_signal(signal.SIGUSR1)
    code, output = done(process)
    assert code == 0, output
    assert time.monotonic() - began < 250  # played, srun hangs for longer
    assert early or "the ranks did not leave in time (VIDEODIFF_SAVE_SECONDS=6) and are ended" in output
    assert "go on: " in output
    assert requeued(tmp_path)


def ranks(folder: Path, **more: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """`ranks videodiff train` in a shell where all that Slurm has are stand-ins; what srun was given."""
    for name, text in (("scontrol", "echo n1"), ("srun", 'printf "%s\\n" "$*" >> "$PLAY/srun.log"')):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    known = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    known |= {"PATH": f"{folder}:{os.environ['PATH']}", "PLAY": str(folder), "SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}
    known |= {"SLURM_JOB_NODELIST": "n1", "VIDEODIFF_CONTAINER": "/images/videodiff.sqsh", **more}
    script = f"set -euo pipefail; source {ROOT}/slurm/env.sh; ranks videodiff train; once videodiff status; echo end"
    told = subprocess.run(
        ["bash", "-c", script], env=known, capture_output=True, text=True, check=False, cwd=folder, timeout=60
    )
    log = folder / "srun.log"
    return told, log.read_text() if log.is_file() else ""


def test_a_task_for_each_gpu_or_none_at_all(tmp_path: Path) -> None:
    told, given = ranks(tmp_path, SLURM_GPUS_ON_NODE="8", SLURM_TASKS_PER_NODE="1(x2)")
    assert (told.returncode, given, told.stdout) == (2, "", "")
    assert told.stderr.splitlines() == [
        "error: 8 GPUs but 1 tasks on a node, and a task takes one GPU; give sbatch --gpus-per-node=N "
        "--ntasks-per-node=N"
    ]
    for tasks in ("8(x2)", "8,7", "8"):
        told, given = ranks(tmp_path, SLURM_GPUS_ON_NODE="8", SLURM_TASKS_PER_NODE=tasks)
        assert (told.returncode, told.stderr) == (0, "")
        assert "--gpu-bind=none" in given


def test_containers_get_what_their_runtime_wants(tmp_path: Path) -> None:
    """A stand-in `srun` notes its arguments; no container runs here."""
    end = ' exec "$@" rank videodiff train'

    def tell(**more: str) -> tuple[str, str]:
        (tmp_path / "srun.log").unlink(missing_ok=True)
        told, given = ranks(tmp_path, **more)
        assert (told.returncode, told.stderr, told.stdout) == (0, "", "end\n")
        for_ranks, for_one = given.splitlines()
        assert for_ranks.startswith("--kill-on-bad-exit=1 ")
        assert for_ranks.count("bash -c trap") == 1
        return for_ranks.partition("bash -c trap")[0].removeprefix("--kill-on-bad-exit=1 "), for_one

    image, here = "/images/videodiff.sqsh", str(tmp_path)
    for mounts, bound in (("", ""), ("/data,/scratch", ",/data,/scratch")):
        pyxis = f"--container-image={image} --container-workdir={here} --container-mounts={here}:{here}{bound} "
        once = "--nodes=1 --ntasks=1 "
        assert tell(VIDEODIFF_MOUNTS=mounts) == (pyxis, f"{once}{pyxis}videodiff status")
        apptainer = f"apptainer exec --nv --bind {here}{bound} /images/videodiff.sif "
        given = {"VIDEODIFF_MOUNTS": mounts, "VIDEODIFF_CONTAINER": "/images/videodiff.sif"}
        assert tell(**given) == (apptainer, f"{once}{apptainer}videodiff status")
    assert end in (tmp_path / "srun.log").read_text()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("SLURM_JOB_NODELIST", "start this in a job"),
        ("SLURM_JOB_ID", "start this in a job"),
        ("SLURM_NTASKS", "give sbatch or salloc --ntasks-per-node=N"),
    ],
)
def test_without_a_variable_of_slurms_there_is_one_line(tmp_path: Path, name: str, remedy: str) -> None:
    told, given = ranks(tmp_path, **{name: ""})
    assert (told.returncode != 0, given, told.stdout) == (True, "", "")
    assert len(told.stderr.splitlines()) == 1
    assert f"{name}: is not set: {remedy}" in told.stderr


def test_without_slurm_it_says_so() -> None:
    known = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    command = ["bash", str(ROOT / "slurm/train.sbatch"), "configs/demo/image.yaml"]
    found = subprocess.run(command, env=known, capture_output=True, text=True, check=False)
    assert found.returncode
    assert "submit this script with sbatch" in found.stderr
    known |= {"SLURM_SUBMIT_DIR": str(ROOT), "VIDEODIFF_VENV": sys.prefix, "PATH": "/usr/bin:/bin"}
    if (Path(sys.prefix) / "bin" / "activate").is_file():
        found = subprocess.run(command, env=known, capture_output=True, text=True, check=False)
        assert found.returncode
        assert "SLURM_JOB_NODELIST" in found.stderr


def test_a_chain_names_what_each_job_waits_for(tmp_path: Path) -> None:
    """slurm/pipeline.sh with an sbatch that is played."""
    played = 'n=$(ls "$PLAY" | wc -l); touch "$PLAY/job$n"; echo "$*" >> "$PLAY.log"; echo $n'
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\n{played}\n")
    (tmp_path / "sbatch").chmod(0o755)
    (tmp_path / "play").mkdir()
    known = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PLAY": str(tmp_path / "play")}

    def chain(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "slurm/pipeline.sh"), *arguments]
        return subprocess.run(command, env=known, capture_output=True, text=True, check=False, cwd=ROOT)

    found = chain("configs/demo", "--", "--nodes=2")
    assert [line.partition(":")[0] for line in found.stdout.splitlines()] == [
        "autoencoder", "text", "image", "image_prompt", "video", "interpolation", "upscale",
    ]  # fmt: skip
    jobs = (tmp_path / "play.log").read_text().splitlines()
    assert "--dependency" not in jobs[0]
    assert [f"--dependency=afterok:{n} " in job for n, job in enumerate(jobs[1:])] == [True] * 6
    assert all("--nodes=2" in job for job in jobs)
    order = [f"configs/emu/{name}.yaml" for name in ("image", "video_256", "interpolation")]
    assert [line.partition(":")[0] for line in chain(*order).stdout.splitlines()] == [
        "image",
        "video_256",
        "interpolation",
    ]
    assert "left out: configs/demo/autoencoder_vq.yaml " in found.stderr
    emu = chain("configs/emu")
    assert (emu.returncode, emu.stdout) == (2, "")
    assert "no video.yaml" in emu.stderr
    assert "configs/emu/video_512_16.yaml" in emu.stderr
    assert chain("configs/nowhere").returncode == 2
    assert "no stage is named" in chain("configs/data").stderr
