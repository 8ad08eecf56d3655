"""Decoding in helper processes with a deadline: a clip that hangs or crashes its decoder costs that clip only.

A helper is a fresh interpreter (no fork: threads of training libraries do not survive one; no re-import of the main
script), fed over a socket; frames come back through memory that both see. It ignores signals meant for the training
process and ends when its socket closes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from data_pipeline.decoders import ClipError
from data_pipeline.shared_bytes import SharedBytes, anonymous_file
from videodiff.errors import UserError

DECODER = "data_pipeline.clips:decode_clip"
_START_SECONDS = 180.0  # importing from a busy network disk takes its time
Item = TypeVar("Item")
_MAIN = "import sys; sys.path[:] = {path!r}; from data_pipeline.decoding import serve; serve({fds}, {function!r})"


class DecodePool:
    """``workers`` helper processes that call ``function`` ("module:name", keyword arguments in, a result out).

    With ``workers`` = 0 the call happens in this process, without a deadline. Close it, or use it in a ``with``.
    """

    def __init__(self, workers: int, deadline_seconds: float, function: str = DECODER) -> None:
        self._deadline, self._function = deadline_seconds, function
        self._helpers = [_Helper(function) for _ in range(workers)]
        self._closed = False

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all helpers; may be called from another thread than the one in :meth:`map`, which then ends at once."""
        self._closed = True
        for helper in self._helpers:
            helper.kill()

    def map(self, jobs: Iterable[dict[str, Any] | None], deadline_seconds: float | None = None) -> Iterator[Any]:
        """The results of all jobs in the order of the jobs; a job None gives None. A failed clip is a ClipError, not
        raised. ``deadline_seconds`` may replace the pool's own.

        Besides the decoder's own, the reasons are "deadline" (killed after deadline_seconds, since its start or since
        it was last `alive`) and "crash" (its helper died).
        """
        deadline = deadline_seconds or self._deadline
        if not self._helpers:
            function = _resolve(self._function)
            for job in jobs:
                if self._closed:
                    return
                yield None if job is None else _call(function, job)
            return
        source = enumerate(jobs)
        results: dict[int, Any] = {}
        ready: deque[tuple[int, dict[str, Any]]] = deque()
        ahead = 4 * len(self._helpers)  # bounds the results that wait behind a slow clip
        next_out, next_in, more = 0, 0, True
        while more or next_out < next_in:
            while more and next_in - next_out < ahead:
                item = next(source, None)
                if item is None:
                    more = False
                    break
                next_in += 1
                if item[1] is None:
                    results[item[0]] = None
                else:
                    ready.append((item[0], item[1]))
            self._work(ready, results, deadline, idle=next_out in results or next_out >= next_in)
            if self._closed:
                return
            while next_out in results:
                yield results.pop(next_out)
                next_out += 1

    def _work(
        self, ready: deque[tuple[int, dict[str, Any]]], results: dict[int, Any], deadline: float, idle: bool
    ) -> None:
        """Hand out what is ready, then take in what is done, waiting for something unless ``idle``.

        Who is done gets the next job at once: what is made of its result may take a while.
        """
        self._hand_out(ready, deadline)
        if not ready and all(helper.number is None for helper in self._helpers):
            return
        awaited = [helper for helper in self._helpers if helper.number is not None or not helper.up]
        patience = max(0.0, min(helper.until for helper in awaited) - time.monotonic())
        done = wait([helper.connection for helper in awaited], 0 if idle else patience)
        if self._closed:  # that is what ended them
            return
        for index, helper in enumerate(self._helpers):
            if helper not in awaited:
                continue
            if helper.connection in done:
                result = helper.receive()
                if result is None:  # it has only told that it is up, or alive
                    continue
            elif time.monotonic() >= helper.until:
                if not helper.up:
                    seconds = f"{_START_SECONDS:.0f} s"
                    raise UserError(f"a decoding helper did not start in {seconds}; try data.workers=0 to see why")
                result = ClipError("deadline", f"not decoded in {deadline:g} s")
            else:
                continue
            assert helper.number is not None
            results[helper.number], helper.number = result, None
            if isinstance(result, ClipError) and result.reason in ("deadline", "crash"):
                helper.kill()
                if self._closed:
                    return
                self._helpers[index] = _Helper(self._function)
        self._hand_out(ready, deadline)

    def _hand_out(self, ready: deque[tuple[int, dict[str, Any]]], deadline: float) -> None:
        """A helper that is still starting gets no job: nobody might ever read it, and to send it could wait for
        ever."""
        for helper in self._helpers:
            if ready and helper.up and helper.number is None:
                helper.send(*ready.popleft(), deadline)


