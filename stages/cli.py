"""The `videodiff` command: parses, calls, prints. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from videodiff.errors import UserError

app = typer.Typer(
    name="videodiff",
    help="Text to image to video to smooth video: train, generate, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Make and inspect training data.", no_args_is_help=True)
app.add_typer(data, name="data")


class StageChoice(str, Enum):
    """What `videodiff evaluate --stage` takes."""

    autoencoder = "autoencoder"
    image = "image"
    video = "video"
    interpolation = "interpolation"
    all = "all"


class SamplerChoice(str, Enum):
    """What `videodiff generate --sampler` takes."""

    ddim = "ddim"
    ddpm = "ddpm"


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A stage's YAML, e.g. configs/demo/image.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value ...")] = None,
) -> None:
    """Train a stage; the same command resumes it. Runs alone, under torchrun, or under srun."""
    from stages.assemble import train_stage

    train_stage(config, overrides or [])


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the video shows")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The mp4 to write, or a folder for several")] = None,
    model: Annotated[str | None, typer.Option(help="A model folder, a run, a checkpoint, or 'demo'")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Videos per prompt")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed, another video")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps of the image and video stages")] = None,
    sampler: Annotated[SamplerChoice | None, typer.Option(help="Sampler of the image and video stages")] = None,
    text_guidance: Annotated[float | None, typer.Option(help="Scale of the text")] = None,
    image_guidance: Annotated[float | None, typer.Option(help="Scale of the first image (video stage)")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames before interpolation")] = None,
    fps: Annotated[float | None, typer.Option(help="Playback rate before interpolation")] = None,
    interpolation: Annotated[bool, typer.Option(help="Raise the frame rate by the interpolation stage")] = True,
    image: Annotated[Path | None, typer.Option(help="Animate this picture instead of generating the first image")] = None,
    image_only: Annotated[bool, typer.Option("--image-only", help="Stop at the first image")] = False,
    prompts: Annotated[Path | None, typer.Option(help=".txt (a prompt a line) or .jsonl (prompt and options)")] = None,
    from_sidecar: Annotated[Path | None, typer.Option("--from", help="Repeat a generation from its side-car JSON")] = None,
) -> None:
    """Turn a prompt into an mp4, its first image as PNG, and a JSON side-car that repeats it."""
    from stages.generate import main

    given = {
        "model": model, "num_samples": num_samples, "seed": seed, "steps": steps,
        "sampler": sampler.value if sampler else None, "text_guidance": text_guidance,
        "image_guidance": image_guidance, "frames": frames, "fps": fps,
        "interpolation": None if interpolation else False, "image": str(image) if image else None,
        "image_only": image_only or None,
    }  # fmt: skip
    options = {key: value for key, value in given.items() if value is not None}
    main(prompt=prompt, out=out, prompts=prompts, sidecar=from_sidecar, options=options)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, a run, a checkpoint, or 'demo'")],
    stage: Annotated[StageChoice, typer.Option(help="Which stage to judge")] = StageChoice.all,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts per row")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the prompts and of the noise")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the table, the JSON and the pictures")] = Path("outputs/evaluation"),
) -> None:
    """Judge a model stage by stage on the built-in world; the last row tells which stage loses most."""
    from stages.evaluate import main

    main(model, stage.value, num_prompts, seed, out)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint or a model folder")],
    out: Annotated[Path, typer.Option(help="The new model folder")],
    half: Annotated[bool, typer.Option("--half", help="Store the weights in float16")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="The raw weights of the newest stage, not the averaged ones")] = False,
) -> None:
    """Copy a model's inference weights into one folder that stands alone."""
    from videodiff.model import Model
    from videodiff.model import export as export_model

    export_model(Model.load(model, "raw" if raw else "ema"), out, half)
    typer.echo(f"wrote {out}")


@data.command()
def world(
    out: Annotated[Path, typer.Option(help="Folder of the shards")],
    num_clips: Annotated[int, typer.Option(min=1, help="How many clips")] = 1000,
    size: Annotated[int, typer.Option(min=16, help="Height and width in pixels, even")] = 64,
    frames: Annotated[int, typer.Option(min=1, help="Frames per clip")] = 31,
    fps: Annotated[float, typer.Option(min=0.1, help="Frames per second")] = 16.0,
    seed: Annotated[int, typer.Option(help="Another seed, other clips")] = 0,
) -> None:
    """Render the built-in world of moving shapes into training shards (mp4 + json in tar files)."""
    from data_pipeline.shards import write_world_shards

    index = write_world_shards(out, num_clips=num_clips, size=size, frames=frames, fps=fps, seed=seed)
    typer.echo(f"wrote {index}")


def main() -> None:
    """Entry point: a user's mistake ends in one line and status 2, Ctrl-C in status 130, a full disk in status 1."""
    try:
        app()
    except UserError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("stopped by Ctrl-C; what was finished is kept, the same command goes on", 130)
    except OSError as error:
        if os.environ.get("VIDEODIFF_TRACEBACK"):
            raise
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}", 1)


def _fail(message: str, status: int) -> None:
    print(f"videodiff: error: {message}", file=sys.stderr)
    raise SystemExit(status)
