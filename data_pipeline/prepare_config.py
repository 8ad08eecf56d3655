"""The configuration of `videodiff data prepare`, as it lies in the folder that it makes."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from data_pipeline.filters import Filters
from data_pipeline.scenes import ClipConfig, ScenesConfig
from data_pipeline.source import SourcesConfig
from videodiff import config as configs
from videodiff.config import Config, operational
from videodiff.errors import UserError

CONFIG = "prepare.yaml"


class ScoresConfig(Config):
    """Public weights that lie in local files, for the measures clip_similarity and aesthetic of the first frame."""

    name: str  # open_clip's name of the architecture, such as ViT-L-14
    path: str  # .safetensors, or a checkpoint that torch.load reads with weights_only
    aesthetic: str | None = None  # .safetensors of LAION's predictor for that architecture
    device: str = operational("cpu")


class PrepareConfig(Config):
    """All of `videodiff data prepare`; each part is explained where it is defined."""

    sources: SourcesConfig = SourcesConfig()
    scenes: ScenesConfig | None = ScenesConfig()  # null: a source is one scene
    clip: ClipConfig = ClipConfig()
    scores: ScoresConfig | None = None
    filters: Filters = Filters()
    exclude: str | None = None  # a file with a clip's key, a source's key or its name in each line
    shard_mb: float = Field(256.0, gt=0)  # millions of bytes of a shard, about
    strip: int = Field(64, ge=0, le=512)  # height in pixels of the report's pictures; 0 for none
    workers: int | None = operational(None, ge=0)  # helper processes, one per core by default; 0 knows no deadlines
    video_seconds: float = operational(300.0, gt=0)  # the deadline for looking at a video, for each frame of it anew
    clip_seconds: float = operational(60.0, gt=0)  # and for cutting one clip

    @field_validator("exclude")
    @classmethod
    def _wherever_it_is_read(cls, exclude: str | None) -> str | None:
        """`data filter` and `data merge` read the list again, perhaps from another directory."""
        return exclude and os.path.abspath(exclude)

    @model_validator(mode="after")
    def _check(self) -> PrepareConfig:
        if self.filters.clip_similarity and self.scores is None:
            raise ValueError("filters.clip_similarity needs scores; name an open_clip model and its weights there")
        if self.filters.aesthetic and (self.scores is None or self.scores.aesthetic is None):
            raise ValueError("filters.aesthetic needs scores.aesthetic; name a file there")
        return self


def load_config(out: Path) -> PrepareConfig:
    """The configuration with which ``out`` was made."""
    if not (out / CONFIG).is_file():
        raise UserError(f"{out}: was not made by `videodiff data prepare` (there is no {CONFIG}); check the path")
    return configs.load(PrepareConfig, out / CONFIG)
