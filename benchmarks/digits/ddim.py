"""DDIM: quality over eta and steps, inversion, interpolation between two encodings."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from benchmarks.digits.bench import Bench, Trained
from benchmarks.digits.judge import Score
from benchmarks.digits.report import all_of, axes, claim, picture, save, save_grid, table
from videodiff.batch import Condition
from videodiff.diffusion.samplers import DDIM, invert

ETAS = (0.0, 0.5, 1.0)
PAIRS, POINTS = 5, 11
ENCODING_STEPS = 100
SETTING = (
    "pictures of 8x8 pixels instead of 32x32, a small network, trailing instead of leading steps, no clipping of x0."
)
# DDIM, table 2: mean square error of reconstructions of CIFAR-10.
PAPER_ERRORS = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}


def run(bench: Bench) -> str:
    trained = bench.denoiser("linear-simple")
    return "\n\n".join([_quality(bench, trained), _inversion(bench, trained), _interpolation(bench, trained)])


def _quality(bench: Bench, trained: Trained) -> str:
    counts = bench.settings.sampler_steps
    grid = {
        eta: [bench.judge.frechet(bench.samples(trained, DDIM(steps=steps, eta=eta))) for steps in counts]
        for eta in ETAS
    }
    figure, ax = axes()
    for eta, scores in grid.items():
        values, deviations = [s.value for s in scores], [s.deviation for s in scores]
        ax.errorbar(counts, values, deviations, label=f"eta = {eta:g}", marker="o", markersize=3)
    ax.set(xscale="log", yscale="log", xlabel="steps S", ylabel="Frechet distance")
    ax.legend()
    save(figure, bench.pictures, "ddim-frechet")
    few = [i for i, steps in enumerate(counts) if steps <= 20]
    pairs = [(counts[i], grid[0.0][i], grid[1.0][i]) for i in few]
    return "\n\n".join(
        [
            f"Frechet distance of N = {bench.settings.num_samples} samples of the network linear-simple, ± deviation "
            "under resampling; all from the same noise.",
            table(["eta", *(f"S = {s}" for s in counts)], [[f"{eta:g}", *scores] for eta, scores in grid.items()]),
            claim(
                "DDIM, table 1: at few steps eta = 0 is better than eta = 1, by far.",
                all_of([zero.below(one) for _, zero, one in pairs]),
                "; ".join(
                    f"S = {s}: {zero} against {one}, {one.value / zero.value:.1f} times" for s, zero, one in pairs
                ),
                SETTING,
            ),
            claim(
                "DDIM, table 1: for every eta more steps are better.",
                all_of([_falls(scores) for scores in grid.values()]),
                "from fewest to most steps " + "; ".join(f"eta = {e:g}: {s[0]} to {s[-1]}" for e, s in grid.items()),
                SETTING,
            ),
            picture("ddim-frechet", "Frechet distance over steps, for three eta."),
        ]
    )


def _falls(scores: list[Score]) -> bool | None:
    return scores[-1].below(scores[0])


def _inversion(bench: Bench, trained: Trained) -> str:
    N, T = bench.settings.num_inverted, bench.settings.num_steps
    data, schedule = bench.digits.test[:N], trained.denoiser.schedule
    denoise = trained.denoiser.bind(Condition())
    counts = [*(s for s in bench.settings.inversion_steps if s < T), T]

    def errors(steps: int) -> Tensor:
        def make() -> dict[str, Tensor]:
            noise = invert(denoise, data, schedule, steps)
            back = DDIM(steps=steps)(denoise, noise, schedule)
            # On [0, 1], as the paper's.
            return {"errors": ((back - data) / 2).square().flatten(1).mean(1)}

        return bench.cache.tensors(f"inversion-{steps}", (trained.key, steps, N), make)["errors"]

    found = [errors(steps) for steps in counts]
    means = [float(e.mean()) for e in found]
    deviations = [float(e.std()) / N**0.5 for e in found]
    lines = [
        ["here", *(f"{m:.2g} ± {d:.1g}" for m, d in zip(means, deviations, strict=True))],
        ["CIFAR-10, the paper", *(PAPER_ERRORS.get(s, "") for s in counts)],
    ]
    falls = all(before > after for before, after in itertools.pairwise(means))
    return "\n\n".join(
        [
            f"Inversion: N = {N} test digits to noise and back with S steps each way, mean square error on [0, 1].",
            table(["error", *(f"S = {s}" for s in counts)], lines),
            claim(
                "DDIM, table 2: the error falls with S.",
                falls,
                f"{means[0]:.2g} at S = {counts[0]}, {means[-1]:.2g} at S = {counts[-1]}",
                SETTING,
            ),
        ]
    )


def _interpolation(bench: Bench, trained: Trained) -> str:
    schedule, denoise = trained.denoiser.schedule, trained.denoiser.bind(Condition())
    steps = min(ENCODING_STEPS, bench.settings.num_steps)
    ends = bench.digits.test[: 2 * PAIRS]

    def make() -> dict[str, Tensor]:
        codes = invert(denoise, ends, schedule, steps)
        between = torch.cat([spherical(codes[2 * i], codes[2 * i + 1], POINTS) for i in range(PAIRS)])
        return {"pictures": DDIM(steps=steps)(denoise, between, schedule)}

    found = bench.cache.tensors("interpolation", (trained.key, steps, PAIRS, POINTS), make)["pictures"]
    lines = []
    for i, path in enumerate(found.split(POINTS)):
        lines.append((f"pair {i + 1}", torch.cat([ends[2 * i][None], path, ends[2 * i + 1][None]])))
    save_grid(bench.pictures, "ddim-interpolation", lines)
    return picture(
        "ddim-interpolation",
        f"Interpolation: two test digits (outermost) are encoded with S = {steps}; between them what DDIM makes of "
        "points on the great circle between their encodings (DDIM, section 5.3).",
    )


def spherical(a: Tensor, b: Tensor, points: int) -> Tensor:
    """`points` codes from a to b, both included, on the great circle through them."""
    angle = torch.acos(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    where = torch.linspace(0, 1, points).view(-1, *[1] * a.dim())
    return (((1 - where) * angle).sin() * a + (where * angle).sin() * b) / angle.sin()
