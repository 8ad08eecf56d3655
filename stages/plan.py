"""Knowing before you pay: what a stage's training takes, from its configuration alone, on the meta device.

Nothing is allocated and no weights are read. Memory is what the engine holds by ZeRO's formulas (Rajbhandari et al.,
2020) with our dtypes and the average in fp32, what autograd keeps between the passes, and DeepSpeed's buffers; work is
counted in multiply-adds of linear layers, convolutions and attention, two operations each, with a backward pass of once
that for the input and once for the weights that train.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from stages.assemble import load_stage
from stages.base import DenoisingStageConfig
from stages.fits import check_size, told_text
from stages.image import ImageStage
from stages.image_prompt import ImagePromptStage
from stages.interpolation import InterpolationStage
from stages.video import VideoStage
from videodiff import config as configs
from videodiff.errors import UserError
from videodiff.model import Model, find
from videodiff.networks.unet import UNet, UNetConfig, is_temporal
from videodiff.networks.work import TOKENS, Work, count
from videodiff.parts import DESCRIPTION, ModelConfig
from videodiff.training.engine_config import EngineConfig, bucket

USABLE = 0.94  # of a GPU's memory: the rest is the context, kernels and what fragments
LIVE = 1_000_000_000  # gathered values that DeepSpeed's stage 3 keeps at most, by default
SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
FACTOR = 8  # pixels a latent position, where no model says


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU; `host`: in the memory of its node besides."""

    states: float
    activations: float
    buffers: float
    encoders: float
    host: float

    @property
    def total(self) -> float:
        return self.states + self.activations + self.buffers + self.encoders


@dataclass(frozen=True)
class Plan:
    """What a configuration takes on `gpus` GPUs; `memory` by ZeRO stage."""

    stage: str
    parameters: int
    trained: int
    gpus: int
    micro_batch: int
    accumulation: int
    work: Work
    memory: dict[int, Memory]
    communication: dict[int, float]
    step_operations: float
    latent_positions: int
    pixel_bytes: int
    notes: tuple[str, ...]


def plan(path: Path, overrides: Sequence[str], gpus: int) -> Plan:
    """Plan the training of a diffusion stage; UserError for a batch that the GPUs do not divide, or another stage."""
    config = load_stage(path, overrides)
    if not isinstance(config, (ImageStage, VideoStage, InterpolationStage)):
        raise UserError(
            f"{path}: plans are made for the stages image, video and interpolation; name one of their YAMLs"
        )
    notes: list[str] = []
    base = _model(config.model)
    network_config = _network(config, path, base)
    with torch.device("meta"):
        network = UNet(network_config)
    network.checkpointing = config.activation_checkpointing
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(_trains_all(config) or is_temporal(name))
    parameters = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    factor = FACTOR if base is None or base.config.autoencoder is None else base.config.autoencoder.network.factor
    if base is None:
        notes.append(
            f"model={config.model} is not there yet: {FACTOR} pixels a latent position, {TOKENS} text tokens, and its "
            "autoencoder and text towers are not counted"
        )
    if config.data.buckets:
        notes.append("data.buckets are not looked at: planned is data.frames x data.size")
    notes.append("what encoding pictures and text takes is not counted; encoded shards need none of it")
    frames = 1 if isinstance(config, ImageStage) else config.data.frames
    check_size(config.data.size, factor * network_config.divisor, "the autoencoder's factor x the network's")
    side = config.data.size // factor
    frozen = _encoders(base)
    micro_batch, accumulation = config.engine.shares(config.data.batch_size, gpus)
    try:
        config.data.check_ranks(gpus)
    except UserError as error:
        notes.append(f"no run begins like this: {error}")
    work = count(network, frames, side, side, config.engine.dtype)
    memory = {
        stage: Memory(
            states(parameters, trained, gpus, config.engine, stage),
            work.kept * micro_batch,
            buffers(parameters, trained, config.engine, stage),
            frozen,
            host(parameters, trained, gpus, config.engine, stage),
        )
        for stage in range(4)
        if stage > 0 or config.engine.precision == "fp32"
    }
    repeated = work.forward if config.activation_checkpointing else 0.0
    return Plan(
        stage=config.stage,
        parameters=parameters,
        trained=trained,
        gpus=gpus,
        micro_batch=micro_batch,
        accumulation=accumulation,
        work=work,
        memory=memory,
        communication={
            stage: communication(parameters, trained, gpus, config.engine, stage, accumulation) for stage in memory
        },
        step_operations=(work.forward + work.backward + repeated) * config.data.batch_size,
        latent_positions=frames * side * side,
        pixel_bytes=frames * config.data.size**2 * 3,
        notes=tuple(notes),
    )


def states(parameters: int, trained: int, ranks: int, config: EngineConfig, stage: int) -> float:
    """Bytes of parameters, gradients, masters, moments and average on each GPU, `parameters` with the frozen ones.

    Stage 0 has no masters beside the parameters. Stage 1 shards masters, moments and average (4 + 8 + 4 bytes a trained
    parameter), 2 the gradients too, 3 the parameters too, frozen ones as well. With the optimizer offloaded what is
    sharded lies in the CPU's memory, see `host`, but for the sums of gradients at stages 1 and 2 in half precision.
    """
    size, gradient = SIZE[config.precision], SIZE[config.accumulation_dtype]
    if stage == 0:
        return 4 * parameters + (4 + 8 + 4) * trained
    shared = 0 if config.offload_optimizer else (4 + 8 + 4) * trained / ranks
    partition = gradient * trained / ranks
    if config.offload_optimizer:
        if stage == 3 or not _adds_up_apart(config):
            partition = 0
        shared += partition if stage == 1 else 0
    if stage == 1:
        # Over micro-steps gradients in half precision add up beside those of the module, which stay.
        own = size * trained if _adds_up_apart(config) else 0
        return size * parameters + gradient * trained + own + shared
    if stage == 2:
        return size * parameters + partition + shared
    return (0 if config.offload_parameters else size * parameters / ranks) + partition + shared


