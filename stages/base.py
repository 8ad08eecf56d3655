"""Stage: which frames are given and what trains. The configuration and the training task of the diffusion stages.

Shapes: B batch, C latent channels, T frames, H W latent size, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.loader import DataConfig
from videodiff import config as configs
from videodiff.batch import Condition, VideoBatch
from videodiff.config import Config
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.loss import DiffusionLoss, sample_times
from videodiff.diffusion.prediction import Prediction
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.model import DESCRIPTION, DiffusionPart, Model, ModelConfig, Sampling, carry, write_weights
from videodiff.networks.unet import UNet
from videodiff.seeding import normals, uniforms
from videodiff.training.engine import EngineConfig
from videodiff.training.trainer import LossOutput, RunConfig
from videodiff.video_io import contact_sheet, write_png


class StageConfig(Config):
    """What every stage's YAML holds: the run, its data, the engine, and the model it stands on."""

    run: RunConfig
    data: DataConfig
    engine: EngineConfig = EngineConfig()
    model: str | None = None


class Dropout(Config):
    """Probabilities of dropping conditions in training: the text alone, the image alone, both together.

    Guidance with two scales needs the network to know X(0), X(I) and X(I,p) (Emu Video, eq. 1).
    """

    text: float = 0.1
    image: float = 0.05
    both: float = 0.05

    def draw(self, seed: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(text dropped [B] bool, image dropped [B] bool) of the samples with these global numbers."""
        u = uniforms(seed, "condition-dropout", numbers)
        text, image = u < self.text, (u >= self.text) & (u < self.text + self.image)
        both = (u >= self.text + self.image) & (u < self.text + self.image + self.both)
        return text | both, image | both


def known_mask(slots: Sequence[int], like: Tensor) -> Tensor:
    """[B,1,T,1,1] with ones at the given frames, for latents `like` [B,C,T,H,W]."""
    mask = like.new_zeros(like.shape[0], 1, like.shape[2], 1, 1)
    mask[:, :, list(slots)] = 1
    return mask


def with_known(condition: Condition, latents: Tensor, slots: Sequence[int]) -> Condition:
    """The condition with clean `latents` [B,C,T,H,W] shown at the frames `slots`, zeros and mask 0 elsewhere."""
    mask = known_mask(slots, latents)
    full = mask.expand(-1, -1, -1, *latents.shape[3:])
    return replace(condition, known=latents * mask, known_mask=full)


class DiffusionTask:
    """Trains a network of one of the three diffusion stages; frozen autoencoder and text tower stay outside of it.

    known_slots: T -> frames whose clean latents are given (image (), video (0,), interpolation (0,k,2k,...)).
    trainable: which parameters of the network get gradients, by name.
    """

    def __init__(
        self,
        stage: str,
        base: Model,
        network: UNet,
        part: dict[str, Any],
        known_slots: Callable[[int], Sequence[int]],
        trainable: Callable[[str], bool],
        loss: DiffusionLoss,
        dropout: Dropout,
    ) -> None:
        self.stage, self.base, self.module = stage, base, network
        self.part, self.known_slots, self._trainable = part, known_slots, trainable
        self.schedule: NoiseSchedule = part["schedule"]
        self.prediction: Prediction = part["prediction"]
        self.loss_function, self.dropout = loss, dropout
        self.autoencoder, self.text = base.autoencoder, base.text

    def trains(self, name: str) -> bool:
        return self._trainable(name)

    def latents(self, batch: VideoBatch, seed: int) -> Tensor:
        """A posterior sample of each clip, [B,C,T,H,W] float32, drawn by the sample's own number."""
        with torch.no_grad():
            posterior = self.autoencoder.encode_clip(batch.frames)
        noise = normals(tuple(posterior.mean.shape[1:]), seed, "posterior", batch.numbers)
        return posterior.mean + posterior.std * noise.to(posterior.mean.device)

    def condition(self, batch: VideoBatch, latents: Tensor) -> Condition:
        """What the network is told of the batch, nothing dropped."""
        with torch.no_grad():
            features = self.text.encode(list(batch.captions))
        condition = Condition(text=(features.tokens,), text_mask=(features.mask,), pooled=features.pooled, fps=batch.fps)
        slots = self.known_slots(latents.shape[2])
        return with_known(condition, latents, slots) if slots else condition

    def loss(self, module: Callable[..., Tensor], batch: VideoBatch, seed: int) -> LossOutput:
        x0 = self.latents(batch, seed)
        condition = self.condition(batch, x0).drop(*self.dropout.draw(seed, batch.numbers))
        t = sample_times(self.schedule, seed, batch.numbers)
        eps = normals(tuple(x0.shape[1:]), seed, "noise", batch.numbers).to(x0.device)
        denoiser = Denoiser(module, self.schedule, self.prediction, next(self.module.parameters()).dtype)
        return LossOutput(per_sample=self.loss_function(denoiser, x0, eps, t, condition), metrics={})

    @torch.no_grad()
    def sample(self, module: nn.Module, batch: VideoBatch, folder: Path, step: int) -> None:
        """A contact sheet of generated clips above the real ones, with fixed noise so that steps compare."""
        batch = batch.select(slice(8))
        x0 = self.latents(batch, seed=0)
        condition = self.condition(batch, x0)
        dtype = next(module.parameters()).dtype
        denoiser = Denoiser(module, self.schedule, self.prediction, dtype)
        sampling: Sampling = self.part["sampling"]
        noise = normals(tuple(x0.shape[1:]), 0, "sample", batch.numbers).to(x0.device)
        made = sampling.sampler(sampling.guidance(denoiser, condition), noise, self.schedule)
        rows = []
        for latents in (made, x0):
            rows.append(self.autoencoder.decode_clip(latents).cpu().numpy())
        pictures, labels = [], []
        for i, caption in enumerate(batch.captions):
            for name, clips in zip(("made", "real"), rows, strict=True):
                keep = range(0, clips.shape[1], max(1, clips.shape[1] // 8))
                pictures += [clips[i, k] for k in keep]
                labels += [f"{name}: {caption}" if k == 0 else "" for k in keep]
        columns = len(pictures) // (2 * len(batch.captions))
        write_png(folder / f"step-{step:08d}.png", contact_sheet(pictures, columns=max(columns, 1), labels=labels))

    def export(self, state: dict[str, Tensor], folder: Path, file: str) -> None:
        write_part(self.stage, self.base, folder, file, state, lambda weights: DiffusionPart(**self.part, weights=weights))


def write_part(
    stage: str,
    base: Model | None,
    folder: Path,
    file: str,
    state: dict[str, Tensor],
    part: Callable[[Any], Config],
) -> None:
    """Write weights of `stage` into a model folder and describe them: first the averaged ones, then the raw ones."""
    weights = write_weights(folder, file, state)
    description = folder / DESCRIPTION
    if not description.is_file():
        model = carry(base, folder) if base is not None else ModelConfig()
        model = model.model_copy(update={stage: part(weights)})
    else:
        model = configs.load(ModelConfig, description)
        named = getattr(model, stage)
        field = "raw" if file.startswith("raw") else "weights"
        model = model.model_copy(update={stage: named.model_copy(update={field: weights})})
    configs.save(model, description)
