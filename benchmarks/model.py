"""What a model of the built-in world has learned beyond single prompts: which condition rules, how much it varies, and
how many evaluations of its networks it takes.

    python -m benchmarks.model [--model demo] [--cases swap diversity steps] [--prompts 64] [--seeds 50] [--steps N ...]
                               [--split held_out] [--out FILE]

swap: the first image of one prompt with the text of another. Colour and shape should follow the image, the motion the
text. diversity: where the object starts over many seeds of one prompt, against where the data's does. steps: the share
of prompts that the reader finds right over the number of evaluations, for DDIM and DPM-Solver++ and for guidance in the
noisier part alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from benchmarks.report import publish
from data_pipeline.progress import bar
from data_pipeline.world import ATTRIBUTES, Combination, Split, render, rng, sample_scene, split
from data_pipeline.world_captions import prompts
from data_pipeline.world_reader import read, read_image
from stages.evaluation.questions import stored
from stages.pipeline import Pipeline, SampleKey, adjusted
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import mistakes_in_one_line
from videodiff.metrics.intervals import Interval, wilson
from videodiff.metrics.pictures import clip_psnr
from videodiff.model import Model
from videodiff.parts import Sampling

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CASES = ("swap", "diversity", "steps")
SPLITS: dict[Split, str] = {
    "train": "seen combinations", "held_out": "held-out combinations", "held_out_pair": "held-out pairs",
}  # fmt: skip
STEPS = (2, 4, 6, 8, 12, 20, 32)
# What is told of a way -> the noisier share of the times in which it is guided.
GUIDED = {"": 1.0, ", guided in the noisier half": 1 / 2, ", guided in the noisiest eighth": 1 / 8}
BATCH, SEED = 8, 7
IMAGE_ATTRIBUTES = tuple(name for name in ATTRIBUTES if name != "motion")


class Subject:
    """A model's stages at their own settings, frames uint8 in and out."""

    def __init__(self, model: Model) -> None:
        self.road = Pipeline(model, "cuda" if torch.cuda.is_available() else "cpu")
        self.size = model.diffusion("image").size
        self.image, self.video = model.diffusion("image").sampling, model.diffusion("video").sampling
        self.schedules = {"image": model.diffusion("image").schedule, "video": model.diffusion("video").schedule}
        self.fps, self.frames = model.diffusion("video").fps, model.diffusion("video").frames

    def pictures(self, keys: Sequence[SampleKey], sampling: Sampling | None = None) -> Tensor:
        """The latents of first images [B,C,1,H,W]."""
        return self.road.image(keys, sampling or self.image)

    def clips(self, keys: Sequence[SampleKey], first: Tensor, sampling: Sampling | None = None) -> np.ndarray:
        """uint8 [B,T,S,S,3]."""
        return self.road.decode(self.road.video(keys, first, self.fps, sampling or self.video))

    def real_first(self, combinations: Sequence[Combination], number: int) -> Tensor:
        """The latents of first frames of real clips, none of which is in any shards, stored as those in shards are."""
        frames = [
            stored(render(sample_scene(c, "benchmark", number, i), self.size, 1, self.fps), self.fps)
            for i, c in enumerate(combinations)
        ]
        return self.road.encode(np.stack(frames))


def pieces(count: int, advance: Callable[[int], None]) -> Iterator[slice]:
    for start in range(0, count, BATCH):
        yield slice(start, min(start + BATCH, count))
        advance(BATCH)


# --- swap -------------------------------------------------------------------------------------------------------------


def pairs(count: int) -> list[tuple[Combination, Combination, str]]:
    """(shown, told, the told one's prompt): two seen combinations that differ in colour, shape and motion, the look of
    one with the motion of the other being a seen one too."""
    told = prompts(count, SEED, "train")
    others = [combination for combination, _ in prompts(max(4 * count, 64), SEED + 1, "train")]
    found = []
    for number, (combination, text) in enumerate(told):
        order = rng("swap", number).permutation(len(others))
        differs = (
            other for other in (others[int(i)] for i in order)
            if all(getattr(other, name) != getattr(combination, name) for name in ("colour", "shape", "motion"))
            and split(replace(other, motion=combination.motion)) == "train"
        )  # fmt: skip
        found.append((next(differs), combination, text))
    return found


