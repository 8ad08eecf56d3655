"""Quality against network evaluations, for every sampler of the core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.digits.bench import Bench, Counted, Trained
from benchmarks.digits.judge import Score
from benchmarks.digits.report import all_of, axes, claim, picture, save, table
from videodiff.batch import Condition
from videodiff.diffusion.samplers import DDIM, DDPM, DPMSolver, Heun, Langevin, PredictorCorrector, SamplerConfig

# The sampler of a budget of evaluations, with defaults in all but the steps.
SOLVERS: dict[str, Callable[[int], SamplerConfig]] = {
    "DDPM, beta-tilde": lambda budget: DDPM(steps=budget),
    "DDIM, eta 0": lambda budget: DDIM(steps=budget),
    "DPM-Solver++(2M)": lambda budget: DPMSolver(steps=budget),
    "Heun (EDM)": lambda budget: Heun(steps=(budget + 1) // 2),
    "predictor-corrector": lambda budget: PredictorCorrector(steps=(budget + 1) // 2),
    "annealed Langevin": lambda budget: Langevin(steps=max(1, (budget - 1) // 5)),
}


@dataclass(frozen=True)
class Point:
    evaluations: int
    frechet: Score


def run(bench: Bench) -> str:
    trained, T = bench.denoiser("linear-simple"), bench.settings.num_steps
    budgets = [b for b in bench.settings.evaluations if b <= T]
    curves = {name: [_measure(bench, trained, make(budget)) for budget in budgets] for name, make in SOLVERS.items()}
    figure, ax = axes()
    for name, curve in curves.items():
        values, deviations = [p.frechet.value for p in curve], [p.frechet.deviation for p in curve]
        ax.errorbar([p.evaluations for p in curve], values, deviations, label=name, marker="o", markersize=3)
    ax.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="Frechet distance")
    ax.legend(fontsize=7)
    save(figure, bench.pictures, "solvers")
    header = ["sampler", *(f"about {b}" for b in budgets)]
    lines = [[name, *(f"{p.frechet} ({p.evaluations})" for p in curve)] for name, curve in curves.items()]
    best = [min(curves, key=lambda name: curves[name][i].frechet.value) for i in range(len(budgets))]
    few = min(range(len(budgets)), key=lambda i: abs(budgets[i] - 10))
    ddim, ddpm = curves["DDIM, eta 0"][few].frechet, curves["DDPM, beta-tilde"][few].frechet
    solver = curves["DPM-Solver++(2M)"][few].frechet
    at = f"{budgets[few]} evaluations"
    differs = "8x8 pixels, the linear schedule with trailing steps, a small network, no clipping of x0."
    return "\n\n".join(
        [
            f"Frechet distance of N = {bench.settings.num_samples} samples of the network linear-simple, ± deviation "
            "under resampling, and in brackets how often the network was really asked for each sample. Every sampler "
            "has its default settings; Heun and Langevin begin and end at noise levels of their own.",
            table(header, lines),
            "- Best at each budget: " + "; ".join(f"{b}: {name}" for b, name in zip(budgets, best, strict=True)) + ".",
            claim(
                f"DPM-Solver++ and DDIM: at {at} deterministic solvers beat ancestral sampling.",
                all_of([ddim.below(ddpm), solver.below(ddpm)]),
                f"DDIM {ddim}, DPM-Solver++ {solver}, DDPM {ddpm}",
                differs,
            ),
            claim(
                f"DPM-Solver++: at {at} second order beats first order (DDIM).",
                solver.below(ddim),
                f"{solver} against {ddim}",
                differs,
            ),
            picture("solvers", "Quality against network evaluations."),
        ]
    )


def _measure(bench: Bench, trained: Trained, sampler: SamplerConfig) -> Point:
    pictures = bench.samples(trained, sampler)
    # Counted on one sample more: how often a sampler asks doesn't depend on the pictures.
    counted = Counted(trained.denoiser.bind(Condition()))
    sampler(counted, torch.zeros(1, *pictures.shape[1:]), trained.denoiser.schedule, [torch.Generator()])
    return Point(counted.evaluations, bench.judge.frechet(pictures))
