"""What a run tells of itself: to people in plain text, to job scripts by an exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_training import TinyTask, run_tiny, tiny

from videodiff.errors import LostError, UserError
from videodiff.training import status
from videodiff.training.lease import Holder, Lease
from videodiff.training.status import Status, Verdict, describe, verdict

CAP = 3


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the third step of a tiny run raise."""
    loss = TinyTask.loss

    def failing(self: TinyTask, module: Any, batch: Any, seed: int) -> Any:
        if 16 in batch.numbers.tolist():
            raise error
        return loss(self, module, batch, seed)

    monkeypatch.setattr(TinyTask, "loss", failing)


def test_a_complete_run(tmp_path: Path) -> None:
    run_tiny(tiny(tmp_path))
    assert verdict(tmp_path, 4, CAP) == (Verdict.COMPLETE, "all 4 steps are done")
    text = describe(tmp_path, 4, CAP)
    assert text.startswith(f"{tmp_path}: complete\n  step 4 of 4 (100 %), loss ")
    assert "last checkpoint: step 4, " in text
    assert "last problem: none" in text
    assert verdict(tmp_path, 5, CAP) == (Verdict.GO_ON, "1 steps are left")  # and now it shall be longer
    run_tiny(tiny(tmp_path, run__steps=5))
    assert verdict(tmp_path, 5, CAP)[0] is Verdict.COMPLETE


def test_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr("videodiff.training.run_folder.STATUS_SECONDS", 0)
    texts: list[str] = []
    loss = TinyTask.loss
    monkeypatch.setattr(TinyTask, "loss", lambda *given: texts.append(describe(tmp_path, 4, CAP)) or loss(*given))
    run_tiny(tiny(tmp_path))
    assert f"training (job 12, attempt 0, process {os.getpid()} on " in texts[-1]
    assert "step 3 of 4 (75 %)" in texts[-1]
    assert "s/step" in texts[-1]
    assert "left" in texts[-1]


def test_a_users_mistake_is_hopeless_until_it_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, UserError("data: a shard is gone; put it back"))
    with pytest.raises(UserError):
        run_tiny(tiny(tmp_path, run__save_every=1))
    assert verdict(tmp_path, 4, CAP) == (Verdict.HOPELESS, "data: a shard is gone; put it back")
    assert "mend it before the next start" in describe(tmp_path, 4, CAP)
    monkeypatch.undo()
    run_tiny(tiny(tmp_path, run__save_every=1))
    assert verdict(tmp_path, 4, CAP)[0] is Verdict.COMPLETE


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device lost"), LostError("rank 1 is gone")])
def test_what_a_new_start_mends_is_gone_on_with_up_to_a_cap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fails(monkeypatch, error)
    codes = []
    for _ in range(CAP):
        with pytest.raises(type(error)):
            run_tiny(tiny(tmp_path))
        codes.append(verdict(tmp_path, 4, CAP)[0])
    assert codes == [Verdict.GO_ON] * (CAP - 1) + [Verdict.OVER_THE_CAP]
    assert str(error) in verdict(tmp_path, 4, CAP)[1]
    with pytest.raises(type(error)):
        run_tiny(tiny(tmp_path, run__save_every=1))  # two steps are saved before it fails: not in vain
    assert verdict(tmp_path, 4, CAP) == (Verdict.GO_ON, "2 steps are left")


def test_a_killed_run_is_interrupted_and_goes_on(tmp_path: Path) -> None:
    code = "import os, signal; from tiny_training import *; from pathlib import Path\n"
    code += "TinyTask.sample = lambda *given: os.kill(os.getpid(), signal.SIGKILL)\n"
    code += f"run_tiny(tiny(Path({str(tmp_path)!r}), run__sample_every=2, run__save_every=2))"
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=False, timeout=300)
    assert f"{tmp_path}: interrupted (its process is gone)\n  step 2 of 4 (50 %)" in describe(tmp_path, 4, CAP)
    assert verdict(tmp_path, 4, CAP)[0] is Verdict.GO_ON
    run_tiny(tiny(tmp_path, run__sample_every=0, run__save_every=2))
    assert verdict(tmp_path, 4, CAP)[0] is Verdict.COMPLETE


def test_a_job_that_does_not_come_so_far_as_to_open_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(attempt: int) -> Verdict:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(attempt))
        return verdict(tmp_path, 4, CAP)[0]

    monkeypatch.setenv("SLURM_JOB_ID", "12")
    given_up = [Verdict.GO_ON, Verdict.GO_ON, Verdict.OVER_THE_CAP]
    assert [asked(attempt) for attempt in range(CAP)] == given_up
    # What another job left decides nothing, not even that it failed; what this one saved counts.
    for state in ("interrupted", "failed"):
        Status(state, step=2, steps=4, fruitless=9, opened=("11", 3), saved=("11", 2)).write(tmp_path)
        assert [asked(attempt) for attempt in range(CAP)] == given_up
    Status("interrupted", step=2, steps=4, opened=("12", 1), saved=("12", 1)).write(tmp_path)
    assert [asked(1 + attempt) for attempt in range(CAP + 1)] == [Verdict.GO_ON, *given_up]
    # A mistake of an earlier attempt of this job may be mended; this one's is not.
    Status("failed", step=2, steps=4, problem="no", opened=("12", 1), saved=("12", 1)).write(tmp_path)
    assert [asked(1), asked(2)] == [Verdict.HOPELESS, Verdict.GO_ON]


def test_a_new_job_has_its_own_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Status(fruitless=7, opened=("11", 3))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    found.open(4)
    assert (found.fruitless, found.opened) == (1, ("12", 0))
    found.open(4)
    assert found.fruitless == 2


def test_an_attempt_that_was_replaced_does_not_requeue_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lease = Lease(tmp_path, Holder.this())
    assert lease.take() is None
    Status(steps=4, opened=("12", 1)).write(tmp_path)
    assert verdict(tmp_path, 4, CAP)[0] is Verdict.GO_ON
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    code, why = verdict(tmp_path, 4, CAP)
    assert (code, why.endswith("has taken over")) == (Verdict.HOPELESS, True)
    lease.give_back()


def test_another_jobs_run_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "11")
    lease = Lease(tmp_path, Holder.this())
    assert lease.take() is None
    Status(steps=4).write(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    code, why = verdict(tmp_path, 4, CAP)
    assert code is Verdict.HOPELESS
    assert why.startswith("job 11, attempt 0, process ")
    lease.give_back()
    assert verdict(tmp_path, 4, CAP)[0] is Verdict.GO_ON


def test_an_unreadable_status_is_none(tmp_path: Path) -> None:
    assert "no run has begun here" in describe(tmp_path, 4, CAP)
    (tmp_path / status.FILE).write_text('{"state": ')
    assert status.read(tmp_path) is None
    (tmp_path / status.FILE).write_text(
        json.dumps({"state": "complete", "step": 4, "steps": 4, "of a later version": 1})
    )
    assert verdict(tmp_path, 4, CAP)[0] is Verdict.COMPLETE
