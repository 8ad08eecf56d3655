"""The loop: is handed what to train, an engine's settings and batches; starts a run or goes on with it.

A run is a function of its configuration: the learning rate, the average's weight and every random draw follow from
the step and the sample's number, so that a restart needs no more than the weights, the moments and the step.
"""

import contextlib
import errno
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import NonNegativeInt, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from videodiff import config as configs
from videodiff.batch import VideoBatch
from videodiff.config import Config, operational
from videodiff.errors import UserError
from videodiff.seeding import generator
from videodiff.training import distributed
from videodiff.training.checkpoint import Checkpoints
from videodiff.training.distributed import (
    device,
    from_first,
    gather_rows,
    gather_to_first,
    raise_from_first,
    rank,
    sum_over_ranks,
    world,
)
from videodiff.training.ema import EMA
from videodiff.training.engine import Engine, EngineConfig
from videodiff.training.metrics import Report

CHECKPOINTS = "checkpoints"
MEMORY = "memory.safetensors"
MAX_BAD_STEPS = 10  # steps in a row with gradients that are not finite


class RunConfig(Config):
    """A run: its folder, length and habits. 0 for `sample_every`: never; None for `log_every`: every ten seconds."""

    dir: str = operational()
    steps: PositiveInt = operational()
    seed: int = 0
    save_every: PositiveInt = operational(1000)
    sample_every: NonNegativeInt = operational(1000)
    log_every: PositiveInt | None = operational(None)
    keep_last: PositiveInt = operational(2)


@dataclass
class LossOutput:
    """per_sample: loss of each sample, [B] float32, unweighted. metrics: scalars to log, the same names each step.

    seen: numbers [B, K] float64 that a task with a memory wants back of all the step's samples, see `Remembers`.
    """

    per_sample: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    seen: Tensor | None = None


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


class BatchSource(Protocol):
    """Where batches come from: one endless sequence of samples, cut the same way however many ranks read it."""

    fingerprint: str

    def batches(self, start_sample: int, rank: int, world: int, micro_batch: int) -> Iterator[VideoBatch]:
        """This rank's micro-batches from `start_sample` on; those of all ranks together are consecutive samples."""


@dataclass
class Progress:
    """What a checkpoint knows of the run besides weights. The first four must be equal to resume from it."""

    world: int
    zero_stage: int
    precision: str
    frozen: str
    source: str
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


def train(
    run: RunConfig, engine: EngineConfig, batch_size: int, task: Task, source: BatchSource, config: Config
) -> None:
    """Train until `run.steps` steps are done, from the newest sound checkpoint in `run.dir`, else from the start.

    batch_size: samples of a step over all ranks. config: the whole tree; kept in the run and compared when it goes on.
    Raises UserError for a changed configuration, a folder that another process trains in, a full disk, gradients that
    stay not finite. After SIGINT or SIGTERM the step is finished and saved, then the process exits with 130 or 143.
    """
    distributed.start()
    folder = Path(run.dir)
    devices = [device()] if device().type == "cuda" else []
    with contextlib.ExitStack() as held, torch.random.fork_rng(devices):
        raise_from_first(_open_folder(folder, config, held) if rank() == 0 else None)
        trainer = _Trainer(run, engine, batch_size, task, source)
        try:
            trainer.train()
        finally:
            trainer.engine.close()


