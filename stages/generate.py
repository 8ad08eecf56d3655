"""`videodiff generate`: requests -> files. One request makes one mp4, its first image and a side-car that repeats it.

Requests with equal settings are computed together in batches, and shared out over the ranks that a launcher starts.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from data_pipeline.world_captions import asks_for_motion
from stages.guides import check_guides, guides_for
from stages.pipeline import Pipeline, SampleKey, adjusted
from stages.requests import SIDECAR_FORMAT, Options, Request, model_hash, read_requests
from videodiff import config as configs
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.parts import DiffusionStage, Sampling
from videodiff.training.distributed import device, launched_as
from videodiff.video_io import Frames, read_image, symptoms, write_json, write_png, write_video

# What only a video has.
VIDEO_OPTIONS = ("frames", "fps", "image_guidance")


def main(
    prompt: str | None,
    out: Path | None,
    prompts: Path | None,
    sidecar: Path | None,
    options: dict[str, Any],
    batch_size: int = 4,
) -> None:
    """Make all that the command line asks for; this rank's share of it under torchrun or srun.

    Raises UserError for what the model can't do, before anything is computed, and at the end where a result was not
    finite. With a file of prompts, what stands already is skipped.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    requests = read_requests(prompt, out, prompts, sidecar, options)
    rank, world = launched_as()
    models = {name: Model.load(name) for name in dict.fromkeys(n for r in requests for n in r.options.models())}
    for request in requests:
        check(request, models)
    jobs = []
    for request in requests[rank::world]:
        model = models[request.options.model]
        job = Job(request, model, request.identity(model_hash(model)))
        if prompts is not None and request.finished(job.identity):
            console.print(f"{request.stem}: already made, skipped")
        else:
            jobs.append(job)
    for folder in dict.fromkeys(job.request.stem.parent for job in jobs):
        _make_writable(folder)
    sick = 0
    pipelines = {name: Pipeline(model, device()) for name, model in models.items()}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for batch in batches(jobs, batch_size):
            results = _make(batch, pipelines, progress)
            for job, result in zip(batch, results, strict=True):
                sick += not _deliver(job, result, console)
    if sick:
        raise UserError(f"{sick} of {len(jobs)} results are not finite and were not written; try other weights")


@dataclass(frozen=True)
class Job:
    """A request that is to be computed, the model that does it, and the name of what comes out."""

    request: Request
    model: Model
    identity: str

    def settings(self) -> tuple[Any, ...]:
        """What jobs must share to be computed together."""
        options = self.request.options
        told = configs.to_dict(options)
        told |= {name: getattr(options, name) is not None for name in ("image", "control")}
        shared = {name: told[name] for name in sorted(told.keys() - {"prompt", "seed", "num_samples"})}
        return self.request.batch, json.dumps(shared)


@dataclass
class Result:
    """What came of a job: frames uint8 [T,H,W,3] played at `fps`, the first image [H,W,3]; None where not finite."""

    frames: Frames | None
    picture: Frames | None
    fps: float
    stages: dict[str, Any]
    batch: tuple[int, int]
    warnings: list[str] = field(default_factory=list)


