"""`videodiff data prepare | merge | filter`: from videos to shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of videos, a table (.csv .tsv .jsonl .parquet), or shards: folder, pattern, .txt"
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the shards, the table and the report")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value ...")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML, e.g. configs/data/prepare.yaml [default: every default]")
    ] = None,
    part: Annotated[str, typer.Option(help="i/n: part i of n of the work, for arrays; then `data merge`")] = "1/1",
    retry: Annotated[str, typer.Option(help="Verdicts to try again, such as deadline,crash,unreadable")] = "",
) -> None:
    """Cut videos into clips, measure and filter them, and write those that are kept as shards.

    The same command goes on where it was stopped. OUT/report.html shows what was kept and why the rest was not.
    """
    from data_pipeline.prepare import PrepareConfig, parse_part
    from data_pipeline.prepare import prepare as run
    from videodiff.config import load

    settings = load(PrepareConfig, config, overrides or [])
    again = tuple(filter(None, (reason.strip() for reason in retry.split(","))))
    typer.echo(run(source, out, settings, parse_part(part), progress=sys.stdout.isatty(), retry=again))


def merge(out: Annotated[Path, typer.Argument(help="The --out of the parts, all of which are done")]) -> None:
    """Make shards of what `data prepare --part` made in parts; near-duplicates are found among all of them."""
    from data_pipeline.prepare import merge as run

    typer.echo(run(out, progress=sys.stdout.isatty()))


def refilter(
    out: Annotated[Path, typer.Argument(help="A folder that `data prepare` made")],
    overrides: Annotated[list[str] | None, typer.Argument(help="filters.motion.min=0.5 filters.black=null ...")] = None,
) -> None:
    """Decide again by other limits; only clips that are newly accepted and were never encoded are cut."""
    from data_pipeline.prepare import refilter as run

    typer.echo(run(out, overrides or [], progress=sys.stdout.isatty()))
