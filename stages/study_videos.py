"""Two folders of `videodiff generate` become pairs of clips that show as little as can be of where they come from.

A video is known by the side-car JSON beside it. Of another system's, {"options": {"prompt": "..."}} is enough; its seed
and its sample are then 0.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from videodiff.errors import UserError
from videodiff.video_io import Frames, read_video

Key = tuple[str, int, int]  # prompt, seed, sample


@dataclass(frozen=True)
class Video:
    """One mp4 and what its side-car says. model: its name and the beginning of its sha256, where that is told."""

    path: Path
    prompt: str
    seed: int
    sample: int
    model: str

    @property
    def key(self) -> Key:
        return self.prompt, self.seed, self.sample


@dataclass
class Folder:
    """The videos of a folder, and file names that gave none, by reason."""

    videos: dict[Key, Video] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, why: str, name: str) -> None:
        self.left_out.setdefault(why, []).append(name)


class Clip(NamedTuple):
    """Frames uint8 [T,H,W,3] and their rate in frames a second."""

    frames: Frames
    fps: float


def read_folder(folder: Path) -> Folder:
    """Every mp4 of a folder that has a side-car; UserError where there is none at all."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; name one that `videodiff generate --prompts` wrote")
    found = Folder()
    for sidecar in sorted(folder.glob("*.json")):
        video = _read_sidecar(sidecar)
        if video is None:
            found.leave_out("not a side-car of `videodiff generate`", sidecar.name)
        elif not video.path.is_file():
            found.leave_out("a side-car whose mp4 is missing", sidecar.name)
        elif video.key in found.videos:
            found.leave_out("of the same prompt, seed and sample as another", video.path.name)
        else:
            found.videos[video.key] = video
    for path in sorted(folder.glob("*.mp4")):
        if not path.with_suffix(".json").is_file():
            found.leave_out("an mp4 without a side-car", path.name)
    if not found.videos:
        raise UserError(
            f"{folder}: holds no mp4 with its side-car JSON; name a folder that `videodiff generate --prompts` wrote"
        )
    return found


def match(first: Folder, second: Folder, names: tuple[str, str]) -> list[tuple[Video, Video]]:
    """Pairs of equal prompt, seed and sample, in order of these; the others are noted as left out of their folder.

    Raises UserError where nothing matches. names: what the folders are called in it.
    """
    both = first.videos.keys() & second.videos.keys()
    if not both:
        shared = {key[0] for key in first.videos} & {key[0] for key in second.videos}
        why = f"{len(shared)} prompts are in both, but none with the same seed and sample" if shared else "no prompt is"
        raise UserError(
            f"{names[0]} and {names[1]}: no video is of the same prompt, seed and sample in both ({why}); generate "
            "both from the same file of prompts"
        )
    for folder in (first, second):
        for key, video in folder.videos.items():
            if key not in both:
                folder.leave_out("without a partner of the same prompt, seed and sample", video.path.name)
    return [(first.videos[key], second.videos[key]) for key in sorted(both)]


def read_pair(first: Path, second: Path, as_made: bool) -> tuple[Clip, Clip, bool]:
    """Two videos as they are shown, and whether they differed in size, rate or length.

    as_made keeps such differences. Raises UserError for a file that can't be decoded.
    """
    one, other = (Clip(*read_video(path)) for path in (first, second))
    differ = one.frames.shape != other.frames.shape or abs(one.fps - other.fps) > 0.01
    if differ and not as_made:
        one, other = alike(one, other)
    return _even(one), _even(other), differ


def alike(one: Clip, other: Clip) -> tuple[Clip, Clip]:
    """Both with the smaller size, rate and length of the two; of unlike shapes only the middle square stays.

    So did Emu Video (2023) before raters compared systems: what differs in form tells them apart.
    """
    shapes = [clip.frames.shape[1:3] for clip in (one, other)]
    (height, width), (other_height, other_width) = shapes
    # 854x480 and 1280x720 are of one shape but for rounding.
    if abs(height * other_width / (width * other_height) - 1) > 0.01:
        sides = [min(shape) for shape in shapes]
        one, other = (Clip(_middle(c.frames, s, s), c.fps) for c, s in zip((one, other), sides, strict=True))
        size = min(sides), min(sides)
    else:
        size = min(shapes, key=lambda shape: shape[0] * shape[1])
    fps = min(one.fps, other.fps)
    seconds = min(len(clip.frames) / clip.fps for clip in (one, other))
    count = max(1, int(seconds * fps + 1e-6))
    return _reduced(one, size, fps, count), _reduced(other, size, fps, count)


def _reduced(clip: Clip, size: tuple[int, int], fps: float, count: int) -> Clip:
    """The frames that are on screen at `count` times of the lower rate, in the smaller size (Lanczos)."""
    from PIL import Image

    times = np.arange(count) / fps
    chosen = np.minimum((times * clip.fps + 1e-6).astype(int), len(clip.frames) - 1)
    frames = clip.frames[chosen]
    if frames.shape[1:3] != size:
        smaller = (size[1], size[0])
        frames = np.stack([np.asarray(Image.fromarray(f).resize(smaller, Image.Resampling.LANCZOS)) for f in frames])
    return Clip(frames, fps)


def _even(clip: Clip) -> Clip:
    """Without the last row or column of an odd size, which no player takes."""
    height, width = clip.frames.shape[1:3]
    return Clip(_middle(clip.frames, height - height % 2, width - width % 2), clip.fps)


def _middle(frames: Frames, height: int, width: int) -> Frames:
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return frames[:, top : top + height, left : left + width]


def _read_sidecar(path: Path) -> Video | None:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        options, model = told["options"], told.get("model") or {}
        prompt, seed, sample = options["prompt"], options.get("seed", 0), told.get("sample", 0)
        name = " ".join(filter(None, (str(model.get("name", "")), str(model.get("sha256", ""))[:12])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(prompt, str) or type(seed) is not int or type(sample) is not int:
        return None
    return Video(path.with_suffix(".mp4"), prompt, seed, sample, name)
