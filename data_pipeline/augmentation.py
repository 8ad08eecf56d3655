"""What a sample shows of its clip: window, crop and flip, drawn from (seed, purpose, number)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.clips import CENTRE, Clip
from data_pipeline.data_config import DataConfig
from videodiff.seeding import uniform


@dataclass(frozen=True)
class Augmentation:
    """position in [0,1): where the window starts; crop: which part is kept, see `data_pipeline.clips.fit`."""

    position: float
    crop: tuple[float, float] = CENTRE
    flip: bool = False

    @staticmethod
    def draw(config: DataConfig, seed: int, number: int) -> Augmentation:
        """That of a number of the run: a sample in an epoch."""
        crop = CENTRE
        if config.crop == "random":
            crop = uniform(seed, "crop down", number), uniform(seed, "crop across", number)
        flip = config.flip and uniform(seed, "flip", number) < 0.5
        return Augmentation(uniform(seed, "window", number), crop, flip)

    def cut(self, clip: Clip, frames: int) -> npt.NDArray[np.uint8]:
        """The window of so many frames, uint8 [T,H,W,3], of a clip that was decoded with this crop."""
        window = clip.window(frames, self.position)
        return window[:, :, ::-1] if self.flip else window
