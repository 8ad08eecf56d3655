"""`videodiff compare A B`: is B better than A? Paired on prompts and seeds, a verdict for each figure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from stages.evaluation.figures import FIGURES, LEAST, LIKE, RANKS, alike, recalls
from stages.evaluation.kept import FeatureFiles, differences, read_samples, without_model
from stages.evaluation.measures import MEASURES, OF_TOWER
from stages.evaluation.paired import SICK, Line, Result, result_of, sample_lines, set_line, set_lines, verdict_in_words
from stages.evaluation.report import evaluations
from stages.evaluation.statistics import ROWS, SPLITS
from videodiff.errors import UserError
from videodiff.metrics.intervals import wilson
from videodiff.networks.features.extractor import told_apart
from videodiff.video_io import write_json

Sample = dict[str, Any]


def main(first: Path, second: Path, out: Path | None) -> None:
    """Print how the second evaluation differs from the first, and write it as JSON."""
    told = compared(first, second)
    show = Console()
    if not show.is_terminal:
        show = Console(width=150)
    show.print(_table(told, first, second))
    decided = [line for line in told if line["verdict"] != "can't tell"]
    better = sum(line["verdict"] == "better" for line in decided)
    show.print(
        f"{len(told)} figures: the second is better in {better}, worse in {len(decided) - better}; of "
        f"{len(told) - len(decided)} these samples can't tell. At 95 %, about one in twenty of equal models differs by "
        "chance.",
        highlight=False,
    )
    for line in filter(None, map(_failures, told)):
        show.print(line, highlight=False, markup=False)
    if out is not None:
        write_json(out, told)
        print(out)


def _failures(line: Line) -> str | None:
    """Which videos failed, of the line that counts them."""
    if line["figure"] != SICK:
        return None
    first, second = line["not_finite"]
    where = f"{ROWS[line['row']]}, {line['split'].replace('_', ' ')} prompts"
    return (
        f"{where}: {first} of {line['n']} videos of the first and {second} of the second are not finite; each counts "
        "as the worst that either made, and figures of sets leave its prompt out."
    )


def compared(first: Path, second: Path) -> list[dict[str, Any]]:
    """Of every share, measure and figure that both have: both values, the difference, its interval and the verdict.

    Raises UserError for evaluations of unequal protocol, with the difference.
    """
    a, b = _newest(first), _newest(second)
    (old_protocol, old), (new_protocol, new) = read_samples(a), read_samples(b)
    # Of the text stage alone the tower that judges is the one that is judged.
    tower = all(protocol["rows"] == ["real"] for protocol in (old_protocol, new_protocol))
    one, other = ({**without_model(p, own_tower=tower), "rows": None} for p in (old_protocol, new_protocol))
    if differing := list(differences(one, other)):
        raise UserError(f"{first} and {second}: unequal protocols ({'; '.join(differing)}); evaluate both alike")
    common = [row for row in old_protocol["rows"] if row in new_protocol["rows"]]
    rows = [row for row in common if tower or not row.startswith("real")]
    told: list[dict[str, Any]] = []
    for split, name in SPLITS.items():
        keys = [key for key in old if key[0] == split and key in new and "rows" in old[key] and "rows" in new[key]]
        for row in rows:
            if len(keys) > 1:
                lines = _samples(keys, old, new, row, old_protocol.get("judged_by", {}))
                told += [{"row": row, "split": name, **line} for line in lines]
        files = FeatureFiles(a, old_protocol), FeatureFiles(b, new_protocol)
        found = _recalls(*files, split, old, old_protocol) if tower else _sets(*files, split, rows, old_protocol)
        told += [{"split": name, **line} for line in found]
    if not told:
        raise UserError(f"{first} and {second}: have no row with two samples in common; evaluate both on more prompts")
    return told


def _samples(
    keys: list[tuple[str, int]],
    old: Mapping[tuple[str, int], Sample],
    new: Mapping[tuple[str, int], Sample],
    row: str,
    by: dict[str, str],
) -> Iterator[Line]:
    """Shares and measures of one row, by differences of the same prompts."""
    first, second = ([result_of(side[key], row) for key in keys] for side in (old, new))
    if row == "real":  # equal in both but for what the tower says
        first, second = ([Result(result.row) for result in side] for side in (first, second))
    like = [result_of(old[key], LIKE[row]) if LIKE.get(row) in old[key]["rows"] else None for key in keys]
    yield from sample_lines(first, second, like, OF_TOWER if row == "real" else tuple(MEASURES), by, row)


def _sets(a: FeatureFiles, b: FeatureFiles, split: str, rows: list[str], protocol: dict[str, Any]) -> Iterator[Line]:
    """Distances from the same real clips, by halves of the same prompts of both models."""
    (old_numbers, old), (new_numbers, new) = a.of_split(split), b.of_split(split)
    both = [(i, new_numbers.index(number)) for i, number in enumerate(old_numbers) if number in set(new_numbers)]
    places = [list(side) for side in zip(*both, strict=True)] or [[], []]
    judges = told_apart([judge["name"] for judge in protocol["features"]])
    for number, judge in enumerate(judges):
        for row in rows:
            wanted = (f"{number}/{row}", f"{number}/{LIKE.get(row, '')}", f"finite/{row}")
            if any(name not in features for name in wanted for features in (old, new)):
                continue

            def of(name: str) -> tuple[Tensor, Tensor]:
                return old[name][places[0]], new[name][places[1]]

            made, classes, finite = of(wanted[0]), f"{wanted[0]}/classes", of(wanted[2])
            known = of(classes) if classes in old and classes in new else None
            lines = set_lines(
                old[wanted[1]][places[0]], *made, finite=(finite[0].bool(), finite[1].bool()), classes=known,
                is_clip=f"{number}/texts" in old, by=judge, takes=protocol["features"][number]["takes"], key=(row,),
            )  # fmt: skip
            yield from ({"row": row, **line} for line in lines)


def _recalls(
    a: FeatureFiles, b: FeatureFiles, split: str, samples: Mapping[tuple[str, int], Sample], protocol: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Recalls of the same captions and real clips by both models' towers."""
    (old_numbers, old), (new_numbers, new) = a.of_split(split), b.of_split(split)
    both = [number for number in old_numbers if number in set(new_numbers)]
    said = alike([samples[(split, number)]["prompt"] for number in both])
    for number, judge in enumerate(told_apart([judge["name"] for judge in protocol["features"]])):
        if len(both) < LEAST or any(f"{number}/texts" not in features for features in (old, new)):
            continue
        sides = []
        for numbers, features in ((old_numbers, old), (new_numbers, new)):
            places = [numbers.index(each) for each in both]
            sides.append(recalls(features[f"{number}/real"][places].mean(1), features[f"{number}/texts"][places], said))
        for name in sides[0]:
            before, after = (side[name] for side in sides)
            try:
                line = set_line(before, after, len(both), True, "real", name, resamples=100, is_share=True)
            except UserError:  # half of them are fewer than the rank
                line = _apart(before(np.arange(len(both))), after(np.arange(len(both))), len(both))
            yield {"row": "real", "figure": f"{FIGURES[name].label}, {judge}", **line}