def _adds_up_apart(config: EngineConfig) -> bool:
    """Whether gradients in half precision add up in fp32."""
    return config.precision != "fp32" and config.accumulation_dtype == "fp32"


def _adds_up_beside(config: EngineConfig) -> bool:
    """Whether DeepSpeed's optimizer of its own for bf16 at stage 1 is at work."""
    return config.precision == "bf16" and _adds_up_apart(config) and not config.offload_optimizer


def host(parameters: int, trained: int, ranks: int, config: EngineConfig, stage: int) -> float:
    """Bytes of what is offloaded, for each GPU in the memory of its node.

    Masters, moments, average and the gradients that AdamW gets; the sums of gradients where they are not on the GPU; at
    stages 1 and 2 the new parameters on their way back.
    """
    if stage == 0 or not config.offload_optimizer:
        offloaded = 0.0
    else:
        sums = SIZE[config.accumulation_dtype] if stage == 3 or not _adds_up_apart(config) else 0
        back = SIZE[config.precision] if stage < 3 else 0
        offloaded = (4 + 8 + 4 + 4 + sums + back) * trained / ranks
    if stage == 3 and config.offload_parameters:
        offloaded += SIZE[config.precision] * parameters / ranks
    return offloaded


def buffers(parameters: int, trained: int, config: EngineConfig, stage: int) -> float:
    """Bytes of DeepSpeed's buffers: gradients on their way, two in turn; at stage 3 gathered parameters."""
    travelling = SIZE[config.communication_dtype] * bucket(trained)
    if stage == 0:
        return float(travelling)
    gathered = SIZE[config.precision] * min(LIVE, parameters) if stage == 3 else 0
    return 2.0 * travelling + gathered


def communication(
    parameters: int, trained: int, ranks: int, config: EngineConfig, stage: int, accumulation: int = 1
) -> float:
    """Bytes that each rank sends in a step of `accumulation` micro-steps.

    Stages 0 and 1 reduce gradients once (stage 0, and 1 in bf16, to all ranks: twice the bytes), 2 and 3 in every
    micro-step; then trained parameters are gathered, at stage 3 instead all of them in each forward and backward pass.
    """
    share = (ranks - 1) / ranks
    gradient = SIZE[config.communication_dtype] * trained * share
    size = SIZE[config.precision]
    if stage == 0:
        return 2 * gradient
    if stage == 1:
        return (2 if _adds_up_beside(config) else 1) * gradient + size * trained * share
    if stage == 2:
        return accumulation * gradient + size * trained * share
    return accumulation * (gradient + 2 * size * parameters * share)


def _model(name: str | None) -> Model | None:
    """The model that a stage stands on, if it is there; its files are not read."""
    if name is None:
        return None
    try:
        folder = find(name)
    except UserError:
        return None
    return Model(folder, configs.load(ModelConfig, folder / DESCRIPTION))


def _trains_all(config: DenoisingStageConfig) -> bool:
    """Whether the spatial layers are trained too."""
    if isinstance(config, VideoStage):
        return not config.freeze_spatial
    return isinstance(config, ImageStage) or (isinstance(config, InterpolationStage) and config.network is not None)


def _network(config: DenoisingStageConfig, path: Path, base: Model | None) -> UNetConfig:
    """The network of a stage: its own, or that of the stage before, from the model or from the YAML that makes it."""
    if isinstance(config, ImageStage):
        return _told_text(config.network, base)
    if isinstance(config, InterpolationStage) and config.network is not None:
        return _told_text(config.network, base).model_copy(update={"known_channels": True})
    if base is not None:
        before = base.config.video if isinstance(config, InterpolationStage) else base.config.image
        if before is not None:
            return _with_time(config, before.network)
    for other in sorted(path.parent.glob("*.y*ml")):
        try:
            earlier = load_stage(other)
        except UserError:
            continue
        if not isinstance(earlier, (ImageStage, ImagePromptStage, VideoStage, InterpolationStage)):
            continue
        beside = isinstance(earlier, ImageStage) and earlier.model == config.model  # both on one imported model
        if earlier.run.dir == config.model or beside:
            return _with_time(config, _network(earlier, other, _model(earlier.model)))
    raise UserError(
        f"{path}: model={config.model} is not there, and no YAML in {path.parent} makes it; name a model or a run"
    )


def _told_text(network: UNetConfig, base: Model | None) -> UNetConfig:
    """The network with the text towers' widths where its own are left out, from the description alone if it tells."""
    if network.context_dims or base is None or base.config.text is None:
        return network
    text = base.config.text
    if text.network.pretrained is not None or text.further:
        return told_text(network, base)
    return network.model_copy(update={"context_dims": (text.network.width,), "pooled_dim": text.network.embed_dim})


def _encoders(base: Model | None) -> float:
    """Bytes in float32 of the frozen autoencoder and text towers, told from the heads of their files."""
    if base is None:
        return 0.0
    parts = [part for part in (base.config.autoencoder, base.config.text) if part is not None]
    files = [part.weights for part in (*parts, *(base.config.text.further if base.config.text else ()))]
    total = 0
    for file in files:
        if file.name.endswith(".safetensors"):
            with safe_open(base.folder / file.name, "pt") as opened:
                total += sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())  # noqa: SIM118
    return 4.0 * total


def _with_time(config: DenoisingStageConfig, network: UNetConfig) -> UNetConfig:
    if isinstance(config, VideoStage):
        return network.model_copy(update={"temporal": config.temporal, "known_channels": config.first_image})
    return network
