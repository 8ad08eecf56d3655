"""The one interface of networks that judge pictures and clips by features.

Shapes: N pictures or clips, T frames, H W their size, S the network's, D features, K classes. What is given is uint8
[N,H,W,3] or [N,T,H,W,3]; pictures are resized on the CPU by antialiased bicubic interpolation and not rounded, as
resizing otherwise moves distances more than models do (Parmar et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from videodiff.errors import UserError

Takes: TypeAlias = Literal["pictures", "clips"]
# Rules of resizing in words, as protocols tell them.
SQUEEZED = "squeezed to SxS by antialiased bicubic, in [0, 255], not rounded"
CROPPED = "shorter side to S by antialiased bicubic, in [0, 255], not rounded, the centre cropped"
AS_IS = "as it is; the file resizes"
STRIP = f"{SQUEEZED}; four frames at half size on one picture"


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network that gives a vector for each picture or clip, in chunks of `batch`.

    name: for people, named beside each figure. sha256: of its weights. frames: the length that a clip must have, None
    where any will do. size: S, None where pictures are taken as they are; `resize` and `values` say in words what
    happens to them. classes: K where it tells class probabilities.
    prepare: uint8 [n,T,H,W,3] (T = 1 for pictures) -> what the network sees, on the CPU. look: that, on `device`, and
    whether probabilities are wanted -> features [n,D], probabilities [n,K] or None. write: captions -> [n,D].
    """

    kind: str
    name: str
    sha256: str
    takes: Takes
    size: int | None
    resize: str
    values: str
    dimension: int
    device: torch.device
    batch: int
    prepare: Callable[[Tensor], Tensor]
    look: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]
    write: Callable[[Sequence[str]], Tensor] | None = None
    frames: int | None = None
    classes: int | None = None

    @property
    def has_texts(self) -> bool:
        """Whether `texts` gives vectors to compare features with."""
        return self.write is not None

    def __call__(self, frames: npt.NDArray[np.uint8] | Tensor) -> Tensor:
        """Features float32 [N,D] on the CPU, of length 1 where there are texts.

        UserError for clips of another length, pictures where clips are due, and features that are not finite.
        """
        return self._run(frames, False)[0]

    def with_probabilities(self, frames: npt.NDArray[np.uint8] | Tensor) -> tuple[Tensor, Tensor]:
        """Features [N,D] and class probabilities [N,K]; UserError where the network has no classes."""
        if self.classes is None:
            raise UserError(
                f"{self.name}: tells no class probabilities; take kind: inception with a file that holds its last layer"
            )
        return self._run(frames, True)

    def probabilities(self, frames: npt.NDArray[np.uint8] | Tensor) -> Tensor:
        """Class probabilities float32 [N,K]; see `with_probabilities`."""
        return self.with_probabilities(frames)[1]

    def texts(self, captions: Sequence[str]) -> Tensor:
        """Captions -> float32 [N,D] of length 1, to be compared with features. Too long ones are cut."""
        if self.write is None:
            raise UserError(f"{self.name}: knows no texts; take kind: bundled or kind: open_clip")
        found = [torch.empty(0, self.dimension)]
        with torch.inference_mode(), _exact():
            chunks = (captions[first : first + self.batch] for first in range(0, len(captions), self.batch))
            found += [self.write(chunk).float().cpu() for chunk in chunks]
        return self._finite(torch.cat(found), "caption")

    def protocol(self) -> dict[str, Any]:
        """All that features follow from but the frames, as JSON: figures of unequal protocols can't be compared."""
        told = ("kind", "name", "sha256", "takes", "size", "resize", "values", "frames", "dimension")
        return {name: getattr(self, name) for name in told}

    def _run(self, frames: npt.NDArray[np.uint8] | Tensor, classify: bool) -> tuple[Tensor, Tensor]:
        given = self._checked(frames)
        features, probabilities = [torch.empty(0, self.dimension)], [torch.empty(0, self.classes or 0)]
        with torch.inference_mode(), _exact():
            for chunk in given.split(self.batch):
                if len(chunk):  # a split of nothing is one empty chunk
                    found, classes = self.look(self.prepare(chunk.cpu()).to(self.device), classify)
                    features.append(found.float().cpu())
                    probabilities += [] if classes is None else [classes.float().cpu()]
        # Outside of inference_mode, so that the result is a tensor like any other.
        return self._finite(torch.cat(features), self.takes[:-1]), torch.cat(probabilities)

    def _checked(self, frames: npt.NDArray[np.uint8] | Tensor) -> Tensor:
        """[N,T,H,W,3], T = 1 for pictures."""
        given = torch.as_tensor(frames)
        assert given.dtype == torch.uint8, given.dtype
        if given.ndim != (4 if self.takes == "pictures" else 5) or given.shape[-1] != 3:
            due = "pictures [N,H,W,3]" if self.takes == "pictures" else "clips [N,T,H,W,3]"
            raise UserError(f"{self.name}: takes {due}, not {list(given.shape)}; choose features of another kind")
        if self.takes == "pictures":
            return given[:, None]
        if self.frames not in (None, given.shape[1]):
            raise UserError(
                f"{self.name}: takes clips of {self.frames} frames, these have {given.shape[1]}; judge clips of that "
                "length, or choose features of another kind"
            )
        return given

    def _finite(self, features: Tensor, what: str) -> Tensor:
        if not features.isfinite().all():
            number = int((~features.isfinite()).any(dim=1).nonzero()[0])
            raise UserError(
                f"{self.name}: the features of {what} {number} are not finite; its weights (sha256 "
                f"{self.sha256[:12]}...) are damaged or another network's: copy them again"
            )
        return features


def resized(frames: Tensor, size: int | None, crop: bool = False) -> Tensor:
    """uint8 [n,T,H,W,3] -> float32 [n,T,3,S,S] in [0,255], squeezed to the square or cropped to it; H x W for None.

    Values that the interpolation takes beyond black and white are cut, as a picture has none such.
    """
    x = frames.permute(0, 1, 4, 2, 3).flatten(0, 1).float()
    height, width = x.shape[-2:]
    if size is not None and (height, width) != (size, size):
        short = min(height, width)
        shape = (int(size * height / short), int(size * width / short)) if crop else (size, size)
        x = F.interpolate(x, shape, mode="bicubic", antialias=True).clamp(0, 255)
        top, left = (round((side - size) / 2) for side in shape)
        x = x[..., top : top + size, left : left + size]
    return x.unflatten(0, frames.shape[:2])


def film_strip(frames: Tensor, size: int) -> Tensor:
    """Four frames of each clip in reading order on one picture: uint8 [n,T,H,W,3] -> float32 [n,3,S,S] in [0,255].

    A single frame can't show a motion; four of them can, and a tower that is trained on them stays one for pictures
    (stages/text.py). A clip of one frame is four equal ones: a still clip.
    """
    count = frames.shape[1]
    chosen = resized(frames[:, [round(i * (count - 1) / 3) for i in range(4)]], size)
    halves = F.avg_pool2d(chosen.flatten(0, 1), 2)
    return rearrange(halves, "(n row column) c h w -> n c (row h) (column w)", row=2, column=2)


def _exact() -> Any:
    """cuDNN as deterministic as it can be, and in float32: TensorFloat-32 would differ from card to card."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def told_apart(names: Sequence[str]) -> list[str]:
    """The names of networks, numbered where several have the same one."""
    return [
        name if names.count(name) == 1 else f"{name} ({names[: place + 1].count(name)})"
        for place, name in enumerate(names)
    ]
