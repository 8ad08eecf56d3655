"""Words, tables and pictures of the report: every sentence about a result is made from its figures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

VERDICTS = {True: "**yes**", False: "**no**", None: "**not decided**"}


def table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def claim(paper: str, holds: bool | None, measured: str, differs: str = "") -> str:
    """What a paper says, whether it is seen here, by which figures; where not, in what this setting differs."""
    reason = f" What is different here: {differs}" if holds is not True and differs else ""
    return f"- {paper} Here: {VERDICTS[holds]} ({measured}).{reason}"


def all_of(answers: Sequence[bool | None]) -> bool | None:
    """No as soon as one is no; undecided as long as one is."""
    if any(answer is False for answer in answers):
        return False
    return None if any(answer is None for answer in answers) else True


def picture(name: str, text: str) -> str:
    return f"![{name.replace('-', ' ')}](core-results/{name}.png)\n\n*{text}*"


def wrapped(text: str) -> str:
    """Markdown with its paragraphs and list entries broken at the house's width."""

    def line(said: str) -> str:
        if said.startswith(("|", "!", "#")):
            return said
        indent = "  " if said.startswith("- ") else ""
        return textwrap.fill(said, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)

    return "\n".join(line(said) for said in text.split("\n"))


def axes(width: float = 5.5, height: float = 3.6) -> tuple[Figure, plt.Axes]:
    figure, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.grid(alpha=0.3)
    return figure, ax


def save(figure: Figure, folder: Path, name: str) -> None:
    # Without the program's version, equal results are equal files.
    figure.savefig(folder / f"{name}.png", dpi=90, metadata={"Software": None})
    plt.close(figure)


def save_grid(folder: Path, name: str, lines: Sequence[tuple[str, Tensor]]) -> None:
    """One named line of pictures each: [N, C, 1, H, W] in [-1, 1], C = 1 or 3."""
    height = len(lines) * 0.62
    figure, rows = plt.subplots(len(lines), 1, figsize=(8, height), layout="constrained", squeeze=False)
    for ax, (label, pictures) in zip(rows[:, 0], lines, strict=True):
        frames = torch.nn.functional.pad(pictures[:, :, 0], (1, 1, 1, 1), value=1)  # a white rim parts them
        strip = torch.cat(list(frames), dim=-1).permute(1, 2, 0)
        ax.imshow(((strip + 1) / 2).clamp(0, 1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        ax.set_xticks([])
        ax.set_yticks([])
        for side in ax.spines.values():
            side.set_visible(False)
    save(figure, folder, name)
