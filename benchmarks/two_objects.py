"""Two objects with a relation: does a model give each its own colour, shape and motion, where the prompt puts it?

    python -m benchmarks.two_objects [--prompts 256] [--held-out 128] [--runs runs/two] [--out docs/two-objects.md]

Makes the data, trains the model of configs/two and judges it, on seen and on held-out looks; hours on a CPU, and the
same command goes on where it was stopped. The evaluation's sheet of videos is put beside `--out`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from benchmarks.report import publish
from stages.demo_model import call_videodiff, machines_and_runs, table, train_all
from videodiff.errors import mistakes_in_one_line
from videodiff.model import Model
from videodiff.model_folder import export
from videodiff.parts import DESCRIPTION, sha256

SHARDS = {
    "clips": {"objects": 2, "num-clips": 8192, "size": 64, "frames": 31, "fps": 16, "seed": 1},
    "images": {"objects": 2, "num-clips": 32768, "size": 64, "frames": 1, "fps": 16, "seed": 2},
}
RUNS = {"autoencoder": "clips", "text": "clips", "image": "images", "video": "clips"}
SEED = 12345  # of the figures
ROW = "video_generated"  # whose sheet is shown


def main(num_prompts: int, num_held_out: int, runs: Path, out: Path | None, command: str) -> None:
    """Train and judge, print the report, and write it to `out`."""
    last = train_all(runs, "configs/two", SHARDS, RUNS)
    model = runs / "model"
    shutil.rmtree(model, ignore_errors=True)
    export(Model.load(last), model, half=True)
    of = f"{sha256(model / DESCRIPTION)[:12]}-{num_prompts}-{num_held_out}"
    judged = runs / f"evaluation-{of}"  # goes on for the same weights and counts, begins for others
    counts = ("--num-prompts", str(num_prompts), "--num-held-out", str(num_held_out), "--seed", str(SEED))
    call_videodiff("evaluate", str(model), "--objects", "2", *counts, "--out", str(judged))
    report = json.loads((judged / "evaluation.json").read_text(encoding="utf-8"))
    lines = [
        "# Two objects with a relation", "", f"`{command}`", "",
        *machines_and_runs(runs, SHARDS, RUNS), "",
        f"## Figures: `videodiff evaluate {model} --objects 2 {' '.join(counts)}`", "",
        "Share of prompts that the reader finds right, in percent, with 95 % intervals; caption wordings and seeds are",
        "unseen in training. `colour`, `shape`, `motion`: of the object that the prompt names first. Held out: a tenth",
        "of the looks (both colours and shapes, and which lies where), unseen in training; held-out pairs: one of the",
        "objects shows a pair of attributes, such as red with triangle, that no training clip shows.", "",
        *table(report["rows"]),
    ]  # fmt: skip
    if report["verdict"]:
        lines += ["", report["verdict"]]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        picture = out.with_suffix(".png")
        shutil.copyfile(judged / f"{ROW}.png", picture)
        lines += ["", f"![videos of seen and held-out looks]({picture.name})"]
    publish(lines, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256, help="on seen looks")
    parser.add_argument("--held-out", type=int, default=128, help="on each kind of held-out ones")
    parser.add_argument("--runs", type=Path, default=Path("runs/two"), help="folder of the data and the runs")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    given = parser.parse_args()
    told = f"python -m benchmarks.two_objects --prompts {given.prompts} --held-out {given.held_out} --runs {given.runs}"
    with mistakes_in_one_line():
        main(given.prompts, given.held_out, given.runs, given.out, told)
