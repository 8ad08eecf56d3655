"""Prompt -> image -> video -> smooth video, in latents; decoded once, at the end.

B batch, C latent channels, T frames, H W latent size. A sample's noise depends on (seed, prompt, sample index) alone,
so another batch size or number of ranks changes its frames by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from stages import interpolation as interpolation_stage
from stages import upscale as upscale_stage
from stages import video as video_stage
from stages.base import with_known
from videodiff import config as configs
from videodiff.batch import Condition
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.prediction import Denoise
from videodiff.diffusion.samplers import DDIM, OnStep, invert
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks.autoencoder import Autoencoder
from videodiff.networks.classifier import NoisyClassifier
from videodiff.networks.control import HINTS, ControlledUNet
from videodiff.networks.prompted import PromptedUNet
from videodiff.networks.unet import UNet
from videodiff.parts import ControlPart, DiffusionStage, Sampling, UpscalePart
from videodiff.seeding import generator

UPSCALE_FRAMES = 8  # frames that are upscaled together: bounds memory


@dataclass(frozen=True)
class SampleKey:
    """What a sample's noise follows from."""

    seed: int
    prompt: str
    index: int = 0

    def generator(self, *purpose: str | int) -> torch.Generator:
        """A CPU generator for one purpose of this sample, e.g. a stage, or a stage and a window."""
        return generator(self.seed, self.prompt, self.index, *purpose)


def adjusted(
    sampling: Sampling,
    sampler: str | None = None,
    steps: int | None = None,
    text: float | None = None,
    image: float | None = None,
    rescale: float | None = None,
    interval: tuple[float, float | None] | None = None,
) -> Sampling:
    """A stage's sampling with what the caller asks for in place of the model's own; UserError for impossible values."""
    tree = configs.to_dict(sampling)
    if sampler is not None and sampler != tree["sampler"]["kind"]:
        tree["sampler"] = {"kind": sampler, "steps": tree["sampler"]["steps"]}
    if steps is not None:
        tree["sampler"]["steps"] = steps
    scales = {"text": text, "image": image, "rescale": rescale, "interval": interval}
    tree["guidance"] |= {key: value for key, value in scales.items() if value is not None}
    return configs.build(Sampling, tree, "the options")


class Steering(Protocol):
    """What a stage follows besides its condition and its sampling: `stages.guides.Guides`."""

    def start(self, stage: DiffusionStage, drawn: Tensor) -> Tensor:
        """Where a stage begins [B,C,T,H,W], in place of the noise drawn for it or that noise itself."""

    def wrap(self, stage: DiffusionStage, denoise: Denoise, condition: Condition, sampling: Sampling) -> Denoise:
        """The stage's denoiser, guided further."""


