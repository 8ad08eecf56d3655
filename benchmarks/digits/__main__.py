"""python -m benchmarks.digits [--only SECTION ...] [--processes 2] [--quick] [--runs FOLDER] [--docs FOLDER]

Trains, measures and writes core-results.md with its pictures into the docs folder. Networks, samples and finished
sections are kept in the runs folder: the same command goes on where it was interrupted. `--only` renews single sections
and leaves the others as they were; `--quick` runs every line with sizes that mean nothing, into the runs folder alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import sklearn
import torch

from benchmarks.digits.bench import Bench
from benchmarks.digits.cache import Cache
from benchmarks.digits.data import LEVELS
from benchmarks.digits.judge import FEATURES
from benchmarks.digits.report import wrapped
from benchmarks.digits.sections import NEEDED, SECTIONS, network, section
from benchmarks.digits.settings import QUICK, Settings


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits", description=__doc__.split("\n\n")[1])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--processes", type=int, default=2, help="jobs at once, a thread each [2]")
    parser.add_argument("--quick", action="store_true", help="every line, but nothing measured; minutes become seconds")
    parser.add_argument("--runs", type=Path, help="what was trained and drawn [runs/digits]")
    parser.add_argument("--docs", type=Path, help="where the report goes [docs]")
    given = parser.parse_args(arguments)
    runs = given.runs or Path("runs/digits-quick" if given.quick else "runs/digits")
    docs = given.docs or (runs / "docs" if given.quick else Path("docs"))
    settings = QUICK if given.quick else Settings()
    where = (settings, runs, docs / "core-results")
    if given.processes > 1:
        # Networks first, one by one: of what two sections need, one would train and the other wait. Then the built-in
        # world, which needs none of them, while the last one trains.
        networks = dict.fromkeys(name for wanted in given.only for name in NEEDED[wanted])
        sections = sorted(given.only, key=lambda name: name != "latents")
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(given.processes, spawn, torch.set_num_threads, (1,)) as pool:
            jobs = [pool.submit(network, name, *where) for name in networks]
            jobs += [pool.submit(section, name, *where) for name in sections]
            for job in jobs:
                job.result()
    else:
        for name in given.only:
            section(name, *where)
    bench = Bench(settings, Cache(runs), docs / "core-results")
    report = docs / "core-results.md"
    finished = [runs / f"{name}.md" for name in SECTIONS]
    texts = [path.read_text(encoding="utf-8") for path in finished if path.exists()]
    report.write_text("\n".join([wrapped(introduction(bench)), *texts]), encoding="utf-8")
    print(f"written: {report}")


def introduction(bench: Bench) -> str:
    settings, digits, judge = bench.settings, bench.digits, bench.judge
    again = digits.train[: len(digits.test)]
    return "\n\n".join(
        [
            "# The core on real data",
            "Written by `python -m benchmarks.digits` (`make bench-digits`) from what it measured; do not edit. "
            "Nothing was tuned towards the papers: one width, one learning rate and one number of steps for all "
            "networks of digits.",
            f"**Data.** scikit-learn's {len(digits.train) + len(digits.test):,} handwritten digits, 8x8 pixels with "
            f"{LEVELS} grey levels, in a fixed split of {len(digits.train):,} to train on and {len(digits.test)} to "
            "judge by.",
            f"**Networks.** The U-Net of `videodiff.networks` with {settings.width} channels at 8x8 and "
            f"{2 * settings.width} at 4x4, attention at 4x4, T = {settings.num_steps}, eps prediction, "
            f"{settings.train_steps:,} steps with batches of {settings.batch}, Adam at {settings.learning_rate:g}, "
            "averaged weights. No estimate of x0 is clipped while sampling.",
            f"**Judges.** Frechet distance, precision and recall are taken in the {FEATURES} features before the last "
            f"layer of a small convolutional classifier (test accuracy {judge.network_accuracy()}), not in "
            "Inception's; they are scaled so that the test digits have a total variance of 1. "
            f"{len(again)} real digits of the training half score a Frechet distance of {judge.frechet(again)} against "
            f"the test digits, recall {judge.recall(again)}, precision {judge.precision(again)}. Labels are read by a "
            f"support vector machine on pixels (test accuracy {judge.accuracy(digits.test, digits.test_labels)}). "
            "Samples are rounded to the data's grey levels, as real pictures are.",
            "**Verdicts.** An effect counts where it exceeds two standard deviations, or where a 95 % interval leaves "
            "out 0; otherwise it is called not decided. Deviations tell the spread of samples, not of training again "
            "from other weights. Where a verdict isn't yes, the text names what differs from the paper's setting.",
            f"Versions: torch {torch.__version__}, scikit-learn {sklearn.__version__}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
