"""report.html: what an evaluation found, in one file: curves over checkpoints, tables, videos, confusions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.evaluation.checkpoints import INDEX
from stages.evaluation.figures import FIGURES
from stages.evaluation.kept import read_samples
from stages.evaluation.measures import MEASURES, labelled
from stages.evaluation.paired import Line, verdict_in_words
from stages.evaluation.sheets import clip_path, figure_in_words, in_words, percent, picture_path
from stages.evaluation.statistics import CHIEF, ROWS, STEPS, sick_in_words
from stages.evaluation.weakest import cost_in_words, weak_rows
from stages.evaluation.worlds import attribute_label, columns
from videodiff.errors import UserError
from videodiff.pages import data_url, write_page

PAGE = Path(__file__).with_name("report.html.jinja")
SHOWN_CLIPS = 6  # prompts whose videos the page shows
MOST_COLUMNS = 8  # checkpoints whose videos stand side by side: the newest, and others evenly between
Entry = dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """One finished evaluation of a folder: its name there ("" alone), of which step and weights, and what was told."""

    name: str
    step: int | None
    weights: str
    told: Entry


def write_report(out: Path) -> Path:
    """Write the page of a folder that `videodiff evaluate` filled, of one model or of several checkpoints.

    Raises UserError for another folder, and where jinja2 is not installed.
    """
    path, found = out / "report.html", evaluations(out)
    newest = found[-1]
    step = -(-len(found) // (MOST_COLUMNS - 1))
    shown = found if len(found) <= MOST_COLUMNS else [*found[:-1:step], newest]
    told = newest.told
    attributes = columns(entry for judged in found for entry in judged.told["rows"])
    write_page(
        path,
        PAGE,
        name=f"{told['protocol']['model'][:12]}{f', {newest.name}' if newest.name else ''}",
        verdict=told["verdict"],
        weakest=_weakest(told),
        sick=sick_in_words(told["rows"]),
        costs=[_cost(split, lines) for split, lines in told.get("first_images", {}).items() if lines],
        curves=_curves(found) if len(found) > 1 else [],
        tables=[(judged.name or "this model", _table(judged.told, attributes)) for judged in found[::-1]],
        columns=[judged.name for judged in shown],
        videos=_videos(out, [judged.name for judged in shown]),
        confusions=_confusions(told["rows"]),
        attributes=[attribute_label(name) for name in attributes],
        memorized=told["memorized"],
        neighbours=[data_url(p, "image/png") for p in sorted((out / newest.name / "neighbours").glob("*.png"))],
        protocol=json.dumps(told["protocol"], indent=1),
        skipped={**unread(out), **told["skipped"]},
        bad=told["bad"],
    )
    return path


def evaluations(out: Path) -> list[Judged]:
    """The evaluations of a folder by step, of each step the averaged weights last. UserError where there is none."""
    try:
        entries = [{"name": "", "step": None, "weights": "ema"}]
        if (out / INDEX).is_file():
            entries = json.loads((out / INDEX).read_text(encoding="utf-8"))["checkpoints"]
        entries.sort(key=lambda entry: (entry["step"] or 0, entry["weights"] == "ema"))
        files = [out / entry["name"] / "evaluation.json" for entry in entries]
        return [Judged(e["name"], e["step"], e["weights"], json.loads(file.read_text(encoding="utf-8")))
                for e, file in zip(entries, files, strict=True)]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{out}: holds no finished evaluation ({error}); give `evaluate --out` this folder") from None


def unread(out: Path) -> dict[str, str]:
    """The checkpoints of a folder's run that could not be read, and why."""
    try:
        return json.loads((out / INDEX).read_text(encoding="utf-8")).get("unread", {})
    except (OSError, ValueError, AttributeError):
        return {}


def _weakest(told: Entry) -> list[tuple[str, str]]:
    """(row, prompts) of the weak stages: the one that loses most of what the reader sees, else those of figures."""
    found = []
    for split in CHIEF:
        most = told["losses"].get(split, {}).get("most")
        rows = {after for stage, _, after in STEPS if stage == most} or weak_rows(told.get("alone", {}).get(split, ()))
        found += [(row, split) for row in sorted(rows)]
    return found


def _cost(split: str, lines: Sequence[Line]) -> dict[str, Any]:
    told = [
        {
            "figure": line["figure"], "n": line["n"],
            "numbers": [f"{line[key]:.4g}" for key in ("first", "second", "difference")],
            "interval": " - ".join(f"{end:.4g}" for end in line["interval"]), "verdict": verdict_in_words(line),
        }
        for line in lines
    ]  # fmt: skip
    return {"prompts": split, "words": cost_in_words(lines), "lines": told}


# A checkpoint, and its figure with its interval.
Point = tuple[Judged, tuple[float, ...]]


