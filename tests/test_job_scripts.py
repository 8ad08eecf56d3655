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
import os, signal, subprocess, sys
ranks = []
signal.signal(signal.SIGUSR1, lambda *_: [rank.send_signal(signal.SIGUSR1) for rank in ranks])
command = sys.argv[1:]
open(os.environ["PLAY"] + "/srun.log", "a").write(" ".join(command) + "\\n")
if "PLAY_CRASH" in os.environ:
    sys.exit(1)
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
        "autoencoder", "text", "image", "video", "interpolation",
    ]  # fmt: skip
    jobs = (tmp_path / "play.log").read_text().splitlines()
    assert "--dependency" not in jobs[0]
    assert [f"--dependency=afterok:{n} " in job for n, job in enumerate(jobs[1:])] == [True] * 4
    assert all("--nodes=2" in job for job in jobs)
    order = [f"configs/emu/{name}.yaml" for name in ("image", "video_256", "interpolation")]
    assert [line.partition(":")[0] for line in chain(*order).stdout.splitlines()] == [
        "image",
        "video_256",
        "interpolation",
    ]
    assert chain("configs/nowhere").returncode == 2
    assert "no stage is named" in chain("configs/data").stderr
