"""What people read of an evaluation: the table, and a contact sheet for each row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from data_pipeline.world import ATTRIBUTES
from stages.evaluate_statistics import ROWS, SPLITS, right, truth_of
from videodiff.video_io import read_image, save_sheet

SHOWN = {"train": 6, "held_out": 3, "held_out_pair": 3}  # prompts on a sheet, of each split
MEASURES = {
    "reconstruction": "",
    "first_frame": "first frame ",
    "middle": "made ",
    "middle_blended": "blended ",
    "middle_reconstructed": "rebuilt ",
    "upscaled": "made ",
    "bilinear": "bilinear ",
    "bicubic": "bicubic ",
    "rebuilt_upscaled": "rebuilt, made ",
    "rebuilt_bilinear": "rebuilt, bilinear ",
    "rebuilt_bicubic": "rebuilt, bicubic ",
    "controlled": "off by ",
    "free": "without control ",
}


def table(entries: Sequence[dict[str, Any]]) -> Table:
    """Shares in percent, PSNR in dB and distances in percent of the side, each with its 95 % interval below it."""
    drawn = Table(title="Read right, % (95 % interval below)", show_lines=True)
    for column in ("stage", "prompts", "N", *ATTRIBUTES, "all", "PSNR, dB; distance, %"):
        drawn.add_column(column, justify="left" if column in ("stage", "prompts") else "right")
    for entry in entries:
        shares = ["\n".join(percent(entry["shares"].get(name))) for name in (*ATTRIBUTES, "all")]
        near = "\n".join(
            f"{MEASURES[name]}{value['mean']:.1f}\n{value['interval'][0]:.1f}-{value['interval'][1]:.1f}"
            for name, value in {**entry["psnr"], **entry["distance"]}.items()
        )
        split = entry["split"].replace("_", " ")
        drawn.add_row(ROWS[entry["row"]], split, str(entry["n"]), *shares, near or "-")
    return drawn


def percent(value: dict[str, Any] | None) -> tuple[str, ...]:
    """A share and its interval in percent; "-" where there is none."""
    if value is None:
        return ("-",)
    low, high = (100 * limit for limit in value["interval"])
    return f"{100 * value['share']:.1f}", f"{low:.1f}-{high:.1f}"


def picture_path(out: Path, row: str, split: str, number: int) -> Path:
    """Where the picture of a sample is kept until its sheet is made."""
    return out / "pictures" / f"{row}-{split}-{number:04d}.png"


def write_sheets(out: Path, samples: Sequence[dict[str, Any]], rows: Sequence[str]) -> list[Path]:
    """A sheet for each row: the first prompts of each split, with what was read wrong."""
    shown = [s for s in samples if s["number"] < SHOWN[s["split"]]]
    paths = []
    for row in rows:
        images = [read_image(picture_path(out, row, s["split"], s["number"])) for s in shown]
        labels = [
            f"{_mark(s['rows'][row], truth_of(s, row))} | {SPLITS[s['split']].replace('_', ' ')}: {s['prompt']}"
            for s in shown
        ]
        path = out / f"{row}.png"
        save_sheet(path, [np.asarray(image) for image in images], 3 if row != "image" else 6, labels)
        paths.append(path)
    return paths


def _mark(result: dict[str, Any], truth: dict[str, str]) -> str:
    verdict = right(result, truth)
    if verdict["all"]:
        return "RIGHT"
    wrong = [f"{name} {value or 'unclear'}" for name, value in result["read"].items() if not verdict[name]]
    if not result["consistent"]:
        wrong.append("changes between frames")
    return f"WRONG ({', '.join(wrong)})"
