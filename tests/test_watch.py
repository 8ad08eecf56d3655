"""A rank that dies or hangs ends the job within a set time, and is named: real processes, killed and stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tiny_training import TinyConfig, tiny

from videodiff import config as configs
from videodiff.errors import UserError
from videodiff.training import watch
from videodiff.training.status import Verdict, verdict
from videodiff.training.watch import Board, Phase, Sign, Watch

SCRIPT = Path(__file__).with_name("tiny_training.py")
LAST = 8 * 2 + 7  # a sample of rank 1's in the third step


def two(config: TinyConfig, seconds: float = 60, **more: str) -> list[tuple[int, str]]:
    """(exit status, output) of two ranks; those still there so long after the first has ended are killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", **more}
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
    config = tiny(tmp_path, run__save_every=1, run__patience=40, signal=int(signal.SIGSTOP), signal_at=LAST)
    (status, output), (killed, _) = two(config, seconds=5)  # patience also holds for the start, slow where all is busy
    assert killed == -signal.SIGKILL  # by this test: nothing else moves a stopped process
    assert status == os.EX_TEMPFAIL
    assert "step 3: nothing moved for 40 s (run.patience); no sign of life from rank 1 (process " in output, output


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_before_the_first_step_is_named(tmp_path: Path, rank: int) -> None:
    """It lives, and reads for ever: a disk that does not answer, say."""
    results = two(tiny(tmp_path, run__patience=20), TINY_HANG=str(rank))
    assert {status for status, _ in results} == {os.EX_TEMPFAIL}, results
    told = "before the first step: nothing moved for 20 s (run.patience); reading models and data: "
    assert f"{told}rank {rank} (process " in results[1 - rank][1]
    assert told in verdict(tmp_path, 4, 1)[1]


def test_a_full_disk_of_one_rank_is_told_by_both(tmp_path: Path) -> None:
    config = tiny(tmp_path, run__save_every=2)
    results = two(config, TINY_FILE_LIMIT="300", TINY_FULL_RANK="1")
    assert [status for status, _ in results] == [2, 2], results
    assert "the checkpoint of step 2 could not be written (File too large)" in results[1][1].splitlines()[-1]
    told = results[0][1].splitlines()[-1]
    assert told.startswith("rank 1 (process ")
    assert "stopped: " in told
    assert "could not be written (File too large)" in told
    assert verdict(tmp_path, 4, 5)[0] is Verdict.HOPELESS  # room must be made: no new start mends it


@pytest.mark.parametrize("rank", [0, 1])
def test_a_ranks_own_mistake_is_told_by_all(tmp_path: Path, rank: int) -> None:
    """A problem of the data that one rank meets, say: the others name it, and stop."""
    config = tiny(tmp_path, run__save_every=1, fails_at=8 * 2 + 7 * rank)
    results = two(config)
    assert [status for status, _ in results] == [2, 2]
    assert results[rank][1].splitlines()[-1] == "sample of the third step is forbidden"
    other = results[1 - rank][1]
    if rank == 1:
        assert other.splitlines()[-1].startswith("rank 1 (process ")
        assert other.splitlines()[-1].endswith("stopped: sample of the third step is forbidden")
    else:
        assert "forbidden" not in other  # once is enough, and rank 0 speaks for all
    assert verdict(tmp_path, 4, 5) == (Verdict.HOPELESS, verdict(tmp_path, 4, 5)[1])
    assert verdict(tmp_path, 4, 5)[1].endswith("sample of the third step is forbidden")


def test_a_mistake_that_all_ranks_find_is_told_once(tmp_path: Path) -> None:
    results = two(tiny(tmp_path, batch_size=9))
    assert [status for status, _ in results] == [2, 2]
    line = "data.batch_size=9 can't be shared by 2 processes"
    assert ("\n".join(output for _, output in results)).count(line) == 1


