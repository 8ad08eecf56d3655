"""What the recipe's choices are worth: the video stage trained or sampled otherwise, with all else equal.

    python -m benchmarks.ablations [--model runs/demo/image_prompt] [--shards runs/demo/shards] [--steps 1000]
                                   [--batch 32] [--prompts 100] [--held-out 50] [--only WAY ...]
                                   [--at-once 1] [--runs runs/ablations] [--out docs/ablations.md]

Every way starts from the same image stage, sees the same clips in the same order for the same number of steps, and is
judged on the same prompts and seeds, in pairs with the way that differs from it in that choice. What was trained and
judged is kept: the same command goes on where it was interrupted. `--at-once` trains and judges several ways side by
side: a GPU has room for more than one of these small networks.
"""

from __future__ import annotations

import argparse
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import publish
from data_pipeline.index import INDEX
from stages.demo_model import RUNS, SHARDS, call_videodiff, render_world
from stages.evaluation.kept import read_samples
from stages.evaluation.statistics import SPLITS, right, truth_of
from videodiff import config as configs
from videodiff import resources
from videodiff.errors import mistakes_in_one_line
from videodiff.metrics.intervals import compare, mean_interval, wilson
from videodiff.model import Model
from videodiff.model_folder import export
from videodiff.parts import DESCRIPTION, ModelConfig

ROW = "video_generated"
FIGURES = ("motion", "all")
RECIPE = resources.path("configs/demo/video.yaml")
BASE = "recipe"
Samples = dict[tuple[str, int], dict[str, Any]]  # (split, number) -> what the reader found


@dataclass(frozen=True)
class Way:
    """One choice made otherwise than `against` makes it. training: overrides of configs/demo/video.yaml; shards: one of
    `demo_model.SHARDS`; guidance: scales of the recipe's weights, nothing trained."""

    told: str
    against: str = BASE
    training: dict[str, str] = field(default_factory=dict)
    shards: str = RUNS["video"]
    guidance: dict[str, Any] | None = None


TEXT_EVERYWHERE = {  # guided as is best for it
    "temporal.image_prompt": "null",
    "sampling.guidance.text": "2",
    "sampling.guidance.image": "1",
    "sampling.guidance.interval": "null",
}
WAYS = {
    BASE: Way(
        "text to image to video; spatial layers frozen and told the first image; captions of the motion alone; "
        "image scale 2, text scale 4 in the noisiest eighth"
    ),
    "true_captions": Way("captions that tell what is seen too", shards="clips"),
    "text_everywhere": Way(
        "the spatial layers hear the prompt, not the image, as published", "true_captions", TEXT_EVERYWHERE, "clips"
    ),
    "naive": Way(
        "text to video at once, no first image (Emu Video's first ablation)",
        "text_everywhere",
        {**TEXT_EVERYWHERE, "first_image": "false", "temporal.first_frame_attention": "false"},
        "clips",
    ),
    "terminal_snr": Way(
        "the schedule ends before all is noise",
        training={
            "schedule": "{kind: scaled_linear, zero_terminal_snr: false}",
            "sampling.guidance.interval": "[7.5, null]",
        },
    ),
    "spatial_trained": Way("spatial layers trained too", training={"freeze_spatial": "false"}),
    "one_scale": Way("one scale, 2, for text and image together", guidance={"text": 2.0, "image": 2.0}),
    "image_unguided": Way("no guidance by the image", guidance={"image": 1.0}),
    "guided_throughout": Way("text guidance in every step", guidance={"interval": None}),
    "unguided": Way("no guidance", guidance={"text": 1.0, "image": 1.0}),
}


def train(way: str, given: argparse.Namespace) -> Path:
    """The run, or the model, of a way; what exists goes on, or is taken as it is."""
    run: Path = given.runs / way
    guidance = WAYS[way].guidance
    if guidance is not None:
        if not run.exists():
            draft = run.with_name(f".{way}")  # in its place only when whole
            shutil.rmtree(draft, ignore_errors=True)
            export(Model.load(given.runs / BASE), draft)
            told = configs.load(ModelConfig, draft / DESCRIPTION)
            assert told.video is not None
            scales = told.video.sampling.guidance.model_copy(update=guidance)
            sampling = told.video.sampling.model_copy(update={"guidance": scales})
            video = told.video.model_copy(update={"sampling": sampling})
            configs.save(told.model_copy(update={"video": video}), draft / DESCRIPTION)
            draft.rename(run)
        return run
    call_videodiff("train", str(RECIPE), *overrides(way, given))
    return run


def overrides(way: str, given: argparse.Namespace) -> list[str]:
    """What a way is trained with, over RECIPE."""
    values = {
        "model": given.model, "run.dir": str(given.runs / way), "run.steps": str(given.steps),
        "engine.decay_steps": str(given.steps), "data.shards": str(given.shards / WAYS[way].shards),
        "data.batch_size": str(given.batch), **WAYS[way].training,
    }  # fmt: skip
    return [f"{name}={value}" for name, value in values.items()]


