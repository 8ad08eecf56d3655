"""SIGINT, SIGTERM and SIGUSR1 (a cluster's warning): the step is finished and saved before the process goes."""

import os
import signal
import threading
import time
from typing import Any


class Signals:
    """SIGINT, SIGTERM and SIGUSR1 while the loop runs: remembered, answered when the step is finished."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.got: int = 0
        self._first = 0.0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals there alone
            self._before = {number: signal.signal(number, self._handle) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # a forked helper process inherits the handler; it has nothing to save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        # A second Ctrl-C means now. Not within two seconds: torchrun passes on what the terminal has already sent.
        if number == signal.SIGINT and self.got and time.monotonic() - self._first > 2:
            raise KeyboardInterrupt
        if not self.got:
            self.got, self._first = number, time.monotonic()
