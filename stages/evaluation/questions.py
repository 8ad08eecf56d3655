"""What a model is asked: prompts with a real clip each, of the built-in world or of a data set's shards.

The built-in world knows the truth, so that a reader can tell what is right; of other data there are captions and clips.
S frame side in pixels.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from data_pipeline.decoders import ClipError
from data_pipeline.decoding import DecodePool
from data_pipeline.index import fingerprint, open_shards
from data_pipeline.samples import SampleError, read_texts, try_sample
from data_pipeline.world import EDITION, Combination, rng
from data_pipeline.world_two import TwoCombination
from stages.evaluation.worlds import WORLD_SPLITS, planned, rendered, told_in
from videodiff.errors import UserError
from videodiff.video_io import encode_video, read_video

DEADLINE_SECONDS = 60.0  # to decode a clip
Split = Literal["train", "held_out", "held_out_pair", "data"]


@dataclass(frozen=True)
class Prompt:
    """Prompt `number` of a split; `turn` counts how often its words came before. combination: what it says, where the
    built-in world knows it. place: which sample of the data set it is of."""

    split: Split
    number: int
    turn: int
    combination: Combination | TwoCombination | None
    text: str
    place: int = -1


@dataclass(frozen=True)
class Clips:
    """The real clips that are wanted: `count` frames of `size` x `size` pixels at `fps`."""

    size: int
    count: int
    fps: float


class Decoder:
    """Decodes one clip after another, in a helper that starts with the first one and has a deadline for each."""

    def __init__(self) -> None:
        self._pool: DecodePool | None = None

    def frames(self, video: bytes, suffix: str, clips: Clips, **more: Any) -> np.ndarray:
        """Frames uint8 [count,S,S,3]; more: what else `data_pipeline.clips.decode_clip` takes. Raises ClipError."""
        job = {
            "video": video, "suffix": suffix, "fps": clips.fps, "frames": clips.count, "size": clips.size, **more,
        }  # fmt: skip
        if self._pool is None:
            self._pool = DecodePool(1, DEADLINE_SECONDS)
        (found,) = self._pool.map([job])
        if isinstance(found, ClipError):
            raise found
        return found.frames

    def close(self) -> None:
        """End the helper."""
        if self._pool is not None:
            self._pool.close()


class Questions(Protocol):
    """Prompts, and the real clip of each."""

    prompts: Sequence[Prompt]
    problems: Sequence[str]  # why samples can't be asked about, a reason for each

    def identity(self) -> dict[str, Any]:
        """What they follow from, as JSON: figures of unequal questions can't be compared."""

    def clip(self, prompt: Prompt, clips: Clips) -> np.ndarray:
        """Frames uint8 [count,S,S,3]. Raises ClipError when there are none."""

    def close(self) -> None:
        """End what reads them."""


class WorldQuestions:
    """Prompts on seen and on held-out combinations of the built-in world; no clip of it is among the training data."""

    def __init__(self, num: int, num_held_out: int, seed: int, objects: int = 1) -> None:
        """`num` prompts on seen combinations, `num_held_out` on each held-out split; of one object no more than one for
        each combination that it has. UserError for a world that isn't there."""
        if objects not in (1, 2):
            raise UserError(f"objects is {objects}; the built-in world has clips with 1 or 2")
        self.num, self.num_held_out, self.seed, self.objects = num, num_held_out, seed, objects
        self.prompts = planned_prompts(num, num_held_out, seed, objects)
        self.problems: list[str] = []

    def identity(self) -> dict[str, Any]:
        asked = [[prompt.text, asdict(prompt.combination)] for prompt in self.prompts if prompt.combination is not None]
        told = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        world = "built-in world" if self.objects == 1 else "built-in world of two objects"
        return {
            "data": f"{world}, edition {EDITION}", "prompts": told, "num_prompts": self.num,
            "num_held_out": self.num_held_out,
        }  # fmt: skip

    def clip(self, prompt: Prompt, clips: Clips) -> np.ndarray:
        """Rendered, and as the training data are."""
        assert prompt.combination is not None
        key = ("evaluation", self.seed, prompt.split, prompt.number)
        return stored(rendered(prompt.combination, clips.size, clips.count, clips.fps, *key), clips.fps)

    def close(self) -> None:
        """Nothing is open."""


