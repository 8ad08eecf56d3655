"""A decoder for tests of the helpers, in a module that they import in no time: its fate is written in its video."""

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.clips import Clip, ClipError
from data_pipeline.decoding import alive


def decode(**job: Any) -> Clip:
    """From b"word number", 4 frames of 8x8 pixels with the value `number`, unless the word says otherwise."""
    word, number = job["video"].decode().split()
    if word == "hang":
        time.sleep(600)
    if word == "die":
        os._exit(11)
    if word == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "bad":
        raise ClipError("too short", "in a test")
    if word == "alive":  # longer than a deadline of 2 s, but never so long without a word
        for _ in alive(range(4)):
            time.sleep(1.1)
    if word == "slow":
        time.sleep(0.2)
    return Clip(np.full((4, 8, 8, 3), int(number), np.uint8), 0, 4)


@dataclass(frozen=True)
class Arrays:
    """A result of any size."""

    first: np.ndarray
    second: np.ndarray | None
    name: str


def arrays(lengths: tuple[int, ...]) -> Arrays:
    """An array for each of one or two numbers, filled with its place."""
    made = [np.full((length, 3), 0.5 + place) for place, length in enumerate(lengths)]
    return Arrays(made[0], made[1] if len(made) > 1 else None, "a" * len(lengths))
