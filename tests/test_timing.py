"""What the benchmarks measure with: the ratio of a pair, and the memory that a call needs beyond what it was given."""

import sys
import time

import pytest
import torch

from benchmarks.timing import paired, peak_memory

MIB = 2**18  # float32 values


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_peak_memory_is_that_of_the_call_alone() -> None:
    x = torch.ones(150 * MIB)
    torch.randn(100 * MIB)  # freed before the call
    assert peak_memory(lambda: (x * 2 + 1).sum()) == pytest.approx(300, rel=0.05)
    assert peak_memory(lambda: (x[: 10 * MIB] * 2 + 1).sum()) < 40


def test_a_ratio_of_sleeps_with_and_without_their_work() -> None:
    slow, fast = (lambda: time.sleep(0.06)), (lambda: time.sleep(0.02))
    ratio = paired(slow, fast, 5)
    assert ratio.median == pytest.approx(3, rel=0.3)
    assert ratio.verdict == "slower"
    assert paired(slow, fast, 5, per_unit=(6, 1)).verdict == "faster"