def swap(subject: Subject, count: int) -> list[str]:
    """Rows: the share of clips in which each attribute follows the image, and the text."""
    asked = pairs(count)
    follows = {name: {"image": 0, "text": 0} for name in ("colour", "shape", "motion")}
    nearness = []
    with bar(True, "swap", count) as advance:
        for some in pieces(count, advance):
            part = asked[some]
            # Placed so that what is told can happen: where the shown one would move, the other might leave the frame.
            placed = [replace(shown, motion=told.motion) for shown, told, _ in part]
            first = subject.real_first(placed, some.start)
            keys = [SampleKey(SEED, text, some.start + i) for i, (_, _, text) in enumerate(part)]
            given = subject.road.decode(first)
            for (shown, told, _), clip, picture in zip(part, subject.clips(keys, first), given, strict=True):
                seen = read(clip).values()
                nearness.append(clip_psnr(clip[:1], picture))
                for name, counts in follows.items():
                    counts["image"] += seen[name] == getattr(shown, name)
                    counts["text"] += seen[name] == getattr(told, name)
    rows = ["| what | follows the image, % | follows the text, % |", "|---|---|---|"]
    for name, counts in follows.items():
        cells = [percent(wilson(counts[of], count)) for of in ("image", "text")]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    low = np.percentile(nearness, 5)
    return [
        f"{count} pairs of seen combinations that differ in colour, shape and motion; real first images.",
        "", *rows, "",
        f"Frame 0 against the image that was given: {np.mean(nearness):.1f} dB PSNR in the mean, {low:.1f} dB in the "
        "worst twentieth.",
    ]  # fmt: skip


# --- diversity --------------------------------------------------------------------------------------------------------


def diversity(subject: Subject, seeds: int, count: int = 12) -> list[str]:
    """Rows: the deviation of where the object lies in first images, of the model and of the data, for some prompts."""
    rows = [
        "| prompt | clips | deviation across, model / data | down, model / data | share of the data's |",
        "|---|---|---|---|---|",
    ]
    shares = []
    asked = prompts(count, SEED + 2, "train")
    with bar(True, "diversity", count * seeds) as advance:
        for combination, text in asked:
            places = []
            for some in pieces(seeds, advance):
                keys = [SampleKey(seed, text) for seed in range(some.start, some.stop)]
                readings = map(read_image, subject.road.decode(subject.pictures(keys))[:, 0])
                places += [(reading.x, reading.y) for reading in readings if np.isfinite(reading.diameter)]
            scenes = [sample_scene(combination, "diversity", n) for n in range(2000)]
            data = np.std([(scene.x, scene.y) for scene in scenes], axis=0)
            made = np.std(places, axis=0, ddof=1) if len(places) > 1 else np.zeros(2)
            share = float(np.sqrt((made**2).sum() / (data**2).sum()))
            shares.append(share)
            cells = [f"{a:.3f} / {b:.3f}" for a, b in zip(made, data, strict=True)]
            rows.append(f"| {text} | {len(places)} | {cells[0]} | {cells[1]} | {100 * share:.0f} % |")
    told = f"{seeds} seeds of each prompt; deviations of the object's centre in fractions of the frame side."
    return [told, "", *rows, "", f"In the mean {100 * np.mean(shares):.0f} % of the data's deviation."]


# --- steps ------------------------------------------------------------------------------------------------------------

Curve = dict[int, Interval]  # evaluations of the network -> share of right prompts


def ways(sampling: Sampling, schedule: NoiseSchedule) -> dict[str, Callable[[int], Sampling]]:
    """Ways of sampling by name, each a function of the number of steps."""

    def way(kind: str, share: float) -> Callable[[int], Sampling]:
        time = torch.tensor((1 - share) * schedule.num_steps + 0.5)  # a step that ends its share is not in it
        least = float(torch.exp(-schedule.log_snr(time) / 2))  # sigma / alpha
        return lambda steps: adjusted(sampling, kind, steps, interval=(least, None))

    ddim = {f"DDIM{told}": way("ddim", share) for told, share in GUIDED.items()}
    return {**ddim, "DPM-Solver++": way("dpm_solver", 1.0)}