class _Trainer:
    def __init__(self, run: RunConfig, config: EngineConfig, batch_size: int, task: Task, source: BatchSource) -> None:
        self.run, self.config, self.batch_size = run, config, batch_size
        self.task, self.source, self.folder = task, source, Path(run.dir)
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, run.keep_last)
        newest = self.checkpoints.newest()
        self.engine = Engine(task.module, config, task.trains, batch_size)
        self.ema = EMA(self.engine.masters())
        self.progress = Progress(
            world(), config.zero_stage, config.precision, self.engine.frozen_digest, source.fingerprint
        )
        if newest is not None:
            self._resume(newest)
        self.saved = self.progress.step

    def train(self) -> None:
        progress, run = self.progress, self.run
        batches = self.source.batches(progress.step * self.batch_size, rank(), world(), self.engine.micro_batch)
        report = Report(self.folder, progress.step, run.steps, run.log_every, silent=rank() != 0)
        with _Signals() as signals, report:
            report.say(self._opening())
            try:
                while progress.step < run.steps:
                    first, stop = self._step(batches, signals, report)
                    is_last = progress.step == run.steps
                    if is_last or stop or progress.step % run.save_every == 0:
                        self._save()
                    if stop and not is_last:
                        report.say(self._goodbye(stop))
                        raise SystemExit(128 + stop)
                    if run.sample_every and progress.step % run.sample_every == 0:
                        self._sample(first)
            finally:
                if callable(close := getattr(batches, "close", None)):
                    close()
            report.say(f"{self.folder}: {progress.step} steps done")

    def _step(self, batches: Iterator[VideoBatch], signals: "_Signals", report: Report) -> tuple[VideoBatch, int]:
        """One update; returns the rank's first micro-batch and the signal to stop for, 0 without."""
        began = time.perf_counter()
        step, engine = self.progress.step, self.engine
        rate = self.config.rate(step)
        micro_batches = [next(batches) for _ in range(engine.accumulation)]
        own_weight = sum(float(batch.weight.double().sum()) for batch in micro_batches)
        weight = float(sum_over_ranks(torch.tensor(own_weight, dtype=torch.float64, device=device())))
        scale = 1.0 / max(weight, 1e-6)  # a step of bad samples alone has no gradient at all
        loss = torch.zeros((), dtype=torch.float64, device=device())
        metrics: list[dict[str, Tensor]] = []
        seen: list[Tensor] = []
        for index, batch in enumerate(micro_batches):
            # Dropout inside networks draws from torch's own generator: keyed too, exact for an equal number of ranks.
            torch.manual_seed(generator(self.run.seed, "layers", step, rank(), index).initial_seed())
            output = self.task.loss(engine, batch, self.run.seed)
            weights = batch.weight.to(output.per_sample.device)
            weighted = torch.where(weights > 0, output.per_sample.float() * weights, 0).sum()
            engine.backward(weighted * (scale * world()))  # the engine averages over ranks
            loss += weighted.detach().double() * scale
            metrics.append(output.metrics)
            if output.seen is not None:
                seen.append(torch.cat([batch.numbers.double()[:, None].cpu(), output.seen.cpu()], dim=1))
        result = engine.step(rate)
        if seen and isinstance(self.task, Remembers):
            rows = gather_rows(torch.cat(seen).to(device())).cpu()
            self.task.after_step(rows[rows[:, 0].argsort(), 1:])
        self.progress.step += 1
        if result.applied:
            self.ema.update(engine.masters(), step, self.config.ema_decay)
        means, stop = self._agree(loss, metrics, signals)
        keys = self._keys(micro_batches, step)
        record = {"step": step + 1, **means, "samples": keys, "lr": rate, "grad_norm": result.grad_norm}
        self._count(result.applied, keys, report)
        record |= {"skipped": self.progress.skipped, "seconds": round(time.perf_counter() - began, 4)}
        report.step(record)
        return micro_batches[0], stop

    def _agree(
        self, loss: Tensor, metrics: list[dict[str, Tensor]], signals: "_Signals"
    ) -> tuple[dict[str, float], int]:
        """Loss and mean metrics over all ranks, and the signal that any of them got: one all-reduce."""
        names = sorted(metrics[0])
        parts = [torch.stack([m[name].detach().double().to(loss.device) for m in metrics]).mean() for name in names]
        flags = [loss.new_tensor(signals.got == number) for number in _Signals.NUMBERS]
        total = sum_over_ranks(torch.stack([*flags, loss, *parts])).tolist()
        stop = next((number for number, flag in zip(_Signals.NUMBERS, total, strict=False) if flag), 0)
        loss_sum, *sums = total[len(flags) :]
        means = {name: value / world() for name, value in zip(names, sums, strict=True)}
        return {"loss": loss_sum, **means}, stop

    def _keys(self, micro_batches: list[VideoBatch], step: int) -> list[str]:
        """Keys of the step's global batch in the order of the run; on rank 0, else []."""
        own = [pair for b in micro_batches for pair in zip(b.numbers.tolist(), b.keys, strict=True)]
        gathered = gather_to_first(own)
        if gathered is None:
            return []
        pairs = sorted(pair for pairs in gathered for pair in pairs)
        due = list(range(step * self.batch_size, (step + 1) * self.batch_size))
        if [number for number, _ in pairs] != due:
            raise RuntimeError(f"step {step + 1}: the source gave other samples than {due[0]}..{due[-1]}")
        return [key for _, key in pairs]

    def _count(self, applied: bool, keys: list[str], report: Report) -> None:
        progress = self.progress
        if applied:
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        report.say(f"step {progress.step}: gradients are not finite, the step is skipped ({progress.skipped} so far)")
        if progress.skipped_in_a_row >= MAX_BAD_STEPS:
            raise UserError(
                f"step {progress.step}: gradients were not finite {MAX_BAD_STEPS} times in a row; lower "
                f"engine.learning_rate or look at the last samples: {', '.join(keys)}"
            )

    def _save(self) -> None:
        if self.saved == self.progress.step:
            return
        size = self.engine.checkpoint_bytes() if rank() == 0 else 0
        self.checkpoints.write(self.progress.step, self._fill, size)
        self.saved = self.progress.step

    def _fill(self, folder: Path) -> None:
        self.engine.save(folder)
        self.ema.save(folder / _average_file())
        for file, values in (("ema.safetensors", self.ema.values), ("raw.safetensors", self.engine.masters())):
            state = self.engine.gather(values)
            if state is not None:
                self.task.export(state, folder, file)
        if rank() == 0:
            if isinstance(self.task, Remembers) and (memory := self.task.state()):
                save_file(memory, folder / MEMORY)
            (folder / "state.json").write_text(json.dumps(vars(self.progress), indent=1), encoding="utf-8")

    def _sample(self, batch: VideoBatch) -> None:
        state = self.engine.gather(self.ema.values)
        error: Exception | None = None
        if state is not None:
            folder = self.folder / "samples"
            try:
                folder.mkdir(exist_ok=True)
                with torch.random.fork_rng([device()] if device().type == "cuda" else []):
                    self.task.sample(self.engine.network(state), batch, folder, self.progress.step)
            except Exception as caught:  # the others wait: they hear of it before it goes on its way
                error = caught
        problem = str(error) if isinstance(error, UserError) else None
        if error is not None and problem is None:
            name = type(error).__name__
            problem = f"step {self.progress.step}: rank 0 could not draw samples ({name}), see its message"
        problem = from_first(problem)
        if error is not None:
            raise error
        if problem is not None:
            raise UserError(problem)

    def _resume(self, checkpoint: Path) -> None:
        stored = Progress(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
        own = self.progress
        for name, remedy in (
            ("world", "start with as many processes as before"),
            ("zero_stage", "set engine.zero_stage back"),
            ("precision", "set engine.precision back"),
            ("frozen", "the frozen layers are not those it trained on: name the model it started from"),
            ("source", "the data is not what it was: restore the shards, or start a new run.dir"),
        ):
            before, now = getattr(stored, name), getattr(own, name)
            if before != now:
                raise UserError(f"{checkpoint}: written with {name} {_short(before)}, now {_short(now)}; {remedy}")
        self.engine.load(checkpoint)
        self.ema.load(checkpoint / _average_file())
        if isinstance(self.task, Remembers) and self.task.state():
            self.task.load_state(load_file(checkpoint / MEMORY))
        self.progress = stored

    def _opening(self) -> str:
        config, engine = self.config, self.engine
        begin = f"resumed after step {self.progress.step}" if self.progress.step else "started"
        return (
            f"{self.folder}: {begin}, to step {self.run.steps}; batch {self.batch_size} = {world()} processes x "
            f"{engine.accumulation} x {engine.micro_batch} samples; ZeRO {config.zero_stage}, parameters "
            f"{config.precision}, gradients, masters and EMA fp32, on {device()}"
        )

    def _goodbye(self, number: int) -> str:
        name = signal.Signals(number).name
        return f"{self.folder}: stopped by {name}, saved after step {self.progress.step}; the same command goes on"


class _Signals:
    """SIGINT and SIGTERM while the loop runs: remembered, answered when the step is finished."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.got: int = 0
        self._first = 0.0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals there alone
            self._before = {number: signal.signal(number, self._handle) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # a forked helper process inherits the handler; it has nothing to save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        # A second Ctrl-C means now. Not within two seconds: torchrun passes on what the terminal has already sent.
        if number == signal.SIGINT and self.got and time.monotonic() - self._first > 2:
            raise KeyboardInterrupt
        if not self.got:
            self.got, self._first = number, time.monotonic()


def _open_folder(folder: Path, config: Config, held: contextlib.ExitStack) -> str | None:
    """Make the run's folder, or compare the configuration with that of its checkpoints. Returns the problem.

    `held` keeps the folder locked until it is closed, or this process is gone.
    """
    path = folder / "config.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _lock(folder / ".lock", held):
            return f"run.dir={folder}: another process trains in it; wait for its end or stop it, or name a new run.dir"
        # Without a checkpoint there is nothing to go on with: the start failed, and this may be the command mended.
        if path.is_file() and Checkpoints(folder / CHECKPOINTS, 1).exist():
            changes = configs.differences(configs.load(type(config), path), config)
            if forbidden := [str(change) for change in changes if not change.operational]:
                return (
                    f"{path}: this run began with another configuration ({'; '.join(forbidden)}); "
                    "take the values back, or name a new run.dir"
                )
            for change in changes:
                print(f"{folder}: goes on with {change}", flush=True)
        configs.save(config, path)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"run.dir={folder}: can't be written ({error.strerror or error}); name another folder"
    return None


def _lock(path: Path, held: contextlib.ExitStack) -> bool:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    held.callback(os.close, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # a cluster's disk may come without locks
            raise
    return True


def _average_file() -> str:
    return f"average-{rank():05d}.safetensors"


def _short(value: object) -> str:
    return str(value)[:12]