class _Helper:
    """One process, and the job it has."""

    def __init__(self, function: str) -> None:
        ours, theirs = socket.socketpair()
        self._shared = SharedBytes(anonymous_file())
        fds = (theirs.fileno(), self._shared.descriptor)
        main = _MAIN.format(path=sys.path, fds=fds, function=function)
        # One thread in each library: the helpers themselves are the parallelism.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        # A killed one can't tidy up what it was writing.
        self._folder = tempfile.TemporaryDirectory(prefix="videodiff-", ignore_cleanup_errors=True)
        environment["TMPDIR"] = self._folder.name
        self._process = subprocess.Popen(
            [sys.executable, "-c", main],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        theirs.close()
        self.connection = Connection(ours.detach())
        self.up = False
        self.number: int | None = None
        self._deadline = _START_SECONDS
        self.until = time.monotonic() + _START_SECONDS

    def send(self, number: int, job: dict[str, Any], deadline: float) -> None:
        self.number, self._deadline = number, deadline
        self.until = time.monotonic() + deadline
        with contextlib.suppress(OSError):  # it died between two jobs: receive() will find its socket closed
            self.connection.send(job)

    def receive(self) -> Any:
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            if not self.up:
                raise UserError(f"a decoding helper cannot start (exit status {code}); its message is above") from None
            return ClipError("crash", f"the decoder ended with status {code}")
        if message == "up":
            self.up = True
            return None
        if message == "alive":
            self.until = time.monotonic() + self._deadline
            return None
        if isinstance(message, UserError):
            raise message
        return self._shared.take(message)

    def kill(self) -> None:
        # Its connection closes with the object: another thread may be waiting on it just now, and wakes up by this.
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


_to_pool: Connection | None = None  # in a helper, where its results go


def alive(items: Iterable[Item]) -> Iterator[Item]:
    """Those items, of each of which the pool hears in which this is done: a job's deadline begins anew (at most once a
    second)."""
    told = time.monotonic()
    for item in items:
        if _to_pool is not None and time.monotonic() - told > 1:
            told = time.monotonic()
            _to_pool.send("alive")
        yield item


def serve(descriptors: tuple[int, int], function_name: str) -> None:
    """The life of a helper: one job in, one result out, until the socket closes."""
    # Sent to the whole job at its end or preemption: the training process decides what happens, and closes the socket.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    global _to_pool
    function = _resolve(function_name)
    connection = _to_pool = Connection(descriptors[0])
    shared = SharedBytes(descriptors[1])
    with contextlib.suppress(EOFError, OSError):
        connection.send("up")
        while True:
            job = connection.recv()
            try:
                result: Any = _call(function, job)
            except UserError as error:
                result = error
            try:
                answer = shared.put(result)
            except OSError as error:  # not the clip's fault, which must not be noted as bad
                answer = UserError(
                    f"a decoding helper has no memory to hand over what it made ({error.strerror or error}); free "
                    "some, raise the limit (ulimit -f, the job's memory), or use fewer data.workers"
                )
            connection.send(answer)


def _call(function: Callable[..., Any], job: dict[str, Any]) -> Any:
    try:
        return function(**job)
    except ClipError as error:
        return error


def _resolve(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function
