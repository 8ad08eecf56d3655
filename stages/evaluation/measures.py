"""What is measured of each clip besides what the reader sees: likeness to real ones, steadiness, motion, features.

Shapes: a clip is uint8 [T,S,S,3]; B clips, T frames, K frames that features are taken of, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from videodiff.errors import UserError
from videodiff.metrics.flow import interpolate_by_flow
from videodiff.metrics.motion import consistency, flicker, is_dynamic, motion_amount, still, unsteadiness
from videodiff.metrics.pictures import clip_psnr, looks, ssim
from videodiff.metrics.scores import clip_scores
from videodiff.networks.features import FeatureExtractor
from videodiff.networks.features.extractor import told_apart

AT_ONCE = 8  # frames that LPIPS looks at together
CHANNELS = 16  # of latents that are told one by one
FRAMES = 8  # of a clip, evenly from its first to its last, that networks for pictures look at
Distance = Callable[[Tensor, Tensor], Tensor]  # pictures [N,3,H,W] in [-1,1], twice -> [N]


@dataclass(frozen=True)
class Unit:
    """How a measure is told. better: which way; "real": near that of the real clips. is_share: of one it is 0 or 1."""

    label: str
    better: Literal["more", "less", "real"]
    scale: float = 1.0
    digits: int = 2
    is_share: bool = False


def _likeness(what: str) -> dict[str, Unit]:
    return {
        f"{what}_psnr": Unit(f"{what.replace('_', ' ')} PSNR, dB", "more", digits=1),
        f"{what}_ssim": Unit(f"{what.replace('_', ' ')} SSIM", "more", digits=3),
        f"{what}_lpips": Unit(f"{what.replace('_', ' ')} LPIPS", "less", digits=3),
    }


MIDDLES = ("middle", "middle_rebuilt_blended", "middle_blended", "middle_by_flow", "middle_rebuilt")
LOOKS = {
    "brightness": Unit("brightness, %", "real", 100.0, 1), "black": Unit("black pixels, %", "real", 100.0, 1),
    "sharpness": Unit("sharpness, grey levels squared", "real", digits=0),
    "saturation": Unit("saturation, %", "real", 100.0, 1),
    **{name: Unit(f"{name}, %", "real", 100.0, 1) for name in ("red", "green", "blue")},
}  # fmt: skip
MEASURES: dict[str, Unit] = {
    **{name: unit for what in ("reconstruction", "first_frame", *MIDDLES) for name, unit in _likeness(what).items()},
    "captions_cut": Unit("captions that the text tower cuts, %", "less", 100.0, 1, is_share=True),
    "latent_mean": Unit("mean of the latents", "real", digits=3),
    "latent_deviation": Unit("deviation of the latents", "real", digits=3),
    **{f"latent_{what}_{channel}": Unit(f"{what} of latent channel {channel}", "real", digits=3)
       for channel in range(CHANNELS) for what in ("mean", "deviation")},
    "text_likeness": Unit("CLIP score", "more", digits=1),
    "consistency": Unit("frames alike, cosine", "real", digits=3),
    **LOOKS,
    "flicker": Unit("flicker, grey levels", "real"),
    "unsteadiness": Unit("unsteadiness, grey levels", "less"),
    "motion": Unit("motion, % of diagonal a second", "real", 100.0),
    "dynamic": Unit("clips that move, %", "real", 100.0, 0, is_share=True),
    "frozen": Unit("frozen steps, %", "real", 100.0, 1),
    "bound": Unit("bound, nats a latent dimension", "less", digits=3),
    **{f"loss_{place}": Unit(f"loss at t = {place}/8 N", "less", digits=4) for place in range(1, 9)},
    **{f"{given}{how}": Unit(f"{given.replace('_', ', ')}{how} PSNR, dB", "more", digits=1)
       for given in ("", "rebuilt_") for how in ("upscaled", "bilinear", "bicubic")},
    "controlled": Unit("off the outlines, % of the side", "less", digits=1),
    "free": Unit("the same without control, % of the side", "real", digits=1),
}  # fmt: skip


def labelled(name: str, by: str | None) -> str:
    """A measure's label, with the network that it is of."""
    return MEASURES[name].label if by is None else f"{MEASURES[name].label}, {by}"


