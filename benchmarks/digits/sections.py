"""The sections of the report, each measured by itself. Apart from the command: other processes can't import that."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.digits import ddim, ddpm, guidance, latents, solvers
from benchmarks.digits.bench import Bench
from benchmarks.digits.cache import Cache
from benchmarks.digits.report import wrapped
from benchmarks.digits.settings import Settings

SECTIONS = {
    "ddpm": ("DDPM: schedules, losses, likelihood", ddpm.run),
    "ddim": ("DDIM: few steps, inversion, interpolation", ddim.run),
    "guidance": ("Guidance: fidelity against diversity", guidance.run),
    "solvers": ("Solvers: quality against evaluations", solvers.run),
    "latents": ("Latent against pixel diffusion", latents.run),
}


# The networks of digits that a section asks for.
NEEDED = {
    "ddpm": ddpm.NAMES,
    "ddim": ("linear-simple",),
    "guidance": ("linear-simple", "linear-labelled"),
    "solvers": ("linear-simple",),
    "latents": (),
}


def network(name: str, settings: Settings, runs: Path, pictures: Path) -> None:
    """Train one network of digits."""
    Bench(settings, Cache(runs), pictures).denoiser(name)


def section(name: str, settings: Settings, runs: Path, pictures: Path) -> None:
    """Measure one section and keep its text."""
    title, run = SECTIONS[name]
    start = time.perf_counter()
    text = run(Bench(settings, Cache(runs), pictures))
    (runs / f"{name}.md").write_text(wrapped(f"## {title}\n\n{text}\n"), encoding="utf-8")
    print(f"{title}: {time.perf_counter() - start:.0f} s", flush=True)
