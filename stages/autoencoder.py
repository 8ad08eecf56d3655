"""Stage autoencoder: frames to latents and back, one frame at a time (Rombach et al., 2022).

The loss is latent diffusion's: error of the reconstruction, a perceptual distance, the latent's own term (KL, or that
of a codebook), and from some step on a discriminator.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from data_pipeline.loader import ShardSource
from stages.adversarial import Contest
from stages.base import StageConfig, write_part
from stages.fits import check_size
from videodiff.batch import VideoBatch
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    AutoencoderLoss,
    crops,
    kl_divergence,
    to_float,
)
from videodiff.networks.discriminator import DiscriminatorConfig
from videodiff.networks.perceptual import PerceptualConfig, load_perceptual
from videodiff.networks.quantizer import codebook_use
from videodiff.parts import AutoencoderPart
from videodiff.seeding import normals, uniforms
from videodiff.training.distributed import device, sum_over_ranks
from videodiff.training.task import Adversary, LossOutput
from videodiff.video_io import contact_sheet, write_png


class AutoencoderStage(StageConfig):
    """`videodiff train configs/demo/autoencoder.yaml`.

    With `model` it goes on from that model's autoencoder and trains the decoder alone: the latents stay what they are,
    and so does every stage that was trained on them.
    """

    stage: Literal["autoencoder"]
    network: AutoencoderConfig = AutoencoderConfig()
    loss: AutoencoderLoss = AutoencoderLoss()
    crop: PositiveInt | None = Field(None, description="side of the piece of each frame to train on; None: all of it")
    perceptual: PerceptualConfig | None = None
    discriminator: DiscriminatorConfig | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> AutoencoderStage:
        if self.network.quantizer is not None and self.loss.kl_weight not in (0, AutoencoderLoss().kl_weight):
            raise ValueError(
                f"loss.kl_weight {self.loss.kl_weight:g} weighs the KL divergence of a Gaussian latent, and with "
                "network.quantizer there is none; leave one of the two out"
            )
        if self.discriminator is None:
            return self
        if self.engine.zero_stage == 3:
            raise ValueError(
                "engine.zero_stage 3 keeps no whole parameters, and with a discriminator the gradient at the decoder's "
                "last layer is needed beside the engine; set engine.zero_stage to 0, 1 or 2, or discriminator to null"
            )
        name, size = ("data.size", self.data.size) if self.crop is None else ("crop", self.crop)
        if self.discriminator.patches(size) < 1:
            raise ValueError(
                f"discriminator.num_layers {self.discriminator.num_layers} leaves nothing of pictures of {name} "
                f"{size}, which must be at least {3 * 2**self.discriminator.num_layers}; lower num_layers"
            )
        return self


class AutoencoderTask:
    """Trains on single frames; a clip's loss is the mean over its frames."""

    CALIBRATION_FRAMES = 1024  # enough for the spread of a latent channel to within a few percent

    def __init__(self, config: AutoencoderStage, base: Model | None = None) -> None:
        self.config, self.network, self._given = config, config.network, {}
        if base is not None:
            self.network, self._given = base.autoencoder.config, base.state("autoencoder")
            if config.network not in (AutoencoderConfig(), self.network):
                raise UserError(f"network: differs from that of the autoencoder of {base.folder}; leave it out")
        self.module = Autoencoder(self.network)
        if base is not None:
            self.module.load_state_dict(self._given)
        factor = self.module.factor
        check_size(config.data.size, factor, "autoencoder's factor")
        if config.crop is not None and (config.crop % factor or config.crop > config.data.size):
            raise UserError(
                f"crop: {config.crop} is not a multiple of the autoencoder's factor {factor} up to data.size "
                f"{config.data.size}; use {factor}, for one, or leave it out"
            )
        self._calibration: Tensor | None = None
        given = config.perceptual
        self.perceptual = None if given is None else load_perceptual(given, config.data.size).to(device())
        self.contest = None if config.discriminator is None else Contest(config.discriminator, self.module)
        self.adversary: Adversary | None = None if self.contest is None else self.contest.adversary

    def trains(self, name: str) -> bool:
        return not self._given or name.startswith("decoder.")

    def loss(self, module: Callable[..., tuple[Tensor, ...]], batch: VideoBatch, seed: int) -> LossOutput:
        clips, count = batch.frames.shape[:2]
        like = next(self.module.parameters())
        frames = to_float(batch.frames.to(like.device))  # [B*T,3,H,W]
        if self.config.crop is not None:
            places = uniforms(seed, "crop", batch.numbers, (count, 3)).flatten(0, 1)
            frames = crops(frames, self.config.crop, self.module.factor, places, count)
        weight = batch.weight.to(like.device).repeat_interleave(count)
        contest = self.contest if self._contested(batch) else None
        noise = None
        if self.network.quantizer is None:
            noise = normals((count, *self._latent_shape(frames)), seed, "posterior", batch.numbers).flatten(0, 1)
            noise = noise.to(like.device)
        with contest.watched() if contest is not None else nullcontext() as hidden:
            made, *latent = module(frames.to(like.dtype), noise)
        # A tensor of its own, by which gradients can be asked for without the engine taking note.
        pictures = made.float().view_as(made)
        error = self.config.loss.error(pictures, frames)
        squared = (pictures.detach().clamp(-1, 1) - frames).square().mean((1, 2, 3)) / 4
        metrics = {"psnr": -10 * squared.clamp(min=1e-10).log10().mean(), "reconstruction": error.detach().mean()}
        if self.config.perceptual is not None and self.perceptual is not None:
            distance = self.perceptual(pictures, frames).float()
            metrics["perceptual"] = distance.detach().mean()
            error = error + self.config.perceptual.weight * distance
        losses = error + self._latent_term(latent, frames, weight, metrics)
        if contest is not None and hidden is not None:
            term, measured = contest.term(pictures, error, weight, hidden[0])
            losses, metrics = losses + term, {**metrics, **measured}
        return LossOutput(
            per_sample=losses.unflatten(0, (clips, count)).mean(1),
            metrics=metrics,
            adversary=None if contest is None else contest.against(frames, pictures, clips),
        )

    def _latent_term(self, latent: list[Tensor], frames: Tensor, weight: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """[N]: weighted KL of a Gaussian latent, or the loss of codebook and commitment; adds to `metrics`."""
        if self.module.quantizer is None:
            kl = kl_divergence(*latent)
            metrics["kl"] = kl.detach().mean()
            return self.config.loss.divergence(kl, frames)
        raw, code, indices = latent
        quantization = self.module.quantizer.loss(raw, code)
        # Over the frames of all ranks: a rank's few would never use a large codebook.
        size = self.module.quantizer.config.codebook_size  # of the codebook itself, ZeRO 3 leaves a rank its share
        counts = torch.bincount(indices[weight > 0].flatten(), minlength=size)
        perplexity, used = codebook_use(sum_over_ranks(counts))
        metrics |= {"quantization": quantization.detach().mean(), "perplexity": perplexity, "codes_used": used}
        return quantization

    def _contested(self, batch: VideoBatch) -> bool:
        """Whether the discriminator has joined in the step that this batch belongs to."""
        if self.config.discriminator is None:
            return False
        return int(batch.numbers[0]) // self.config.data.batch_size >= self.config.discriminator.start

    @torch.no_grad()
    def sample(self, module: nn.Module, batch: VideoBatch, folder: Path, step: int) -> None:
        """Originals above their reconstructions."""
        assert isinstance(module, Autoencoder)
        real = batch.frames[:16, :1]
        made = module.decode_clip(module.encode_clip(real.to(next(module.parameters()).device)).mean).cpu()
        pictures = [picture.numpy() for picture in (*real[:, 0], *made[:, 0])]
        write_png(folder / f"step-{step:08d}.png", contact_sheet(pictures, columns=len(real)))

    def export(self, state: dict[str, Tensor], folder: Path, file: str) -> None:
        network = Autoencoder(self.network)
        network.load_state_dict({**self._given, **state})
        if not self._given:
            network.set_latent_statistics(*self._latent_statistics(network))
        write_part(
            "autoencoder",
            None,
            folder,
            file,
            network.state_dict(),
            lambda weights: AutoencoderPart(network=self.network, weights=weights),
        )

    @torch.no_grad()
    def _latent_statistics(self, network: Autoencoder) -> tuple[Tensor, Tensor]:
        """Mean and deviation [C] of raw latents over the run's first samples (the same ones at every save)."""
        if self._calibration is None:
            # A source of its own: the run's is being read by another thread, that of training.
            alone = self.config.data.model_copy(update={"workers": 0, "prefetch": 0, "cache_gib": 0.0})
            size, frames = alone.batch_size, alone.frames
            batches = ShardSource(alone, self.config.run.seed).batches(0, 0, 1, size)
            count = -(-self.CALIBRATION_FRAMES // (size * frames))
            chosen = [batch.frames[batch.weight > 0] for batch in islice(batches, count)]
            self._calibration = torch.cat(chosen)
        posterior = network.encode_clip(self._calibration)
        mean = posterior.mean.mean((0, 2, 3, 4))
        spread = posterior.mean.transpose(0, 1).flatten(1).var(1) + posterior.std.square().mean((0, 2, 3, 4))
        return mean, spread.sqrt()

    def _latent_shape(self, frames: Tensor) -> tuple[int, int, int]:
        height, width = (side // self.module.factor for side in frames.shape[2:])
        return self.network.latent_channels, height, width