def stored(frames: np.ndarray, fps: float) -> np.ndarray:
    """Frames [T,H,W,3] as an mp4 gives them back, colours at half the size: no stage has seen sharper ones."""
    with tempfile.TemporaryDirectory(prefix="videodiff-") as folder:
        path = Path(folder) / "clip.mp4"
        path.write_bytes(encode_video(frames, fps))
        return read_video(path)[0]


class ShardQuestions:
    """The first captions of `num` samples of shards, drawn by `seed`, and their clips from their beginning on."""

    def __init__(
        self, location: str, num: int, seed: int, at_most: bool = False, option: Literal["data", "training"] = "data"
    ) -> None:
        """at_most: fewer will do. option: which one named the shards. Raises UserError for encoded shards, too few
        samples, and none with a caption."""
        self._decoder = Decoder()
        self._shards = open_shards(location)
        if any(shard.encoding for shard in self._shards):
            raise UserError(f"--{option} {location}: these shards hold latents; name those of the videos")
        self._places = [(shard, number) for shard in self._shards for number in range(len(shard.offsets))]
        if len(self._places) < num and not at_most:
            raise UserError(
                f"--data {location}: holds {len(self._places)} samples, --num-prompts {num} are asked; ask for fewer"
            )
        self.problems: list[str] = []
        self.prompts = list(self._planned(num, rng("questions", seed).permutation(len(self._places)).tolist()))
        if len({type(prompt.combination) for prompt in self.prompts if prompt.combination is not None}) > 1:
            raise UserError(
                f"--{option} {location}: some samples are of the built-in world with one object, others of that with "
                "two, which are read otherwise; judge them apart"
            )
        if not self.prompts:
            reason = self.problems[0] if self.problems else "there is none"
            raise UserError(f"--{option} {location}: no sample can be asked about ({reason}); see data check")
        if len(self.prompts) < num and not at_most:
            raise UserError(
                f"--data {location}: {len(self.prompts)} samples can be asked about, --num-prompts {num} are asked "
                f"({len(self.problems)} others can't, the first: {self.problems[0]}); ask for fewer"
            )

    def _planned(self, num: int, order: list[int]) -> list[Prompt]:
        found: list[Prompt] = []
        turns: dict[str, int] = {}
        for place in order:
            if len(found) == num:
                break
            try:
                sample = read_texts(*self._places[place])
            except SampleError as error:
                self.problems.append(error.reason)
                continue
            text = sample.captions[0]
            turns[text] = turns.get(text, -1) + 1
            found.append(Prompt("data", len(found), turns[text], told_in(sample.meta.get("scene")), text, place))
        return found

    def identity(self) -> dict[str, Any]:
        return {"data": fingerprint(self._shards), "num_prompts": len(self.prompts), "num_held_out": 0}

    def clip(self, prompt: Prompt, clips: Clips) -> np.ndarray:
        shard, number = self._places[prompt.place]
        raw = try_sample(shard, number)
        if isinstance(raw, SampleError):
            raise ClipError(raw.reason, str(raw))
        return self._decoder.frames(raw.video, raw.suffix, clips)

    def close(self) -> None:
        self._decoder.close()


def planned_prompts(num: int, num_held_out: int, seed: int, objects: int = 1) -> list[Prompt]:
    """`num` prompts on seen combinations, `num_held_out` on each held-out split; of one object no more than one for
    each combination that it has."""
    return [
        Prompt(which, number, turn, combination, text)
        for which in WORLD_SPLITS
        for number, (turn, combination, text) in enumerate(
            planned(objects, which, num if which == "train" else num_held_out, seed)
        )
    ]
