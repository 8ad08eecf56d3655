"""What an evaluation has finished, on disk: a line of JSON for each sample, a file of features for each batch.

A killed evaluation goes on where it stopped, and several ranks share one folder: each writes files of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from stages.evaluation.questions import Prompt
from videodiff.errors import UserError
from videodiff.tensor_files import save_file
from videodiff.video_io import atomic_path

NEWLINE = b"\n"


class Samples:
    """The finished prompts of a folder: `samples.jsonl`, the protocol and then a line for each prompt, and beside it
    `samples-R.jsonl` of each further rank R. A rank writes into its own file alone and reads all of them."""

    def __init__(self, out: Path, protocol: dict[str, Any], rank: int = 0) -> None:
        self.path = out / ("samples.jsonl" if rank == 0 else f"samples-{rank}.jsonl")
        self.found: dict[tuple[str, int], dict[str, Any]] = {}
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.read(protocol)
            whole = self._read(self.path, protocol) if self.path.is_file() else 0
            if not whole:
                self.path.write_text(json.dumps({"protocol": protocol}) + "\n", encoding="utf-8")
            elif whole < self.path.stat().st_size:  # a line that a crash tore
                os.truncate(self.path, whole)
        except OSError as error:
            raise UserError(f"{out}: can't be written ({error.strerror}); name another folder with --out") from None

    def read(self, protocol: dict[str, Any]) -> None:
        """Take in what all ranks finished so far."""
        for path in sorted(self.path.parent.glob("samples*.jsonl")):
            self._read(path, protocol)

    def _read(self, path: Path, protocol: dict[str, Any]) -> int:
        """How many bytes of a file are whole lines, taken into `found`; UserError when they were made by another
        protocol."""
        whole = 0
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(NEWLINE):
                break
            try:
                value = json.loads(line)
                if number > 1:
                    self.found[(value["split"], value["number"])] = value
                else:
                    self._check(path, value["protocol"], protocol)
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, UserError):
                    raise
                what = f"line {number} is not one that evaluate wrote"
                raise UserError(f"{path}: {what}; remove the file or name another folder with --out") from None
            whole += len(line)
        return whole

    def _check(self, path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
        differing = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        if differing:
            raise UserError(
                f"{path}: holds samples of another evaluation (differs in {', '.join(differing)}); "
                "name another folder with --out, or remove this one"
            )

    def keep(self, sample: dict[str, Any]) -> None:
        """Add a finished sample, on disk before this returns."""
        key = (sample["split"], sample["number"])
        if key in self.found:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(sample) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.found[key] = sample


def read_samples(out: Path) -> tuple[dict[str, Any], dict[tuple[str, int], dict[str, Any]]]:
    """The protocol of an evaluation's folder and its samples by (split, number); UserError where there is none."""
    protocol: dict[str, Any] = {}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    try:
        for path in sorted(out.glob("samples*.jsonl")):
            whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(NEWLINE)]
            if whole:  # a rank that died at once left an empty file
                first, *lines = map(json.loads, whole)
                protocol = first["protocol"]
                found |= {(line["split"], line["number"]): line for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out}: its samples can't be read ({error}); evaluate again into another folder") from None
    if not found:
        raise UserError(f"{out}: holds no samples of an evaluation; name the folder of `videodiff evaluate --out`")
    return protocol, dict(sorted(found.items()))


def protocol_of(out: Path) -> dict[str, Any] | None:
    """What the samples of a folder were judged by; None where there are none."""
    try:
        with open(out / "samples.jsonl", encoding="utf-8") as file:
            return json.loads(file.readline())["protocol"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def without_model(protocol: dict[str, Any], own_tower: bool) -> dict[str, Any]:
    """A protocol without what tells the model alone. own_tower: the text tower that judges is the model's own and may
    be another one too."""
    told = {name: value for name, value in protocol.items() if name not in ("model", "weights")}
    if own_tower:
        bundled = [{**judge, "sha256": None} if judge["kind"] == "bundled" else judge for judge in told["features"]]
        told["features"] = bundled
    return told


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Every place at which two trees of JSON differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            yield from differences(one.get(key), other.get(key), f"{where}.{key}" if where else key)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{where}.{i}")
    elif one != other:
        yield f"{where}: {_short(one)} and {_short(other)}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def digest_of(protocol: dict[str, Any]) -> str:
    """A short name of a protocol."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]


class FeatureFiles:
    """`features/batch-NNNNNN.safetensors` of a folder: what the extractors made of a batch of prompts, and by which
    protocol. Files of another one count as not there."""

    def __init__(self, out: Path, protocol: dict[str, Any]) -> None:
        self.folder, self.digest = out / "features", digest_of(protocol)

    def has(self, batch: int) -> bool:
        return self._told(self._path(batch)) is not None

    def keep(self, batch: int, prompts: Sequence[Prompt], features: Mapping[str, Tensor]) -> None:
        """Written beside, seen to the disk and renamed: it is whole, or not there. OSError names a full disk."""
        path = self._path(batch)
        asked = json.dumps([[prompt.split, prompt.number] for prompt in prompts])
        write_tensors(path, features, {"prompts": asked, "protocol": self.digest})

    def of_split(self, split: str) -> tuple[list[int], dict[str, Tensor]]:
        """The numbers of a split's samples, and name -> their features [N, ...]; what not all batches have is left out.

        Raises UserError for a file that can't be read.
        """
        numbers: list[int] = []
        parts: list[dict[str, Tensor]] = []
        for path in sorted(self.folder.glob("batch-*.safetensors")):
            asked = self._told(path) or []
            chosen = [i for i, (of, _) in enumerate(asked) if of == split]
            if chosen:
                numbers += [int(asked[i][1]) for i in chosen]
                parts.append({name: value[chosen] for name, value in read_tensors(path).items()})
        names = set.intersection(*map(set, parts)) if parts else set()
        return numbers, {name: torch.cat([part[name] for part in parts]) for name in sorted(names)}

    def _path(self, batch: int) -> Path:
        return self.folder / f"batch-{batch:06d}.safetensors"

    def _told(self, path: Path) -> list[list[Any]] | None:
        """[split, number] of each of its samples; None for a file that is not there, torn, or of another protocol."""
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata()
            return json.loads(told["prompts"]) if told["protocol"] == self.digest else None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; UserError where it can't be read."""
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        raise UserError(f"{path}: not readable; remove it and give the same command again") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], told: dict[str, str]) -> None:
    """Write tensors with words about them, whole or not at all; OSError where the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as draft:
        save_file({name: value.contiguous() for name, value in tensors.items()}, draft, told)
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
