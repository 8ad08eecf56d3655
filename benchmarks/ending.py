"""How a benchmark ends: its report printed and written, a user's mistake told in one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from videodiff.errors import UserError


def publish(lines: Sequence[str], out: Path | None) -> None:
    """Print a report and write it to `out`, where one is named; missing folders are made."""
    text = "\n".join(lines) + "\n"
    Console().print(text, markup=False, soft_wrap=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """End the program with the one line of a UserError in place of a traceback."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
