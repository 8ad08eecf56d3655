"""Our metrics of feature sets against torchmetrics and scikit-learn, on the same features and cores.

    python -m benchmarks.metrics [--pairs 5] [--threads 1] [--samples 2000] [--dimension 512] [--out FILE]

frechet: features to FID, against torchmetrics' FrechetInceptionDistance. kid: 10 subsets, against its
KernelInceptionDistance. support: precision, recall, density and coverage, against full tables of scikit-learn's
distances, as in the code of Naeem et al. ssim: against torchmetrics' structural_similarity_index_measure. Ratios of
paired calls in one run; below 1, ours is faster. The figures of both sides are compared before the race.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from sklearn.metrics import pairwise_distances
from torch import Tensor, nn

from benchmarks.timing import paired
from videodiff.metrics.gaussian import frechet_distance
from videodiff.metrics.kernels import kid
from videodiff.metrics.manifold import support
from videodiff.metrics.pictures import ssim
from videodiff.networks.tokenizer import declare_torchvision_ops

declare_torchvision_ops()
from torchmetrics.functional.image import structural_similarity_index_measure  # noqa: E402
from torchmetrics.image.fid import FrechetInceptionDistance  # noqa: E402  # its import of torchvision needs the call
from torchmetrics.image.kid import KernelInceptionDistance  # noqa: E402

SUBSETS = 10
Race = tuple[str, Callable[[], object], Callable[[], object], float]  # name, ours, theirs, how far figures may differ
HEAD = "| metric | time, ours / theirs (95 %) | verdict | ms | figures, ours / theirs |\n" + "|---" * 5 + "|"


class Same(nn.Module):
    """A feature extractor that hands on what it gets."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.num_features = dimension

    def forward(self, x: Tensor) -> Tensor:
        return x


def races(samples: int, dimension: int) -> list[Race]:
    """What is compared. Features are like a network's: not negative, and of very unequal variances."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -2, dimension)
    x, y = (torch.randn(samples, dimension, generator=generator).relu() * scale for _ in range(2))
    y = 1.1 * y + 0.02 * scale
    pictures = torch.randint(0, 256, (8, 128, 128, 3), dtype=torch.uint8, generator=generator)
    others = (pictures // 2 + 60).to(torch.uint8)
    size = min(1000, samples)

    def their_frechet() -> float:
        metric = FrechetInceptionDistance(feature=Same(dimension))
        metric.update(x, real=True)
        metric.update(y, real=False)
        return float(metric.compute())

    def their_kid() -> float:
        metric = KernelInceptionDistance(feature=Same(dimension), subsets=SUBSETS, subset_size=size)
        metric.update(x, real=True)
        metric.update(y, real=False)
        return float(metric.compute()[0])

    def their_support(k: int = 5) -> float:
        one, other = x.numpy(), y.numpy()
        radii = [np.partition(pairwise_distances(part), k, axis=1)[:, k] for part in (one, other)]
        near = pairwise_distances(one, other)
        held = near <= radii[0][:, None]
        found = [
            held.any(0).mean(),
            (near <= radii[1]).any(1).mean(),
            held.sum() / (k * len(other)),
            held.any(1).mean(),
        ]
        return float(found[0])

    def their_ssim() -> float:
        a, b = (part.permute(0, 3, 1, 2).double() for part in (pictures, others))
        return float(structural_similarity_index_measure(a, b, data_range=255.0, reduction="none").mean())

    return [
        ("frechet", lambda: frechet_distance(x, y), their_frechet, 1e-3),
        ("kid", lambda: kid(x, y, SUBSETS, size).mean, their_kid, 0.2),  # other subsets
        ("support", lambda: support(x, y, 5, 5).precision, their_support, 1e-3),
        ("ssim", lambda: float(ssim(pictures.numpy(), others.numpy()).mean()), their_ssim, 1e-2),  # they pad first
    ]


def row(race: Race, pairs: int) -> str:
    """A row of the table; RuntimeError where the two sides compute other figures."""
    name, ours, theirs, tolerance = race
    figures = [float(call()) for call in (ours, theirs)]  # type: ignore[arg-type]
    if abs(figures[0] - figures[1]) > tolerance * abs(figures[1]):
        raise RuntimeError(f"{name}: {figures[0]:.6g} and {figures[1]:.6g} are not one figure: the race is void")
    ratio = paired(ours, theirs, pairs)
    return (
        f"| {name} | {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) | {ratio.verdict} | "
        f"{ratio.ours * 1e3:.0f} / {ratio.theirs * 1e3:.0f} | {figures[0]:.5g} / {figures[1]:.5g} |"
    )


def main(pairs: int, threads: int, samples: int, dimension: int, out: Path | None) -> None:
    """Run the races, print the table, and write it to ``out``."""
    torch.set_num_threads(threads)
    lines = [
        "# Speed of the metrics",
        "",
        f"`python -m benchmarks.metrics --pairs {pairs} --threads {threads} --samples {samples} --dimension "
        f"{dimension}`: {platform.machine()}, PyTorch {torch.__version__}. Two sets of so many features; ratios of "
        "paired calls in one run, below 1: ours is faster.",
        "",
        HEAD,
    ]
    for race in races(samples, dimension):
        lines.append(row(race, pairs))
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    if out is not None:
        out.write_text(text, encoding="utf-8")
        Console().print(f"wrote {out}", markup=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    given = parser.parse_args()
    main(given.pairs, given.threads, given.samples, given.dimension, given.out)
