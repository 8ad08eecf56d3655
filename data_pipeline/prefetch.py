"""Work done ahead in threads."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def mapped(function: Callable[[Item], Result], items: Iterator[Item], threads: int) -> Iterator[Result]:
    """The function's results in the order of the items, made by so many threads (0: none), twice as many ahead. What
    the function raises is raised in its place."""
    if threads == 0:
        yield from map(function, items)
        return
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, "videodiff-read") as pool:
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def prefetched(items: Iterator[Item], depth: int, close: Callable[[], None]) -> Iterator[Item]:
    """The same items, up to ``depth`` of them made ahead in a thread, whose errors are raised here, in their place.

    ``close`` must make the thread's work end soon: it is called before waiting for it.
    """
    if depth == 0:
        yield from items
        return
    made: queue.Queue[tuple[Item] | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()

    def put(what: tuple[Item] | BaseException | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                made.put(what, timeout=0.1)
                return

    def make() -> None:
        try:
            for item in items:
                put((item,))
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # whatever it is, the consumer has to see it
            put(error)

    thread = threading.Thread(target=make, name="videodiff-data", daemon=True)
    thread.start()
    try:
        while (what := made.get()) is not None:
            if isinstance(what, BaseException):
                raise what
            yield what[0]
    finally:
        stop.set()
        close()
        thread.join()