def _apart(first: float, second: float, count: int) -> Line:
    """Two shares of so many samples as if they weren't of the same ones, by the intervals of each (Newcombe 1998, of
    independent proportions, method 10)."""
    old, new = (wilson(round(share * count), count) for share in (first, second))
    below = math.hypot(new.value - new.low, old.high - old.value)
    above = math.hypot(new.high - new.value, old.value - old.low)
    low, high = second - first - below, second - first + above
    verdict = "better" if low > 0 else "worse" if high < 0 else "can't tell"
    return {
        "n": count, "first": first, "second": second, "difference": second - first, "interval": [low, high],
        "verdict": verdict, "more": 0 if verdict != "can't tell" else 2 * (max(RANKS) + 1) - count,
    }  # fmt: skip


def _newest(folder: Path) -> Path:
    """Where the evaluation lies, of several checkpoints that of the last one."""
    return folder / evaluations(folder)[-1].name


def _table(told: list[dict[str, Any]], first: Path, second: Path) -> Table:
    drawn = Table(title=f"{second} against {first}")
    for column in ("stage", "prompts", "figure", "N", "first", "second", "difference", "95 % interval", "verdict"):
        drawn.add_column(column, justify="left" if column in ("stage", "prompts", "figure", "verdict") else "right")
    for line in told:
        low, high = line["interval"]
        numbers = [f"{line[key]:.4g}" for key in ("first", "second", "difference")]
        where = (ROWS[line["row"]], line["split"].replace("_", " "), line["figure"], str(line["n"]))
        drawn.add_row(*map(escape, where), *numbers, f"{low:.4g} - {high:.4g}", verdict_in_words(line))
    return drawn
