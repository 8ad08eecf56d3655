"""The commands of a study with people: `videodiff study build | score`; thin, heavy imports inside."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class QuestionChoice(str, Enum):
    """What `videodiff study build --question` takes."""

    quality = "quality"
    faithfulness = "faithfulness"
    both = "both"


def build(
    first: Annotated[Path, typer.Argument(metavar="A", help="A folder of `videodiff generate --prompts`")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another, of the same prompts and seeds")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the page and of the key")],
    question: Annotated[QuestionChoice, typer.Option(help="What raters are asked")] = QuestionChoice.both,
    num_pairs: Annotated[int | None, typer.Option(min=1, help="So many pairs, drawn from all [default: all]")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Repeats what was drawn; raters must not know it [default: drawn, see the key]")
    ] = None,
    raters: Annotated[int, typer.Option(min=1, max=1000, help="How many people; an odd number knows no ties")] = 5,
    repeats: Annotated[
        bool, typer.Option("--repeats", help="Show a tenth of the pairs again with sides exchanged")
    ] = False,
    as_made: Annotated[
        bool, typer.Option("--as-made", help="Keep unequal sizes, rates and lengths [default: the smaller of a pair]")
    ] = False,
    page_mb: Annotated[float, typer.Option(min=0, help="A larger page becomes a folder of page and videos")] = 100.0,
) -> None:
    """Make a page on which people choose between two systems' videos, blindly, and say why (JUICE)."""
    from stages.study import build as make

    questions = ("quality", "faithfulness") if question is QuestionChoice.both else (question.value,)
    built = make(
        first, second, out, questions=questions, num_pairs=num_pairs, seed=seed, raters=raters, repeats=repeats,
        as_made=as_made, page_mb=page_mb, progress=sys.stdout.isatty(),
    )  # fmt: skip
    for line in built.remarks:
        typer.echo(line)
    single = built.page.parent == built.key.parent
    what = built.page if single else f"{built.page.parent}, a folder that must stay together,"
    size = sum(path.stat().st_size for path in ([built.page] if single else built.page.parent.iterdir()))
    typer.echo(f"wrote {what} ({size / 1e6:.1f} MB): {built.pairs} pairs, {built.trials} answers of each rater")
    typer.echo(f"give it to the raters, each with a number from 1 to {raters}: {built.page.name}#1")
    typer.echo(f"keep {built.key} to yourself: it says which video is whose, and the score needs it")


def score(
    key: Annotated[Path, typer.Argument(help="The key.json of `videodiff study build`")],
    answers: Annotated[list[Path], typer.Argument(help="The raters' answers-*.json")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of score.json and score.html [default: the key's]")
    ] = None,
) -> None:
    """How often raters prefer A to B, how sure that is, why they do, and how far they agree."""
    from stages.study_score import main as run

    run(key, answers, out if out is not None else key.parent)
