"""`videodiff study score`: the votes of a study become win rates with intervals, agreement, reasons and biases.

As in Emu Video (Girdhar et al. 2023) a pair goes to the system that most of its raters chose. An even split counts half
for each. All intervals are of 95 %: over pairs by bootstrap, or over prompts where several pairs share one, since these
aren't independent; by Wilson's formula where each pair is a prompt of its own and none is split. Pairs that came again
count only for how far raters agree with themselves.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from stages.study_answers import Sheet, Vote, read_answers, read_key, votes
from videodiff.errors import UserError
from videodiff.metrics.intervals import Interval, mean_interval, wilson
from videodiff.metrics.scores import fleiss_kappa
from videodiff.video_io import atomic_path, write_json

SCORE, PICTURE = "score.json", "score.html"


def main(key_path: Path, files: Sequence[Path], out: Path) -> None:
    """Score, print the table and write score.json and score.html into `out`."""
    key = read_key(key_path)
    sheets, left_out = read_answers(key, files)
    told = score(key, sheets) | {"left_out": [{"file": file, "why": why} for file, why in left_out]}
    console = Console(soft_wrap=True, highlight=False)
    for name, system in told["systems"].items():
        console.print(f"{name} is {_named(system)}", markup=False)
    console.print(table(told))
    for name, asked in told["questions"].items():
        console.print(reasons_table(name, asked))
    for line in remarks(told):
        console.print(line, markup=False)
    write_json(out / SCORE, told)
    with atomic_path(out / PICTURE) as temporary:
        temporary.write_text(_page(told), encoding="utf-8")
    console.print(f"wrote {out / SCORE} and {out / PICTURE}", markup=False)


def score(key: Mapping[str, Any], sheets: Sequence[Sheet]) -> dict[str, Any]:
    """All figures, ready for JSON: for each question, for each rater."""
    cast = votes(key, sheets)
    prompts = [row["prompt"] for row in key["pairs"]]
    questions = {}
    for name, reasons in key["questions"].items():
        mine = [vote for vote in cast if vote.question == name]
        if mine:
            questions[name] = _question(mine, prompts, reasons)
    return {
        "study": key["study"],
        "systems": key["systems"],
        "pairs": len(prompts),
        "raters": [
            {
                "rater": sheet.rater,
                "file": sheet.file,
                "answers": len(sheet.answers),
                "of": len(key["raters"][sheet.rater - 1]),
                "median_seconds": median(a.milliseconds for a in sheet.answers) / 1000,
            }
            for sheet in sheets
        ],
        "missing_raters": sorted({*range(1, len(key["raters"]) + 1)} - {sheet.rater for sheet in sheets}),
        "questions": questions,
    }


def _question(mine: Sequence[Vote], prompts: Sequence[str], reasons: Sequence[str]) -> dict[str, Any]:
    first = [vote for vote in mine if not vote.repeat]
    pairs: dict[int, list[Vote]] = defaultdict(list)
    for vote in first:
        pairs[vote.pair].append(vote)
    shares = {pair: mean(vote.system == "A" for vote in given) for pair, given in pairs.items()}
    outcome = {pair: 0.5 if share == 0.5 else float(share > 0.5) for pair, share in shares.items()}
    wins, ties = Counter(outcome.values()), Counter(outcome.values())[0.5]
    alone = len({prompts[pair] for pair in pairs}) == len(pairs)
    exact = alone and not ties
    rate = _told(wilson(wins[1.0], len(pairs))) if exact else _interval(outcome, prompts)
    method = "Wilson" if exact else f"bootstrap over {'pairs' if alone else 'prompts'}"
    several = [pair for pair, given in pairs.items() if len(given) > 1]
    left = {pair: mean(vote.side == "left" for vote in given) for pair, given in pairs.items()}
    again = {(vote.rater, vote.pair): vote.system for vote in mine if vote.repeat}
    same = sum(again.get((vote.rater, vote.pair)) == vote.system for vote in first)
    return {
        "majority": {"A": wins[1.0], "B": wins[0.0], "ties": ties, "pairs": len(pairs), "interval_by": method, **rate},
        "answers": {**_count(first), **_interval(shares, prompts)},
        "unanimous": {"pairs": sum(shares[pair] in (0, 1) for pair in several), "of": len(several)},
        "kappa": _kappa(pairs),
        "left": {"left": sum(vote.side == "left" for vote in first), "of": len(first), **_interval(left, prompts)},
        "self_agreement": {"same": same, "of": len(again), **(_told(wilson(same, len(again))) if again else {})},
        "reasons": {reason: _count([vote for vote in first if reason in vote.reasons]) for reason in reasons},
    }


def _kappa(pairs: Mapping[int, Sequence[Vote]]) -> dict[str, Any]:
    """Fleiss' kappa over the pairs that most raters answered: it is only defined for equally many answers each."""
    most = max(len(given) for given in pairs.values())
    counts = [[sum(vote.system == name for vote in given) for name in "AB"] for given in pairs.values()]
    full = np.array([row for row in counts if sum(row) == most])
    told = {"pairs": len(full), "raters": most, "value": None}
    try:
        return told | {"value": fleiss_kappa(full)}
    except UserError:  # one rater, or all chose the same system: there is no agreement beyond chance to speak of
        return told


