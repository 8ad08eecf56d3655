"""What the loop is handed: a task, which knows what is trained and how, and where batches come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from videodiff.batch import VideoBatch


@dataclass
class LossOutput:
    """per_sample: loss of each sample, [B] float32, unweighted. metrics: scalars to log, the same names all step long.

    seen: numbers [B, K] float64 that a task with a memory wants back of all the step's samples, see `Remembers`.
    adversary: from its engine to what the adversary makes of the same batch, see `Contested`; None: it does not learn
    in this step (on no rank and in no micro-batch).
    tallies: [2] each, a sum and a count, to log their quotient over the whole step; the same names all step long.
    """

    per_sample: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    seen: Tensor | None = None
    adversary: Callable[[Callable[..., Any]], LossOutput] | None = None
    tallies: dict[str, Tensor] = field(default_factory=dict)


class Task(Protocol):
    """What is trained. The loop knows no more of it than this."""

    @property
    def module(self) -> nn.Module:
        """Enters the engine, which converts it in place; frozen networks beside it stay outside."""

    def trains(self, name: str) -> bool:
        """Whether this parameter of the module gets gradients."""

    def loss(self, module: Callable[..., Any], batch: VideoBatch, seed: int) -> LossOutput:
        """The losses of a batch. `module` is the engine's; its inputs must come in the module's dtype."""

    def sample(self, module: nn.Module, batch: VideoBatch, folder: Path, step: int) -> None:
        """Write pictures of what a module with the averaged weights makes. Rank 0 only."""

    def export(self, state: dict[str, Tensor], folder: Path, file: str) -> None:
        """Write folder/file from the trained weights (and buffers), and what else makes the folder a Model."""


@runtime_checkable
class Remembers(Protocol):
    """A task that learns something besides weights, equal on all ranks. It is kept in the run's checkpoints."""

    def after_step(self, seen: Tensor) -> None:
        """`LossOutput.seen` of the whole step, [batch, K] in the order of sample numbers, the same on every rank."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; empty when there is nothing now."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""


@dataclass
class Adversary:
    """A module that learns against the task's own. learning_rate: in place of the engine's; None: the same."""

    module: nn.Module
    learning_rate: float | None = None


@runtime_checkable
class Counts(Protocol):
    """A task that knows its work."""

    def operations(self, batch: VideoBatch) -> float | None:
        """Of a training step on these samples: forward, backward, and what activation checkpointing repeats; None when
        it is not known."""


@runtime_checkable
class Contested(Protocol):
    """A task that may have an adversary. It gets an engine of its own, which the run's checkpoints keep too."""

    adversary: Adversary | None


class BatchSource(Protocol):
    """Where batches come from: one endless sequence of samples, cut the same way however many ranks read it."""

    fingerprint: str

    def batches(self, start_sample: int, rank: int, world: int, micro_batch: int) -> Iterator[VideoBatch]:
        """This rank's micro-batches from `start_sample` on; those of all ranks together are consecutive samples."""
