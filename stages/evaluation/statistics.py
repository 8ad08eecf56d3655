"""Figures from finished samples: shares and PSNR with their 95 % intervals, and what each stage loses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from stages.evaluation.measures import MEASURES
from stages.evaluation.worlds import attributes_of
from videodiff.metrics import intervals

MEAN, DEVIATION = "latent_mean", "latent_deviation"  # how measures of the latents begin
# Sickness -> what is said of so many clips of a row.
SICK = {
    "not finite": "are not finite", "black": "are black", "saturated": "are saturated", "static": "stand still",
}  # fmt: skip
# The world's word -> the report's; "data" is any other data set.
SPLITS = {"train": "seen", "held_out": "held_out", "held_out_pair": "held_out_pair", "data": "data"}
# Kinds of prompts on which stages are compared, and what they are called in a sentence.
CHIEF = {"seen": "seen combinations", "data": "the data"}

ROWS = {
    "real": "real clips",
    "real_smooth": "real clips at the smooth rate",
    "autoencoder": "autoencoder, real clips",
    "image": "image",
    "video_real": "video, real first image",
    "video_generated": "video, generated first image",
    "interpolation": "interpolation, real clips",
    "whole": "whole, interpolated",
    "classifier_clean": "classifier, clean latents",
    "classifier_quarter": "classifier, t = N/4",
    "classifier_half": "classifier, t = N/2",
    "classifier_noisy": "classifier, t = 3N/4",
    "unguided": "image without text",
    "guided": "image without text, guided by the classifier",
    "control": "control, the prompt's shape",
    "control_other": "control, another shape",
    "image_prompt": "image told a real picture",
    "upscale": "upscale, rebuilt pictures",
}
# (stage, row before its work, row after it); None stands for real clips, which are right by definition.
STEPS: tuple[tuple[str, str | None, str], ...] = (
    ("autoencoder", None, "autoencoder"),
    ("image", "autoencoder", "image"),
    ("video", "image", "video_generated"),
    ("interpolation", "video_generated", "whole"),
)

# (what, row before, row after) of differences that are no steps of the road.
APART: tuple[tuple[str, str | None, str], ...] = (
    ("video_alone", "autoencoder", "video_real"),
    ("first_images", "video_real", "video_generated"),
)


def mean_interval(values: Sequence[float], *key: str, is_share: bool = False) -> dict[str, Any]:
    """Mean and 95 % interval as JSON, a bootstrap one, or Wilson's where the values are 0 or 1 (`is_share`). One value
    tells nothing of the others: its interval is None."""
    if is_share:
        told = share(value == 1 for value in values)
        return {"n": told["n"], "mean": told["share"], "interval": told["interval"]}
    if len(values) == 1:
        return {"n": 1, "mean": float(values[0]), "interval": None}
    found = intervals.mean_interval(values, *key)
    return {"n": found.n, "mean": found.value, "interval": [found.low, found.high]}


def pooled_deviation(means: Sequence[float], deviations: Sequence[float], *key: str) -> dict[str, Any]:
    """The deviation of all values of all clips as JSON, from each clip's own mean and deviation: that of the clips'
    means is in it, which the mean of their deviations leaves out."""
    mean, square = np.array(means), np.array(means) ** 2 + np.array(deviations) ** 2

    def pooled(i: Any) -> float:
        return float(np.sqrt(max(0.0, square[i].mean() - mean[i].mean() ** 2)))

    count = len(mean)
    if count < 4:  # too few for halves
        return {"n": count, "mean": pooled(np.arange(count)), "interval": None}
    found = intervals.set_interval(pooled, (count,), *key)
    return {"n": count, "mean": found.value, "interval": [found.low, found.high]}


def right(result: dict[str, Any], truth: dict[str, str]) -> dict[str, bool]:
    """Attribute -> read right, and "all": every one right, and of a clip the same in every frame. None is wrong."""
    each = {name: value == truth[name] for name, value in result["read"].items()}
    return {**each, "all": all(each.values()) and result["consistent"]}


def truth_of(sample: dict[str, Any], row: str) -> dict[str, str] | None:
    """What a row of a finished sample should show: the prompt, unless the row was told something else besides; None
    where nobody knows."""
    return sample["rows"][row].get("truth", sample["truth"])


def share(hits: Iterable[bool]) -> dict[str, Any]:
    """How many of the hits are true, with its interval."""
    given = list(hits)
    count = sum(given)
    found = intervals.wilson(count, len(given))
    return {"right": count, "n": len(given), "share": found.value, "interval": [found.low, found.high]}


def summary(
    samples: Sequence[dict[str, Any]], rows: Sequence[str], named: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """One entry for each row and split that has samples. named: measure -> the network that it is of."""
    entries = []
    for row in rows:
        for split, name in SPLITS.items():
            chosen = [(s["rows"][row], truth_of(s, row)) for s in samples if s["split"] == split]
            if chosen:
                entries.append(_entry(row, name, chosen, named or {}))
    return entries


def _entry(
    row: str, split: str, chosen: list[tuple[dict[str, Any], dict[str, str] | None]], named: Mapping[str, str]
) -> dict[str, Any]:
    known = [(result, truth) for result, truth in chosen if truth is not None]
    verdicts = [right(result, truth) for result, truth in known]
    attributes = [name for name in (verdicts[0] if verdicts else ()) if name != "all"]
    values = attributes_of(known[0][1] if known else ())
    confusions = {
        name: {
            value: dict(sorted(Counter(str(r["read"][name] or "none") for r, t in known if t[name] == value).items()))
            for value in values[name]
        }
        for name in attributes
    }
    names = dict.fromkeys(name for result, _ in chosen for name in result["measures"])
    measured = {name: [v for r, _ in chosen if (v := r["measures"].get(name)) is not None] for name in names}
    measures = {
        name: _measure(name, measured, row, split) | ({"by": named[name]} if name in named else {})
        for name, found in measured.items()
        if found
    }
    return {
        "row": row,
        "split": split,
        "n": len(chosen),
        "shares": {name: share(v[name] for v in verdicts) for name in (*attributes, "all") if attributes},
        "measures": measures,
        "not_finite": sum(not r["finite"] for r, _ in chosen),
        "symptoms": dict(sorted(Counter(sick for r, _ in chosen for sick in r.get("symptoms", ())).items())),
        "confusions": confusions,
    }


def _measure(name: str, measured: Mapping[str, Sequence[float]], row: str, split: str) -> dict[str, Any]:
    found = measured[name]
    means = measured.get(name.replace(DEVIATION, MEAN), ())
    if name.startswith(DEVIATION) and len(means) == len(found):
        return pooled_deviation(means, found, row, split, name)
    return mean_interval(found, row, split, name, is_share=MEASURES[name].is_share)


def losses(samples: Sequence[dict[str, Any]], split: str) -> dict[str, Any]:
    """What each stage takes from "all attributes" on a split, in percentage points; needs at least two rows in a chain.

    all: row -> percent right. steps: stage -> drop from the row before it. video_alone: from real first images, against
    their reconstructions. first_images: what generated first images cost the video stage. intervals: of each of these
    the 95 % interval, by differences of the same prompts. most: the stage with the greatest drop, where these prompts
    tell it from chance and from the next greatest; more: how many further ones would, where that can be said.
    """
    chosen = [s for s in samples if SPLITS[s["split"]] == split and s["truth"] is not None]
    rows = list(dict.fromkeys(row for s in chosen for row in s["rows"]))
    hits = {row: [100.0 * right(s["rows"][row], truth_of(s, row) or {})["all"] for s in chosen] for row in rows}
    lost = {
        name: [(100.0 if before is None else hits[before][i]) - hits[after][i] for i in range(len(chosen))]
        for name, before, after in (*STEPS, *APART)
        if after in hits and (before is None or before in hits)
    }
    means = {name: round(sum(values) / len(values), 6) for name, values in lost.items()}
    steps = {stage: means[stage] for stage, _, _ in STEPS if stage in means}
    told: dict[str, Any] = {
        "n": len(chosen), "all": {row: sum(values) / len(values) for row, values in hits.items()}, "steps": steps,
        **{name: means[name] for name, _, _ in APART if name in means}, "intervals": {}, "most": None, "more": None,
    }  # fmt: skip
    if len(chosen) > 1:
        for name, before, after in (*STEPS, *APART):
            if name in lost:
                made = [hit / 100 for hit in hits[after]]
                if before is None:  # real clips are right by definition: what is lost is a share
                    found = intervals.wilson(made.count(0.0), len(made))
                else:
                    found = intervals.share_difference([hit / 100 for hit in hits[before]], made)
                told["intervals"][name] = [100 * found.low, 100 * found.high]
        if len(steps) > 1:
            worst, second = sorted(steps, key=lambda stage: -steps[stage])[:2]
            nothing = [0.0] * len(chosen)
            tests = [intervals.compare(lost[worst], other, "most", split) for other in (nothing, lost[second])]
            if all(test.verdict == "better" for test in tests):
                told["most"] = worst
            elif all(test.more is not None for test in tests):
                told["more"] = max(test.more or 0 for test in tests)
    return told


def in_words(told: dict[str, Any], where: str) -> str | None:
    """The losses as a sentence or two; None where there are too few rows to compare stages. where: on which prompts."""
    steps = told["steps"]
    if len(steps) < 2:
        return None

    def points(name: str, value: float) -> str:
        low, high = told["intervals"].get(name, (None, None))
        return f"{value:.1f}" if low is None else f"{value:.1f} ({low:.1f} to {high:.1f})"

    listed = ", ".join(f"{stage} {points(stage, value)}" for stage, value in steps.items())
    if told["most"] is not None:
        before, after = next((b, a) for stage, b, a in STEPS if stage == told["most"])
        start = 100.0 if before is None else told["all"][before]
        text = (
            f"Stage {told['most']} loses most: all attributes fall from {start:.1f} % to {told['all'][after]:.1f} % "
            f"on {where} (points lost: {listed})."
        )
    elif told["n"] >= intervals.LEAST_PAIRS and max(steps.values()) <= 0:
        text = f"No stage loses any of all attributes on {where} (points lost: {listed})."
    else:
        text = f"{told['n']} {'prompt' if told['n'] == 1 else 'prompts'} can't tell which stage loses most on {where} "
        text += f"(points lost of all attributes: {listed}); "
        text += f"about {told['more']} more would." if told["more"] else "ask for more."
    if "video_alone" in told:
        text += f" From real first images the video stage loses {points('video_alone', told['video_alone'])}"
        if "first_images" in told:
            text += f"; generated ones cost it {points('first_images', told['first_images'])} more"
        text += "."
    return text


def sick_in_words(entries: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each row and split of whose clips more are sick than of the real ones: static, black, not finite."""
    lines = []
    real = {entry["split"]: entry for entry in entries if entry["row"] == "real"}
    for entry in entries:
        usual = real.get(entry["split"], {"symptoms": {}, "n": 0})
        told = [
            f"{count} of {entry['n']} {SICK[name]}"
            + (f" (of the real clips {usual['symptoms'].get(name, 0)} of {usual['n']})" if usual["n"] else "")
            for name, count in entry["symptoms"].items()
            if count / entry["n"] > usual["symptoms"].get(name, 0) / max(1, usual["n"])
        ]
        if told:
            lines.append(f"{ROWS[entry['row']]}, {entry['split'].replace('_', ' ')} prompts: {'; '.join(told)}.")
    return lines
