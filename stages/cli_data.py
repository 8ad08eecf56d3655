"""`videodiff data world | check | show | encode`: the built-in world, and what one does with finished shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from videodiff.errors import UserError

Shards = Annotated[str, typer.Argument(help="A folder of shards, an index.json, a tar, a pattern, or a URL of these")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode; 0: this one, without a deadline")]
Deadline = Annotated[float, typer.Option(min=0.1, help="Seconds for one clip")]


def world(
    out: Annotated[Path, typer.Option(help="Folder of the shards")],
    num_clips: Annotated[int, typer.Option(min=1, help="How many clips")] = 1000,
    size: Annotated[int, typer.Option(min=16, help="Height and width in pixels, even")] = 64,
    frames: Annotated[int, typer.Option(min=1, help="Frames per clip")] = 31,
    fps: Annotated[float, typer.Option(min=0.1, help="Frames per second")] = 16.0,
    seed: Annotated[int, typer.Option(help="Another seed, other clips")] = 0,
    objects: Annotated[int, typer.Option(min=1, max=2, help="Of each clip; two, each moving its own way")] = 1,
    motion_captions: Annotated[
        int,
        typer.Option(
            min=0, help="Of how many of a clip's 4 captions the motion alone is true; the look they tell is drawn"
        ),
    ] = 0,
) -> None:
    """Render the built-in world of moving shapes into training shards (mp4 + json in tar files)."""
    from data_pipeline.shards import write_world_shards

    index = write_world_shards(
        out,
        num_clips,
        size,
        frames,
        fps,
        seed,
        motion_captions=motion_captions,
        objects=objects,
        progress=sys.stdout.isatty(),
    )
    typer.echo(f"wrote {index}")


def check(
    shards: Shards,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Of the whole run, for the steps of an epoch")] = None,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks of the run")] = 1,
    frames: Annotated[int | None, typer.Option(min=1, help="data.frames of the run; with --fps")] = None,
    fps: Annotated[float | None, typer.Option(min=0.1, help="data.fps of the run; with --frames")] = None,
    workers: Workers = 2,
    deadline_seconds: Deadline = 30.0,
) -> None:
    """Read and decode every sample, compare hashes, list all that is wrong; status 2 if anything is."""
    from data_pipeline.check import check_shards, steps_per_epoch

    if batch_size is not None:
        steps_per_epoch(0, batch_size, world_size)  # refuses numbers that don't fit before anything is read
    if (frames is None) != (fps is None):
        raise UserError("--frames and --fps say together what a run will ask of a clip; give both")
    wanted = None if frames is None or fps is None else (fps, frames)
    found = check_shards(shards, workers, deadline_seconds, progress=sys.stdout.isatty(), wanted=wanted)
    for line in found.problems:
        typer.echo(line)
    hours = f", {found.seconds / 3600:.3g} hours" if found.seconds else ""
    typer.echo(
        f"{found.num_good} of {found.num_samples} samples in {found.num_shards} shards are good "
        f"({found.num_captions} captions{hours})"
    )
    if found.decoders:
        typer.echo("read by " + ", ".join(f"{name} {count}" for name, count in sorted(found.decoders.items())))
    if batch_size is not None:
        steps = steps_per_epoch(found.num_samples, batch_size, world_size)
        typer.echo(f"{steps:.6g} steps an epoch: batches of {batch_size} = {world_size} x {batch_size // world_size}")
    if found.problems:
        reasons = ", ".join(f"{count} {reason}" for reason, count in found.counts.most_common())
        raise UserError(f"{shards}: {len(found.problems)} problems ({reasons}), listed above; mend or remove them")


def show(
    shards: Shards,
    out: Annotated[Path, typer.Option(help="The HTML file to write")],
    num_samples: Annotated[int, typer.Option(min=1, help="Samples on the page, spread over all")] = 48,
    frames: Annotated[int, typer.Option(min=1, help="Frames shown of each")] = 8,
    height: Annotated[int, typer.Option(min=8, help="Their height in pixels")] = 96,
    workers: Workers = 2,
    deadline_seconds: Deadline = 30.0,
) -> None:
    """Write a page of samples with their frames, captions and measures."""
    from data_pipeline.show import write_page

    count = write_page(shards, out, num_samples, frames, height, workers, deadline_seconds)
    typer.echo(f"wrote {out} with {count} samples")


def encode(
    shards: Shards,
    model: Annotated[str, typer.Option(help="Whose autoencoder and text towers: a run, a checkpoint, a model folder")],
    out: Annotated[Path, typer.Option(help="Folder of the encoded shards")],
    frames: Annotated[int, typer.Option(min=1, help="data.frames of the stage that will train; 1 for images")],
    fps: Annotated[float, typer.Option(min=0.1, help="Its data.fps")],
    size: Annotated[int, typer.Option(min=8, help="Its data.size")],
    variants: Annotated[int, typer.Option(min=1, help="Windows, crops and flips fixed for each sample")] = 1,
    random_crop: Annotated[
        bool, typer.Option("--random-crop", help="Not the centre of pictures that aren't square")
    ] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror every other variant")] = False,
    seed: Annotated[int, typer.Option(help="Another seed, other windows, crops and flips")] = 0,
    processes: Annotated[
        int,
        typer.Option(min=1, help="That share the shards and the GPUs; --workers and --bad-limit are of each"),
    ] = 1,
    workers: Workers = 2,
    deadline_seconds: Deadline = 30.0,
    bad_limit: Annotated[
        float, typer.Option(min=0, max=1, help="Stop beyond this share of bad clips, if over 10")
    ] = 0.01,
) -> None:
    """Make latents and text features of videos once, to train the diffusion stages without decoding."""
    from data_pipeline.bad_samples import BadSamples
    from data_pipeline.data_config import DataConfig
    from stages.encode import BAD_SAMPLES
    from stages.encode import encode as run
    from videodiff.model import Model

    config = DataConfig(
        shards=shards, batch_size=1, frames=frames, fps=fps, size=size, crop="random" if random_crop else "centre",
        flip=flip, workers=workers, deadline_seconds=deadline_seconds, bad_limit=bad_limit,
    )  # fmt: skip
    done = run(config, Model.load(model), out, variants, seed, progress=sys.stdout.isatty(), processes=processes)
    typer.echo(f"wrote {done}")
    left_out = BadSamples(out / BAD_SAMPLES, bad_limit, config.bad_floor)
    if left_out.counts:
        typer.echo(f"left out: {left_out.told()}")
