"""A small task on synthetic batches, for the tests of training; as a script, one process of a run.

python tiny_training.py '{"run": {...}, "engine": {...}, "bad": [3]}' ... trains one run after the other.
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from videodiff import config as configs
from videodiff.batch import VideoBatch
from videodiff.config import Config
from videodiff.diffusion.times import LossHistory, LossSecondMoment
from videodiff.errors import UserError
from videodiff.seeding import generator, normals
from videodiff.training import distributed
from videodiff.training.engine import EngineConfig
from videodiff.training.task import LossOutput
from videodiff.training.trainer import RunConfig, train

PACE = ("seconds", "waited", "samples_per_second")  # of a record: the only things that differ between equal runs


class TinyConfig(Config):
    """bad: samples whose clip did not decode. poison: samples that make the gradient infinite. on_sample: a signal.

    fails_at: a sample that is a user's mistake.
    dropout: of the network; the one thing that is drawn otherwise on another number of ranks.
    importance: each sample's loss is multiplied by one of four times, drawn by how large those losses were.
    """

    run: RunConfig
    engine: EngineConfig = EngineConfig(learning_rate=1e-2)
    batch_size: int = 8
    bad: tuple[int, ...] = ()
    poison: tuple[int, ...] = ()
    fails_at: int | None = None
    signal: int | None = None
    signal_at: int | None = None
    dropout: float = 0.1
    importance: LossSecondMoment | None = None


class TinyTask:
    """Regresses a noisy function of the frames; the first bias is frozen, a buffer and a dropout are in the way."""

    def __init__(self, config: TinyConfig) -> None:
        torch.manual_seed(1)
        self.config = config
        self.module = nn.Sequential(nn.Linear(24, 33), nn.Dropout(config.dropout), nn.SiLU(), nn.Linear(33, 7))
        self.module.register_buffer("scale", torch.tensor([1 / 3]))
        self.sampled: list[dict[str, Tensor]] = []
        self.history = LossHistory(config.importance, 4) if config.importance is not None else None

    def trains(self, name: str) -> bool:
        return name != "0.bias"

    def loss(self, module: Callable[..., Tensor], batch: VideoBatch, seed: int) -> LossOutput:
        if self.config.signal_at in batch.numbers.tolist() and self.config.signal is not None:
            os.kill(os.getpid(), self.config.signal)
        if int(os.environ.get("TINY_KILL_AT", "-1")) in batch.numbers.tolist():  # not a matter of the configuration
            os.kill(os.getpid(), signal.SIGKILL)
        if self.config.fails_at in batch.numbers.tolist():
            raise UserError("sample of the third step is forbidden")
        output, target = module(self.inputs(batch)).float(), normals((7,), seed, "target", batch.numbers)
        losses = (output - target).square().mean(1)
        factors = torch.tensor([torch.inf if n in self.config.poison else 1.0 for n in batch.numbers.tolist()])
        if self.history is None:
            return LossOutput(losses * factors, {"mean": output.detach().mean()})
        t, weight = self.history.draw(seed, batch.numbers)
        losses = losses * t**2
        seen = torch.stack([t.double(), losses.detach().double().where(batch.weight > 0, torch.nan)], dim=1)
        return LossOutput(losses * weight.float(), {"mean_time": t.double().mean()}, seen)

    def after_step(self, seen: Tensor) -> None:
        if self.history is not None:
            self.history.update(seen[:, 0], seen[:, 1])

    def state(self) -> dict[str, Tensor]:
        return {} if self.history is None else self.history.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self.history is not None:
            self.history.load_state(state)

    def inputs(self, batch: VideoBatch) -> Tensor:
        return (batch.frames.flatten(1).float() / 255).to(next(self.module.parameters()).dtype)

    def sample(self, module: nn.Module, batch: VideoBatch, folder: Path, step: int) -> None:
        torch.rand(3)  # drawing here must not change the run
        state = {name: value.float() for name, value in module.state_dict().items()}
        save_file(state, folder / f"step-{step:08d}.safetensors")

    def export(self, state: dict[str, Tensor], folder: Path, file: str) -> None:
        save_file(state, folder / file)


class TinySource:
    """Sample n is made from n alone."""

    fingerprint = "synthetic"

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.bad = bad

    def batches(self, start_sample: int, rank: int, world: int, micro_batch: int) -> Iterator[VideoBatch]:
        first = start_sample + rank * micro_batch
        while True:
            yield self.batch(torch.arange(first, first + micro_batch))
            first += world * micro_batch

    def batch(self, numbers: Tensor) -> VideoBatch:
        frames = [
            torch.randint(0, 256, (1, 2, 4, 3), generator=generator("frames", n), dtype=torch.uint8)
            for n in numbers.tolist()
        ]
        return VideoBatch(
            frames=torch.stack(frames),
            captions=tuple(f"clip {n}" for n in numbers.tolist()),
            fps=torch.full((len(frames),), 8.0),
            numbers=numbers,
            keys=tuple(f"key-{n}" for n in numbers.tolist()),
            weight=torch.tensor([float(n not in self.bad) for n in numbers.tolist()]),
        )


def run_tiny(config: TinyConfig) -> TinyTask:
    """Train the tiny task as `config` says."""
    task, source = TinyTask(config), TinySource(config.bad)

    def prepare() -> tuple[TinyTask, TinySource]:
        if os.environ.get("TINY_HANG") == str(distributed.rank()):
            time.sleep(1000)
        return task, source

    train(config.run, config.engine, config.batch_size, prepare, config)
    return task


def tiny(folder: Path, **values: Any) -> TinyConfig:
    """A configuration with run.dir in `folder`; keys like `run.steps` go down into the tree."""
    tree: dict[str, Any] = {
        "run": {"dir": str(folder), "steps": 4, "sample_every": 0},
        "engine": {"learning_rate": 0.01},
    }
    for path, value in values.items():
        *parents, name = path.split("__")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = value
    return configs.build(TinyConfig, tree, "test")


if __name__ == "__main__":
    import deepspeed  # noqa: F401 - what is imported before the watch begins does not count towards its patience

    # Of one rank alone, where TINY_FULL_RANK says which.
    if "TINY_FILE_LIMIT" in os.environ and os.environ.get("TINY_FULL_RANK") in (None, os.environ.get("RANK")):
        # What a full disk looks like to the process: its writes fail.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = int(os.environ["TINY_FILE_LIMIT"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        for text in sys.argv[1:]:
            run_tiny(configs.build(TinyConfig, json.loads(text), "command line"))
    except UserError as error:
        if not error.echoed:
            print(error, file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        distributed.cleanup()
