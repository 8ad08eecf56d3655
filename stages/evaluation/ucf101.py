"""The UCF-101 protocol (Soomro et al. 2012): so many videos of each class, zero-shot, against as many real ones.

Papers differ in all of it: sentences written for each class (Singer et al. 2022) or bare class names (Blattmann et al.
2023), how many videos of a class, their length, rate and size. So the protocol is told in the same line as the figures.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.decoders import ClipError
from data_pipeline.world import rng
from stages.evaluation.questions import Clips, Decoder, Prompt
from videodiff.errors import UserError
from videodiff.networks.features.extractor import told_apart

PREFIX = "ucf101:"  # of --data
CLASSES = 101
SUFFIXES = (".avi", ".mp4", ".mkv", ".webm")
ROWS = ("video_generated", "whole")  # whose figures the protocol tells


class UCF101Questions:
    """`num` prompts, as many of each class, by turns; the real clip of each is one of its class, none of them twice
    before all have been shown, from a place that follows from the seed. folder: that of the classes' folders.

    Raises UserError for a folder without classes, and a number that gives no equal number of each class.
    """

    def __init__(self, folder: Path, num: int, seed: int, sentences: Path | None = None) -> None:
        self._decoder = Decoder()
        self.problems: list[str] = []
        self._folder, self._seed = folder, seed
        self._videos = _videos_by_class(folder)
        self.classes = len(self._videos)
        self.per_class, left = divmod(num, self.classes)
        if left or not self.per_class:
            raise UserError(
                f"--num-prompts {num}: the {self.classes} classes of {folder} need a multiple of {self.classes}; "
                f"--num-prompts {100 * self.classes} makes 100 of each class"
            )
        self._sentences = None if sentences is None else _sentences(sentences, list(self._videos))
        self.prompts = [
            Prompt("data", turn * self.classes + place, turn, None, self._text(name), place)
            for turn in range(self.per_class)
            for place, name in enumerate(self._videos)
        ]

    def identity(self) -> dict[str, Any]:
        files = [f"{path.relative_to(self._folder)} {path.stat().st_size}" for v in self._videos.values() for path in v]
        return {
            "data": {"ucf101": hashlib.sha256("\n".join(files).encode()).hexdigest(), "classes": self.classes,
                     "per_class": self.per_class, "texts": self._sentences or "bare class names"},
            "num_prompts": len(self.prompts), "num_held_out": 0,
        }  # fmt: skip

    def clip(self, prompt: Prompt, clips: Clips) -> np.ndarray:
        name = list(self._videos)[prompt.place]
        videos = self._videos[name]
        order = rng("ucf101", self._seed, name, prompt.turn // len(videos)).permutation(len(videos))
        path = videos[int(order[prompt.turn % len(videos)])]
        position = float(rng("ucf101 position", self._seed, name, prompt.turn).random())
        try:
            return self._decoder.frames(path.read_bytes(), path.suffix.removeprefix("."), clips, position=position)
        except ClipError as error:
            raise ClipError(error.reason, f"{path.name}: {error}") from None

    def close(self) -> None:
        self._decoder.close()

    def _text(self, name: str) -> str:
        return bare_name(name) if self._sentences is None else self._sentences[name]


def bare_name(name: str) -> str:
    """ "ApplyEyeMakeup" -> "apply eye makeup", "YoYo" -> "yo yo"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower()


def protocol_line(protocol: dict[str, Any], figures: list[dict[str, Any]]) -> str | None:
    """Protocol, FVD and inception score in one line; None of another evaluation."""
    told = protocol["data"]
    if not isinstance(told, dict) or "ucf101" not in told:
        return None
    texts = told["texts"] if isinstance(told["texts"], str) else "sentences from a file"
    share = "" if told["classes"] == CLASSES else f" (NOT the data set's {CLASSES})"
    said = [
        f"UCF-101, zero-shot: {told['per_class']} clips of each of {told['classes']} classes{share}, {texts}, "
        f"{protocol['frames']} frames at {protocol['fps']:g} a second (whole: times {protocol['factor']}), "
        f"{protocol['size']}x{protocol['size']}, against as many real clips at the same size, rate and length"
    ]
    refused: list[str] = []
    for row in ROWS:
        for one in figures:
            if one["row"] != row or one["figure"] not in ("frechet", "inception_clips"):
                continue
            if not _sees_clips(protocol, one["features"]):
                continue
            if "value" not in one:
                refused.append(f"{row}: no figure by {one['features']} ({one['refused']})")
                continue
            name = "FVD" if one["figure"] == "frechet" else "IS"
            low, high = one["interval"]
            said.append(f"{row}: {name} {one['value']:.1f} ({low:.1f} to {high:.1f}, N {one['n']}, {one['features']})")
    if len(said) == 1:
        said += refused or ["no network for clips among --judges saw them: no FVD, no inception score"]
    return "; ".join(said)


def _sees_clips(protocol: dict[str, Any], name: str) -> bool:
    judges = protocol["features"]
    names = told_apart([told["name"] for told in judges])
    return any(other == name and told["takes"] == "clips" for other, told in zip(names, judges, strict=True))


def _videos_by_class(folder: Path) -> dict[str, list[Path]]:
    try:
        found = {
            entry.name: sorted(file for file in entry.iterdir() if file.suffix.lower() in SUFFIXES)
            for entry in sorted(folder.iterdir())
            if entry.is_dir()
        }
    except OSError as error:
        raise UserError(f"--data {PREFIX}{folder}: can't be read ({error.strerror})") from None
    found = {name: videos for name, videos in found.items() if videos}
    if not found:
        raise UserError(
            f"--data {PREFIX}{folder}: holds no folder of a class with videos; name UCF-101's own folder, which holds "
            "ApplyEyeMakeup and so on"
        )
    return found


def _sentences(path: Path, classes: list[str]) -> dict[str, str]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--sentences {path}: can't be read ({error})") from None
    if not isinstance(told, dict):
        raise UserError(f"--sentences {path}: is no object; write class: sentence, for each class")
    missing = [name for name in classes if not isinstance(told.get(name), str) or not told[name].strip()]
    if missing:
        raise UserError(f"--sentences {path}: no sentence for {missing[0]} and {len(missing) - 1} more classes")
    return {name: told[name] for name in classes}
