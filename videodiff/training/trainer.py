"""The loop: is handed what to train, an engine's settings and batches; starts a run or goes on with it.

A run is a function of its configuration: the learning rate, the average's weight and every random draw follow from
the step and the sample's number, so that a restart needs no more than the weights, the moments and the step.
"""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from safetensors.torch import load_file
from torch import Tensor

from videodiff.batch import VideoBatch
from videodiff.config import Config, operational
from videodiff.errors import UserError
from videodiff.seeding import generator
from videodiff.tensor_files import save_file
from videodiff.training import distributed
from videodiff.training.checkpoint import Checkpoints
from videodiff.training.distributed import (
    device,
    gather_rows,
    gather_to_first,
    raise_from_first,
    rank,
    sum_over_ranks,
    world,
)
from videodiff.training.ema import EMA
from videodiff.training.engine import Engine, EngineConfig
from videodiff.training.gpus import by_device_name
from videodiff.training.metrics import Report
from videodiff.training.run_folder import CHECKPOINTS, Attempt
from videodiff.training.signals import Signals
from videodiff.training.task import BatchSource, Contested, Counts, LossOutput, Remembers, Task
from videodiff.training.watch import Phase, Watch

ADVERSARY = "adversary"
MEMORY = "memory.safetensors"
MAX_BAD_STEPS = 10  # steps in a row with gradients that are not finite


class RunConfig(Config):
    """A run: its folder, length and habits. 0 for `sample_every`: never; None for `log_every`: every ten seconds.

    wandb: the project of Weights & Biases that hears of it too, offline unless WANDB_MODE says otherwise; None: none.
    keep_average_every: of the checkpoints of each so many steps the averaged weights stay for good; 0: of none.
    patience: seconds that a step, a save, the drawing of samples or an act of the start (taking the folder, reading
    data and models, reading a checkpoint) may take; then a run of several ranks takes itself for hung, and ends.
    max_fruitless: starts in a row that save nothing, after which `videodiff status` advises a job against another.
    """

    dir: str = operational()
    steps: PositiveInt = operational()
    seed: int = 0
    save_every: PositiveInt = operational(1000)
    sample_every: NonNegativeInt = operational(1000)
    log_every: PositiveInt | None = operational(None)
    keep_last: PositiveInt = operational(2)
    wandb: str | None = operational(None)
    keep_average_every: NonNegativeInt = operational(0)
    patience: PositiveFloat = operational(1800.0)
    max_fruitless: PositiveInt = operational(5)


@dataclass
class Progress:
    """What a checkpoint knows of the run besides weights. The first two must be equal to resume from it."""

    frozen: str
    source: str
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


def train(
    run: RunConfig,
    engine: EngineConfig,
    batch_size: int,
    prepare: Callable[[], tuple[Task, BatchSource]],
    config: Config,
) -> None:
    """Train until `run.steps` steps are done, from the newest sound checkpoint in `run.dir`, else from the start.

    batch_size: samples of a step over all ranks. prepare: makes what is trained and its data, once the folder is this
    run's. config: the whole tree; kept in the run and compared when it goes on.
    Raises UserError for a changed configuration, a folder that another process trains in, a full disk, gradients that
    stay not finite; LostError when a rank is gone. After SIGINT, SIGTERM or SIGUSR1 (a cluster's warning) the step is
    finished and saved, then the process exits with 128 + the signal's number.
    """
    distributed.start()
    devices = [device()] if device().type == "cuda" else []
    with (
        Attempt(Path(run.dir), config, run.steps) as attempt,
        Watch(run.patience, attempt.ended) as watch,
        torch.random.fork_rng(devices),
    ):
        attempt.open()
        watch.at(0, Phase.READING_MODELS_AND_DATA)
        # Torch's own generator begins elsewhere in every process: without this no two runs began with equal weights.
        torch.manual_seed(generator(run.seed, "initialization").initial_seed())
        task, source = prepare()
        watch.at(0, Phase.CHOOSING_A_CHECKPOINT)
        trainer = _Trainer(run, engine.on(world()), batch_size, task, source, attempt, watch)
        try:
            trainer.train()
        finally:
            trainer.engine.close()
            if trainer.adversary is not None:
                trainer.adversary.close()


