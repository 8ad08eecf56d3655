"""Stage: which frames are given and what trains. The configuration and the training task of the diffusion stages.

Shapes: B batch, C latent channels, T frames, H W latent size, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipeline.loader import DataConfig
from stages.fits import check_fit, check_size
from stages.posteriors import PosteriorCache
from videodiff import config as configs
from videodiff.batch import Condition, VideoBatch
from videodiff.config import Config, operational
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.loss import DiffusionLoss
from videodiff.diffusion.prediction import Prediction, check_pair
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.diffusion.times import LossHistory
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.model_folder import carry, write_weights
from videodiff.networks.control import ControlledUNet
from videodiff.networks.prompted import PromptedUNet
from videodiff.networks.unet import UNet
from videodiff.networks.work import count
from videodiff.parts import DESCRIPTION, EXTRAS, STAGES, DiffusionPart, File, ModelConfig, Sampling
from videodiff.seeding import generator, normals, uniforms
from videodiff.training.distributed import device
from videodiff.training.engine import EngineConfig
from videodiff.training.task import LossOutput
from videodiff.training.trainer import RunConfig
from videodiff.video_io import contact_sheet, write_png


class StageConfig(Config):
    """What every stage's YAML holds: the run, its data, the engine, and the model it stands on."""

    run: RunConfig
    data: DataConfig
    engine: EngineConfig = EngineConfig()
    model: str | None = None

    takes_buckets: ClassVar[bool] = False  # whether clips may have several shapes

    @model_validator(mode="after")
    def _one_shape(self) -> StageConfig:
        if self.data.buckets and not self.takes_buckets:
            raise ValueError("data.buckets: this stage needs clips of one shape; leave it out")
        return self

    @model_validator(mode="after")
    def _learns_to_the_end(self) -> StageConfig:
        end = self.engine.decay_steps
        if end is not None and self.run.steps > end:
            raise ValueError(
                f"run.steps is {self.run.steps}, but at engine.decay_steps={end} the learning rate is zero, and "
                f"nothing is learned from there on; set engine.decay_steps={self.run.steps}"
            )
        return self


