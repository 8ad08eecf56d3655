"""`videodiff doctor` on this machine, alone and on two ranks, and on one where something is broken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages import doctor
from stages.cli import main
from stages.doctor import examine

ROOT = Path(__file__).resolve().parents[1]


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *map(str, arguments)])
    return int(ended.value.code or 0), capsys.readouterr().out


def test_a_sound_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, tmp_path / "runs")
    assert code == 0, text
    lines = text.splitlines()
    assert all(line.split()[0] in ("ok", "warning") for line in lines)
    assert {line.split()[1] for line in lines} >= {"machine", "packages", "device", "decord", "ffmpeg", "disk", "ranks"}
    assert "MB/s written and synced" in text
    assert list((tmp_path / "runs").iterdir()) == []  # what was written to try is gone


def test_what_is_broken_is_named_with_a_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    code, text = said(capsys, tmp_path / "file" / "runs")
    assert code == 1
    assert "can't be written" in text
    assert "name another folder" in text
    monkeypatch.setattr(
        doctor, "_python", lambda code: "ImportError: no" if "ffmpeg" in code or "decord" in code else ""
    )
    monkeypatch.setattr(doctor, "PACKAGES", (*doctor.PACKAGES, "not-a-package"))
    found = {finding.what: finding for finding in examine(tmp_path)}
    assert (found["ffmpeg"].grade, found["decord"].grade, found["packages"].grade) == ("bad", "warning", "warning")
    assert "pip install" in found["ffmpeg"].text
    assert "not installed: not-a-package" in found["packages"].text


TWO_MACHINES = """
import os, socket, sys
from pathlib import Path
rank = int(os.environ["RANK"])
os.environ["LOCAL_RANK"] = "0"
socket.gethostname = lambda: f"n{rank + 1}"
from stages import doctor
from stages.cli import main
if rank:
    doctor._version, known = (lambda name: "0.1" if name == "safetensors" else known(name)), doctor._version
main(["doctor", sys.argv[1 + rank]])
"""


def test_what_differs_between_machines_is_named(tmp_path: Path) -> None:
    """Two ranks that call themselves two machines, with folders and a version of their own."""
    script = tmp_path / "doctors.py"
    script.write_text(TWO_MACHINES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(script), str(tmp_path / "a"), str(tmp_path / "b")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[2] for line in lines if line.split()[1] == "machine"] == ["n1,", "n2,"]
    wrong = [line for line in lines if line.startswith("bad")]
    assert len(wrong) == 2, done.stdout
    assert "safetensors is not the same everywhere: 0.1 on n2" in wrong[0]
    assert f"{tmp_path / 'a'}: not the same folder on n2" in wrong[1]


def test_two_ranks_reduce(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "-m", "stages", "doctor", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [line for line in done.stdout.splitlines() if " ranks " in line]
    assert len(ranks) == 1
    assert "2 (" in ranks[0]
    assert "gloo: all-reduce of 64 MiB" in ranks[0]