class Pipeline:
    """The stages of a model, ready to run. Each method takes and gives latents [B,C,T,H,W] in normalised units."""

    def __init__(self, model: Model, device: torch.device | str = "cpu") -> None:
        self.model, self.device = model, torch.device(device)
        self._denoisers: dict[str, Denoiser] = {}

    @cached_property
    def autoencoder(self) -> Autoencoder:
        return self.model.autoencoder.to(self.device)

    @cached_property
    def classifier(self) -> NoisyClassifier:
        return self.model.classifier.to(self.device)

    def load(self) -> None:
        """Load every network of the model now: its files may be gone later."""
        for stage in self.model.config.stages():
            if stage in ("autoencoder", "classifier"):
                getattr(self, stage)
            elif stage in ("text", "control", "image_prompt"):
                getattr(self.model, stage)
            else:
                self.denoiser(stage)  # type: ignore[arg-type]

    def denoiser(self, stage: DiffusionStage) -> Denoiser:
        """The stage's denoiser, loaded once."""
        if stage not in self._denoisers:
            part = self.model.diffusion(stage)
            network = self.model.unet(stage).to(self.device)
            self._denoisers[stage] = Denoiser(network, part.schedule, part.prediction, variance=part.network.variance)
        return self._denoisers[stage]

    def _image_within(self, wrap: Callable[[UNet], nn.Module]) -> Denoiser:
        """The image stage's denoiser, its network within another one."""
        plain = self.denoiser("image")
        assert isinstance(plain.network, UNet)
        return Denoiser(wrap(plain.network), plain.schedule, plain.prediction, plain.dtype, plain.variance)

    @torch.no_grad()
    def condition(self, prompts: Sequence[str], fps: float) -> Condition:
        """What the networks are told of the prompts."""
        features = self.model.text.encode(list(prompts))
        rate = torch.full((len(prompts),), float(fps))
        return features.condition(rate).to(self.device)

    def image(
        self, keys: Sequence[SampleKey], sampling: Sampling, on_step: OnStep = None, steering: Steering | None = None
    ) -> Tensor:
        """Stage 1: the first image of each prompt, [B,C,1,H,W]."""
        condition = self.image_condition([key.prompt for key in keys])
        generators = [key.generator("image") for key in keys]
        return self._sample("image", condition, 1, generators, sampling, on_step, steering)

    def controlled_image(
        self,
        keys: Sequence[SampleKey],
        pictures: np.ndarray[Any, Any],
        scale: float,
        sampling: Sampling,
        on_step: OnStep = None,
        steering: Steering | None = None,
    ) -> Tensor:
        """Stage 1 along the outlines of `pictures`, uint8 [B,S,S,3]: [B,C,1,H,W]. Scale 0 is `image`, bit for bit."""
        part = self.model.part("control")
        assert isinstance(part, ControlPart)
        control = self.model.control.to(self.device)
        denoiser = self._image_within(lambda network: ControlledUNet(network, control, scale))
        hint = HINTS[part.hint](torch.from_numpy(np.ascontiguousarray(pictures))).to(self.device)
        condition = replace(self.image_condition([key.prompt for key in keys]), hint=hint)
        generators = [key.generator("image") for key in keys]
        return self._sample("image", condition, 1, generators, sampling, on_step, steering, denoiser)

    def prompted_image(self, keys: Sequence[SampleKey], pictures: Tensor, sampling: Sampling) -> Tensor:
        """Stage 1 told `pictures` [B,C,1,H,W] in place of the prompts, as the video stage's spatial layers are:
        [B,C,1,H,W], unguided, since no text is heard."""
        prompt = self.model.image_prompt.to(self.device)
        denoiser = self._image_within(lambda network: PromptedUNet(network, prompt))
        condition = with_known(self.image_condition([key.prompt for key in keys]), pictures, (0,))
        generators = [key.generator("image") for key in keys]
        unguided = adjusted(sampling, text=1.0, image=1.0)
        return self._sample("image", condition, 1, generators, unguided, None, denoiser=denoiser)

    def video(
        self,
        keys: Sequence[SampleKey],
        first: Tensor,
        fps: float,
        sampling: Sampling,
        on_step: OnStep = None,
        steering: Steering | None = None,
    ) -> Tensor:
        """Stage 2: from first images [B,C,1,H,W] to clips [B,C,T,H,W]."""
        condition = self.video_condition([key.prompt for key in keys], first, fps)
        frames, generators = self.model.diffusion("video").frames, [key.generator("video") for key in keys]
        return self._sample("video", condition, frames, generators, sampling, on_step, steering)

    def image_condition(self, prompts: Sequence[str]) -> Condition:
        """What stage 1 is told."""
        return self.condition(prompts, self.model.diffusion("image").fps)

    def video_condition(self, prompts: Sequence[str], first: Tensor, fps: float) -> Condition:
        """What stage 2 is told: the prompts, and the first images [B,C,1,H,W] where it was trained with any."""
        frames = self.model.diffusion("video").frames
        if not self.model.diffusion("video").first_image:
            return self.condition(prompts, fps)
        known = first.new_zeros(*first.shape[:2], frames, *first.shape[3:])
        known[:, :, :1] = first
        return with_known(self.condition(prompts, fps), known, video_stage.known_slots(frames))

    def invert(
        self, stage: DiffusionStage, latents: Tensor, condition: Condition, sampling: Sampling, on_step: OnStep = None
    ) -> Tensor:
        """The noise [B,C,T,H,W] from which the stage makes `latents`, nearly; the sampler must be DDIM with eta 0."""
        sampler = sampling.sampler
        if not isinstance(sampler, DDIM) or sampler.random:
            raise UserError(
                f"the {stage} stage is sampled by {sampler!r}; only ddim with eta 0 leads back to its noise"
            )
        denoise, schedule = sampling.guidance(self.denoiser(stage), condition), self.model.diffusion(stage).schedule
        return invert(denoise, latents, schedule, sampler.steps, sampler.spacing, on_step)

    def interpolation(
        self, keys: Sequence[SampleKey], clip: Tensor, fps: float, sampling: Sampling, on_step: OnStep = None
    ) -> Tensor:
        """Stage 3: from T frames at `fps` to (T-1)k+1 at k times `fps`, window by window; given frames are kept.

        With an offset there are so many more frames before the first given one and after the last.
        """
        part = self.model.diffusion("interpolation")
        clips, channels, count = clip.shape[:3]
        factor, offset = part.factor, part.offset
        if count < 2:
            raise UserError("interpolation needs at least two frames; leave it out with --no-interpolation")
        frames = min(part.frames, (count - 1) * factor + 1 + 2 * offset)
        starts = interpolation_stage.windows(count, frames, factor, offset)
        slots = interpolation_stage.known_slots(frames, factor, offset)
        per_window = len(slots)
        known = clip.new_zeros(clips, len(starts), channels, frames, *clip.shape[3:])
        for w, start in enumerate(starts):
            known[:, w, :, list(slots)] = clip[:, :, start : start + per_window]
        rows = [(b, w) for b in range(clips) for w in range(len(starts))]
        generators = [keys[b].generator("interpolation", starts[w]) for b, w in rows]
        condition = self.condition([keys[b].prompt for b, _ in rows], fps * factor)
        given = known.flatten(0, 1)
        if part.known_time:
            drawn = [keys[b].generator("interpolation-known", starts[w]) for b, w in rows]
            noise = torch.stack([torch.randn(given.shape[1:], generator=g) for g in drawn]).to(given.device)
            times = torch.full((len(rows),), part.known_time)
            given = interpolation_stage.noised(given, noise, times, part.schedule)
        if part.deviation is None:
            condition = with_known(condition, given, slots)
            made = self._sample("interpolation", condition, frames, generators, sampling, on_step)
        else:
            blend = interpolation_stage.blended(given[:, :, list(slots)], frames, factor, offset)
            condition = interpolation_stage.told_blend(condition, blend, slots)
            difference = self._sample("interpolation", condition, frames, generators, sampling, on_step)
            made = blend + part.deviation * difference
        total = (count - 1) * factor + 1 + 2 * offset
        smooth = clip.new_zeros(clips, channels, total, *clip.shape[3:])
        for (b, w), window in zip(rows, made, strict=True):
            # Where windows meet, each knows the side on which its own given frames lie: the later one begins there.
            begin = 0 if w == 0 else offset
            smooth[b, :, starts[w] * factor + begin : starts[w] * factor + frames] = window[:, begin:]
        smooth[:, :, offset : total - offset : factor] = clip
        return smooth

    def upscale(
        self, key: SampleKey, frames: np.ndarray[Any, Any], sampling: Sampling, on_step: OnStep = None
    ) -> np.ndarray[Any, Any] | None:
        """Super-resolution: frames uint8 [T,S,S,3] of one clip to [T,kS,kS,3]; None where the result is not finite.

        Each frame by itself, and all from the same noise: what stands still does not flicker, and how many frames go
        through together changes nothing but rounding.
        """
        part = self.model.part("upscale")
        assert isinstance(part, UpscalePart)
        large = upscale_stage.enlarge(torch.from_numpy(np.ascontiguousarray(frames)), part.factor)
        given = upscale_stage.to_squares(large[:, None], upscale_stage.square_side(part.network)).to(self.device)
        told = self.condition([key.prompt], part.fps)
        pieces = []
        for known in given.split(UPSCALE_FRAMES):
            condition = with_known(told.select([0] * len(known)), known, (0,))
            generators = [key.generator("upscale") for _ in known]
            made = self._sample("upscale", condition, 1, generators, sampling, on_step)
            if not torch.isfinite(made).all():
                return None
            pieces.append(upscale_stage.with_difference(known, made, part.deviation)[:, 0])
        return torch.cat(pieces).cpu().numpy()

    @torch.no_grad()
    def encode(self, frames: np.ndarray[Any, Any]) -> Tensor:
        """uint8 frames [B,T,H,W,3] to the mean of their latents [B,C,T,h,w]."""
        return self.autoencoder.encode_clip(torch.from_numpy(np.ascontiguousarray(frames)).to(self.device)).mean

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray[Any, Any]:
        """Latents [B,C,T,h,w] to uint8 frames [B,T,H,W,3]."""
        return self.decode_checked(latents)[0]

    @torch.no_grad()
    def decode_checked(self, latents: Tensor) -> tuple[np.ndarray[Any, Any], list[bool]]:
        """As `decode`; and whether each clip was finite before it became bytes."""
        frames, finite = self.autoencoder.decode_checked(latents)
        return frames.cpu().numpy(), finite

    @torch.no_grad()
    def _sample(
        self,
        stage: DiffusionStage,
        condition: Condition,
        frames: int,
        generators: Sequence[torch.Generator],
        sampling: Sampling,
        on_step: OnStep,
        steering: Steering | None = None,
        denoiser: Denoiser | None = None,
    ) -> Tensor:
        part = self.model.diffusion(stage)
        side = part.size // self.autoencoder.factor
        shape: tuple[int, ...] = (part.network.channels, frames, side, side)
        if condition.known is not None:  # what is given lies where the rest is made; upscale's are no latents
            shape = tuple(condition.known.shape[1:])
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)
        denoise = sampling.guidance(denoiser or self.denoiser(stage), condition)
        if steering is not None:
            noise = steering.start(stage, noise)
            denoise = steering.wrap(stage, denoise, condition, sampling)
        return sampling.sampler(denoise, noise, part.schedule, generators, on_step)
