"""`make demo-model`: the bundled model from nothing, by the recorded recipe of configs/demo.

Each step is a `videodiff` command that resumes when it was interrupted, so running this again goes on. Hours on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from data_pipeline.data_config import DataConfig
from stages.assemble import load_stage
from stages.evaluation.measures import MEASURES
from stages.evaluation.sheets import percent
from stages.evaluation.statistics import ROWS
from stages.evaluation.worlds import attribute_label, columns
from stages.pipeline import Pipeline, SampleKey
from videodiff import resources
from videodiff.errors import mistakes_in_one_line
from videodiff.metrics.intervals import wilson
from videodiff.model import Model
from videodiff.model_folder import export
from videodiff.parts import DESCRIPTION, sha256
from videodiff.training.run_folder import MACHINES
from videodiff.video_io import Frames, contact_sheet, read_image, save_sheet, write_animation

# Folder of the shards -> what `videodiff data world` is asked for. The image stage sees the first frames of scenes;
# the video stage's captions tell the motion alone, as its first image tells the rest.
CLIPS = {"num-clips": 8192, "size": 64, "frames": 31, "fps": 16, "seed": 1}
SHARDS: dict[str, dict[str, int]] = {
    "clips": CLIPS,
    "images": {"num-clips": 16384, "size": 64, "frames": 1, "fps": 16, "seed": 2},
    "motions": {**CLIPS, "motion-captions": 4},
    "large": {"num-clips": 2048, "size": 128, "frames": 4, "fps": 2, "seed": 3},
}
# Run -> its shards, in the order of training: each stands on the one before it.
RUNS = {
    "autoencoder": "clips",
    "text": "clips",
    "image": "images",
    "image_prompt": "motions",
    "video": "motions",
    "interpolation": "clips",
    "upscale": "large",
}
ENCODED = ("image", "image_prompt", "video")  # runs that decode nothing: latents and text features are made once
# glibc gives freed memory back at once, and large tensors fault their pages in anew: on a CPU that can double a step.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": "536870912",
}
PROMPTS = (
    "a large red circle moving left on a white background",
    "a small blue square moving up on a checkered background",
    "a large green cross moving diagonally on a black background",
    "a small purple triangle circling on a gradient background",
    "a large yellow square growing on a white background",
    "a small cyan circle moving down on a black background",
)
SEED = 12345  # of the figures on the card
SHEET, ANIMATION, NEIGHBOURS = "demo.png", "demo.webp", "demo-neighbours.png"


def main(out: Path, num_prompts: int, num_held_out: int, install: bool) -> None:
    """Make the data, train all stages, export, evaluate, write the card; `install` replaces the bundled model."""
    last = train_all(out, "configs/demo", SHARDS, RUNS)
    model = out / "model"
    shutil.rmtree(model, ignore_errors=True)
    export(Model.load(last), model, half=True)
    judged = out / f"evaluation-{sha256(model / DESCRIPTION)[:12]}"  # goes on for the same weights, begins for others
    counts = ("--num-prompts", str(num_prompts), "--num-held-out", str(num_held_out))
    training = ("--training", str(out / "shards" / "clips"))
    call_videodiff("evaluate", str(model), *counts, *training, "--seed", str(SEED), "--out", str(judged))
    report = json.loads((judged / "evaluation.json").read_text(encoding="utf-8"))
    (model / "README.md").write_text(card(out, model, report, counts), encoding="utf-8")
    pictures(Model.load(model), out)
    made = [SHEET, ANIMATION]
    if neighbours(judged, out):
        made.append(NEIGHBOURS)
    else:
        print(f"{judged}: no pictures of nearest training clips, see `skipped` in its evaluation.json; none is drawn")
    if install:
        model = _install(model, out, made)
    names = ", ".join(str(out / name) for name in made)
    print(f"the model: {model}; its card: {model / 'README.md'}; its pictures: {names}")


def train_all(out: Path, recipes: str, shards: Mapping[str, Mapping[str, int]], runs: Mapping[str, str]) -> Path:
    """Render the shards and train the runs, each on the one before it, into folders of `out`; what is there stays, or
    goes on. recipes: the folder of the runs' YAMLs. Returns the last run."""
    for name, arguments in shards.items():
        render_world(out / "shards" / name, arguments)
    before: list[str] = []
    for run, seen in runs.items():
        recipe = resources.path(f"{recipes}/{run}.yaml")
        data = encoded(out, seen, load_stage(recipe).data) if run in ENCODED else out / "shards" / seen
        call_videodiff("train", str(recipe), f"run.dir={out / run}", f"data.shards={data}", *before)
        before = [f"model={out / run}"]
    return out / run


def _install(model: Path, out: Path, drawn: Sequence[str]) -> Path:
    """Put a finished model in the place of the bundled one, and what was drawn into the documents; at no moment is
    there half a model."""
    target = resources.path("assets/demo")
    fresh, former = target.with_name("demo.new"), target.with_name("demo.old")
    for folder in (fresh, former):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, fresh)
    if target.exists():
        target.rename(former)
    fresh.rename(target)
    shutil.rmtree(former, ignore_errors=True)
    if (docs := Path(__file__).resolve().parents[1] / "docs").is_dir():  # a checkout
        for name in (SHEET, ANIMATION, NEIGHBOURS):  # a former model's would not be true of this one
            (docs / name).unlink(missing_ok=True)
        for name in drawn:
            shutil.copyfile(out / name, docs / name)
    return target


