"""Training state that any number of ranks can read: each rank writes the parts that it holds, named, in one file.

ZeRO gives a rank arbitrary ranges of arbitrary parameters. Here every range carries its name and its place, so that a
reader asks for the values it wants and gets them from whichever files have them: another number of ranks, another ZeRO
stage need no conversion. safetensors only: nothing is unpickled.

Shapes: all parts are flat fp32 ranges of a flattened parameter.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from videodiff.errors import UserError

PATTERN = "rank-*.safetensors"


@dataclass(frozen=True)
class Part:
    """Values [n] of the flattened parameter `name` from `start` on; `kind` says of what (its weights, a moment ...)."""

    kind: str
    name: str
    start: int
    values: Tensor


def write(folder: Path, rank: int, parts: Iterable[Part], counters: Mapping[str, float]) -> None:
    """Write a rank's file into `folder`. counters: numbers of the whole state, equal on all ranks."""
    tensors = {f"{part.kind}|{part.start}|{part.name}": part.values.detach().cpu().contiguous() for part in parts}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank:05d}.safetensors"
    save_file(tensors, path, {"counters": json.dumps(dict(counters))})
    with open(path, "rb") as file:  # the one that wrote it hears of a disk that failed later; another machine would not
        os.fsync(file.fileno())


class Fragments:
    """The state in a folder. Raises UserError when there is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = sorted(folder.glob(PATTERN))
        if not paths:
            raise UserError(f"{folder}: no state of training ({PATTERN}) lies here; start a new run.dir")
        self._files = [safe_open(path, "pt") for path in paths]
        self.counters: dict[str, float] = json.loads(self._files[0].metadata()["counters"])
        self._held: dict[tuple[str, str], list[tuple[int, int, int, str]]] = {}
        for index, file in enumerate(self._files):
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                kind, start, name = key.split("|", 2)
                length = file.get_slice(key).get_shape()[0]
                self._held.setdefault((kind, name), []).append((int(start), length, index, key))
        for held in self._held.values():
            held.sort()

    @property
    def contents(self) -> list[tuple[str, str]]:
        """All (kind, name)."""
        return sorted(self._held)

    def __len__(self) -> int:
        """The number of files."""
        return len(self._files)

    def size(self, kind: str, name: str) -> int:
        """The number of values that are there; 0 for an unknown name."""
        return sum(length for _, length, *_ in self._held.get((kind, name), []))

    def check(self, kind: str, shapes: Mapping[str, torch.Size]) -> None:
        """Refuse (UserError) a state of other parameters than these."""
        theirs = {name for held, name in self._held if held == kind}
        for name, words in (
            *((name, "is not in it") for name in sorted(shapes.keys() - theirs)),
            *((name, "is of a network with more parameters") for name in sorted(theirs - shapes.keys())),
            *(
                (name, f"has {self.size(kind, name)} values there, {shape.numel()} here")
                for name, shape in sorted(shapes.items())
                if name in theirs and self.size(kind, name) != shape.numel()
            ),
        ):
            raise UserError(f"{self.folder}: another network's state, {name} {words}; name a new run.dir")

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Values [length] from `start` on. Raises UserError when some are missing."""
        values = torch.full((length,), math.nan)
        missing = length
        for first, held, index, key in self._held.get((kind, name), []):
            begin, end = max(first, start), min(first + held, start + length)
            if begin < end:
                values[begin - start : end - start] = self._files[index].get_slice(key)[begin - first : end - first]
                missing -= end - begin
        if missing:
            raise UserError(f"{self.folder}: {missing} values of {kind} {name} are missing; use an earlier checkpoint")
        return values


def reshape(source: Path, target: Path, num_files: int) -> None:
    """Write the state of folder `source` as `num_files` files of about equal size into `target`."""
    state = Fragments(source)
    for index in range(num_files):
        parts = []
        for kind, name in state.contents:
            size = state.size(kind, name)
            begin, end = (size * i // num_files for i in (index, index + 1))
            if begin < end:
                parts.append(Part(kind, name, begin, state.read(kind, name, begin, end - begin)))
        write(target, index, parts, state.counters)