def judge(way: str, folder: Path, given: argparse.Namespace) -> Samples:
    """What the reader found of each prompt's clip."""
    out = given.runs / f"{way}-evaluation"
    counts = ("--num-prompts", str(given.prompts), "--num-held-out", str(given.held_out))
    call_videodiff("evaluate", str(folder), "--stage", "video", *counts, "--out", str(out))
    return read_samples(out)[1]


def hits(samples: Samples, split: str, figure: str) -> list[float]:
    """1 where the figure is right and 0 where it is not, of each prompt in its order."""
    chosen = [sample for (where, _), sample in sorted(samples.items()) if where == split]
    return [float(right(sample["rows"][ROW], truth_of(sample, ROW) or {})[figure]) for sample in chosen]


def rows(judged: dict[str, Samples], runs: Path) -> list[str]:
    """A Markdown table: shares by split, and how each way differs from what it is held against."""
    splits = [split for split in SPLITS if any(where == split for where, _ in judged[BASE])]
    heads = [f"{figure}, {SPLITS[split].replace('_', ' ')}, %" for split in splits for figure in FIGURES]
    lines = [
        "| way | " + " | ".join(heads) + " | first frame, dB | against | all: points | verdict | s a step |",
        "|---" * (len(heads) + 6) + "|",
    ]
    for way, samples in judged.items():
        found = [hits(samples, split, figure) for split in splits for figure in FIGURES]
        shares = [wilson(int(sum(values)), len(values)) for values in found]
        cells = [f"{100 * s.value:.1f} ({100 * s.low:.1f}-{100 * s.high:.1f})" for s in shares]
        near = [s["rows"][ROW]["measures"].get("first_frame_psnr") for s in samples.values()]
        known = [value for value in near if value is not None]
        told = WAYS[way].training.get("first_image") != "false" and len(known) > 1
        cells.append(f"{mean_interval(known, way).value:.1f}" if told else "-")
        cells += ["-", "-", "-"] if way == BASE else _differs(way, samples, judged[WAYS[way].against])
        cells.append("-" if WAYS[way].guidance is not None else f"{_seconds_a_step(runs / way):.2f}")
        lines.append(f"| {way.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines


def _differs(way: str, samples: Samples, others: Samples) -> list[str]:
    """What it is held against, and by how many points all splits' prompts together differ, in pairs."""
    ours, theirs = ([hit for split in SPLITS for hit in hits(each, split, "all")] for each in (samples, others))
    found = compare(ours, theirs, "ablation", way, is_share=True)
    points = f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
    return [WAYS[way].against.replace("_", " "), points, found.verdict]


def _seconds_a_step(run: Path) -> float:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return median(json.loads(line)["seconds"] for line in lines)


def main(given: argparse.Namespace, command: str) -> None:
    """Train, judge, and write the report."""
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
    wanted = {BASE, *given.only}
    while more := {WAYS[way].against for way in wanted} - wanted:
        wanted |= more
    names = [way for way in WAYS if way in wanted]
    for name in {WAYS[way].shards for way in names}:
        if not (given.shards / name / INDEX).exists():  # else they may be encoded ones, or others
            render_world(given.shards / name, SHARDS[name])
    with ThreadPoolExecutor(given.at_once) as pool:  # each is a process of its own
        trained = [way for way in names if WAYS[way].guidance is None]
        folders = dict(zip(trained, pool.map(lambda way: train(way, given), trained), strict=True))
        folders |= {way: train(way, given) for way in names if way not in folders}
        found = pool.map(lambda way: judge(way, folders[way], given), names)
        judged = dict(zip(names, found, strict=True))
    lines = [
        "# Ablations",
        "",
        f"`{command}`",
        "",
        f"The demo's video stage, {given.steps:,} steps of batch {given.batch} of each way from the same image",
        "stage, on the same clips in the same order. Judged are clips from generated first images (the naive way:",
        "from the text alone), the same prompts and seeds for all. Shares that the reader finds right, with 95 %",
        "intervals. Each way is held against the one that differs from it in this choice, and in the guidance and",
        "layers that go with it: points of difference over the prompts of all splits, in pairs.",
        "",
        *(f"- **{way.replace('_', ' ')}**: {WAYS[way].told}" for way in names),
        "",
        *rows(judged, given.runs),
    ]
    if given.at_once > 1:
        lines += ["", f"Seconds a step are those of {given.at_once} trainings side by side."]
    publish(lines, given.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/image_prompt", help="what all ways start from")
    parser.add_argument("--shards", type=Path, default=Path("runs/demo/shards"), help="the folder of `make demo-model`")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--held-out", type=int, default=50, help="of each kind of unseen prompts")
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--at-once", type=int, default=1, help="ways that are trained and judged side by side")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    told = {name: value if isinstance(value, list) else [value] for name, value in vars(options).items()}
    said = [f"--{name.replace('_', '-')} {' '.join(map(str, told[name]))}" for name in told if name != "out"]
    with mistakes_in_one_line():
        main(options, f"python -m benchmarks.ablations {' '.join(said)}")