def test_who_does_not_come_is_named(tmp_path: Path) -> None:
    """Two of three ranks: both end in time, rank 0 says who is missing. Without rank 0 the other says so."""
    code = (
        "import sys\nfrom videodiff.training import distributed\n"
        "try:\n    distributed.start(float(sys.argv[1]))\n"
        "except distributed.LostError as error:\n    print(error.echoed, error)\n"
    )
    with socket.socket() as free, socket.socket() as other:
        free.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = free.getsockname()[1], other.getsockname()[1]
    known = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "3"}

    def start(rank: int, port: int, seconds: int) -> subprocess.Popen[str]:
        given = known | {"RANK": str(rank), "LOCAL_RANK": "0", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", code, str(seconds)]
        return subprocess.Popen(command, env=given, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    first, second, lost = start(0, ports[0], 15), start(1, ports[0], 15), start(1, ports[1], 2)
    told = [process.communicate(timeout=300)[0] for process in (first, second, lost)]
    missing = "rank 2 of 3 did not come within 15 s; the same command tries again\n"
    assert told[:2] == [f"False {missing}", f"True {missing}"]
    assert f"does not find the others by MASTER_ADDR=127.0.0.1, MASTER_PORT={ports[1]} (" in told[2]


class CountingStore:
    """A group's store, and how often it was asked."""

    def __init__(self) -> None:
        self.store, self.asked = dist.HashStore(), 0

    def __getattr__(self, name: str) -> Any:
        self.asked += 1
        return getattr(self.store, name)


def sign(rank: int, **values: Any) -> Sign:
    told = {"where": f"process {rank} on n", "beat": 1, "step": 7, "phase": Phase.COMPUTING, "problem": ""}
    return Sign(rank, **(told | {"mistake": False} | values))


def test_the_board_of_a_thousand_ranks_fits_into_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is silent, dead, behind, and who stopped, from signs whose ages are known."""
    now = 100.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    monkeypatch.setattr(watch, "world", lambda: 1000)
    store, signs = CountingStore(), watch._Signs()

    def tell(*told: Sign) -> Board:
        for one in told:
            store.set(str(one.rank), json.dumps(asdict(one)))
        return signs.read(store, told[0])

    board = tell(*[sign(rank) for rank in range(999)])  # the last one has not come
    assert (board.silent, board.dead, board.behind, board.stopped) == ("", "", "computing: every rank", -1)
    now += 6
    board = tell(*[sign(rank, beat=2, step=8) for rank in range(990)], sign(0, beat=3, step=8))
    behind = ", ".join(f"rank {rank} (process {rank} on n)" for rank in range(990, 998))
    assert board.behind == f"computing: {behind} and 1 more"
    assert board.silent == f"{behind} and 2 more"
    assert board.dead == ""
    now += 61
    board = tell(
        *[sign(rank, beat=4, step=8) for rank in range(995)],
        sign(995, beat=2, problem="no room", mistake=True),
        sign(996, beat=2, problem="a peer is gone"),
    )
    assert board.dead == "rank 997 (process 997 on n), rank 998 (process 998 on n)"
    assert (board.stopped, board.problem, board.mistake) == (995, "rank 995 (process 995 on n) stopped: no room", True)
    assert len(json.dumps(asdict(board))) < 1000


def test_a_rank_asks_as_often_in_a_group_of_two_as_of_thousands(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for size in (2, 5000):
        monkeypatch.setattr(watch, "world", lambda size=size: size)
        monkeypatch.setattr(watch, "rank", lambda: 1)
        watched, store = Watch(10), CountingStore()
        store.store.set("board", json.dumps(asdict(Board(1, "process 0 on n", "", "", ""))))
        watched._store, beats = store, iter([False, False, False, True])
        watched._over.wait = lambda seconds=0, beats=beats: next(beats)
        watched._talk()
        asked.append(store.asked)
    assert asked == [9, 9]  # tells, looks for the board and reads it, three times


@pytest.mark.parametrize(
    ("error", "foreign"),
    [
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("[/gloo/gloo/transport/tcp/pair.cc:543] writev [10.0.0.2]:4711: Broken pipe"), True),
        (RuntimeError("Connection reset by peer"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (UserError("Connection of the peers is a shard's name"), False),
    ],
)
def test_what_a_lost_peer_looks_like(error: Exception, foreign: bool) -> None:
    assert watch._of_a_peer(error) is foreign