def check(request: Request, models: Mapping[str, Model]) -> None:
    """Refuse what the request's model, or a model that guides it, can't do before anything is computed."""
    options, model = request.options, models[request.options.model]
    for needed in ("autoencoder", "text", "image") if options.image_only else ("autoencoder", "text", "image", "video"):
        model.part(needed)
    if options.image_only:
        for name in VIDEO_OPTIONS:
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is of a video, --image-only makes none; leave it out")
        if not options.interpolation:
            raise UserError("--no-interpolation is of a video, --image-only makes none; leave it out")
    if options.image_only and options.image is not None:
        raise UserError("--image-only makes a first image and --image gives one; leave one of them out")
    if options.image is not None:
        if not model.diffusion("video").first_image:
            raise UserError(f"--image: the video stage of {options.model} takes no first image; leave it out")
        _picture(options.image, model.diffusion("image").size)
    if options.control is not None:
        model.part("control")
        if options.image is not None:
            raise UserError("--control steers the first image and --image gives one; leave one of them out")
        _picture(options.control, model.diffusion("image").size)
        if _same_file(request.file(".png"), Path(options.control)):
            raise UserError(
                f"{options.control}: the result's picture would take its place; name another output with -o"
            )
    elif options.control_scale is not None:
        raise UserError("--control-scale says how closely --control PICTURE is followed; name a picture too")
    if options.upscale:
        model.part("upscale")
    if not options.image_only and options.frames not in (None, model.diffusion("video").frames):
        raise UserError(
            f"--frames {options.frames}: this model makes clips of {model.diffusion('video').frames} frames "
            "(before interpolation); leave it out"
        )
    sampled: tuple[DiffusionStage, ...] = ("image",) if options.image_only else ("image", "video")
    for stage in sampled:
        part = model.diffusion(stage)
        _sampling(options, model, stage).sampler.check(part.schedule, part.network.variance)
    check_guides(options, models)


def batches(jobs: Iterable[Job], batch_size: int) -> Iterator[list[Job]]:
    """Jobs with equal settings together, at most `batch_size` of them, in the order in which they were asked for."""
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.settings(), []).append(job)
    for group in groups.values():
        for first in range(0, len(group), batch_size):
            yield group[first : first + batch_size]


def _make(jobs: list[Job], pipelines: Mapping[str, Pipeline], progress: Progress) -> list[Result]:
    """Compute a batch of jobs with equal settings."""
    options = jobs[0].request.options
    pipeline = pipelines[options.model]
    model = pipeline.model
    requests = [job.request for job in jobs]
    places = [(len(jobs), row) for row in range(len(jobs))]
    if (place := requests[0].batch) is not None:  # an exact repetition: the others' rows are filled with its own
        requests, places = requests * place[0], [place]

    def bar(stage: str) -> Callable[[int, int], None]:
        of = "" if len(jobs) == 1 else f" of {len(jobs)} samples"
        task = progress.add_task(f"{stage}{of}", total=None)
        return lambda done, total: progress.update(task, completed=done, total=total, visible=done < total)

    keys = [SampleKey(r.options.seed, r.options.prompt, r.sample) for r in requests]
    guides = guides_for(options, [key.prompt for key in keys], pipelines)
    used: dict[str, Any] = {}
    size, fps = model.diffusion("image").size, 1.0
    if options.image is not None:
        pictures = np.stack([_picture(str(r.options.image), size) for r in requests])
        first = pipeline.encode(pictures[:, None])
    else:
        sampling = _sampling(options, model, "image")
        if options.control is None:
            first = pipeline.image(keys, sampling, bar("image"), guides)
        else:
            pictures = np.stack([_picture(str(r.options.control), size) for r in requests])
            scale = 1.0 if options.control_scale is None else options.control_scale
            first = pipeline.controlled_image(keys, pictures, scale, sampling, bar("image"), guides)
        used["image"] = configs.to_dict(sampling)
    latents = first
    if not options.image_only:
        video = model.diffusion("video")
        smooth = options.interpolation and model.config.interpolation is not None
        factor = model.diffusion("interpolation").factor if smooth else 1
        fps = options.fps or video.fps * factor
        sampling = _sampling(options, model, "video")
        latents = pipeline.video(keys, first, fps / factor, sampling, bar("video"), guides)
        used["video"] = configs.to_dict(sampling)
        if smooth:
            sampling = model.diffusion("interpolation").sampling
            latents = pipeline.interpolation(keys, latents, fps / factor, sampling, bar("interpolation"))
            used["interpolation"] = configs.to_dict(sampling)
    if options.upscale:
        used["upscale"] = configs.to_dict(model.diffusion("upscale").sampling)
    results = []
    for rows, row in places:
        stages = {stage: told | guides.told(stage, row) for stage, told in used.items()}
        result = Result(None, None, fps, stages, (rows, row), _about_words(model, requests[row].options.prompt))
        if torch.isfinite(latents[row]).all():
            result.frames = pipeline.decode(latents[row : row + 1])[0]
        if options.upscale and result.frames is not None:
            sampling = model.diffusion("upscale").sampling
            result.frames = pipeline.upscale(keys[row], result.frames, sampling, bar("upscale"))
        if result.frames is not None:
            if options.image is not None:  # shown as it was given, not as the autoencoder sees it
                result.picture = pictures[row]
            elif options.image_only:
                result.picture = result.frames[0]
            else:  # beside a video it keeps the model's own size, so that --image takes it
                result.picture = pipeline.decode(first[row : row + 1])[0, 0]
            result.warnings += [f"the result is {s}" for s in symptoms(result.frames, _asks_for_motion(requests[row]))]
        else:
            result.warnings.append("the result is not finite")
        results.append(result)
    return results