def _interval(values: Mapping[int, float], prompts: Sequence[str]) -> dict[str, Any]:
    """Mean over prompts of the mean of their pairs, with its interval; None for the limits of a single one."""
    groups: dict[str, list[float]] = defaultdict(list)
    for pair in sorted(values):
        groups[prompts[pair]].append(float(values[pair]))
    means = [mean(group) for group in groups.values()]
    if len(means) < 2:
        return {"rate": means[0], "interval": None}
    if set(means) in ({0.0}, {1.0}):  # no resample differs, which doesn't make it certain
        return _told(wilson(round(sum(means)), len(means)))
    return _told(mean_interval(means, "study"))


def _told(found: Interval) -> dict[str, Any]:
    return {"rate": found.value, "interval": [found.low, found.high]}


def _count(given: Sequence[Vote]) -> dict[str, int]:
    return {name: sum(vote.system == name for vote in given) for name in "AB"}


# --- what is printed and drawn ----------------------------------------------------------------------------------------


def table(told: Mapping[str, Any]) -> Table:
    """A column for each question; percentages with their 95 % interval."""
    drawn = Table("", *told["questions"], title="How often A is preferred to B (95 % interval)")
    rows: dict[str, list[str]] = defaultdict(list)
    for asked in told["questions"].values():
        majority, kappa = asked["majority"], asked["kappa"]["value"]
        unanimous, again = asked["unanimous"], asked["self_agreement"]
        rows["pairs: A wins, split, B wins"].append(f"{majority['A']}, {majority['ties']}, {majority['B']}")
        rows["majority of a pair for A, %"].append(percent(majority))
        rows["answers for A, %"].append(percent(asked["answers"]))
        rows["pairs on which all agree"].append(f"{unanimous['pairs']} of {unanimous['of']}")
        rows["Fleiss' kappa"].append("-" if kappa is None else f"{kappa:.2f}")
        rows["left side chosen, %"].append(percent(asked["left"]))
        rows["same choice when shown again"].append(f"{again['same']} of {again['of']}" if again["of"] else "-")
    for label, cells in rows.items():
        drawn.add_row(label, *cells)
    return drawn


def reasons_table(name: str, asked: Mapping[str, Any]) -> Table:
    """How many of the answers for a system gave each reason."""
    drawn = Table(title=f"Why: {name}")
    drawn.add_column("reason")
    for system in "AB":
        drawn.add_column(f"of {asked['answers'][system]} answers for {system}", justify="right")
    for reason, counts in asked["reasons"].items():
        cells = (f"{counts[s]} ({100 * _share(counts[s], asked['answers'][s]):.0f} %)" for s in "AB")
        drawn.add_row(reason, *cells)
    return drawn


