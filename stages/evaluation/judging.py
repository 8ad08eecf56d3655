"""One model on all prompts: batches shared by the ranks, what is finished kept, figures made of it."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.decoders import ClipError
from stages.evaluation.extras import measure_extras
from stages.evaluation.figures import set_figures
from stages.evaluation.kept import FeatureFiles, Samples
from stages.evaluation.losses import time_losses
from stages.evaluation.measures import Gauge
from stages.evaluation.questions import Prompt, Questions
from stages.evaluation.road import Plan, Road, measure, record
from stages.evaluation.sheets import clip_path, is_shown, picture_path, write_sheets
from stages.evaluation.statistics import CHIEF, SPLITS, in_words, losses, summary
from stages.evaluation.weakest import alone_in_words, first_images, stages_alone
from stages.pipeline import Pipeline
from videodiff import config as configs
from videodiff.errors import UserError
from videodiff.training import distributed
from videodiff.video_io import write_png, write_video

FORMAT = 5  # of the samples: figures of another one can't be compared
LOG_SECONDS = 60.0
PASSING = ("deadline", "crash")  # what is wrong with a clip's decoder and not with the clip


@dataclass(frozen=True)
class Job:
    """One model on all prompts. identity: which model it is, and with which software it is judged; out: the folder
    where what is found is kept."""

    road: Road
    plan: Plan
    questions: Questions
    gauge: Gauge
    identity: dict[str, Any]
    out: Path

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """All that the figures follow from, as JSON gives it back: samples of another one are never mixed in."""
        plan, gauge = self.plan, self.gauge
        told = {name: value for name, value in vars(plan).items() if name != "sampling" and value is not None}
        told["sampling"] = {stage: configs.to_dict(sampling) for stage, sampling in plan.sampling.items()}
        told |= {"features": [extractor.protocol() for extractor in gauge.extractors]}
        told |= {"perceptual": gauge.perceptual_name, "flow": gauge.flow, "judged_by": gauge.named()}
        return json.loads(json.dumps({"format": FORMAT, **self.identity, **self.questions.identity(), **told}))


def evaluate(job: Job, console: Console) -> dict[str, Any] | None:
    """Measure every prompt that is not finished yet; on rank 0 the protocol, the rows, the figures of sets, the losses
    by stage, the verdict in words and how many samples could not be read, by reason.

    Collective: a UserError that one rank meets is raised on all of them, when the others have finished their share.
    """
    samples, files, problem = None, FeatureFiles(job.out, job.protocol), None
    try:
        samples = Samples(job.out, job.protocol, distributed.rank())
    except UserError as error:
        problem = str(error)
    distributed.raise_from_any(problem)  # and every rank has read what is finished before any adds to it
    assert samples is not None
    try:
        _measure_all(job, samples, files, console)
    except UserError as error:
        problem = str(error)
    except OSError as error:
        place = error.filename or job.out
        problem = f"{place}: {error.strerror or error}; mend that, then the same command goes on where it stopped"
    distributed.raise_from_any(problem)
    report = None
    if distributed.rank() == 0:
        samples.read(job.protocol)
        try:
            report = _report(job, samples, files)
        except UserError as error:  # the others wait: they must hear of it
            problem = str(error)
    distributed.raise_from_first(problem)
    return report


def _measure_all(job: Job, samples: Samples, files: FeatureFiles, console: Console) -> None:
    """This rank's share of the batches."""
    prompts, size = job.questions.prompts, job.plan.batch
    batches = list(enumerate(prompts[i : i + size] for i in range(0, len(prompts), size)))
    own = batches[distributed.rank() :: distributed.world()]
    with _progress(console, sum(len(batch) for _, batch in own)) as advance:
        for number, batch in own:
            if not _finished(batch, number, samples, files):
                _measure(job, number, batch, samples, files)
            advance(len(batch))


def _finished(batch: Sequence[Prompt], number: int, samples: Samples, files: FeatureFiles) -> bool:
    told = [samples.found.get((prompt.split, prompt.number)) for prompt in batch]
    if any(sample is None for sample in told):
        return False
    return all("bad" in sample for sample in told if sample) or files.has(number)


