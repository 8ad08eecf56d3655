"""`videodiff evaluate`: a model, or the checkpoints of a run, judged stage by stage.

On the built-in world a reader that no training ever saw says what is right; on any data there are distances, likeness,
motion and losses. Equal seeds for every checkpoint; the same command goes on where it stopped.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline.world import Combination
from stages.evaluation.checkpoints import Choice, Chosen, Index, Subject, follow, placed, subjects
from stages.evaluation.classifier import classifier_scale_for
from stages.evaluation.extras import EXTRA_NEEDS, EXTRA_STAGES
from stages.evaluation.judges import open_gauge, without
from stages.evaluation.judging import Job, evaluate, software
from stages.evaluation.neighbours import check_training, nearest_training_clips, training_questions
from stages.evaluation.questions import Questions, ShardQuestions, WorldQuestions
from stages.evaluation.report import write_report
from stages.evaluation.road import Plan
from stages.evaluation.sheets import measure_table, table
from stages.evaluation.statistics import sick_in_words
from stages.evaluation.ucf101 import PREFIX, UCF101Questions, protocol_line
from stages.evaluation.weakest import cost_in_words
from stages.pipeline import Pipeline
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.parts import DESCRIPTION, DiffusionStage, Sampling, sha256
from videodiff.training import distributed
from videodiff.video_io import write_json

STAGE_ROWS: dict[str, tuple[str, ...]] = {
    "autoencoder": ("autoencoder",),
    "text": (),  # it makes nothing: it is judged on the real clips and their captions
    "image": ("image",),
    "video": ("video_real", "video_generated"),
    "interpolation": ("interpolation", "whole"),
}
NEEDS = {
    "autoencoder": ("autoencoder",),
    "text": ("text",),
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
    batch_size: int = 8
    sentences: Path | None = None
    size: int | None = None
    objects: int = 1


def main(request: Request) -> None:
    """Judge the stage ("all": every one that the model has) and write tables, JSON and pictures to `out`.

    Under torchrun or srun the ranks share the prompts; rank 0 writes and prints the result.
    """
    if signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN:  # by a job script, while nobody listened yet
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # a cluster's warning: what is finished lies on the disk
    distributed.start()
    try:
        _main(request)
    finally:
        distributed.cleanup()


def _main(request: Request) -> None:
    if request.num_prompts < 1:
        raise UserError(f"--num-prompts {request.num_prompts}: there is nothing to judge; ask for at least 1")
    console = Console(stderr=True, soft_wrap=True, quiet=distributed.rank() > 0)
    choice = Choice.parse(request.checkpoints)
    many = request.watch or not choice.last
    index = Index(request.out, request.model)
    if request.watch:
        chosen: Iterable[Subject] = follow(
            request.model, choice, request.weights, index.done, lambda line: console.print(line, markup=False)
        )
    else:
        chosen = subjects(request.model, choice, request.weights, index.known if many else ())
    questions, training = _questions(request), _training(request)
    try:
        for subject in chosen:
            opened = _opened(request, subject, questions, training, console, index if many else None)
            if opened is not None:
                index.check(opened.subject, opened.job.protocol)
                _judge(request, opened, training, console)
                index.add(opened.subject, opened.job.protocol)
            if index.done:
                _publish(request.out)
    finally:
        questions.close()
        if training is not None:
            training.close()
    _told_at_the_end(request.model, index, console)


def _told_at_the_end(model: str, index: Index, console: Console) -> None:
    """The checkpoints that could not be read, by name. Raises UserError where none was judged."""
    names = ", ".join(index.unread)
    if not index.done:
        reason = "; ".join([*index.unread.values()][:1]) or "the run has none that is still there"
        raise UserError(f"{model}: no checkpoint could be judged{f' ({names})' if names else ''}; {reason}")
    if names:
        total = len({*index.unread, *(each.name for each in index.done)})
        console.print(f"{len(index.unread)} of {total} checkpoints could not be read: {names}", style="yellow")


def _publish(out: Path) -> None:
    """What is known so far, for people."""
    if distributed.rank() > 0:
        return
    try:
        print(write_report(out))
    except UserError as error:  # without jinja2 there is all but the page
        print(f"no page: {error}")


def _training(request: Request) -> ShardQuestions | None:
    """The training clips, on rank 0, which looks at them. Raises UserError on all ranks for a location without any."""
    found, problem = None, None
    if request.training is not None and distributed.rank() == 0:
        try:
            found = training_questions(request.training, request.seed)
        except UserError as error:
            problem = str(error)
    distributed.raise_from_first(problem)
    return found


def _questions(request: Request) -> Questions:
    if request.data is not None:
        if request.num_held_out is not None:
            raise UserError(
                "--num-held-out is of the built-in world, --data has no held-out combinations; leave it out"
            )
        if request.objects != 1:
            raise UserError("--objects is of the built-in world, --data says itself what it shows; leave it out")
        if request.data.startswith(PREFIX):
            folder = Path(request.data.removeprefix(PREFIX))
            return UCF101Questions(folder, request.num_prompts, request.seed, request.sentences)
    if request.sentences is not None:
        raise UserError(f"--sentences is of the UCF-101 protocol (--data {PREFIX}FOLDER); leave it out")
    if request.data is not None:
        return ShardQuestions(request.data, request.num_prompts, request.seed)
    held_out = request.num_prompts if request.num_held_out is None else request.num_held_out
    return WorldQuestions(request.num_prompts, held_out, request.seed, request.objects)


@dataclass(frozen=True)
class Opened:
    """A model with all its networks in memory: its files may go while it is judged."""

    subject: Subject
    job: Job
    skipped: dict[str, str]


def _opened(
    request: Request,
    subject: Subject,
    questions: Questions,
    training: ShardQuestions | None,
    console: Console,
    index: Index | None,
) -> Opened | None:
    """The model on every rank, or on none: a run that goes on removes old checkpoints, perhaps under one rank's hands,
    and a disk may have spoiled one.

    index: of several checkpoints, of which one that is gone or can't be read is None, and is told there; without it,
    and for what no checkpoint is to blame for, UserError is raised on all ranks.
    """
    opened, problem, is_its_own = None, None, False
    try:
        device = distributed.device()
        is_its_own = True
        road = Pipeline(Model.load(subject.folder, subject.weights), device)
        road.load()
        is_its_own = False
        opened = _open(request, subject, questions, road)
        if training is not None:
            check_training(training, opened.job.plan, opened.job.gauge)
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{subject.folder}: can't be read ({error.strerror or error}); copy it again"
    told = distributed.gather_to_first((problem, is_its_own))
    first = next((each for each in told if each[0] is not None), None) if told is not None else None
    first, is_gone = distributed.from_first((first, not (subject.folder / DESCRIPTION).exists()))
    if first is not None:
        problem, is_its_own = first
        if index is None or not (is_gone or is_its_own):
            raise UserError(problem)
        reason = "it is gone" if is_gone else str(problem).replace(str(subject.folder), subject.folder.name)
        console.print(f"skipped {subject.name}: {reason}", style="yellow", markup=False)
        if not is_gone:
            index.skip(subject, reason)
        return None
    assert opened is not None
    subject = placed(subject, request.out, opened.job.identity["model"])
    opened = replace(opened, subject=subject, job=replace(opened.job, out=request.out / subject.name))
    for name, reason in opened.skipped.items():
        console.print(f"skipped {name}: {reason}", style="yellow", markup=False, highlight=False)
    return opened


def _open(request: Request, subject: Subject, questions: Questions, road: Pipeline) -> Opened:
    model, device = road.model, road.device
    plan, skipped = plan_for(model, request.stage, request.seed, of_one_object(questions), request.size)
    scale = classifier_scale_for(plan, request.classifier_scale)
    plan = replace(plan, classifier_scale=scale, batch=request.batch_size)
    gauge, left_out = open_gauge(request.judges, model, plan.size, device, request.stage == "text")
    identity = {
        "model": sha256(model.folder / DESCRIPTION), "weights": subject.weights,
        "software": {**software(), "device": device.type},
    }  # fmt: skip
    skipped = {**skipped, **left_out, **gauge.unseen(plan.lengths)}
    return Opened(subject, Job(road, plan, questions, gauge, identity, request.out / subject.name), skipped)


def _judge(request: Request, opened: Opened, training: ShardQuestions | None, console: Console) -> None:
    """One model; what is said of it goes to `out`, or of several to a folder there."""
    out, skipped = opened.job.out, dict(opened.skipped)
    began = time.perf_counter()
    report = evaluate(opened.job, console)
    problem = None
    if report is not None:
        try:
            memorized = None
            if training is not None:
                try:
                    memorized = nearest_training_clips(opened.job, training, request.out)
                    reason = None if memorized else "no generated videos, or no network that sees them"
                except (UserError, OSError) as error:  # all the rest is known: it must not be lost
                    reason = str(error).replace(str(request.training), "--training")
                if reason is not None:
                    skipped["nearest training clips"] = reason
            line = protocol_line(report["protocol"], report["figures"])
            write_json(out / "evaluation.json", {"skipped": skipped, **report, "memorized": memorized, "ucf101": line})
            # Apart from the figures, which are the same when they are made again.
            write_json(out / "timings.json", {"seconds": time.perf_counter() - began, "ranks": distributed.world()})
            _show(opened.subject, {**report, "ucf101": line}, skipped)
            print(out / "evaluation.json")
        except UserError as error:  # the others wait: they must hear of it
            problem = str(error)
    distributed.raise_from_first(problem)


def _show(subject: Subject, report: dict[str, Any], skipped: dict[str, str]) -> None:
    show = Console()
    if not show.is_terminal:
        show = Console(width=150)
    if subject.name:
        show.rule(subject.name)
    show.print(table(report["rows"]))
    show.print(measure_table(report["rows"], report["figures"]))
    costs = [cost_in_words(lines) for lines in report["first_images"].values()]
    for line in filter(None, (report["verdict"], *costs, report["ucf101"], *sick_in_words(report["rows"]))):
        show.print(line, highlight=False, markup=False)
    for reason, count in report["bad"].items():
        show.print(f"Left out: {count} samples ({reason}).", highlight=False, markup=False)
    for name, reason in skipped.items():
        show.print(f"Not judged: {name} ({reason}).", highlight=False, markup=False)


def of_one_object(questions: Questions) -> bool:
    """Whether every prompt is of the built-in world with one object."""
    return all(isinstance(prompt.combination, Combination) for prompt in questions.prompts)


def plan_for(
    model: Model, stage: str, seed: int, of_one: bool = True, size: int | None = None
) -> tuple[Plan, dict[str, str]]:
    """What can be judged of a model, and which stages are left out for which reason.

    of_one: the prompts are of the built-in world with one object, which what stands beside the road needs. size: of
    the clips, for a model that has no stage which fixes it. UserError when a stage named outright, or every stage, is
    missing.
    """
    has = model.config.stages()
    skipped: dict[str, str] = {}
    rows: list[str] = []
    judged: list[str] = []
    # What stands beside the road is judged where there is any, and nobody misses it elsewhere.
    every = [*STAGE_ROWS, *(name for name in EXTRA_STAGES if name in has)]
    for name in every if stage == "all" else (stage,):
        if (problem := _problem(model, name, stage, has, of_one)) is not None:
            skipped[name] = without(model, problem)
        else:
            judged.append(name)
            rows += STAGE_ROWS[name] if name in STAGE_ROWS else EXTRA_STAGES[name].rows
    if not judged:
        raise UserError(f"{model.folder}: holds no stage that can be judged (it has: {', '.join(has) or 'none'})")
    wanted = {part for name in judged for part in {**NEEDS, **EXTRA_NEEDS}[name]}
    used: list[DiffusionStage] = [n for n in ("image", "video", "interpolation", "upscale") if n in has and n in wanted]
    sized: list[DiffusionStage] = [name for name in ("image", "video", "interpolation", "upscale") if name in has]
    if sized:
        own = model.diffusion(sized[0]).size
        if size not in (None, own):
            raise UserError(f"--size {size}: the {sized[0]} stage makes {own} x {own}; leave --size out")
        size = own
    elif size is not None and "autoencoder" in wanted and size % model.config.autoencoder.network.factor:
        raise UserError(f"--size {size}: the autoencoder needs a multiple of {model.config.autoencoder.network.factor}")
    frames, fps = PLAIN_FRAMES, PLAIN_FPS
    if "video" in has:
        frames, fps = model.diffusion("video").frames, model.diffusion("video").fps
    factor = model.diffusion("interpolation").factor if "interpolation" in used else 1
    sampling: dict[str, Sampling] = {name: model.diffusion(name).sampling for name in used}
    enlarged = model.diffusion("upscale").factor if "upscale" in used else 1
    smooth = ["real_smooth"] if {"interpolation", "whole"} & set(rows) else []
    every_row = ("real", *smooth, *rows)
    return Plan(every_row, size or PLAIN_SIZE, frames, fps, factor, seed, sampling, enlarged), skipped


def _problem(model: Model, name: str, asked: str, has: Sequence[str], of_one: bool) -> str | None:
    """Why a stage can't be judged; UserError where it was asked for by name."""
    extra = EXTRA_STAGES.get(name)
    missing = [part for part in {**NEEDS, **EXTRA_NEEDS}[name] if part not in has]
    problem = None
    if missing and asked != "all":
        model.part(missing[-1])  # says what the model lacks
    if missing:
        problem = f"the model has no stage {', '.join(missing)}"
    elif extra is not None:
        problem = (
            extra.problem(model)
            if of_one
            else "it is judged on one object of the built-in world; leave out --data and --objects"
        )
        if problem is not None and asked != "all":
            raise UserError(problem)
    return problem
