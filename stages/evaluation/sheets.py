"""What people read of an evaluation: the tables, and a contact sheet for each row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from data_pipeline.world import ATTRIBUTES
from stages.evaluation.figures import FIGURES
from stages.evaluation.measures import MEASURES
from stages.evaluation.questions import Prompt
from stages.evaluation.statistics import ROWS, SPLITS, right, truth_of
from videodiff.video_io import read_image, save_sheet

# Prompts of each split that are shown.
SHOWN = {"train": 6, "held_out": 3, "held_out_pair": 3, "data": 12}


def table(entries: Sequence[dict[str, Any]]) -> Table:
    """Shares in percent and measures, each with its 95 % interval."""
    drawn = Table(title="Read right, % (95 % interval below), and measures", show_lines=True)
    for column in ("stage", "prompts", "N", *ATTRIBUTES, "all", "measures"):
        drawn.add_column(column, justify="left" if column in ("stage", "prompts", "measures") else "right")
    for entry in entries:
        shares = ["\n".join(percent(entry["shares"].get(name))) for name in (*ATTRIBUTES, "all")]
        near = "\n".join(map(in_a_line, entry["measures"].items()))
        split = entry["split"].replace("_", " ")
        drawn.add_row(ROWS[entry["row"]], split, str(entry["n"]), *shares, near or "-")
    return drawn


def figure_table(figures: Sequence[dict[str, Any]]) -> Table:
    """What only sets have, each with its interval, its network and what to beware of."""
    drawn = Table(title="Figures of sets (95 % interval)", show_lines=False)
    for column in ("stage", "prompts", "N", "figure", "value", "interval", "by", "beware"):
        drawn.add_column(column, justify="right" if column in ("N", "value", "interval") else "left")
    for told in figures:
        figure = FIGURES[told["figure"]]
        start = (ROWS[told["row"]], told["split"].replace("_", " "), str(told["n"]), figure.label)
        if "refused" in told:
            drawn.add_row(*start, "-", "-", told["features"], told["refused"])
            continue
        value, low, high = (f"{x:.{figure.digits}f}" for x in (told["value"], *told["interval"]))
        drawn.add_row(*start, value, f"{low} - {high}", told["features"], told.get("caution", "").partition(":")[0])
    return drawn


def in_a_line(measure: tuple[str, dict[str, Any]]) -> str:
    """A measure, its mean and its interval in words."""
    name, value = measure
    unit = MEASURES[name]
    mean, low, high = (f"{unit.scale * x:.{unit.digits}f}" for x in (value["mean"], *value["interval"]))
    return f"{unit.label} {mean} ({low} - {high})"


def is_shown(prompt: Prompt) -> bool:
    """Whether pictures of a prompt are kept."""
    return prompt.number < SHOWN[prompt.split]


def percent(value: dict[str, Any] | None) -> tuple[str, ...]:
    """A share and its interval in percent; "-" where there is none."""
    if value is None:
        return ("-",)
    low, high = (100 * limit for limit in value["interval"])
    return f"{100 * value['share']:.1f}", f"{low:.1f}-{high:.1f}"


def picture_path(out: Path, row: str, split: str, number: int) -> Path:
    """Where the picture of a sample is kept until its sheet is made."""
    return out / "pictures" / f"{row}-{split}-{number:04d}.png"


def clip_path(out: Path, row: str, split: str, number: int) -> Path:
    """Where what a row made of a prompt is kept as a video."""
    return out / "clips" / f"{row}-{split}-{number:04d}.mp4"


def write_sheets(out: Path, samples: Sequence[dict[str, Any]], rows: Sequence[str]) -> list[Path]:
    """A sheet for each row: the first prompts of each split, with what was read wrong."""
    shown = [s for s in samples if s["number"] < SHOWN[s["split"]]]
    paths: list[Path] = []
    for row in rows if shown else ():
        images = [read_image(picture_path(out, row, s["split"], s["number"])) for s in shown]
        labels = [
            f"{_mark(s['rows'][row], truth_of(s, row))} | {SPLITS[s['split']].replace('_', ' ')}: {s['prompt']}"
            for s in shown
        ]
        path = out / f"{row}.png"
        save_sheet(path, [np.asarray(image) for image in images], 3 if row != "image" else 6, labels)
        paths.append(path)
    return paths


def _mark(result: dict[str, Any], truth: dict[str, str] | None) -> str:
    if truth is None:
        return "finite" if result["finite"] else "NOT FINITE"
    verdict = right(result, truth)
    if verdict["all"]:
        return "RIGHT"
    wrong = [f"{name} {value or 'unclear'}" for name, value in result["read"].items() if not verdict[name]]
    if not result["consistent"]:
        wrong.append("changes between frames")
    return f"WRONG ({', '.join(wrong)})"
