"""What people read of an evaluation: the tables, and a contact sheet for each row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from stages.evaluation.figures import FIGURES, Figure
from stages.evaluation.measures import MEASURES, labelled
from stages.evaluation.questions import Prompt
from stages.evaluation.statistics import CHIEF, ROWS, SPLITS, right, truth_of
from stages.evaluation.worlds import attribute_label, columns
from videodiff.video_io import read_image, save_sheet

# Prompts of each split that are shown.
SHOWN = {"train": 6, "held_out": 3, "held_out_pair": 3, "data": 12}


# What the terminal shows of measures and figures; the page has all of them, on every kind of prompts.
TOLD_MEASURES = ("psnr", "text_likeness", "unsteadiness", "motion", "bound", "controlled", "free")
TOLD_FIGURES = ("frechet", "text_to_image_r1", "inception_clips")


def table(entries: Sequence[dict[str, Any]]) -> Table:
    """Shares read right in percent, each with its 95 % interval below it."""
    drawn = Table(title="Read right, % (95 % interval below)", show_lines=True)
    attributes = columns(entries)
    for column in ("stage", "prompts", "N", *attributes):
        drawn.add_column(attribute_label(column), justify="left" if column in ("stage", "prompts") else "right")
    for entry in entries:
        shares = ["\n".join(percent(entry["shares"].get(name))) for name in attributes]
        drawn.add_row(ROWS[entry["row"]], entry["split"].replace("_", " "), str(entry["n"]), *shares)
    return drawn


def measure_table(entries: Sequence[dict[str, Any]], figures: Sequence[dict[str, Any]]) -> Table:
    """The chief measures and figures of sets, on seen prompts or the data set, with their 95 % intervals."""
    drawn = Table(title="Measures (all of them: report.html)")
    for column in ("stage", "measure", "value", "interval", "beware"):
        drawn.add_column(column, justify="right" if column in ("value", "interval") else "left")
    for entry in entries:
        if entry["split"] not in CHIEF:
            continue
        for name, value in entry["measures"].items():
            if name.endswith(TOLD_MEASURES):
                drawn.add_row(ROWS[entry["row"]], *map(escape, in_words(name, value)))
        for told in figures:
            if (told["row"], told["split"]) == (entry["row"], entry["split"]) and told["figure"] in TOLD_FIGURES:
                figure = FIGURES[told["figure"]]
                cells = _cells(figure, told) if "value" in told else ("-", "-")
                beware = told.get("caution", told.get("refused", "")).partition(":")[0]
                drawn.add_row(ROWS[entry["row"]], escape(f"{figure.label}, {told['features']}"), *cells, escape(beware))
    return drawn


def in_words(name: str, value: dict[str, Any]) -> tuple[str, str, str]:
    """A measure's label with the network it is of, its mean and its interval, or that there is none."""
    unit, label = MEASURES[name], labelled(name, value.get("by"))
    mean, *ends = (f"{unit.scale * x:.{unit.digits}f}" for x in (value["mean"], *(value["interval"] or ())))
    few = "1 sample, no interval" if value["n"] == 1 else f"{value['n']} samples, too few"
    return label, mean, " - ".join(ends) or few


def figure_in_words(told: dict[str, Any]) -> dict[str, str]:
    """A figure's label, value, interval, of how many samples, by what network, and what to beware of."""
    figure = FIGURES[told["figure"]]
    value, interval = _cells(figure, told) if "value" in told else ("-", "")
    beware = told.get("caution", told.get("refused", ""))
    n = str(told["n"])
    return {
        "label": figure.label,
        "by": told["features"],
        "beware": beware,
        "value": value,
        "interval": interval,
        "n": n,
    }


def _cells(figure: Figure, told: dict[str, Any]) -> tuple[str, str]:
    value, low, high = (f"{x:.{figure.digits}f}" for x in (told["value"], *told["interval"]))
    return value, f"{low} - {high}"


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
    read = result["read"].items()
    wrong = [f"{attribute_label(name)} {value or 'unclear'}" for name, value in read if not verdict[name]]
    if not result["consistent"]:
        wrong.append("changes between frames")
    return f"WRONG ({', '.join(wrong)})"
