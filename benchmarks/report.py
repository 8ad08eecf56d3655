"""A benchmark's report: printed, and written where the user asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console


def publish(lines: Sequence[str], out: Path | None) -> None:
    """Print a report and write it to `out`, where one is named; missing folders are made."""
    text = "\n".join(lines) + "\n"
    Console().print(text, markup=False, soft_wrap=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
