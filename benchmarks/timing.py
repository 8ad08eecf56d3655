"""Paired timings, peak memory and counted work: two ways of doing the same thing, side by side in one run.

A shared machine is noisy: single times are not worth reporting, the ratio within a pair that ran at the same moment is.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

RESAMPLES = 2000
MIB = 2**20


@dataclass(frozen=True)
class Ratio:
    """Median of ours / theirs over pairs, its 95 % bootstrap interval, and the median seconds of each."""

    median: float
    low: float
    high: float
    ours: float
    theirs: float

    @property
    def verdict(self) -> str:
        """faster, equal or slower: whether the interval lies below 1, holds it, or lies above."""
        return "faster" if self.high < 1 else "slower" if self.low > 1 else "equal"


def paired(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    pairs: int,
    per_unit: tuple[float, float] = (1.0, 1.0),
    before: Callable[[Callable[[], object]], object] = lambda call: None,
) -> Ratio:
    """Run both alternately, `pairs` times after one warm-up each; the order within a pair alternates.

    per_unit: work of one call of ours and of theirs (such as FLOPs); times are divided by it before they are compared.
    before: what is done with a call before each of its timings, untimed.
    """
    for call in (ours, theirs):
        _seconds(call)
    times = np.empty((pairs, 2))
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            call = (ours, theirs)[side]
            before(call)
            times[pair, side] = _seconds(call)
    ratios = (times[:, 0] / per_unit[0]) / (times[:, 1] / per_unit[1])
    draws = np.random.default_rng(0).integers(0, pairs, (RESAMPLES, pairs))
    low, high = np.quantile(np.median(ratios[draws], axis=1), (0.025, 0.975))
    seconds = [statistics.median(column) for column in times.T]
    return Ratio(float(np.median(ratios)), float(low), float(high), *seconds)


def _seconds(call: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def flops(call: Callable[[], object]) -> float:
    """Operations of a call, as torch counts them. Attention is taken apart for it: fused kernels count as nothing."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def peak_memory(call: Callable[[], object]) -> float:
    """MiB that a call needs at its peak beyond what is held before it; nan where the system tells none (not Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    if sys.platform != "linux":
        return float("nan")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that it counts when it is taken again
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = _peak()
    call()
    return (_peak() - before) / MIB


def _peak() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
