"""Stage autoencoder: frames to latents and back, one frame at a time (Rombach et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from data_pipeline.loader import ShardSource
from stages.base import StageConfig, check_size, write_part
from videodiff.batch import VideoBatch
from videodiff.errors import UserError
from videodiff.model import AutoencoderPart, Model
from videodiff.networks.autoencoder import Autoencoder, AutoencoderConfig, AutoencoderLoss, crops, to_float
from videodiff.seeding import normals, uniforms
from videodiff.training.trainer import LossOutput
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

    def trains(self, name: str) -> bool:
        return not self._given or name.startswith("decoder.")

    def loss(self, module: Callable[..., tuple[Tensor, Tensor, Tensor]], batch: VideoBatch, seed: int) -> LossOutput:
        clips, count = batch.frames.shape[:2]
        weight = next(self.module.parameters())
        frames = to_float(batch.frames.to(weight.device))  # [B*T,3,H,W]
        if self.config.crop is not None:
            places = uniforms(seed, "crop", batch.numbers, (count, 3)).flatten(0, 1)
            frames = crops(frames, self.config.crop, self.module.factor, places)
        noise = normals((count, *self._latent_shape(frames)), seed, "posterior", batch.numbers).flatten(0, 1)
        reconstruction, mean, log_variance = module(frames.to(weight.dtype), noise.to(weight.device))
        per_frame, metrics = self.config.loss(reconstruction, frames, mean, log_variance)
        squared = (reconstruction.detach().float().clamp(-1, 1) - frames).square().mean((1, 2, 3)) / 4
        metrics["psnr"] = -10 * squared.clamp(min=1e-10).log10().mean()
        return LossOutput(per_sample=per_frame.unflatten(0, (clips, count)).mean(1), metrics=metrics)

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