def steps(subject: Subject, count: int, budgets: Sequence[int], which: Split, out: Path | None) -> list[str]:
    """Tables of both stages: the share of prompts of a split whose attributes are all right, over the steps."""
    asked = prompts(count, SEED + 3, which)
    lines = []
    for stage, sampling in (("image", subject.image), ("video", subject.video)):
        schedule = subject.schedules[stage]
        curves: dict[str, Curve] = {}
        with bar(True, f"steps, {stage}", count * len(ways(sampling, schedule)) * len(budgets)) as advance:
            for name, way in ways(sampling, schedule).items():
                curves[name] = {
                    budget: wilson(_right(subject, stage, asked, way(budget), advance), count) for budget in budgets
                }
        head = f"| {stage}: all right, % | " + " | ".join(f"{budget} steps" for budget in budgets) + " |"
        lines += [head, "|---" * (len(budgets) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(map(percent, curve.values()))} |" for name, curve in curves.items()]
        lines.append("")
        if out is not None:
            lines += [_plot(curves, stage, sampling, out), ""]
    told = f"{count} prompts on {SPLITS[which]}; the video stage from real first images, judged by all attributes."
    return [told, "", *lines[:-1]]


def _right(
    subject: Subject,
    stage: str,
    asked: Sequence[tuple[Combination, str]],
    sampling: Sampling,
    advance: Callable[[int], None],
) -> int:
    right = 0
    for some in pieces(len(asked), advance):
        part = asked[some]
        keys = [SampleKey(SEED, text, some.start + i) for i, (_, text) in enumerate(part)]
        if stage == "image":
            frames = subject.road.decode(subject.pictures(keys, sampling))[:, 0]
            seen = [{name: getattr(r, name).value for name in IMAGE_ATTRIBUTES} for r in map(read_image, frames)]
        else:
            first = subject.real_first([combination for combination, _ in part], some.start)
            seen = [read(clip).values() for clip in subject.clips(keys, first, sampling)]
        right += sum(
            all(value == getattr(combination, name) for name, value in found.items())
            for found, (combination, _) in zip(seen, part, strict=True)
        )
    return right


def _plot(curves: dict[str, Curve], stage: str, sampling: Sampling, out: Path) -> str:
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for name, curve in curves.items():
        told = list(curve.values())
        value, low, high = (np.array([getattr(i, which) for i in told]) * 100 for which in ("value", "low", "high"))
        axes.errorbar(list(curve), value, (value - low, high - value), capsize=2, marker="o", label=name)
    axes.axvline(sampling.sampler.steps, color="grey", linestyle=":", label="the default")
    axes.set(
        xlabel="steps",
        ylabel=f"{stage}: all attributes right, %",
        xscale="log",
        xticks=list(next(iter(curves.values()))),
    )
    axes.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    name = f"{out.stem}-steps-{stage}.png"
    figure.savefig(out.with_name(name), dpi=100)
    plt.close(figure)
    return f"![{stage}: quality over steps]({name})"


def percent(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} ({100 * interval.low:.1f}-{100 * interval.high:.1f})"


def main(
    name: str, cases: Sequence[str], count: int, seeds: int, budgets: Sequence[int], which: Split, out: Path | None
) -> None:
    """Run the cases, print the report, and write it to `out`, its pictures beside it."""
    subject = Subject(Model.load(name))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    command = f"python -m benchmarks.model --model {name} --cases {' '.join(cases)} --prompts {count} --seeds {seeds}"
    if "steps" in cases:
        command = " ".join([command, "--split", which, "--steps", *map(str, budgets)])
    lines = ["# What the model has learned", "", f"`{command}`; shares with 95 % intervals."]
    made: dict[str, tuple[str, Callable[[], list[str]]]] = {
        "swap": ("The image of one, the text of another", lambda: swap(subject, count)),
        "diversity": ("Many seeds of one prompt", lambda: diversity(subject, seeds)),
        "steps": ("Fewer steps", lambda: steps(subject, count, budgets, which, out)),
    }
    for case in cases:
        title, run = made[case]
        lines += ["", f"## {title}", "", *run()]
    publish(lines, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a model folder, a run, or 'demo'")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--prompts", type=int, default=64, help="of swap and steps")
    parser.add_argument("--seeds", type=int, default=50, help="of each prompt of diversity")
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS, help="of the curves")
    parser.add_argument("--split", default="train", choices=SPLITS, help="the prompts of the curves")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    given = parser.parse_args()
    with mistakes_in_one_line():
        main(given.model, given.cases, given.prompts, given.seeds, given.steps, given.split, given.out)
