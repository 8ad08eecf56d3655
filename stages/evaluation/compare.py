"""`videodiff compare A B`: is B better than A? Paired on prompts and seeds, a verdict for each figure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stages.evaluation.figures import FIGURES, LEAST, LIKE, WIDE, alike, distances, of_samples, recalls, told_apart
from stages.evaluation.kept import FeatureFiles, differences, read_samples, without_model
from stages.evaluation.measures import MEASURES, OF_TOWER
from stages.evaluation.report import evaluations
from stages.evaluation.statistics import ROWS, SPLITS, right, truth_of
from videodiff.errors import UserError
from videodiff.metrics.intervals import Comparison, compare, compare_sets
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
    if out is not None:
        write_json(out, told)
        print(out)


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
                told += [{"row": row, "split": name, **line} for line in _samples(keys, old, new, row)]
        files = FeatureFiles(a, old_protocol), FeatureFiles(b, new_protocol)
        found = _recalls(*files, split, old, old_protocol) if tower else _sets(*files, split, rows, old_protocol)
        told += [{"split": name, **line} for line in found]
    if not told:
        raise UserError(f"{first} and {second}: have no row with two samples in common; evaluate both on more prompts")
    return told


def _samples(
    keys: list[tuple[str, int]], old: Mapping[tuple[str, int], Sample], new: Mapping[tuple[str, int], Sample], row: str
) -> list[dict[str, Any]]:
    """Shares and measures of one row, by differences of the same prompts."""
    told = []
    pairs = [(old[key], new[key]) for key in keys]
    verdicts = [
        [_right(sample, row) for sample in pair] for pair in pairs if _right(pair[0], row)
    ]  # where truth is known
    of_tower = row == "real"  # equal in both but for what the tower says
    for name in verdicts[0][0] if len(verdicts) > 1 and not of_tower else ():
        values = [np.array([float(pair[side][name]) for pair in verdicts]) for side in (0, 1)]
        told.append(_line(f"{name} right, %", "share", values, 100.0, True, row))
    for name in OF_TOWER if of_tower else MEASURES:
        measured = [[sample["rows"][row]["measures"].get(name) for sample in pair] for pair in pairs]
        known = [pair for pair in measured if None not in pair]
        if len(known) > 1 and MEASURES[name].better != "real":
            values = [np.array([pair[side] for pair in known], np.float64) for side in (0, 1)]
            unit = MEASURES[name]
            told.append(_line(unit.label, name, values, unit.scale, unit.better == "more", row))
        elif MEASURES[name].better == "real":
            told += _towards_real(pairs, name, row)
    return told


def _towards_real(pairs: Sequence[tuple[Sample, Sample]], name: str, row: str) -> Iterator[dict[str, Any]]:
    """A measure that should be what it is of the real clips, by how far its mean is from theirs. Of single clips that
    would be wrong: to always give the middle one is near to each, and nothing like them all."""
    like, unit = LIKE.get(row, ""), MEASURES[name]
    told = [
        (old["rows"][row]["measures"].get(name), new["rows"][row]["measures"].get(name),
         old["rows"].get(like, {}).get("measures", {}).get(name))
        for old, new in pairs
    ]  # fmt: skip
    known = unit.scale * np.array([each for each in told if None not in each], np.float64).reshape(-1, 3)
    if len(known) >= LEAST:

        def off(side: int) -> Callable[..., float]:
            return lambda i: float(abs(np.mean(known[i, side] - known[i, 2])))

        line = _set_line(off(0), off(1), len(known), False, row, name)
        yield {"figure": f"{unit.label}, off the real clips'", **line}


def _right(sample: Sample, row: str) -> dict[str, bool]:
    truth = truth_of(sample, row)
    return {} if truth is None else right(sample["rows"][row], truth)


def _line(
    label: str, name: str, values: list[np.ndarray], scale: float, more_is_better: bool, row: str
) -> dict[str, Any]:
    first, second = (scale * value for value in values)
    found = compare(second, first, row, name, label, higher_is_better=more_is_better)
    return {"figure": label, **_told(found, float(first.mean()), float(second.mean()))}


def _sets(
    a: FeatureFiles, b: FeatureFiles, split: str, rows: list[str], protocol: dict[str, Any]
) -> list[dict[str, Any]]:
    """Distances from the same real clips, by halves of the same prompts of both models."""
    (old_numbers, old), (new_numbers, new) = a.of_split(split), b.of_split(split)
    both = [(i, new_numbers.index(number)) for i, number in enumerate(old_numbers) if number in set(new_numbers)]
    told = []
    judges = told_apart([judge["name"] for judge in protocol["features"]])
    for number, judge in enumerate(judges):
        for row in rows:
            names = (f"{number}/{row}", f"{number}/{LIKE.get(row, '')}", f"finite/{row}")
            if any(name not in features for name in names for features in (old, new)):
                continue
            pairs = [(i, j) for i, j in both if bool(old[names[2]][i]) and bool(new[names[2]][j])]
            if len(pairs) < LEAST:
                continue
            first, second = (list(places) for places in zip(*pairs, strict=True))
            made = old[names[0]][first], new[names[0]][second]
            real = old[names[1]][first][:, : made[0].shape[1]]
            for name, function in distances(f"{number}/texts" in old).items():
                before, after = (of_samples(function, real, side) for side in made)
                resamples = 100 if real.shape[2] <= WIDE else 20
                better = FIGURES[name].better == "more"
                line = _set_line(before, after, len(real), better, row, name, resamples=resamples)
                told.append({"row": row, "figure": f"{FIGURES[name].label}, {judge}", **line})
    return told


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
            try:
                line = _set_line(sides[0][name], sides[1][name], len(both), True, "real", name, resamples=100)
            except UserError:  # half of them are fewer than the rank
                continue
            yield {"row": "real", "figure": f"{FIGURES[name].label}, {judge}", **line}


def _set_line(
    before: Callable[..., float],
    after: Callable[..., float],
    count: int,
    more_is_better: bool,
    *key: str,
    resamples: int = 200,
) -> dict[str, Any]:
    """Figures of chosen ones of `count` samples, of the first and of the second evaluation."""
    every = np.arange(count)
    found = compare_sets(after, before, count, *key, higher_is_better=more_is_better, resamples=resamples)
    return _told(found, before(every), after(every))


def _told(found: Comparison, first: float, second: float) -> dict[str, Any]:
    return {
        "n": found.n, "first": first, "second": second, "difference": found.mean, "interval": [found.low, found.high],
        "verdict": found.verdict, "more": found.more,
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
        verdict = line["verdict"]
        if verdict == "can't tell":
            verdict += ", equal so far" if line["more"] is None else f", {line['more']} more samples would"
        numbers = [f"{line[key]:.4g}" for key in ("first", "second", "difference")]
        where = (ROWS[line["row"]], line["split"].replace("_", " "), line["figure"], str(line["n"]))
        drawn.add_row(*map(escape, where), *numbers, f"{low:.4g} - {high:.4g}", verdict)
    return drawn