class Dropout(Config):
    """Probabilities of dropping conditions in training: the text alone, the image alone, both together.

    Guidance with two scales needs the network to know X(0), X(I) and X(I,p) (Emu Video, eq. 1).
    """

    text: float = Field(0.1, ge=0, le=1)
    image: float = Field(0.05, ge=0, le=1)
    both: float = Field(0.05, ge=0, le=1)

    @model_validator(mode="after")
    def _leave_something(self) -> Dropout:
        if self.text + self.image + self.both > 1 + 1e-9:
            raise ValueError("text, image and both are shares of the same samples and add up to more than 1; lower one")
        return self

    def draw(self, seed: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(text dropped [B] bool, image dropped [B] bool) of the samples with these global numbers."""
        u = uniforms(seed, "condition-dropout", numbers)
        text, image = u < self.text, (u >= self.text) & (u < self.text + self.image)
        both = (u >= self.text + self.image) & (u < self.text + self.image + self.both)
        return text | both, image | both


class DenoisingStageConfig(StageConfig):
    """What the YAMLs share of all stages that train by denoising."""

    loss: DiffusionLoss = DiffusionLoss()
    dropout: Dropout = Dropout()
    latent_cache_gib: float = operational(1.0, ge=0, description="encoded frames kept in the memory of each rank")
    activation_checkpointing: bool = operational(False, description="less memory for about a third more computation")


class DiffusionStageConfig(DenoisingStageConfig):
    """What the YAMLs share of the stages that are sampled by themselves.

    init_from: a run, checkpoint or model whose weights of this stage are the start; nothing else of it is taken.
    """

    init_from: str | None = None
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _says_what_can_be_sampled(self) -> DiffusionStageConfig:
        """Where the YAML says all of it, what does not go together is refused before a model is opened."""
        schedule, prediction, network = (getattr(self, name, None) for name in ("schedule", "prediction", "network"))
        if schedule is not None and prediction is not None:
            check_pair(prediction, schedule)
        if schedule is not None and network is not None:
            self.sampling.sampler.check(schedule, network.variance)
        return self


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
    """Trains a network by denoising; frozen autoencoder and text tower stay outside of it.

    known_slots: T -> frames whose clean latents are given (image (), video (0,), interpolation (0,k,2k,...)).
    trainable: which parameters of the network get gradients, by name.
    """

    part_class: type[DiffusionPart] = DiffusionPart

    def __init__(
        self,
        stage: str,
        base: Model,
        network: UNet | ControlledUNet | PromptedUNet,
        part: dict[str, Any],
        known_slots: Callable[[int], Sequence[int]],
        trainable: Callable[[str], bool],
        config: DenoisingStageConfig,
    ) -> None:
        self.stage, self.base, self.module = stage, base, network
        self.part, self.known_slots, self._trainable = part, known_slots, trainable
        self.schedule: NoiseSchedule = part["schedule"]
        self.prediction: Prediction = part["prediction"]
        sampler = part["sampling"].sampler
        self.check()
        divisor = self.base.autoencoder.factor * network.config.divisor if config.data.buckets else 1
        for side in {side for bucket in config.data.buckets for side in (bucket.height, bucket.width)}:
            check_size(side, divisor, "the autoencoder's factor x the network's", "data.buckets")
        check_pair(self.prediction, self.schedule)
        sampler.check(self.schedule, network.config.variance)
        if config.loss.levels is not None:
            raise UserError(
                f"loss.levels: {config.loss.levels} grey levels are a matter of pixels; leave it out for latents"
            )
        network.checkpointing = config.activation_checkpointing
        self.loss_function, self.dropout = config.loss, config.dropout
        importance = config.loss.importance
        self.history = LossHistory(importance, self.schedule.num_steps) if importance is not None else None
        self.autoencoder, self.text = base.autoencoder.to(device()), base.text.to(device())
        self._operations: dict[tuple[int, int, int], float] = {}
        self.posteriors = PosteriorCache(self.autoencoder, int(config.latent_cache_gib * 2**30))

    def check(self) -> None:
        """Refuse (UserError) a network that can't be trained on this model and size."""
        check_fit(self.base, self.module.config, self.part["size"])

    def trains(self, name: str) -> bool:
        return self._trainable(name)

    def latents(self, batch: VideoBatch, seed: int) -> Tensor:
        """A posterior sample of each clip, [B,C,T,H,W] float32, drawn by the sample's own number."""
        if batch.encoded is None:
            mean, std = self.posteriors(batch.frames)
        else:
            mean, std = (part.to(device()).float() for part in (batch.encoded.mean, batch.encoded.std))
        return mean + std * normals(tuple(mean.shape[1:]), seed, "posterior", batch.numbers).to(mean.device)

    def condition(self, batch: VideoBatch, latents: Tensor, seed: int = 0, sampling: bool = False) -> Condition:
        """What the network is told of the batch, nothing dropped: `seed` is for what is drawn in it, and when it is
        sampled that may be otherwise."""
        condition = self._told(batch)
        slots = self.known_slots(latents.shape[2])
        return with_known(condition, latents, slots) if slots else condition

    @torch.no_grad()
    def _told(self, batch: VideoBatch) -> Condition:
        """The text alone: encoded now, or as it was encoded before."""
        if (given := batch.encoded) is None:
            return self.text.encode(list(batch.captions)).condition(batch.fps)
        null = (tokens.expand(len(batch), -1, -1) for tokens in self.no_text.null_text)
        text = tuple(tokens.to(device()).float() for tokens in given.text)
        pooled = None if given.pooled is None else given.pooled.to(device()).float()
        return Condition(text, given.text_mask, pooled, fps=batch.fps, null_text=tuple(null)).to(device())

    @cached_property
    @torch.no_grad()
    def no_text(self) -> Condition:
        """What the text tower says of no text, [1,L,D]."""
        return self.text.encode([""]).condition(torch.ones(1))

    def frames(self, latents: Tensor, batch: VideoBatch) -> Tensor:
        """uint8 [B,T,H,W,3] of latents that were made as the batch's."""
        return self.autoencoder.decode_clip(latents)

    def loss(self, module: Callable[..., Tensor], batch: VideoBatch, seed: int) -> LossOutput:
        x0 = self.latents(batch, seed)
        condition = self.condition(batch, x0, seed).drop(*self.dropout.draw(seed, batch.numbers))
        t, weight = self.loss_function.draw_times(self.schedule, seed, batch.numbers, self.history)
        eps = self.loss_function.draw_noise(tuple(x0.shape[1:]), seed, batch.numbers).to(x0.device)
        losses = self.loss_function(self._denoiser(module), x0, eps, t.to(x0.device), condition)
        seen = None
        if self.history is not None:
            known = losses.detach().cpu().double().where(batch.weight.cpu() > 0, torch.nan)  # nothing of a bad clip
            seen = torch.stack([t.double(), known], dim=1)
        return LossOutput(losses * weight.to(losses), tallies=self._by_quarter(losses, t, batch.weight), seen=seen)

    def _by_quarter(self, losses: Tensor, t: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Sum and number of the losses in each quarter of the times, the first the least noisy; bad clips left out."""
        quarter = (t.cpu() * 4 // self.schedule.num_steps).long()
        values = losses.detach().cpu().double()
        counts = [((quarter == i) & (weight.cpu() > 0)) for i in range(4)]
        return {f"loss_quarter_{i + 1}": torch.stack([values[c].sum(), c.sum().double()]) for i, c in enumerate(counts)}

    def operations(self, batch: VideoBatch) -> float | None:
        """Counted on the meta device, once for each shape of clips; encoding pictures and text is left out."""
        if not isinstance(self.module, UNet):
            return None
        frames, height, width = self._latent_shape(batch)
        if (key := (frames, height, width)) not in self._operations:
            with torch.device("meta"):
                network = UNet(self.module.config)
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(self.trains(name))
            work = count(network, frames, height, width, torch.bfloat16)
            self._operations[key] = work.forward + work.backward
        return self._operations[key] * len(batch)

    def _latent_shape(self, batch: VideoBatch) -> tuple[int, int, int]:
        if batch.encoded is not None:
            frames, height, width = batch.encoded.mean.shape[2:]
            return frames, height, width
        factor = self.autoencoder.factor
        return batch.frames.shape[1], batch.frames.shape[2] // factor, batch.frames.shape[3] // factor

    def after_step(self, seen: Tensor) -> None:
        """Take in (t, loss) [batch, 2] of the step's samples."""
        if self.history is not None:
            self.history.update(seen[:, 0], seen[:, 1])

    def state(self) -> dict[str, Tensor]:
        return {} if self.history is None else self.history.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self.history is not None:
            self.history.load_state(state)

    def _denoiser(self, module: Callable[..., Tensor]) -> Denoiser:
        dtype, variance = next(self.module.parameters()).dtype, self.module.config.variance
        return Denoiser(module, self.schedule, self.prediction, dtype, variance)

    @torch.no_grad()
    def sample(self, module: nn.Module, batch: VideoBatch, folder: Path, step: int) -> None:
        """A contact sheet of generated clips above the real ones, with fixed noise so that steps compare."""
        batch = batch.select(slice(8))
        x0 = self.latents(batch, seed=0)
        condition = self.condition(batch, x0, sampling=True)
        # Each row's noise and what a random sampler adds at its steps come from one generator, and so are independent.
        generators = [generator(0, "sample", int(number)) for number in batch.numbers]
        made = self._made(module, condition, x0.shape[1:], generators)
        rows = [self.frames(latents, batch).cpu().numpy() for latents in (made, x0)]
        keep = range(0, x0.shape[2], max(1, x0.shape[2] // 8))
        pictures = [clips[i, k] for i in range(len(batch)) for clips in rows for k in keep]
        labels = [
            f"{name}: {caption}" if k == 0 else ""
            for caption in batch.captions for name in ("made", "real") for k in keep
        ]  # fmt: skip
        columns = len(keep) if len(keep) > 1 else 8
        write_png(folder / f"step-{step:08d}.png", contact_sheet(pictures, columns=columns, labels=labels))

    def _made(
        self, module: Callable[..., Tensor], condition: Condition, shape: Sequence[int], by: Sequence[torch.Generator]
    ) -> Tensor:
        """Latents [B,*shape] by the stage's own sampler."""
        sampling: Sampling = self.part["sampling"]
        noise = torch.stack([torch.randn(tuple(shape), generator=own) for own in by]).to(device())
        return sampling.sampler(sampling.guidance(self._denoiser(module), condition), noise, self.schedule, by)

    def export(self, state: dict[str, Tensor], folder: Path, file: str) -> None:
        def part(weights: File) -> DiffusionPart:
            return self.part_class(**self.part, weights=weights)

        write_part(self.stage, self.base, folder, file, state, part)


def write_part(
    stage: str,
    base: Model | None,
    folder: Path,
    file: str,
    state: dict[str, Tensor],
    part: Callable[[File], Config],
) -> None:
    """Write weights of `stage` into a model folder and describe them: first the averaged ones, then the raw ones."""
    weights = write_weights(folder, file, state)
    description = folder / DESCRIPTION
    if not description.is_file():
        model = carry(stages_before(base, stage), folder) if base is not None else ModelConfig()
        model = model.model_copy(update={stage: part(weights)})
    else:
        model = configs.load(ModelConfig, description)
        named = getattr(model, stage)
        field = "raw" if file.startswith("raw") else "weights"
        model = model.model_copy(update={stage: named.model_copy(update={field: weights})})
    configs.save(model, description)


def stages_before(base: Model, stage: str) -> Model:
    """What `stage` stands on: later stages, and what stands beside the road, were trained on top of another one than
    this; beside the road, only the part itself gives way."""
    later = dict.fromkeys((stage,) if stage in EXTRAS else (*STAGES[STAGES.index(stage) :], *EXTRAS))
    return Model(base.folder, base.config.model_copy(update=later), base.weights)
