"""One writer for a run folder, on whatever machine: processes that live, die or hang, and those that replace them."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from videodiff.errors import LostError
from videodiff.training import lease as leases
from videodiff.training.lease import Holder, Lease, is_alive, read

ROOT = Path(__file__).resolve().parents[1]
HERE = Holder.this()
ELSEWHERE = replace(HERE, host="n2", machine="another", pid=1, token="else")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.05)


def taken(folder: Path, holder: Holder) -> Lease:
    lease = Lease(folder, holder)
    assert lease.take() is None
    return lease


def stop(lease: Lease) -> None:
    """Its machine is gone: no heartbeat any more, and nothing given back."""
    lease._over.set()
    if lease._thread is not None:
        lease._thread.join()


def age(folder: Path, seconds: float) -> None:
    os.utime(folder / "lease.json", times=(time.time() - seconds,) * 2)


def test_a_second_holder_is_refused_until_the_first_gives_it_back(tmp_path: Path) -> None:
    first = taken(tmp_path, HERE)
    second = Lease(tmp_path, replace(HERE, token="b"))
    assert f"process {os.getpid()} on {HERE.host} trains in it" in (second.take() or "")
    first.check()
    first.give_back()
    assert read(tmp_path) is None
    assert second.take() is None
    second.give_back()
    assert list(tmp_path.iterdir()) == []


def test_the_heart_beats(tmp_path: Path) -> None:
    lease = taken(tmp_path, HERE)
    age(tmp_path, 1000)
    time.sleep(0.5)
    assert is_alive(tmp_path)
    lease.give_back()
    assert not is_alive(tmp_path)


@pytest.mark.parametrize(
    ("before", "old", "new"),
    [
        ("a later attempt of the same job", replace(ELSEWHERE, job="7"), replace(HERE, job="7", attempt=1)),
        ("its process is dead", replace(HERE, pid=2**22 + 1), replace(HERE, token="b")),
        ("its number is another process's now", replace(HERE, born="1"), replace(HERE, token="b")),
    ],
)
def test_it_is_taken_over_at_once(tmp_path: Path, before: str, old: Holder, new: Holder) -> None:
    first = taken(tmp_path, old)
    second = taken(tmp_path, new)
    second.check()
    with pytest.raises(LostError, match=r"has taken over; this process .* changes nothing more"):
        first.check()
    first.give_back()  # not its own any more
    assert read(tmp_path) == new
    second.give_back()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (ELSEWHERE, HERE),
        (replace(ELSEWHERE, job="7", attempt=2), replace(HERE, job="7", attempt=1)),
        (replace(ELSEWHERE, job="7"), replace(HERE, job="8", attempt=1)),
    ],
)
def test_a_beating_heart_elsewhere_is_respected_a_silent_one_not(tmp_path: Path, old: Holder, new: Holder) -> None:
    first = taken(tmp_path, old)
    assert "trains in it" in (Lease(tmp_path, new).take() or "")
    stop(first)
    age(tmp_path, leases.STALE_SECONDS + 1)
    assert not is_alive(tmp_path)
    second = taken(tmp_path, new)
    second.check()
    second.give_back()


def test_a_torn_file_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "STALE_SECONDS", 1.0)
    (tmp_path / "lease.json").write_text('{"job": ')
    began = time.monotonic()
    taken(tmp_path, HERE).give_back()
    assert time.monotonic() - began > 0.5


def test_of_many_that_try_one_succeeds(tmp_path: Path) -> None:
    """Eight processes at one moment, over a lease whose holder is dead."""
    stop(taken(tmp_path, replace(HERE, pid=2**22 + 1)))
    code = (
        "import sys, time; from pathlib import Path; from videodiff.training.lease import Holder, Lease\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "print(Lease(Path(sys.argv[1]), Holder.this()).take() is None); sys.stdout.flush(); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(time.time() + 3)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    answers = [process.stdout.readline().strip() for process in processes if process.stdout is not None]
    for process in processes:
        process.communicate("")
    assert sorted(answers) == ["False"] * 7 + ["True"]


def test_a_hanging_process_that_lost_its_lease_ends_itself(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from videodiff.training import lease\n"
        "lease.BEAT_SECONDS = lease.FAREWELL_SECONDS = 0.1\n"
        "assert lease.Lease(Path(sys.argv[1]), lease.Holder.this()).take() is None\n"
        "print('taken', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "7"}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        lease = taken(tmp_path, replace(HERE, job="7", attempt=1))
        assert "job 7, attempt 1, process" in process.stdout.read()
    assert process.returncode == os.EX_TEMPFAIL
    lease.give_back()