def _deliver(job: Job, result: Result, console: Console) -> bool:
    """Warn of what is wrong with a result and write its files, the side-car last; False where there are none."""
    request = job.request
    digest = None if result.frames is None else hashlib.sha256(result.frames.tobytes()).hexdigest()
    if request.former is not None and digest not in (None, request.former[0]):
        result.warnings.append(
            f"these are not exactly the frames of the side-car, which were made with torch {request.former[1]}, these "
            f"with torch {torch.__version__}; rounding depends on the versions and on the machine"
        )
    for warning in result.warnings:
        console.print(f"warning: {request.stem.name}: {warning}", style="yellow", markup=False)
    if result.frames is None or result.picture is None:
        return False
    frames, image, video = result.frames, request.file(".png"), request.file(".mp4")
    note = json.dumps({**configs.to_dict(request.options), "sample": request.sample})
    if request.options.image is None or not _same_file(image, Path(request.options.image)):
        write_png(image, result.picture, note)
    files = [image]
    if not request.options.image_only:
        write_video(video, frames, result.fps, metadata=note)
        files = [video, image]
    told = {
        "format": SIDECAR_FORMAT,
        "options": configs.to_dict(request.options),
        "sample": request.sample,
        "batch": result.batch,
        "request": job.identity,
        "model": {"name": request.options.model, "sha256": model_hash(job.model)},
        "inputs": request.inputs(),
        "stages": result.stages,
        "result": {"frames": len(frames), "fps": result.fps, "height": frames.shape[1], "width": frames.shape[2]},
        "frames_sha256": digest,
        "files": [file.name for file in files],
        "warnings": result.warnings,
        "software": {"videodiff": _version(), "torch": torch.__version__},
    }
    write_json(request.file(".json"), told)
    for file in (*files, request.file(".json")):
        print(file, flush=True)
    return True


def _sampling(options: Options, model: Model, stage: DiffusionStage) -> Sampling:
    """The sampling of the image or the video stage as the options ask for it."""
    image_guidance = options.image_guidance if stage == "video" else None
    card = model.diffusion(stage).sampling
    how = options.sampler, options.steps, options.text_guidance, image_guidance
    return adjusted(card, *how, options.guidance_rescale, options.guidance_interval)


def _about_words(model: Model, prompt: str) -> list[str]:
    warnings = []
    if lost := model.text.lost_words(prompt):
        warnings.append(f"the prompt is too long, its last words are cut off: {' '.join(lost)}")
    if unknown := model.text.unknown_words(prompt):
        warnings.append(f"words that the model was not trained on: {', '.join(unknown)}")
    return warnings


def _asks_for_motion(request: Request) -> bool:
    return not request.options.image_only and asks_for_motion(request.options.prompt)


def _picture(path: str, size: int) -> Frames:
    picture = read_image(path)
    height, width = picture.shape[:2]
    if (height, width) != (size, size):
        raise UserError(f"{path}: is {width}x{height} pixels, this model takes {size}x{size}; resize or crop it first")
    return picture


def _make_writable(folder: Path) -> None:
    """Make an output folder; UserError now rather than after minutes of computing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}); name another output with -o") from None


def _same_file(one: Path, other: Path) -> bool:
    return one.exists() and one.samefile(other)


def _version() -> str:
    try:
        return version("videodiff")
    except PackageNotFoundError:
        return "not installed"
