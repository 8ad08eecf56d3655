"""Classifier guidance and classifier-free guidance over their scales: fidelity against diversity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.digits.bench import Bench
from benchmarks.digits.data import CLASSES, told
from benchmarks.digits.judge import Score
from benchmarks.digits.report import axes, claim, picture, save, save_grid, table
from videodiff.diffusion.guidance import ClassifierFree, ClassifierGuidance, class_log_prob
from videodiff.diffusion.prediction import Denoise
from videodiff.diffusion.samplers import DDIM

METHODS = {"classifier": "classifier guidance", "free": "classifier-free guidance"}


@dataclass(frozen=True)
class Point:
    scale: float
    pictures: Tensor
    accuracy: Score
    precision: Score
    recall: Score
    frechet: Score


def run(bench: Bench) -> str:
    labels = torch.arange(bench.settings.num_samples) % CLASSES
    curves = {"classifier": _classifier(bench, labels), "free": _free(bench, labels)}
    _draw(bench, curves)
    blocks = [
        f"N = {len(labels)} samples for each scale, every digit asked for equally often, DDIM with "
        f"{bench.settings.guided_steps} steps. Accuracy: the share that a support vector machine on pixels reads as "
        "what was asked for. Precision and recall (1904.06991, three neighbours) in the features of the small "
        "classifier, against the test digits. ± one standard deviation.",
    ]
    for name, curve in curves.items():
        header = ["scale", "label accuracy", "precision", "recall (diversity)", "Frechet distance"]
        lines = [[f"{p.scale:g}", p.accuracy, p.precision, p.recall, p.frechet] for p in curve]
        blocks += [f"**{METHODS[name]}** ({_whose(name)})", table(header, lines)]
    blocks.append("\n".join(_claims(name, curve) for name, curve in curves.items()))
    blocks.append(
        picture(
            "guidance",
            "The trade-off, from high temperature (small scale) to low: each point is a scale of the tables.",
        )
    )
    blocks.append(picture("guidance-samples", "The same noise and digits at the least and the greatest scale."))
    return "\n\n".join(blocks)


def _whose(name: str) -> str:
    if name == "classifier":
        return "of the unconditional network linear-simple by a classifier of noisy digits; 0 is no guidance"
    return "code scale, 1 + w of the paper: 0 is the network without, 1 with its label, unguided"


def _classifier(bench: Bench, labels: Tensor) -> list[Point]:
    trained = bench.denoiser("linear-simple")
    classifier = bench.classifier(trained.denoiser.schedule)
    points = []
    for scale in bench.settings.classifier_scales:

        def how(chosen: slice, scale: float = scale) -> Denoise:
            return ClassifierGuidance(scale=scale)(trained.plain(chosen), class_log_prob(classifier, labels[chosen]))

        key = ("classifier", scale, bench.settings.feature_steps)
        points.append(_point(bench, scale, bench.samples(trained, _sampler(bench), how, key), labels))
    return points


def _free(bench: Bench, labels: Tensor) -> list[Point]:
    trained = bench.denoiser("linear-labelled")
    points = []
    for scale in bench.settings.free_scales:

        def how(chosen: slice, scale: float = scale) -> Denoise:
            return ClassifierFree(text=scale)(trained.denoiser, told(labels[chosen]))

        points.append(_point(bench, scale, bench.samples(trained, _sampler(bench), how, ("free", scale)), labels))
    return points


def _sampler(bench: Bench) -> DDIM:
    return DDIM(steps=bench.settings.guided_steps)


def _point(bench: Bench, scale: float, pictures: Tensor, labels: Tensor) -> Point:
    judge = bench.judge
    scores = (
        judge.accuracy(pictures, labels),
        judge.precision(pictures),
        judge.recall(pictures),
        judge.frechet(pictures),
    )
    return Point(scale, pictures, *scores)


def _claims(name: str, curve: list[Point]) -> str:
    """Between the unguided model and the greatest scale."""
    start = next(p for p in curve if p.scale == (0 if name == "classifier" else 1))
    end = curve[-1]
    scales = f"from scale {start.scale:g} to {end.scale:g}"
    best = max(curve, key=lambda p: p.accuracy.value)
    paper = {"classifier": "Dhariwal & Nichol, section 4.3", "free": "Classifier-free guidance, section 4"}[name]
    differs = (
        f"ten classes of 8x8 pixels; without guidance {100 * start.accuracy.value:.0f} % of the labels are right and "
        f"the recall is {start.recall.value:.2f}."
    )
    return "\n".join(
        [
            claim(
                f"{paper}: with the scale, {METHODS[name]} makes samples fit their labels better.",
                start.accuracy.below(end.accuracy),
                f"label accuracy {start.accuracy} to {end.accuracy}, {scales}; best {best.accuracy} at {best.scale:g}",
                differs,
            ),
            claim(
                f"{paper}: diversity falls with it.",
                end.recall.below(start.recall),
                f"recall {start.recall} to {end.recall}, {scales}",
                differs,
            ),
        ]
    )


def _draw(bench: Bench, curves: dict[str, list[Point]]) -> None:
    figure, ax = axes()
    for name, curve in curves.items():
        ax.plot([p.recall.value for p in curve], [p.accuracy.value for p in curve], marker="o", label=METHODS[name])
        for p in curve:
            where = (p.recall.value, p.accuracy.value)
            ax.annotate(f"{p.scale:g}", where, fontsize=7, textcoords="offset points", xytext=(3, 3))
    ax.set(xlabel="recall (diversity)", ylabel="label accuracy")
    ax.legend(fontsize=7)
    save(figure, bench.pictures, "guidance")
    ends = [(METHODS[name], curve[i]) for name, curve in curves.items() for i in (0, -1)]
    save_grid(bench.pictures, "guidance-samples", [(f"{m}, {p.scale:g}", p.pictures[:20]) for m, p in ends])
