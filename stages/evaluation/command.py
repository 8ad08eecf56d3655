"""`videodiff evaluate`: a model, or the checkpoints of a run, judged stage by stage.

On the built-in world a reader that no training ever saw says what is right; on any data there are distances, likeness,
motion and losses. Equal seeds for every checkpoint; the same command goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from stages.evaluation.checkpoints import Choice, Chosen, Subject, follow, subjects
from stages.evaluation.classifier import classifier_scale_for
from stages.evaluation.extras import EXTRA_NEEDS, EXTRA_STAGES
from stages.evaluation.judges import open_gauge
from stages.evaluation.judging import evaluate, software
from stages.evaluation.neighbours import nearest_training_clips
from stages.evaluation.questions import Questions, ShardQuestions, WorldQuestions
from stages.evaluation.report import write_report
from stages.evaluation.road import Plan
from stages.evaluation.sheets import measure_table, table
from stages.pipeline import Pipeline
from videodiff.errors import UserError
from videodiff.model import DESCRIPTION, DiffusionStage, Model, Sampling, sha256
from videodiff.training import distributed
from videodiff.video_io import write_json

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


@dataclass(frozen=True)
class Request:
    """What a call asks for. num_held_out: of each held-out split, None for as many as `num_prompts`."""

    model: str
    stage: str
    num_prompts: int
    seed: int
    out: Path
    num_held_out: int | None = None
    classifier_scale: float | None = None
    data: str | None = None
    checkpoints: str = "last"
    weights: Chosen = "ema"
    judges: Path | None = None
    watch: bool = False
    training: str | None = None


def main(request: Request) -> None:
    """Judge the stage ("all": every one that the model has) and write tables, JSON and pictures to `out`.

    Under torchrun or srun the ranks share the prompts; rank 0 writes and prints the result.
    """
    distributed.start()
    try:
        _main(request)
    finally:
        distributed.cleanup()


def _main(request: Request) -> None:
    if request.num_prompts < 1:
        raise UserError(f"--num-prompts {request.num_prompts}: there is nothing to judge; ask for at least 1")
    console = Console(stderr=True, quiet=distributed.rank() > 0)
    questions = _questions(request)
    choice = Choice.parse(request.checkpoints)
    several = request.watch or not choice.last
    chosen = (
        follow(request.model, choice, request.weights, lambda line: console.print(line, highlight=False))
        if request.watch
        else subjects(request.model, choice, request.weights)
    )
    done, gone = [], []
    try:
        for subject in chosen:
            if _judged(request, subject, questions, console, several):
                done.append(subject)
                _publish(request.out, done, gone)
            else:
                gone.append(subject.name)
    finally:
        questions.close()
    if not done:
        raise UserError(f"{request.model}: no checkpoint could be judged (gone before: {', '.join(gone) or 'none'})")


def _publish(out: Path, done: Sequence[Subject], gone: Sequence[str]) -> None:
    """What is known so far, for people: the page, and which checkpoints it is of."""
    if distributed.rank() > 0:
        return
    if any(subject.name for subject in done):
        told = [{"name": subject.name, "step": subject.step, "weights": subject.weights} for subject in done]
        write_json(out / "checkpoints.json", {"checkpoints": told, "gone": list(gone)})
    try:
        print(write_report(out))
    except UserError as error:  # without jinja2 there is all but the page
        print(f"no page: {error}")


def _judged(request: Request, subject: Subject, questions: Questions, console: Console, may_go: bool) -> bool:
    """Judge one model; False where it is gone: a run that goes on removes old checkpoints, which ends no others'."""
    try:
        _judge(request, subject, questions, console)
    except UserError:
        if not may_go or (subject.folder / DESCRIPTION).exists():
            raise
        console.print(f"skipped {subject.name}: it is gone", style="yellow", highlight=False)
        return False
    return True


def _questions(request: Request) -> Questions:
    if request.data is not None:
        if request.num_held_out is not None:
            raise UserError(
                "--num-held-out is of the built-in world, --data has no held-out combinations; leave it out"
            )
        return ShardQuestions(request.data, request.num_prompts, request.seed)
    held_out = request.num_prompts if request.num_held_out is None else request.num_held_out
    return WorldQuestions(request.num_prompts, held_out, request.seed)


