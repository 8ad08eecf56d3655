"""Exponential moving average of the weights, always in fp32.

In bf16 an average with decay 0.9999 never moves: the step is below half a unit in the last place. Here it follows the
rank's own fragments of the fp32 master weights; only saving and sampling bring the fragments together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def decay_at(step: int, decay: float) -> float:
    """Weight of the former average in the update after step `step` (from 0): min(decay, (1 + step) / (10 + step))."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """The average of some fp32 tensors; starts as a copy of them."""

    def __init__(self, masters: Sequence[Tensor]) -> None:
        self.values = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self, masters: Sequence[Tensor], step: int, decay: float) -> None:
        """average <- average + (1 - decay_at(step)) * (master - average)."""
        torch._foreach_lerp_(self.values, [master.detach() for master in masters], 1 - decay_at(step, decay))