def percent(figure: Mapping[str, Any]) -> str:
    """A rate and its interval in percent."""
    if figure["interval"] is None:
        return f"{100 * figure['rate']:.1f}"
    low, high = (100 * limit for limit in figure["interval"])
    return f"{100 * figure['rate']:.1f} ({low:.1f}-{high:.1f})"


def remarks(told: Mapping[str, Any]) -> list[str]:
    """What is not as it should be, a line each, and what the columns rest on."""
    lines = [f"left out {entry['file']}: {entry['why']}" for entry in told["left_out"]]
    partial = [rater for rater in told["raters"] if rater["answers"] < rater["of"]]
    lines += [f"rater {r['rater']} is incomplete: {r['answers']} of {r['of']} answers" for r in partial]
    if told["missing_raters"]:
        lines.append(f"no answers of raters {', '.join(map(str, told['missing_raters']))}")
    for name, asked in told["questions"].items():
        kappa, again = asked["kappa"], asked["self_agreement"]
        how, split = asked["majority"]["interval_by"], ", a split counts half" if asked["majority"]["ties"] else ""
        over = f"kappa over {kappa['pairs']} pairs of {kappa['raters']} answers"
        lines.append(f"{name}: the majority's interval by {how}{split}; {over}")
        if again["of"]:
            lines.append(
                f"{name}: of {again['of']} pairs shown again with sides exchanged, {again['same']} chosen alike"
            )
    seconds = median(rater["median_seconds"] for rater in told["raters"])
    return [*lines, f"{len(told['raters'])} raters, {seconds:.0f} seconds an answer (median)"]


def _page(told: Mapping[str, Any]) -> str:
    """The reasons as bars on either side, A's and B's; a page that needs nothing else."""
    parts = [_STYLE, "<h1>Why raters chose as they did</h1><p>"]
    parts += [f"<b>{name}</b> is {escape(_named(system))}. " for name, system in told["systems"].items()]
    parts.append("A bar is the share of the answers for a system that gave the reason.</p>")
    for name, asked in told["questions"].items():
        rate, count = percent(asked["majority"]), asked["answers"]
        parts.append(
            f"<h2>{escape(name.capitalize())}: A preferred in {rate} % of {asked['majority']['pairs']} pairs</h2>"
        )
        parts.append(f"<table><tr><th class='a'>{count['A']} answers for A<th><th class='b'>{count['B']} answers for B")
        for reason, counts in asked["reasons"].items():
            a, b = (100 * _share(counts[system], count[system]) for system in "AB")
            parts.append(
                f'<tr><td class="a">{counts["A"]} <i style="width:{a * 2:.0f}px"></i><td class="why">{escape(reason)}'
                f'<td class="b"><i style="width:{b * 2:.0f}px"></i> {counts["B"]}'
            )
        parts.append("</table>")
    return "\n".join([*parts, *(f"<p>{escape(line)}</p>" for line in remarks(told)), "</html>\n"])


_STYLE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Reasons</title><style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 820px; padding: 0 1em; color: #222; }
h1, h2 { font-weight: 600; } h2 { margin-top: 1.6em; font-size: 19px; } td, th { padding: 4px 10px; width: 240px; }
i { display: inline-block; height: 14px; border-radius: 3px; vertical-align: -2px; } .why { text-align: center; }
.a { text-align: right; } .b { text-align: left; } .a i { background: #2a7f62; } .b i { background: #d08770; }
table { margin-bottom: 1.6em; } p { margin: 0.3em 0; } </style>"""


def _named(system: Mapping[str, Any]) -> str:
    models = f" ({', '.join(system['models'])})" if system.get("models") else ""
    return f"{system['folder']}{models}"


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