class _Trainer:
    def __init__(
        self,
        run: RunConfig,
        config: EngineConfig,
        batch_size: int,
        task: Task,
        source: BatchSource,
        attempt: Attempt,
        watch: Watch,
    ) -> None:
        self.watch = watch
        self.run, self.config, self.batch_size = run, config, batch_size
        self.task, self.source, self.folder, self.attempt = task, source, Path(run.dir), attempt
        self.checkpoints = Checkpoints(
            self.folder / CHECKPOINTS, run.keep_last, run.keep_average_every, attempt.token, attempt.check
        )
        newest = self.checkpoints.newest()
        watch.at(0, Phase.BUILDING_THE_ENGINE)
        self.engine = Engine(task.module, config, task.trains, batch_size, newest)
        self.adversary = _adversary_engine(task, config, batch_size, newest)
        self.ema = EMA(self.engine.masters())
        self.progress = Progress(self.engine.frozen_digest, source.fingerprint)
        if newest is not None:
            self._resume(newest)
        self.saved = self.progress.step
        attempt.step({"step": self.progress.step})

    def train(self) -> None:
        progress, run = self.progress, self.run
        batches = self.source.batches(progress.step * self.batch_size, rank(), world(), self.engine.micro_batch)
        report = Report(self.folder, progress.step, run.steps, run.log_every, run.wandb, silent=rank() != 0)
        with Signals() as signals, report:
            report.say(self._opening())
            try:
                while progress.step < run.steps:
                    stop = self._step(batches, signals, report)
                    is_last = progress.step == run.steps
                    if is_last or stop or progress.step % run.save_every == 0:
                        self.watch.at(progress.step - 1, Phase.SAVING)
                        self._save()
                    if stop and not is_last:
                        self.attempt.stopped(f"stopped by {signal.Signals(stop).name}")
                        report.say(self._goodbye(stop))
                        raise SystemExit(128 + stop)
                    if run.sample_every and progress.step % run.sample_every == 0:
                        self.watch.at(progress.step - 1, Phase.DRAWING_SAMPLES)
                        self._sample()
            finally:
                if callable(close := getattr(batches, "close", None)):
                    close()
            self.attempt.complete(progress.step)
            report.say(f"{self.folder}: {progress.step} steps done")

    def _step(self, batches: Iterator[VideoBatch], signals: Signals, report: Report) -> int:
        """One update; returns the signal to stop for, 0 without."""
        began = time.perf_counter()
        step, engine = self.progress.step, self.engine
        rate = self.config.rate(step)
        self.watch.at(step, Phase.WAITING_FOR_DATA)
        micro_batches = [next(batches) for _ in range(engine.accumulation)]
        waited = time.perf_counter() - began
        self.watch.at(step, Phase.COMPUTING)
        weights = torch.cat([batch.weight.double() for batch in micro_batches])
        own = torch.stack([weights.sum(), (weights == 0).sum()]).to(device())
        weight, bad = sum_over_ranks(own).tolist()
        scale = 1.0 / max(weight, 1e-6)  # a step of bad samples alone has no gradient at all
        loss = torch.zeros((), dtype=torch.float64, device=device())
        metrics: list[dict[str, Tensor]] = []
        tallies: list[dict[str, Tensor]] = []
        seen: list[Tensor] = []
        for index, batch in enumerate(micro_batches):
            # Dropout inside networks draws from torch's own generator: keyed too, exact for an equal number of ranks.
            torch.manual_seed(generator(self.run.seed, "layers", step, rank(), index).initial_seed())
            output = self.task.loss(engine, batch, self.run.seed)
            loss += _backward(engine, output, batch, scale)
            if contested := output.adversary is not None:
                assert self.adversary is not None
                against = output.adversary(self.adversary)
                _backward(self.adversary, against, batch, scale)
                output.metrics |= against.metrics
            metrics.append(output.metrics)
            tallies.append(output.tallies)
            if output.seen is not None:
                seen.append(torch.cat([batch.numbers.double()[:, None].cpu(), output.seen.cpu()], dim=1))
        result = engine.step(rate)
        applied, extra = result.applied, {}
        if contested:
            assert self.adversary is not None
            second = self.adversary.step(self.adversary.config.rate(step))
            applied, extra = applied and second.applied, {"adversary_grad_norm": second.grad_norm}
        if seen and isinstance(self.task, Remembers):
            rows = gather_rows(torch.cat(seen).to(device())).cpu()
            self.task.after_step(rows[rows[:, 0].argsort(), 1:])
        self.progress.step += 1
        if result.applied:
            self.ema.update(engine.masters(), step, self.config.ema_decay)
        means, stop = self._agree(loss, metrics, tallies, signals)
        keys = self._keys(micro_batches, step)
        record = {"step": step + 1, **means, "samples": keys, "lr": rate, "grad_norm": result.grad_norm, **extra}
        self._count(applied, keys, report)
        record |= {"skipped": self.progress.skipped, "bad_samples": int(bad)}
        record |= self._pace(began, waited, micro_batches[0])
        self.watch.at(step, Phase.STEP_FINISHED)
        self.attempt.step(record)
        report.step(record)
        return stop

    def _agree(
        self, loss: Tensor, metrics: list[dict[str, Tensor]], tallies: list[dict[str, Tensor]], signals: Signals
    ) -> tuple[dict[str, float], int]:
        """Loss, mean metrics and means of tallies over all ranks, and the signal that any got: one all-reduce."""
        names, counted = sorted(metrics[0]), sorted(tallies[0])
        parts = [torch.stack([m[name].detach().double().to(loss.device) for m in metrics]).mean() for name in names]
        sums = [torch.stack([t[name].detach().double().to(loss.device) for t in tallies]).sum(0) for name in counted]
        flags = [loss.new_tensor(signals.got == number) for number in Signals.NUMBERS]
        total = sum_over_ranks(torch.stack([*flags, loss, *parts, *(x for pair in sums for x in pair)])).tolist()
        stop = next((number for number, flag in zip(Signals.NUMBERS, total, strict=False) if flag), 0)
        loss_sum, *rest = total[len(flags) :]
        means = {name: value / world() for name, value in zip(names, rest, strict=False)}
        pairs = zip(rest[len(names) :: 2], rest[len(names) + 1 :: 2], strict=True)
        of_tallies = {name: a / n if n else math.nan for name, (a, n) in zip(counted, pairs, strict=True)}
        return {"loss": loss_sum, **means, **of_tallies}, stop

    def _pace(self, began: float, waited: float, batch: VideoBatch) -> dict[str, float]:
        """Seconds of the step and of waiting for data in it, samples a second; on a GPU the most memory used, and the
        share of its peak in bf16 that was reached."""
        seconds = time.perf_counter() - began
        pace = {
            "seconds": round(seconds, 4),
            "waited": round(waited, 4),
            "samples_per_second": round(self.batch_size / seconds, 3),
        }
        if device().type == "cuda":
            pace["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
            gpu = by_device_name(torch.cuda.get_device_name())
            work = self.task.operations(batch) if isinstance(self.task, Counts) else None
            if gpu is not None and work is not None:  # of the batch's share of the step
                pace["mfu"] = round(work * self.batch_size / len(batch) / (seconds * world() * gpu.flops), 4)
        return pace

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
            raise_from_first(  # who alone knows the samples of all
                f"step {progress.step}: gradients were not finite {MAX_BAD_STEPS} times in a row; lower "
                f"engine.learning_rate or look at the last samples: {', '.join(keys)}"
            )

    def _save(self) -> None:
        if self.saved == self.progress.step:
            return
        engines = [engine for engine in (self.engine, self.adversary) if engine is not None]
        size = sum(engine.checkpoint_bytes() for engine in engines) if rank() == 0 else 0
        self.checkpoints.write(self.progress.step, self._fill, size, self.engine.verify)
        self.saved = self.progress.step
        self.attempt.saved(self.progress.step)

    def _fill(self, folder: Path) -> None:
        self.engine.save(folder, self.ema.values)
        if self.adversary is not None:
            self.adversary.save(folder / ADVERSARY)
        for file, values in (("ema.safetensors", self.ema.values), ("raw.safetensors", self.engine.masters())):
            state = self.engine.gather(values)
            if state is not None:
                self.task.export(state, folder, file)
        if rank() == 0:
            if isinstance(self.task, Remembers) and (memory := self.task.state()):
                save_file(memory, folder / MEMORY)
            (folder / "state.json").write_text(json.dumps(vars(self.progress), indent=1), encoding="utf-8")

    def _sample(self) -> None:
        """Pictures of the run's first samples, the same at every step so that they compare."""
        state = self.engine.gather(self.ema.values)
        error: Exception | None = None
        if state is not None:
            folder = self.folder / "samples"
            try:
                folder.mkdir(exist_ok=True)
                with torch.random.fork_rng([device()] if device().type == "cuda" else []):
                    self.task.sample(self.engine.network(state), self._shown, folder, self.progress.step)
            except Exception as caught:  # the others wait: they hear of it before it goes on its way
                error = caught
        problem = str(error) if isinstance(error, UserError) else None
        if error is not None and problem is None:
            name = type(error).__name__
            problem = f"step {self.progress.step}: rank 0 could not draw samples ({name}), see its message"
        try:
            raise_from_first(problem)
        except UserError:
            if error is not None:
                error.shared = True  # type: ignore[attr-defined]
                raise error from None
            raise

    @cached_property
    def _shown(self) -> VideoBatch:
        batches = self.source.batches(0, rank(), world(), self.engine.micro_batch)
        try:
            return next(batches)
        finally:
            if callable(close := getattr(batches, "close", None)):
                close()

    def _resume(self, checkpoint: Path) -> None:
        stored = Progress(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
        own = self.progress
        for name, remedy in (
            ("frozen", "the frozen layers are not those it trained on: name the model it started from"),
            ("source", "the data is not what it was: restore the shards, or start a new run.dir"),
        ):
            before, now = getattr(stored, name), getattr(own, name)
            if before != now:
                raise UserError(f"{checkpoint}: written with {name} {_short(before)}, now {_short(now)}; {remedy}")
        self.engine.load_average(checkpoint, self.ema.values)
        if isinstance(self.task, Remembers) and self.task.state():
            self.task.load_state(load_file(checkpoint / MEMORY))
        self.progress = stored

    def _opening(self) -> str:
        config, engine = self.config, self.engine
        begin = f"resumed after step {self.progress.step}" if self.progress.step else "started"
        return (
            f"{self.folder}: {begin}, to step {self.run.steps}; batch {self.batch_size} = {world()} processes x "
            f"{engine.accumulation} x {engine.micro_batch} samples; ZeRO {config.zero_stage}"
            f"{'' if config.zero_stage else ' (nothing sharded)'}, parameters "
            f"{config.precision}, gradients {config.accumulation_dtype}, masters and EMA fp32, on {device()}"
        )

    def _goodbye(self, number: int) -> str:
        name = signal.Signals(number).name
        return f"{self.folder}: stopped by {name}, saved after step {self.progress.step}; the same command goes on"


def _adversary_engine(task: Task, config: EngineConfig, batch_size: int, newest: Path | None) -> Engine | None:
    """The second engine of a contested task: the settings of the first, but for the learning rate."""
    adversary = task.adversary if isinstance(task, Contested) else None
    if adversary is None:
        return None
    if adversary.learning_rate is not None:
        config = config.model_copy(update={"learning_rate": adversary.learning_rate})
    resume = newest / ADVERSARY if newest is not None else None
    return Engine(adversary.module, config, lambda name: True, batch_size, resume)


def _backward(engine: Engine, output: LossOutput, batch: VideoBatch, scale: float) -> Tensor:
    """Add the gradients of a micro-batch; its part [] of the step's loss, the mean over the samples that count."""
    weights = batch.weight.to(output.per_sample.device)
    weighted = torch.where(weights > 0, output.per_sample.float() * weights, 0).sum()
    engine.backward(weighted * (scale * world()))  # the engine averages over ranks
    return weighted.detach().double() * scale


def _short(value: object) -> str:
    return str(value)[:12]
