"""The one progress bar of everything that makes or checks shards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def bar(show: bool, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar, and the function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