def pictures(model: Model, folder: Path) -> None:
    """The README's: SHEET, a row of frames for each of PROMPTS, and ANIMATION, their clips at the smooth rate side by
    side, at the default settings of `generate` and seed 0."""
    pipeline = Pipeline(model)
    video, smooth = model.diffusion("video"), model.diffusion("interpolation")
    frames: list[Frames] = []
    clips = []
    for prompt in PROMPTS:
        keys = [SampleKey(0, prompt)]
        first = pipeline.image(keys, model.diffusion("image").sampling)
        latents = pipeline.video(keys, first, video.fps, video.sampling)
        clip = pipeline.decode(latents)[0]
        frames += [clip[round(i * (len(clip) - 1) / 7)] for i in range(8)]
        clips.append(pipeline.decode(pipeline.interpolation(keys, latents, video.fps, smooth.sampling))[0])
    labels = [PROMPTS[i // 8] if i % 8 == 0 else "" for i in range(len(frames))]
    folder.mkdir(parents=True, exist_ok=True)
    save_sheet(folder / SHEET, [_doubled(frame) for frame in frames], 8, labels)
    moments = [contact_sheet([_doubled(f) for f in now], 3, PROMPTS) for now in zip(*clips, strict=True)]
    write_animation(folder / ANIMATION, np.stack(moments), video.fps * smooth.factor)


def neighbours(judged: Path, folder: Path) -> bool:
    """NEIGHBOURS: the generated clips of an evaluation that lie nearest to training clips, each above its neighbour;
    False where it has none, as after too few prompts."""
    pairs = [read_image(path) for path in sorted((judged / "neighbours").glob("*.png"))]
    if pairs:
        save_sheet(folder / NEIGHBOURS, pairs, 1)
    return bool(pairs)


def _doubled(frame: Frames) -> Frames:
    return frame.repeat(2, axis=0).repeat(2, axis=1)


def card(out: Path, model: Path, report: dict[str, Any], counts: Sequence[str]) -> str:
    """The model card: data, seeds, steps, time, machine and figures, as Markdown."""
    megabytes = sum(path.stat().st_size for path in model.iterdir()) / 1e6
    lines = [
        "# The bundled demo model",
        "",
        "Text to image to video to smooth video on the built-in world of moving shapes, made by `make demo-model` with",
        "the recipe in `configs/demo/`. It knows that world and nothing else: one shape in one of six colours on one",
        "of four backgrounds. Apache-2.0, like the code; trained on clips that the project renders itself.",
        "",
        f"Files: {megabytes:.1f} MB in float16. {_clip(model)}",
        "",
        *machines_and_runs(out, SHARDS, RUNS),
        "",
        f"## Figures: `videodiff evaluate demo {' '.join(counts)} --seed {SEED}`",
        "",
        "Share of prompts that the reader finds right, in percent, with 95 % intervals. Caption wordings and seeds are",
        "unseen in training. Held-out pairs: all combinations with one of six pairs of attributes (such as red with",
        "triangle) that no training clip shows; held out: a tenth of the other combinations, unseen in training too.",
        "(The video stage's captions name other looks than the clips', drawn from all combinations, and a quarter of",
        "the image prompt's samples are what the image stage makes of such captions.)",
        "",
        *table(report["rows"]),
    ]
    if report.get("verdict"):
        lines += ["", report["verdict"]]
    if (near := report.get("memorized")) is not None:
        closer = near["nearer_than_usual"]
        lines += [
            "",
            f"Nearest of {near['training_clips']} training clips, by {near['features']}: generated clips lie "
            f"{near['made']['mean']:.3f} from theirs, unseen real ones {near['unseen']['mean']:.3f}; "
            f"{closer['right']} of {closer['n']} generated ones lie nearer than all but {100 * near['usual']:.0f} % of "
            "the real ones.",
        ]
    lines += ["", "## What it can't do", "", *_limits(report["rows"])]
    return "\n".join(lines) + "\n"


def machines_and_runs(out: Path, shards: Mapping[str, Mapping[str, int]], runs: Mapping[str, str]) -> list[str]:
    """What was trained for how long on which machine and data, as Markdown."""
    lines = [
        "| run | steps | batch | seed | hours | final loss | machine |",
        "|---|---|---|---|---|---|---|",
    ]
    machines: dict[str, str] = {}  # what ran it -> its letter
    for run in runs:
        ran = "; ".join((out / run / MACHINES).read_text(encoding="utf-8").splitlines())
        letter = machines.setdefault(ran, ascii_uppercase[len(machines)])
        records = [json.loads(line) for line in (out / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        last = records[-100:]
        hours = sum(record["seconds"] for record in records) / 3600
        config = load_stage(out / run / "config.yaml")  # what the run was given, whatever the recipe says by now
        seed, batch = config.run.seed, config.data.batch_size
        loss = sum(record["loss"] for record in last) / len(last)
        lines.append(f"| {run} | {len(records)} | {batch} | {seed} | {hours:.2f} | {loss:.4f} | {letter} |")
    told = "; ".join(f"{name}: `videodiff data world {_shown(a)}`" for name, a in shards.items())
    return [
        *lines,
        "",
        "Machines: " + "; ".join(f"{letter}: {ran}" for ran, letter in machines.items()) + ".",
        f"Data: {told}. {', '.join(run for run in runs if run in ENCODED)} read latents and text features that "
        "`videodiff data encode` made of them.",
    ]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The evaluation's rows as a Markdown table."""
    attributes = columns(rows)
    named = " | ".join(map(attribute_label, attributes))
    lines = [f"| row | prompts | N | {named} | PSNR, dB |", "|---" * (len(attributes) + 4) + "|"]
    for row in rows:
        if row["row"].startswith("real"):
            continue  # what the others are held against
        figures = [percent(row["shares"].get(name)) for name in attributes]
        shares = [share + "".join(f" ({limits})" for limits in interval) for share, *interval in figures]
        psnr = {name: told for name, told in row["measures"].items() if MEASURES[name].label.endswith(", dB")}
        near = "; ".join(
            f"{name.removesuffix('_psnr').replace('_', ' ')} {told['mean']:.1f}" for name, told in psnr.items()
        )
        cells = [ROWS[row["row"]], row["split"].replace("_", " "), str(row["n"]), *shares, near or "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _limits(rows: list[dict[str, Any]]) -> list[str]:
    """What no prompt gets, and where more than a twentieth of the clips from generated first images come out wrong."""
    lines = [
        "- Nothing but one object of the built-in world: no second one, no other colour, shape or motion, no rotation,",
        "  no camera that moves. `generate` names the words of a prompt that were not in its training.",
        "- No other size or length than those above; `generate` refuses them.",
    ]
    for row in rows:
        if row["row"] != "video_generated":
            continue
        wrong = []
        for name, counts in row["confusions"].items():
            for value, found in counts.items():
                right, asked = found.get(value, 0), sum(found.values())
                if asked and wilson(right, asked).high < 0.95:
                    wrong.append(f"{name} {value} ({right} of {asked} right)")
        if wrong:
            lines.append(f"- Of {row['split'].replace('_', ' ')} combinations not surely: {', '.join(wrong)}.")
    return lines


def _clip(model: Path) -> str:
    opened = Model.load(model)
    video, smooth = opened.diffusion("video"), opened.diffusion("interpolation")
    frames = (video.frames - 1) * smooth.factor + 1
    part = opened.config.upscale
    larger = f"; {part.size}x{part.size} with `--upscale`" if part else ""
    return (
        f"{video.frames} frames of {video.size}x{video.size} at {video.fps:g} fps; "
        f"{frames} frames at {video.fps * smooth.factor:g} fps after interpolation{larger}."
    )


def _shown(arguments: Mapping[str, int]) -> str:
    return " ".join(f"--{key} {value}" for key, value in arguments.items())


def render_world(out: Path, arguments: Mapping[str, int]) -> None:
    """Shards of the built-in world in `out`; those that are there stay."""
    options = [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
    call_videodiff("data", "world", "--out", str(out), *options)


def encoded(out: Path, shards: str, data: DataConfig) -> Path:
    """The shards' latents and text features, as a stage with these clips reads them; what is there stays."""
    target = out / "encoded" / shards
    clips = ("--frames", str(data.frames), "--fps", f"{data.fps:g}", "--size", str(data.size))
    model = ("--model", str(out / "text"), "--out", str(target))
    call_videodiff("data", "encode", str(out / "shards" / shards), *model, *clips, "--processes", "2")
    return target


def call_videodiff(*arguments: str) -> None:
    """Run the command with these arguments in a process of its own, which ends this one where it fails."""
    print("videodiff", *arguments, flush=True)
    with subprocess.Popen([sys.executable, "-m", "stages", *arguments], env={**KEEP_MEMORY, **os.environ}) as child:
        while child.poll() is None:
            with suppress(KeyboardInterrupt):  # the child has it too: it ends its step and saves, and that takes time
                child.wait()
    if child.returncode:
        raise SystemExit(child.returncode)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the data and the runs")
    parser.add_argument("--num-prompts", type=int, default=200, help="prompts behind each figure of the card")
    parser.add_argument("--num-held-out", type=int, default=100, help="the same for each kind of held-out combinations")
    parser.add_argument("--install", action="store_true", help="replace the bundled model by the result")
    parser.add_argument("--pictures", type=Path, help="only draw the README's pictures of the bundled model, to there")
    given = parser.parse_args()
    with mistakes_in_one_line():
        if given.pictures is not None:
            pictures(Model.load("demo"), given.pictures)
        else:
            main(given.out, given.num_prompts, given.num_held_out, given.install)
