"""`videodiff generate`: requests -> files. One request makes one mp4, its first image and a side-car that repeats it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from rich.console import Console
from rich.progress import Progress

from data_pipeline.world_captions import parse
from stages.pipeline import Pipeline, SampleKey, adjusted
from videodiff import config as configs
from videodiff.config import Config
from videodiff.errors import UserError
from videodiff.model import DESCRIPTION, Model, sha256
from videodiff.video_io import read_image, symptoms, write_json, write_png, write_video

SIDECAR_FORMAT = 1


class Options(Config):
    """What `generate` can be told; None means what the model's own card says."""

    prompt: str = Field(min_length=1)
    model: str = "demo"
    num_samples: int = Field(1, ge=1)
    seed: int = 0
    steps: int | None = Field(None, ge=1)
    sampler: Literal["ddim", "ddpm"] | None = None
    text_guidance: float | None = Field(None, ge=0)
    image_guidance: float | None = Field(None, ge=0)
    frames: int | None = Field(None, ge=1)
    fps: float | None = Field(None, gt=0)
    interpolation: bool = True
    image: str | None = None
    image_only: bool = False


@dataclass(frozen=True)
class Request:
    """One video to make: the options, which of their samples, and where it goes (without the ending)."""

    options: Options
    index: int
    stem: Path

    def hash(self, model_hash: str) -> str:
        """Names what will be made: options that change the frames, sample index, model, given picture."""
        told = configs.to_dict(self.options)
        for key in ("num_samples", "model"):
            told.pop(key)
        if self.options.image is not None:
            told["image"] = sha256(Path(self.options.image))
        text = json.dumps({"options": told, "index": self.index, "model": model_hash}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def main(
    prompt: str | None, out: Path | None, prompts: Path | None, sidecar: Path | None, options: dict[str, Any]
) -> None:
    """Make all that the command line asks for; this rank's share of it under torchrun or srun."""
    console = Console(stderr=True)
    requests = list(_requests(prompt, out, prompts, sidecar, options))
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    pipelines: dict[str, Pipeline] = {}
    failed = 0
    for request in requests[rank::world]:
        name = request.options.model
        if name not in pipelines:
            pipelines[name] = Pipeline(Model.load(name), "cuda" if torch.cuda.is_available() else "cpu")
        pipeline = pipelines[name]
        _check(request, pipeline)
        identity = request.hash(_model_hash(pipeline.model))
        if prompts is not None and _finished(request, identity):
            console.print(f"{request.stem}: already made, skipped")
            continue
        failed += not _make(request, pipeline, identity, console)
    if failed:
        raise UserError(f"{failed} of {len(requests[rank::world])} results are not finite; see the warnings above")


def _requests(
    prompt: str | None, out: Path | None, prompts: Path | None, sidecar: Path | None, options: dict[str, Any]
) -> Iterator[Request]:
    if sum(source is not None for source in (prompt, prompts, sidecar)) != 1:
        raise UserError('name one source: a prompt in quotes, or --prompts FILE, or --from SIDECAR.json')
    if sidecar is not None:
        if options:
            raise UserError(f"--from repeats a generation exactly; leave out {', '.join(sorted(options))}")
        yield _repeated(sidecar, out)
    elif prompts is not None:
        folder = out if out is not None else Path("outputs")
        if folder.suffix == ".mp4":
            raise UserError(f"{folder}: --prompts makes many files; name a folder with -o")
        for number, line in enumerate(_lines(prompts)):
            told = configs.build(Options, {**options, **line}, f"{prompts}, prompt {number + 1}")
            yield from _samples(told, folder / f"{number:04d}-{_slug(told.prompt)}")
    else:
        assert prompt is not None
        if not prompt.strip():
            raise UserError("the prompt is empty; say what the video shows, e.g. \"a small blue square moving up\"")
        told = configs.build(Options, {**options, "prompt": prompt}, "the options")
        target = out if out is not None else Path("outputs") / f"{_slug(prompt)}.mp4"
        if target.is_dir():
            target = target / f"{_slug(prompt)}.mp4"
        if target.suffix not in (".mp4", ".png"):
            raise UserError(f"{target}: the output is an mp4; end its name with .mp4, or name an existing folder")
        yield from _samples(told, target.with_suffix(""))


def _samples(options: Options, stem: Path) -> Iterator[Request]:
    for index in range(options.num_samples):
        yield Request(options, index, stem if options.num_samples == 1 else stem.with_name(f"{stem.name}-{index}"))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The prompts of a file, each a dictionary of options; blank lines are left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the prompts can't be read ({error.strerror})") from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            found.append({"prompt": line.strip()})
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(value, dict):
            raise UserError(f'{path}, line {number}: not an object; write {{"prompt": "..."}}')
        found.append(value)
    if not found:
        raise UserError(f"{path}: holds no prompt; write one a line")
    return found


def _repeated(sidecar: Path, out: Path | None) -> Request:
    try:
        told = json.loads(sidecar.read_text(encoding="utf-8"))
        options, index, model_hash = told["options"], told["sample"], told["model"]["sha256"]
    except OSError as error:
        raise UserError(f"{sidecar}: the side-car can't be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{sidecar}: not a side-car that generate wrote") from None
    request_options = configs.build(Options, options, str(sidecar))
    if (found := _model_hash(Model.load(request_options.model))) != model_hash:
        raise UserError(
            f"{sidecar}: was made with another model ({model_hash[:12]}) than {request_options.model} is now "
            f"({found[:12]}); it can't be repeated exactly"
        )
    target = out if out is not None else sidecar.with_name(f"{sidecar.stem}-again.mp4")
    return Request(request_options, index, target.with_suffix(""))


def _check(request: Request, pipeline: Pipeline) -> None:
    """Refuse what the model can't do before anything is computed."""
    options, model = request.options, pipeline.model
    request.stem.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(request.stem.parent, os.W_OK):
        raise UserError(f"{request.stem.parent}: can't be written; name another output with -o")
    for stage in ("autoencoder", "text", "image") if options.image_only else ("autoencoder", "text", "image", "video"):
        model.part(stage)
    if options.image_only and options.image is not None:
        raise UserError("--image-only makes a first image and --image gives one; leave one of them out")
    if not options.image_only and options.frames not in (None, model.diffusion("video").frames):
        raise UserError(
            f"--frames {options.frames}: this model makes clips of {model.diffusion('video').frames} frames; leave it out"
        )


def _make(request: Request, pipeline: Pipeline, identity: str, console: Console) -> bool:
    """Make one request's files; False when the result is not finite (and so is not written as a video)."""
    options, model = request.options, pipeline.model
    key = SampleKey(options.seed, options.prompt, request.index)
    warnings = [f"the text tower does not read the words cut off at its end: {' '.join(lost)}"] if (
        lost := model.text.lost_words(options.prompt)
    ) else []
    if unknown := model.text.unknown_words(options.prompt):
        warnings.append(f"words that the model was not trained on: {', '.join(unknown)}")

    made: dict[str, Any] = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:

        def bar(stage: str):  # type: ignore[no-untyped-def]
            task = progress.add_task(stage, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        part = model.diffusion("image")
        image_sampling = adjusted(part.sampling, options.sampler, options.steps, options.text_guidance)
        if options.image is not None:
            first = pipeline.encode(_picture(Path(options.image), part.size)[None, None])
        else:
            first = pipeline.image([key], image_sampling, bar("image"))
            made["image"] = configs.to_dict(image_sampling)
        latents, fps = first, float(part.fps)
        if not options.image_only:
            video = model.diffusion("video")
            fps = options.fps or video.fps
            sampling = adjusted(
                video.sampling, options.sampler, options.steps, options.text_guidance, options.image_guidance
            )
            latents = pipeline.video([key], first, fps, sampling, bar("video"))
            made["video"] = configs.to_dict(sampling)
            if options.interpolation and model.config.interpolation is not None:
                smoothing = model.diffusion("interpolation")
                latents = pipeline.interpolation([key], latents, fps, smoothing.sampling, bar("interpolation"))
                fps *= smoothing.factor
                made["interpolation"] = configs.to_dict(smoothing.sampling)
        finite = bool(torch.isfinite(latents).all())
        frames = pipeline.decode(latents)[0]
        picture = pipeline.decode(first)[0, 0]
    warnings += ["the result is not finite"] if not finite else [
        f"the result is {symptom}" for symptom in symptoms(frames, _asks_for_motion(options.prompt) and len(frames) > 1)
    ]
    for warning in warnings:
        console.print(f"warning: {request.stem.name}: {warning}", style="yellow", highlight=False)
    if not finite:
        return False
    files = _write(request, frames, picture, fps)
    told = {
        "format": SIDECAR_FORMAT,
        "options": configs.to_dict(options),
        "sample": request.index,
        "request": identity,
        "model": {"name": options.model, "sha256": _model_hash(model)},
        "stages": made,
        "result": {"frames": len(frames), "fps": fps, "height": frames.shape[1], "width": frames.shape[2]},
        "frames_sha256": hashlib.sha256(np.ascontiguousarray(frames).tobytes()).hexdigest(),
        "files": [file.name for file in files],
        "warnings": warnings,
        "software": {"videodiff": _version(), "torch": torch.__version__},
    }
    sidecar = request.stem.with_suffix(".json") if not request.stem.suffix else Path(f"{request.stem}.json")
    write_json(sidecar, told)
    for file in (*files, sidecar):
        print(file)
    return True


def _write(request: Request, frames: np.ndarray[Any, Any], picture: np.ndarray[Any, Any], fps: float) -> list[Path]:
    image = Path(f"{request.stem}.png")
    write_png(image, picture)
    if request.options.image_only:
        return [image]
    video = Path(f"{request.stem}.mp4")
    write_video(video, frames, fps, metadata=json.dumps({"prompt": request.options.prompt, "seed": request.options.seed}))
    return [video, image]


def _finished(request: Request, identity: str) -> bool:
    """Whether the files of exactly this request stand already."""
    try:
        told = json.loads(Path(f"{request.stem}.json").read_text(encoding="utf-8"))
        return told["request"] == identity and all((request.stem.parent / name).is_file() for name in told["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _picture(path: Path, size: int) -> np.ndarray[Any, Any]:
    picture = read_image(path)
    if picture.shape[:2] != (size, size):
        height, width = picture.shape[:2]
        raise UserError(f"{path}: is {width}x{height} pixels, this model takes {size}x{size}; resize or crop it first")
    return picture


def _asks_for_motion(prompt: str) -> bool:
    return parse(prompt).get("motion") not in (None, "still")


def _model_hash(model: Model) -> str:
    """sha256 of the description, which in turn names the sha256 of every file."""
    return sha256(model.folder / DESCRIPTION)


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "video"


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("videodiff")
    except PackageNotFoundError:
        return "unknown"


__all__: Sequence[str] = ["Options", "Request", "main"]
