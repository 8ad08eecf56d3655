"""A rank is killed at a file operation of a save: six points by default, a hundred by `make test-crash`."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("crash.py")


def crash(folder: Path, *points: str) -> list[dict]:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), *points]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line[0] in "[{"]


def check(folder: Path, number: int, seed: int) -> None:
    """A third of the points on rank 1, which writes its own fragments alone."""
    (folder / "count").mkdir()
    counts = crash(folder / "count", "count")[0]
    assert counts[0] > 20  # the wrapped operations are really met
    assert counts[1] > 3
    drawn = random.Random(seed)
    points = [f"1:{drawn.randint(1, counts[1])}" for _ in range(number // 3)]
    points += [f"0:{drawn.randint(1, counts[0])}" for _ in range(number - len(points))]
    points = sorted(set(points))
    results = crash(folder, *points)
    assert [result["point"] for result in results] == points
    for result in results:
        rank = int(result["point"][0])
        assert result["killed"][rank] == -signal.SIGKILL, result
        assert result["killed"][1 - rank] != 0, result
        assert result["verdict"] == "GO_ON", result
        assert {"step-00000002", "step-00000004"} & set(result["left"]), result
        end = (result["resumed"], result["equal"], result["leftovers"], result["complete"])
        assert end == ([0, 0], True, [], True), result


def test_six_points(tmp_path: Path) -> None:
    check(tmp_path, 6, seed=20)


@pytest.mark.crash
def test_a_hundred_points(tmp_path: Path) -> None:
    check(tmp_path, 100, seed=random.randrange(2**32))