def _table(told: Entry, attributes: Sequence[str]) -> list[dict[str, Any]]:
    """Of every row its shares, measures and figures in words."""
    lines = []
    for entry in told["rows"]:
        figures = [f for f in told["figures"] if (f["row"], f["split"]) == (entry["row"], entry["split"])]
        lines.append(
            {
                "row": entry["row"],
                "stage": ROWS[entry["row"]],
                "prompts": entry["split"].replace("_", " "),
                "n": entry["n"],
                "shares": [percent(entry["shares"].get(name)) for name in attributes],
                "measures": [in_words(name, value) for name, value in entry["measures"].items()],
                "figures": [figure_in_words(figure) for figure in figures],
                "not_finite": entry["not_finite"],
            }
        )
    return lines


def _curves(found: Sequence[Judged]) -> list[dict[str, Any]]:
    """A chart for everything that is known of several checkpoints on seen prompts or data: points with bands."""
    series: dict[tuple[str, str], list[Point]] = {}
    for judged in found:
        told = judged.told
        for entry in told["rows"]:
            if entry["split"] not in CHIEF:
                continue
            row = f"{ROWS[entry['row']]}, {judged.weights}"
            for attribute, value in entry["shares"].items():
                figures = (100 * value["share"], *(100 * x for x in value["interval"]))
                series.setdefault((row, f"{attribute_label(attribute)} right, %"), []).append((judged, figures))
            for measure, value in entry["measures"].items():
                unit = MEASURES[measure]
                ends = value["interval"] or (value["mean"], value["mean"])
                figures = tuple(unit.scale * x for x in (value["mean"], *ends))
                series.setdefault((row, labelled(measure, value.get("by"))), []).append((judged, figures))
        for figure in told["figures"]:
            if figure["split"] in CHIEF and "value" in figure:
                label = f"{FIGURES[figure['figure']].label} ({figure['features']})"
                row = f"{ROWS[figure['row']]}, {judged.weights}"
                series.setdefault((row, label), []).append((judged, (figure["value"], *figure["interval"])))
    return [_chart(row, label, points) for (row, label), points in series.items() if len(points) > 1]


def _chart(row: str, label: str, points: Sequence[Point]) -> dict[str, Any]:
    low, high = min(f[1] for _, f in points), max(f[2] for _, f in points)
    spread = high - low or 1.0
    steps = [judged.step or 0 for judged, _ in points]
    places = [100 * (step - steps[0]) / ((steps[-1] - steps[0]) or 1) for step in steps]
    heights = [[100 - 100 * (value - low) / spread for value in figures] for _, figures in points]
    line = " ".join(f"{x:.2f},{y[0]:.2f}" for x, y in zip(places, heights, strict=True))
    upper = [f"{x:.2f},{y[2]:.2f}" for x, y in zip(places, heights, strict=True)]
    lower = [f"{x:.2f},{y[1]:.2f}" for x, y in zip(places, heights, strict=True)]
    told = [f"step {judged.step}: {value:.4g} ({a:.4g} - {b:.4g})" for judged, (value, a, b) in points]
    return {
        "row": row, "label": label, "line": line, "band": " ".join([*upper, *lower[::-1]]), "low": f"{low:.4g}",
        "high": f"{high:.4g}", "points": list(zip(places, [y[0] for y in heights], told, strict=True)),
        "first": f"step {steps[0]}", "last": f"step {steps[-1]}",
    }  # fmt: skip


def _videos(out: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Of each row and prompt what each checkpoint made of it, a clip or a picture, the same prompts side by side."""
    lines = []
    _, samples = read_samples(out / names[-1])
    for row in ROWS:
        for split in ("train", "data"):
            for number in range(SHOWN_CLIPS):
                cells = [_seen(out / name, row, split, number) for name in names]
                if any(cells) and (split, number) in samples:
                    prompt = samples[(split, number)]["prompt"]
                    lines.append({"stage": ROWS[row], "prompt": prompt, "cells": cells})
    return lines


def _seen(folder: Path, row: str, split: str, number: int) -> dict[str, str] | None:
    if (clip := clip_path(folder, row, split, number)).is_file():
        return {"kind": "video", "url": data_url(clip, "video/mp4")}
    if (picture := picture_path(folder, row, split, number)).is_file():
        return {"kind": "image", "url": data_url(picture, "image/png")}
    return None


def _confusions(rows: Sequence[Entry]) -> list[dict[str, Any]]:
    """Of every row on seen prompts or the data, for each attribute what was read of what was asked, as shares."""
    found = []
    for entry in rows:
        if entry["split"] not in CHIEF or entry["row"].startswith("real"):
            continue
        for attribute, counts in entry["confusions"].items():
            others = {value for told in counts.values() for value in told} - {*counts, "none"}
            seen = [*counts, *sorted(others), "none"]
            lines = []
            for asked, told in counts.items():
                total = sum(told.values()) or 1
                lines.append((asked, [(told.get(value, 0), told.get(value, 0) / total) for value in seen]))
            wrong = sum(n for asked, told in counts.items() for value, n in told.items() if value != asked)
            told = {"stage": ROWS[entry["row"]], "attribute": attribute_label(attribute), "seen": seen}
            found.append({**told, "lines": lines, "wrong": wrong})
    return found