def _report(job: Job, samples: Samples, files: FeatureFiles) -> dict[str, Any]:
    plan, out = job.plan, job.out
    told = [samples.found[(p.split, p.number)] for p in job.questions.prompts]
    finished = [sample for sample in told if "bad" not in sample]
    if not finished:
        raise UserError(f"{out}: none of {len(told)} samples could be judged (the first: {told[0]['detail']})")
    extractors, named = job.gauge.extractors, job.gauge.named()
    entries = summary(finished, plan.rows, named)
    figures, alone, cost = [], {}, {}
    for split, name in SPLITS.items():
        numbers, features = files.of_split(split)
        judged = [samples.found[(split, number)] for number in numbers]
        found = set_figures(plan.rows, features, [s["prompt"] for s in judged], extractors, plan.seed, split)
        figures += [{"split": name, **figure} for figure in found]
        if name in CHIEF and judged:
            alone[name] = stages_alone(judged, features, extractors, named, split)
            cost[name] = first_images(judged, features, extractors, named, split)
    write_sheets(out, finished, plan.rows)
    lost = {name: losses(finished, name) for name in SPLITS.values()}
    said = [
        line
        for name, where in CHIEF.items()
        for line in (in_words(lost[name], where), alone_in_words(alone.get(name, ()), where))
        if line is not None
    ]
    bad = Counter([*(sample["bad"] for sample in told if "bad" in sample), *job.questions.problems])
    return {
        "protocol": job.protocol, "rows": entries, "figures": figures, "losses": lost, "alone": alone,
        "first_images": cost, "verdict": " ".join(said) or None, "bad": dict(sorted(bad.items())),
    }  # fmt: skip


def _measure(job: Job, number: int, batch: Sequence[Prompt], samples: Samples, files: FeatureFiles) -> None:
    """Everything of one batch, kept: first the features, then a line for each prompt, which says that it is done."""
    road, plan, gauge = job.road, job.plan, job.gauge
    read = {prompt: _clip(job.questions, prompt, plan) for prompt in batch}
    for prompt, error in read.items():
        if isinstance(error, ClipError) and error.reason in PASSING:
            raise UserError(f"{error} (this machine is busy, or out of memory); give the same command again")
        if isinstance(error, ClipError):
            told = {"split": prompt.split, "number": prompt.number, "prompt": prompt.text}
            samples.keep({**told, "bad": error.reason, "detail": str(error)})
    clips = {prompt: clip for prompt, clip in read.items() if not isinstance(clip, ClipError)}
    if not clips:
        return
    good, real = list(clips), np.stack(list(clips.values()))
    made, rows = measure(road, plan, good, real, gauge)
    measure_extras(road, plan, good, real, made)
    features = gauge.features({name: row.frames for name, row in rows.items()}, [prompt.text for prompt in good])
    for name in rows:
        for measured, more in zip(made, gauge.from_features(name, features, len(good)), strict=True):
            if measured.rows[name]["finite"]:
                measured.rows[name]["measures"] |= more
    for name, told in _by_the_model(road, plan, good, real):
        for measured, more in zip(made, told, strict=True):
            measured.rows[name]["measures"] |= more
    # Kept without any features too: it says that the batch is finished.
    finite = {f"finite/{name}": torch.tensor(row.finite) for name, row in rows.items()}
    files.keep(number, good, {**features, **finite})
    for i, (prompt, measured) in enumerate(zip(good, made, strict=True)):
        if is_shown(prompt):
            for row, picture in measured.pictures.items():
                write_png(picture_path(job.out, row, prompt.split, prompt.number), picture)
            for row, found in rows.items():
                if found.frames.shape[1] > 1:
                    write_video(clip_path(job.out, row, prompt.split, prompt.number), found.frames[i], found.fps)
        samples.keep(record(prompt, measured))


def _by_the_model(
    road: Road, plan: Plan, good: Sequence[Prompt], real: np.ndarray
) -> Iterator[tuple[str, list[dict[str, float | None]]]]:
    """What only a model's own networks can say of the real clips: cut captions, losses at fixed noise; by rows."""
    if not isinstance(road, Pipeline):
        return
    if "text" in road.model.config.stages() and "real" in plan.rows:
        tower = road.model.text
        yield "real", [{"captions_cut": float(bool(tower.lost_words(prompt.text)))} for prompt in good]
    frames = real[:, :: plan.factor]
    if "image" in plan.rows:
        yield "image", time_losses(road, "image", good, frames, plan.fps, plan.seed)
    if "video_real" in plan.rows:
        yield "video_real", time_losses(road, "video", good, frames, plan.fps, plan.seed)


def _clip(questions: Questions, prompt: Prompt, plan: Plan) -> np.ndarray | ClipError:
    try:
        return questions.clip(prompt, plan.clips)
    except ClipError as error:
        return error


def software() -> dict[str, str]:
    """Versions of what the figures depend on."""
    packages = ("videodiff", "torch", "numpy", "imageio-ffmpeg", "opencv-python-headless", "av", "decord", "pillow")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


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
