"""A rank that dies or hangs ends the job within a set time, and is named: real processes, killed and stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_training import TinyConfig, tiny

from videodiff import config as configs
from videodiff.training.status import Verdict, verdict

SCRIPT = Path(__file__).with_name("tiny_training.py")
LAST = 8 * 2 + 7  # a sample of rank 1's in the third step


def two(config: TinyConfig, seconds: float = 60) -> list[tuple[int, str]]:
    """(exit status, output) of two ranks; those still there so long after the first has ended are killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, str(SCRIPT), json.dumps(configs.to_dict(config))]
    ranks = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    end = time.monotonic() + 240
    while time.monotonic() < end and all(rank.poll() is None for rank in ranks):
        time.sleep(0.1)
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(rank.poll() is None for rank in ranks):
        time.sleep(0.1)
    for rank in ranks:
        rank.kill()
    outputs = [rank.communicate()[0] for rank in ranks]
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    config = tiny(tmp_path, run__save_every=1, dropout=0.0, signal=int(signal.SIGKILL), signal_at=LAST)
    (status, output), (killed, _) = two(config)
    assert killed == -signal.SIGKILL
    assert status == 2
    assert "rank 1 (process " in output.splitlines()[-1]
    assert f"on {socket.gethostname()}) is gone; the same command goes on" in output.splitlines()[-1]
    assert verdict(tmp_path, 4, 5) == (Verdict.GO_ON, "2 steps are left")


def test_a_stopped_rank_ends_the_others_in_time(tmp_path: Path) -> None:
    config = tiny(tmp_path, run__save_every=1, run__patience=20, signal=int(signal.SIGSTOP), signal_at=LAST)
    (status, output), (killed, _) = two(config, seconds=5)
    assert killed == -signal.SIGKILL  # by this test: nothing else moves a stopped process
    assert status == os.EX_TEMPFAIL
    assert "step 3: nothing moved for 20 s (run.patience); no sign of life from rank 1 (process " in output, output


@pytest.mark.parametrize("rank", [0, 1])
def test_a_ranks_own_mistake_is_told_by_all(tmp_path: Path, rank: int) -> None:
    """A problem of the data that one rank meets, say: the others name it, and stop."""
    config = tiny(tmp_path, run__save_every=1, fails_at=8 * 2 + 7 * rank)
    results = two(config)
    assert [status for status, _ in results] == [2, 2]
    assert results[rank][1].splitlines()[-1] == "sample of the third step is forbidden"
    other = results[1 - rank][1].splitlines()[-1]
    if rank == 1:
        assert other.endswith("stopped: sample of the third step is forbidden")
        assert other.startswith("rank 1 (process ")
    else:
        assert "rank 0" in other