def _judge(request: Request, subject: Subject, questions: Questions, console: Console) -> None:
    """One model; what is said of it goes to `out`, or of several to a folder there."""
    out = request.out / subject.name
    model = Model.load(subject.folder, subject.weights)
    plan, skipped = plan_for(model, request.stage, request.seed, of_the_world(questions))
    plan = replace(plan, classifier_scale=classifier_scale_for(plan, request.classifier_scale))
    device = distributed.device()
    gauge, left_out = open_gauge(request.judges, model, plan.size, device)
    skipped |= left_out
    for name, reason in skipped.items():
        console.print(f"skipped {name}: {reason}", style="yellow", highlight=False)
    road = Pipeline(model, device)
    road.load()  # a run that goes on may remove the checkpoint while it is judged
    identity = {
        "model": sha256(model.folder / DESCRIPTION), "weights": subject.weights,
        "software": {**software(), "device": device.type},
    }  # fmt: skip
    began = time.perf_counter()
    report = evaluate(road, plan, questions, gauge, identity, out, console)
    if report is None:
        return
    memorized = None
    if request.training is not None:
        split = questions.prompts[0].split
        memorized = nearest_training_clips(out, plan, gauge, request.training, split, request.out)
        if memorized is None:
            skipped["nearest training clips"] = "no generated videos, or no network that sees them"
    write_json(out / "evaluation.json", {"skipped": skipped, **report, "memorized": memorized})
    # Apart from the figures, which are the same when they are made again.
    write_json(out / "timings.json", {"seconds": time.perf_counter() - began, "ranks": distributed.world()})
    _show(subject, report, skipped)
    print(out / "evaluation.json")


def _show(subject: Subject, report: dict[str, Any], skipped: dict[str, str]) -> None:
    show = Console()
    if not show.is_terminal:
        show = Console(width=150)
    if subject.name:
        show.rule(subject.name)
    show.print(table(report["rows"]))
    show.print(measure_table(report["rows"], report["figures"]))
    if report["verdict"] is not None:
        show.print(report["verdict"], highlight=False)
    for reason, count in report["bad"].items():
        show.print(f"Left out: {count} samples ({reason}).", highlight=False)
    for name, reason in skipped.items():
        show.print(f"Not judged: {name} ({reason}).", highlight=False)


def of_the_world(questions: Questions) -> bool:
    """Whether the built-in world knows what every prompt says."""
    return all(prompt.combination is not None for prompt in questions.prompts)


def plan_for(model: Model, stage: str, seed: int, of_world: bool = True) -> tuple[Plan, dict[str, str]]:
    """What can be judged of a model, and which stages are left out for which reason.

    of_world: the prompts are of the built-in world, which what stands beside the road needs. UserError when a stage
    named outright, or every stage, is missing.
    """
    has = model.config.stages()
    skipped: dict[str, str] = {}
    rows: list[str] = []
    # What stands beside the road is judged where there is any, and nobody misses it elsewhere.
    every = [*STAGE_ROWS, *(name for name in EXTRA_STAGES if name in has)]
    for name in every if stage == "all" else (stage,):
        if (problem := _problem(model, name, stage, has, of_world)) is not None:
            skipped[name] = problem
        else:
            rows += STAGE_ROWS[name] if name in STAGE_ROWS else EXTRA_STAGES[name].rows
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
    smooth = ["real_smooth"] if {"interpolation", "whole"} & set(rows) else []
    return Plan(("real", *smooth, *rows), size, frames, fps, factor, seed, sampling, enlarged), skipped


def _problem(model: Model, name: str, asked: str, has: Sequence[str], of_world: bool) -> str | None:
    """Why a stage can't be judged; UserError where it was asked for by name."""
    extra = EXTRA_STAGES.get(name)
    missing = [part for part in {**NEEDS, **EXTRA_NEEDS}[name] if part not in has]
    problem = None
    if missing and asked != "all":
        model.part(missing[-1])  # says what the model lacks
    if missing:
        problem = f"the model has no stage {', '.join(missing)}"
    elif extra is not None:
        problem = extra.problem(model) if of_world else "it is judged on the built-in world alone; leave out --data"
        if problem is not None and asked != "all":
            raise UserError(problem)
    return problem
