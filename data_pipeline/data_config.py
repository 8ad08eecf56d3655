"""Which clips a stage sees, and in what batches."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from data_pipeline.index import Shape
from videodiff.config import Config, operational
from videodiff.errors import UserError


class Mixed(Config):
    """One data set of several. Its weight over the sum of all weights is its share of the samples drawn."""

    shards: str
    weight: float = Field(1.0, gt=0)


class Bucket(Config):
    """Clips that stack: `frames` frames (1 for images) of `height` x `width` pixels."""

    frames: int = Field(ge=1)
    height: int = Field(ge=8)
    width: int = Field(ge=8)

    def takes(self, shape: Shape | None, fps: float) -> tuple[bool, int, float]:
        """How well a sample fits, larger is better: whether it is long enough, how much is kept, how near its aspect.

        A sample of unknown shape fits all alike.
        """
        if shape is None:
            return True, 0, 0.0
        long_enough = self.frames <= shape.frames_at(fps)
        off = abs(math.log(shape.width * self.height / (shape.height * self.width)))
        return long_enough, self.frames if long_enough else -self.frames, -off


class DataConfig(Config):
    """Which clips a stage sees, and in what batches."""

    # A folder of shards, an index.json, a tar, or a {000..012} or * pattern, local or at an http(s) or s3 URL;
    # or several data sets, [{shards: ..., weight: 2}, ...].
    shards: str | tuple[Mixed, ...] = Field(min_length=1)
    batch_size: int = Field(ge=1)  # of the whole run: over all ranks and accumulated micro-batches
    frames: int = Field(ge=1)  # 1 for images: a random frame of each clip
    fps: float = Field(gt=0)  # of the clip as the network sees it
    size: int = Field(ge=8)  # pixels, square
    # In place of frames and size: each sample goes into the longest that it fills, of these the nearest aspect ratio.
    buckets: tuple[Bucket, ...] = ()
    crop: Literal["centre", "random"] = "centre"  # what is kept where the aspect ratio is another one
    flip: bool = False  # every other sample is mirrored; not for captions that tell left from right
    label: str | None = None  # a field of each sample's JSON that goes with it, e.g. scene.shape
    streams: int = Field(64, ge=1)  # a multiple of the number of ranks that a run begins on, best of every later one
    workers: int = operational(2, ge=0)  # helpers of each rank; 0 decodes in the training process, without a deadline
    deadline_seconds: float = operational(30.0, gt=0)  # for one clip
    cache_gib: float = operational(2.0, ge=0)  # decoded clips kept in the memory of each rank
    prefetch: int = operational(2, ge=0)  # micro-batches made ahead
    bad_limit: float = operational(0.01, ge=0, le=1)  # the run stops beyond this share of bad clips ...
    bad_floor: int = operational(10, ge=0)  # ... once there are more than this many

    def data_sets(self) -> list[Mixed]:
        """What `shards` names, each with its weight."""
        return [Mixed(shards=self.shards)] if isinstance(self.shards, str) else list(self.shards)

    def check_ranks(self, world: int) -> None:
        """Raises UserError where a run should not begin on so many ranks. One that has begun may go on with any number:
        it gets the same samples, but where the streams don't divide by it each rank reads in all shards."""
        if self.streams % world:
            raise UserError(
                f"data.streams={self.streams} is not a multiple of {world} ranks, each of which would have to read in "
                f"all shards; set data.streams={self.streams - self.streams % world + world}, or take another number "
                "of ranks"
            )
