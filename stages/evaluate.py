"""`videodiff evaluate`: a model judged stage by stage on the built-in world, by a reader that no training ever saw.

Finished samples are kept in `samples.jsonl`, the first line of which says by which protocol they were made; the same
command goes on where it stopped. Prompts pass in fixed batches, so that a continued run gives the same figures, and so
do several ranks, which share the batches and keep what each finished in a file of its own.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stages.evaluate_classifier import classifier_scale_for
from stages.evaluate_extras import EXTRA_NEEDS, EXTRA_STAGES, measure_extras
from stages.evaluate_report import SHOWN, picture_path, table, write_sheets
from stages.evaluate_samples import Plan, Road, measure, planned_prompts, record
from stages.evaluate_statistics import SPLITS, in_words, losses, summary
from stages.pipeline import Pipeline
from videodiff import config as configs
from videodiff.errors import UserError
from videodiff.model import DESCRIPTION, DiffusionStage, Model, Sampling, sha256
from videodiff.training import distributed
from videodiff.video_io import write_json, write_png

BATCH = 8  # prompts at a time; part of the protocol, as batches change results by rounding
LOG_SECONDS = 60.0
NEWLINE = b"\n"
STAGE_ROWS = {
    "autoencoder": ("autoencoder",),
    "image": ("image",),
    "video": ("video_real", "video_generated"),
    "interpolation": ("interpolation", "whole"),
}
NEEDS = {
    "autoencoder": ("autoencoder",),
    "image": ("autoencoder", "text", "image"),
    "video": ("autoencoder", "text", "image", "video"),
    "interpolation": ("autoencoder", "text", "image", "video", "interpolation"),
}
# Clips for a model that has no video stage yet: those of the built-in world's demo.
PLAIN_SIZE, PLAIN_FRAMES, PLAIN_FPS = 64, 16, 8.0


def main(
    model: str,
    stage: str,
    num_prompts: int,
    seed: int,
    out: Path,
    num_held_out: int | None = None,
    classifier_scale: float | None = None,
) -> None:
    """Judge `stage` ("all": every one that the model has) and write table, JSON and pictures to `out`.

    num_held_out: prompts of each held-out split, None for as many as `num_prompts`. classifier_scale: of the images
    that a classifier guides, None for 1. Under torchrun or srun the ranks share the prompts; rank 0 writes and prints
    the result.
    """
    distributed.start()
    try:
        num_held_out = num_prompts if num_held_out is None else num_held_out
        _main(model, stage, num_prompts, num_held_out, seed, out, classifier_scale)
    finally:
        distributed.cleanup()


def _main(
    model: str, stage: str, num_prompts: int, num_held_out: int, seed: int, out: Path, classifier_scale: float | None
) -> None:
    if num_prompts < 1:
        raise UserError(f"--num-prompts {num_prompts}: there is nothing to judge; ask for at least 1")
    opened = Model.load(model)
    plan, skipped = plan_for(opened, stage, num_prompts, num_held_out, seed)
    plan = replace(plan, classifier_scale=classifier_scale_for(plan, classifier_scale))
    device = distributed.device()
    console = Console(stderr=True, quiet=distributed.rank() > 0)
    for name, reason in skipped.items():
        console.print(f"skipped {name}: {reason}", style="yellow", highlight=False)
    identity = {"model": sha256(opened.folder / DESCRIPTION), "software": {**software(), "device": device.type}}
    report = evaluate(Pipeline(opened, device), plan, identity, out, console)
    if report is None:
        return
    write_json(out / "evaluation.json", {"model": model, "skipped": skipped, **report})
    show = Console()
    if not show.is_terminal:
        show = Console(width=150)
    show.print(table(report["rows"]))
    if report["verdict"] is not None:
        show.print(report["verdict"], highlight=False)
    for name, reason in skipped.items():
        show.print(f"Not judged: {name} ({reason}).", highlight=False)
    print(out / "evaluation.json")


def plan_for(model: Model, stage: str, num_prompts: int, num_held_out: int, seed: int) -> tuple[Plan, dict[str, str]]:
    """What can be judged of a model, and which stages are left out for which reason.

    UserError when a stage named outright, or every stage, is missing.
    """
    has = model.config.stages()
    skipped: dict[str, str] = {}
    rows: list[str] = []
    # What stands beside the road is judged where there is any, and nobody misses it elsewhere.
    every = [*STAGE_ROWS, *(name for name in EXTRA_STAGES if name in has)]
    for name in every if stage == "all" else (stage,):
        extra = EXTRA_STAGES.get(name)
        missing = [part for part in {**NEEDS, **EXTRA_NEEDS}[name] if part not in has]
        if missing and stage != "all":
            model.part(missing[-1])  # says what the model lacks
        if missing:
            skipped[name] = f"the model has no stage {', '.join(missing)}"
        elif extra is not None and (problem := extra.problem(model)) is not None:
            if stage != "all":
                raise UserError(problem)
            skipped[name] = problem
        else:
            rows += STAGE_ROWS[name] if extra is None else extra.rows
    if not rows:
        raise UserError(f"{model.folder}: holds no stage that can be judged (it has: {', '.join(has) or 'none'})")
    used: list[DiffusionStage] = [name for name in ("image", "video", "interpolation", "upscale") if name in has]
    size = model.diffusion(used[0]).size if used else PLAIN_SIZE
    frames, fps = PLAIN_FRAMES, PLAIN_FPS
    if "video" in has:
        frames, fps = model.diffusion("video").frames, model.diffusion("video").fps
    factor = model.diffusion("interpolation").factor if "interpolation" in has else 1
    sampling: dict[str, Sampling] = {name: model.diffusion(name).sampling for name in used}
    enlarged = model.diffusion("upscale").factor if "upscale" in has else 1
    plan = Plan(tuple(rows), size, frames, fps, factor, num_prompts, num_held_out, seed, sampling, enlarged)
    return plan, skipped


def evaluate(road: Road, plan: Plan, identity: dict[str, Any], out: Path, console: Console) -> dict[str, Any] | None:
    """Measure every prompt that is not finished yet; returns protocol, rows, losses and the verdict in words on rank 0.

    `identity` says what is judged, and with which software: samples of another identity or plan are never mixed in.
    """
    protocol = _protocol(plan, identity)
    samples = Samples(out, protocol, distributed.rank())
    distributed.barrier()  # every rank has read what is finished before any adds to it
    prompts = planned_prompts(plan.num_prompts, plan.num_held_out, plan.seed)
    every = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    batches = every[distributed.rank() :: distributed.world()]
    with _progress(console, sum(len(batch) for batch in batches)) as advance:
        for batch in batches:
            if not all((p.split, p.number) in samples.found for p in batch):
                made = measure(road, plan, batch)
                measure_extras(road, plan, batch, made)
                for prompt, measured in zip(batch, made, strict=True):
                    if prompt.number < SHOWN[prompt.split]:
                        for row, picture in measured.pictures.items():
                            write_png(picture_path(out, row, prompt.split, prompt.number), picture)
                    samples.keep(record(prompt, measured))
            advance(len(batch))
    distributed.barrier()
    if distributed.rank() > 0:
        return None
    samples.read(protocol)
    finished = [samples.found[(p.split, p.number)] for p in prompts]
    entries = summary(finished, plan.rows)
    write_sheets(out, finished, plan.rows)
    lost = {name: losses(entries, name) for name in SPLITS.values()}
    return {"protocol": protocol, "rows": entries, "losses": lost, "verdict": in_words(lost["seen"])}


class Samples:
    """The finished prompts of a folder: `samples.jsonl`, the protocol and then a line for each prompt, and beside it
    `samples-R.jsonl` of each further rank R. A rank writes into its own file alone and reads all of them."""

    def __init__(self, out: Path, protocol: dict[str, Any], rank: int = 0) -> None:
        self.path = out / ("samples.jsonl" if rank == 0 else f"samples-{rank}.jsonl")
        self.found: dict[tuple[str, int], dict[str, Any]] = {}
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.read(protocol)
            kept = self._read(self.path, protocol) if self.path.is_file() else b""
            if not kept:
                kept = (json.dumps({"protocol": protocol}) + "\n").encode()
                self.path.write_bytes(kept)
            elif len(kept) < self.path.stat().st_size:  # a line that a crash tore
                os.truncate(self.path, len(kept))
        except OSError as error:
            raise UserError(f"{out}: can't be written ({error.strerror}); name another folder with --out") from None

    def read(self, protocol: dict[str, Any]) -> None:
        """Take in what all ranks finished so far."""
        for path in sorted(self.path.parent.glob("samples*.jsonl")):
            self._read(path, protocol)

    def _read(self, path: Path, protocol: dict[str, Any]) -> bytes:
        """The whole lines of a file, taken into `found`; UserError when they were made by another protocol."""
        kept = b""
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(NEWLINE):
                break
            try:
                value = json.loads(line)
                if kept:
                    self.found[(value["split"], value["number"])] = value
                else:
                    self._check(path, value["protocol"], protocol)
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, UserError):
                    raise
                what = f"line {kept.count(NEWLINE) + 1} is not one that evaluate wrote"
                raise UserError(f"{path}: {what}; remove the file or name another folder with --out") from None
            kept += line
        return kept

    def _check(self, path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
        differing = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        if differing:
            raise UserError(
                f"{path}: holds samples of another evaluation (differs in {', '.join(differing)}); "
                "name another folder with --out, or remove this one"
            )

    def keep(self, sample: dict[str, Any]) -> None:
        """Add a finished sample, on disk before this returns."""
        key = (sample["split"], sample["number"])
        if key in self.found:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(sample) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.found[key] = sample


def _protocol(plan: Plan, identity: dict[str, Any]) -> dict[str, Any]:
    """All that the figures follow from, as JSON gives it back."""
    told = {name: value for name, value in vars(plan).items() if name != "sampling" and value is not None}
    told["sampling"] = {stage: configs.to_dict(sampling) for stage, sampling in plan.sampling.items()}
    return json.loads(json.dumps({"format": 1, **identity, **told, "batch": BATCH}))


def software() -> dict[str, str]:
    """Versions of what the figures depend on."""
    packages = ("videodiff", "torch", "numpy", "imageio-ffmpeg")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line now and then elsewhere; gives a function that counts finished prompts."""
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done, told = 0, time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("prompts", total=total)

        def advance(count: int) -> None:
            nonlocal done, told
            done += count
            bar.update(task, completed=done)
            if not console.is_terminal and (time.monotonic() - told > LOG_SECONDS or done == total):
                console.print(f"{done} of {total} prompts", highlight=False)
                told = time.monotonic()

        yield advance