OF_TOWER = ("text_likeness", "captions_cut")  # what real clips and captions say of the text tower


class Gauge:
    """What measures clips. extractors: networks that judge by features. perceptual: LPIPS, where there is one, and what
    it is called in protocols. flow: whether optical flow can be had (`has_flow`)."""

    def __init__(
        self,
        extractors: Sequence[FeatureExtractor] = (),
        perceptual: Distance | None = None,
        perceptual_name: str | None = None,
        flow: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.extractors, self.flow, self.device = tuple(extractors), flow, torch.device(device)
        self.perceptual, self.perceptual_name = perceptual, perceptual_name

    def likeness(self, what: str, made: np.ndarray, real: np.ndarray) -> list[dict[str, float | None]]:
        """PSNR of each clip, SSIM and LPIPS as means over its frames; uint8 [B,T,S,S,3]."""
        found: list[dict[str, float | None]] = []
        for a, b in zip(made, real, strict=True):
            told: dict[str, float | None] = {f"{what}_psnr": clip_psnr(a, b), f"{what}_ssim": float(ssim(a, b).mean())}
            if self.perceptual is not None:
                told[f"{what}_lpips"] = self._perceived(self.perceptual, a, b)
            found.append(told)
        return found

    @torch.inference_mode()
    def _perceived(self, distance: Distance, a: np.ndarray, b: np.ndarray) -> float:
        """The mean over frames, a few at a time: the network's own layers are large."""
        parts = zip(_pictures(a).split(AT_ONCE), _pictures(b).split(AT_ONCE), strict=True)
        return float(torch.cat([distance(x.to(self.device), y.to(self.device)) for x, y in parts]).mean())

    def measures(self, clip: np.ndarray, fps: float) -> dict[str, float | None]:
        """What a clip looks like, and how it moves, if it is no picture."""
        seen = looks(clip[chosen_frames(len(clip))])
        told: dict[str, float | None] = {name: float(seen[name].mean()) for name in LOOKS}
        if len(clip) < 3:
            return told
        told |= {"flicker": flicker(clip), "frozen": float(still(clip).mean())}
        if self.flow:
            told["unsteadiness"] = unsteadiness(clip)
            told["motion"] = motion_amount(clip, fps)
            told["dynamic"] = float(is_dynamic(clip, fps))
        return told

    def by_flow(self, clips: np.ndarray, factor: int) -> np.ndarray | None:
        """Frames between those of uint8 [B,T,S,S,3] along their optical flow: uint8 [B,(T-1)*factor+1,S,S,3]."""
        if not self.flow:
            return None
        return np.stack([_along_flow(clip, factor) for clip in clips])

    def features(self, rows: Mapping[str, np.ndarray], texts: Sequence[str]) -> dict[str, Tensor]:
        """By "extractor/row": features float32 [B,K,D] of K frames, or [B,1,D] of clips; "extractor/texts" [B,D];
        "extractor/row/classes": probabilities of the first frame or of the clip, where the network tells them.

        rows: uint8 [B,T,S,S,3]. A row that an extractor can't see (a picture, a clip of another length) has none.
        """
        found = {}
        for number, extractor in enumerate(self.extractors):
            for name, frames in rows.items():
                if extractor.takes == "pictures":
                    chosen = frames[:, chosen_frames(frames.shape[1])]
                    flat = extractor(np.ascontiguousarray(chosen.reshape(-1, *chosen.shape[2:])))
                    found[f"{number}/{name}"] = flat.unflatten(0, chosen.shape[:2])
                    if extractor.classes is not None:
                        classes = extractor.probabilities(np.ascontiguousarray(frames[:, 0]))
                        found[f"{number}/{name}/classes"] = classes
                elif sees(extractor, frames.shape[1]):
                    given = np.ascontiguousarray(frames)
                    if extractor.classes is None:
                        seen = extractor(given)
                    else:
                        seen, found[f"{number}/{name}/classes"] = extractor.with_probabilities(given)
                    found[f"{number}/{name}"] = seen[:, None]
            if extractor.has_texts:
                found[f"{number}/texts"] = extractor.texts(texts)
        return found

    def unseen(self, lengths: Mapping[str, int]) -> dict[str, str]:
        """Which network says nothing of which rows, and why. lengths: how many frames each row's clips have; that one
        for clips says nothing of a picture is understood."""
        told = {}
        for extractor in self.extractors:
            for count in sorted({count for count in lengths.values() if count > 1 and not sees(extractor, count)}):
                rows = ", ".join(row for row, length in lengths.items() if length == count)
                reason = f"it takes clips of {extractor.frames} frames, these have {count}"
                told[f"{extractor.name} on {rows}"] = reason
        return told

    def from_features(self, row: str, features: Mapping[str, Tensor], count: int) -> list[dict[str, float | None]]:
        """What features say of each of `count` clips: how near they are to the text, and frames to one another."""
        told: list[dict[str, float | None]] = [{} for _ in range(count)]
        if (reads := self._reader()) is not None and f"{reads}/{row}" in features:
            frames, texts = features[f"{reads}/{row}"], features[f"{reads}/texts"]
            for i in range(count):
                if bool(frames[i].any(1).all()) and bool(texts[i].any()):  # zeros have no direction
                    scores = clip_scores(frames[i], texts[i].expand(len(frames[i]), -1))
                    told[i]["text_likeness"] = float(scores.mean())
        compares = self._comparer()
        frames = features.get(f"{compares}/{row}", torch.empty(count, 0, 0))
        if frames.shape[1] > 1:
            for i in range(count):
                told[i]["consistency"] = consistency(frames[i]).both if bool(frames[i].any(1).all()) else None
        return told

    def named(self) -> dict[str, str]:
        """Measure -> the network that it is of."""
        names = told_apart([extractor.name for extractor in self.extractors])
        asked = {"text_likeness": self._reader(), "consistency": self._comparer()}
        return {measure: names[number] for measure, number in asked.items() if number is not None}

    def _comparer(self) -> int | None:
        """The network that compares frames: the first one that sees more of a clip than one vector."""
        return next((i for i, extractor in enumerate(self.extractors) if extractor.takes == "pictures"), None)

    def _reader(self) -> int | None:
        """The one network that compares with texts, the same for every row: the first for pictures, else the first."""
        reading = [number for number, extractor in enumerate(self.extractors) if extractor.has_texts]
        return min(reading, key=lambda number: self.extractors[number].takes != "pictures", default=None)


def sees(extractor: FeatureExtractor, count: int) -> bool:
    """Whether a network can judge clips of so many frames, or a picture, which has one."""
    return extractor.takes == "pictures" or (count > 1 and extractor.frames in (None, count))


def has_flow() -> bool:
    """Whether optical flow can be computed here."""
    blank = np.zeros((16, 16, 3), np.uint8)
    try:
        interpolate_by_flow(blank, blank, 0.5)
    except UserError:
        return False
    return True


def chosen_frames(count: int) -> list[int]:
    """Which frames of a clip of `count` networks for pictures look at, the first one among them."""
    return list(dict.fromkeys(round(i) for i in np.linspace(0, count - 1, min(count, FRAMES))))


def _along_flow(clip: np.ndarray, factor: int) -> np.ndarray:
    frames = [clip[0]]
    for a, b in pairwise(clip):
        frames += [interpolate_by_flow(a, b, step / factor) for step in range(1, factor)] + [b]
    return np.stack(frames)


def _pictures(clip: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(clip)).permute(0, 3, 1, 2).float() / 127.5 - 1
