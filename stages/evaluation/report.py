"""report.html: what an evaluation found, in one file: curves over checkpoints, tables, videos, confusions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.world import ATTRIBUTES
from stages.evaluation.figures import FIGURES
from stages.evaluation.measures import MEASURES
from stages.evaluation.sheets import clip_path, figure_in_words, in_words, percent, picture_path
from stages.evaluation.statistics import ROWS, SPLITS
from videodiff.errors import UserError
from videodiff.pages import data_url, write_page

PAGE = Path(__file__).with_name("report.html.jinja")
SHOWN_CLIPS = 6  # prompts whose videos the page shows
MOST_COLUMNS = 8  # checkpoints whose videos stand side by side: the newest, and others evenly between
Entry = dict[str, Any]


def write_report(out: Path) -> Path:
    """Write the page of a folder that `videodiff evaluate` filled, of one model or of several checkpoints.

    Raises UserError for another folder, and where jinja2 is not installed.
    """
    path, found = out / "report.html", evaluations(out)
    newest = found[-1][1]
    shown = found if len(found) <= MOST_COLUMNS else [*found[: -1 : -(-len(found) // (MOST_COLUMNS - 1))], found[-1]]
    write_page(
        path,
        PAGE,
        name=newest["protocol"]["model"][:12],
        verdict=newest["verdict"],
        weakest=(newest["losses"].get("seen") or {}).get("most"),
        curves=_curves(found) if len(found) > 1 else [],
        tables=[(name or "this model", _table(told)) for name, told in found[::-1]],
        columns=[name for name, _ in shown],
        videos=_videos(out, [name for name, _ in shown]),
        confusions=_confusions(newest["rows"]),
        attributes=[*ATTRIBUTES, "all"],
        memorized=newest["memorized"],
        neighbours=[data_url(p, "image/png") for p in sorted((out / found[-1][0] / "neighbours").glob("*.png"))],
        protocol=json.dumps(newest["protocol"], indent=1),
        skipped=newest["skipped"],
        bad=newest["bad"],
    )
    return path


def evaluations(out: Path) -> list[tuple[str, Entry]]:
    """The evaluations of a folder, by name ("" alone), in the order of steps. UserError where there is none."""
    try:
        if (out / "checkpoints.json").is_file():
            told = json.loads((out / "checkpoints.json").read_text(encoding="utf-8"))
            names = [entry["name"] for entry in told["checkpoints"]]
        else:
            names = [""]
        return [(name, json.loads((out / name / "evaluation.json").read_text(encoding="utf-8"))) for name in names]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out}: holds no finished evaluation ({error}); give `evaluate --out` this folder") from None


def _table(told: Entry) -> list[dict[str, Any]]:
    """Of every row its shares, measures and figures in words."""
    lines = []
    for entry in told["rows"]:
        figures = [f for f in told["figures"] if (f["row"], f["split"]) == (entry["row"], entry["split"])]
        lines.append(
            {
                "stage": ROWS[entry["row"]],
                "prompts": entry["split"].replace("_", " "),
                "n": entry["n"],
                "shares": [percent(entry["shares"].get(name)) for name in (*ATTRIBUTES, "all")],
                "measures": [in_words(name, value) for name, value in entry["measures"].items()],
                "figures": [figure_in_words(figure) for figure in figures],
                "not_finite": entry["not_finite"],
            }
        )
    return lines


def _curves(found: Sequence[tuple[str, Entry]]) -> list[dict[str, Any]]:
    """A chart for everything that is known of several checkpoints on seen prompts or data: points with bands."""
    series: dict[tuple[str, str], list[tuple[str, float, float, float]]] = {}
    for name, told in found:
        for entry in told["rows"]:
            if entry["split"] not in ("seen", "data"):
                continue
            row = ROWS[entry["row"]]
            for attribute, value in entry["shares"].items():
                point = (name, 100 * value["share"], *(100 * x for x in value["interval"]))
                series.setdefault((row, f"{attribute} right, %"), []).append(point)
            for measure, value in entry["measures"].items():
                unit = MEASURES[measure]
                point = (name, *(unit.scale * x for x in (value["mean"], *value["interval"])))
                series.setdefault((row, unit.label), []).append(point)
        for figure in told["figures"]:
            if figure["split"] in ("seen", "data") and "value" in figure:
                label = f"{FIGURES[figure['figure']].label} ({figure['features']})"
                point = (name, figure["value"], *figure["interval"])
                series.setdefault((ROWS[figure["row"]], label), []).append(point)
    return [_chart(row, label, points) for (row, label), points in series.items() if len(points) > 1]


def _chart(row: str, label: str, points: Sequence[tuple[str, float, float, float]]) -> dict[str, Any]:
    low, high = min(p[2] for p in points), max(p[3] for p in points)
    spread = high - low or 1.0
    places = [100 * i / (len(points) - 1) for i in range(len(points))]
    heights = [[100 - 100 * (value - low) / spread for value in point[1:]] for point in points]
    line = " ".join(f"{x:.2f},{y[0]:.2f}" for x, y in zip(places, heights, strict=True))
    upper = [f"{x:.2f},{y[2]:.2f}" for x, y in zip(places, heights, strict=True)]
    lower = [f"{x:.2f},{y[1]:.2f}" for x, y in zip(places, heights, strict=True)]
    told = [f"{name}: {value:.4g} ({a:.4g} - {b:.4g})" for name, value, a, b in points]
    return {
        "row": row, "label": label, "line": line, "band": " ".join([*upper, *lower[::-1]]), "low": f"{low:.4g}",
        "high": f"{high:.4g}", "points": list(zip(places, [y[0] for y in heights], told, strict=True)),
        "first": points[0][0], "last": points[-1][0],
    }  # fmt: skip


def _videos(out: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Of each row and prompt what each checkpoint made of it, a clip or a picture, the same prompts side by side."""
    lines = []
    for row in ROWS:
        for split in SPLITS:
            for number in range(SHOWN_CLIPS if split in ("train", "data") else 0):
                cells = [_seen(out / name, row, split, number) for name in names]
                if any(cells):
                    prompt = _prompt(out / names[-1], split, number)
                    lines.append({"stage": ROWS[row], "prompt": prompt, "cells": cells})
    return lines


def _seen(folder: Path, row: str, split: str, number: int) -> dict[str, str] | None:
    if (clip := clip_path(folder, row, split, number)).is_file():
        return {"kind": "video", "url": data_url(clip, "video/mp4")}
    if (picture := picture_path(folder, row, split, number)).is_file():
        return {"kind": "image", "url": data_url(picture, "image/png")}
    return None


def _prompt(folder: Path, split: str, number: int) -> str:
    for path in sorted(folder.glob("samples*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            told = json.loads(line)
            if (told.get("split"), told.get("number")) == (split, number):
                return str(told["prompt"])
    return ""


def _confusions(rows: Sequence[Entry]) -> list[dict[str, Any]]:
    """Of every row on seen prompts, for each attribute what was read of what was asked, as shares."""
    found = []
    for entry in rows:
        if entry["split"] != "seen" or entry["row"].startswith("real"):
            continue
        for attribute, counts in entry["confusions"].items():
            seen = [*ATTRIBUTES[attribute], "none"]
            lines = []
            for asked, told in counts.items():
                total = sum(told.values()) or 1
                lines.append((asked, [(told.get(value, 0), told.get(value, 0) / total) for value in seen]))
            wrong = sum(n for asked, told in counts.items() for value, n in told.items() if value != asked)
            told = {"stage": ROWS[entry["row"]], "attribute": attribute, "seen": seen}
            found.append({**told, "lines": lines, "wrong": wrong})
    return found
