"""The commands that look after runs: `videodiff status` and `videodiff checkpoint ...`; thin, heavy imports inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(help="A run's folder, or a stage's YAML with the same overrides as in training")]


def status(
    run: Run,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value ..., after a YAML")] = None,
    exit_code: Annotated[
        bool,
        typer.Option("--exit-code", help="Exit with 0: complete, 3: go on, 4: hopeless, 5: too many starts in vain"),
    ] = False,
) -> None:
    """How a run stands, while it trains and after: step, speed, time left, last checkpoint, last problem."""
    from stages.runs import run_of
    from videodiff.training import status as statuses

    told = run_of(run, overrides or [])
    typer.echo(statuses.describe(*told))
    if exit_code:
        code, why = statuses.verdict(*told)
        typer.echo(f"{code.name.lower().replace('_', ' ')}: {why}")
        raise typer.Exit(code)


def list_checkpoints(run: Run) -> None:
    """A line for each checkpoint: step, size, by how many ranks, whether it is sound."""
    from stages.runs import checkpoint_lines

    for line in checkpoint_lines(run):
        typer.echo(line)


def verify(run: Annotated[Path, typer.Argument(help="A run's folder, or one checkpoint")]) -> None:
    """Read every file of every checkpoint and compare it with its manifest; 1 when one is broken."""
    from stages.runs import verify

    broken = 0
    for path, fault in verify(run):
        typer.echo(f"{path}: {fault or 'sound'}")
        broken += fault is not None
    raise typer.Exit(1 if broken else 0)


def reshape(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run (its newest sound one)")],
    ranks: Annotated[int, typer.Option(min=1, help="Into so many files; one for each rank reads fastest")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the new checkpoint")],
) -> None:
    """Write a checkpoint again as another number of ranks would have. (Any number goes on from any checkpoint.)"""
    from stages.runs import reshape

    typer.echo(f"wrote {reshape(checkpoint, ranks, out)}")


def plan(
    config: Annotated[Path, typer.Argument(help="A stage's YAML: image, video or interpolation")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value ...")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each")] = 8,
    gpu: Annotated[str, typer.Option(help="b200, h200, h100, a100, a100-40, l40s, a10, rtx4090 ...")] = "h100",
    zero_stage: Annotated[int | None, typer.Option(min=0, max=3, help="[default: the configuration's]")] = None,
    efficiency: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the GPU's peak that is reached")] = 0.4,
    network: Annotated[float, typer.Option(min=0.01, help="GB/s of each GPU to other nodes")] = 50.0,
    price: Annotated[float | None, typer.Option(min=0, help="Of a GPU for an hour, in any currency")] = None,
) -> None:
    """What a stage's training takes before it begins: memory by ZeRO stage, work, data, communication, days, cost."""
    from stages.plan_report import report

    given = [*(overrides or []), *([] if zero_stage is None else [f"engine.zero_stage={zero_stage}"])]
    for line in report(config, given, nodes, gpus_per_node, gpu, efficiency, network, price):
        typer.echo(line)


def doctor(
    folder: Annotated[Path, typer.Argument(help="Where runs would be kept: its disk is tried")] = Path("runs"),
) -> None:
    """Versions, GPUs, ffmpeg, disk and, under a launcher, an all-reduce over all ranks; 1 when something is broken."""
    from stages.doctor import examine
    from videodiff.training import distributed

    distributed.start(join_seconds=120)  # it has a few minutes itself (slurm/doctor.sbatch)
    bad = False
    try:
        for finding in examine(folder):
            typer.echo(str(finding))
            bad = bad or finding.grade == "bad"
        if distributed.from_first(bad):
            raise typer.Exit(1)
    finally:
        distributed.cleanup()
