"""Forward, backward, step, fp32 master weights, save and load. DeepSpeed behind it, nothing of it in front.

The only importer of deepspeed, and only when an engine is made: `import videodiff...engine` stays light.
ZeRO: Rajbhandari et al., 2020 (stage 1 shards optimizer state and master weights over the ranks, stage 2 gradients
too, stage 3 parameters too).
"""

import contextlib
import copy
import hashlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from videodiff.config import Config, operational
from videodiff.errors import UserError
from videodiff.training.distributed import device, rank, start, world

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FOLDER = "engine"


class EngineConfig(Config):
    """How a module is optimized. `micro_batch` is per rank and forward pass; None takes the rank's whole share."""

    zero_stage: Literal[0, 1, 2, 3] = operational(1)
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    micro_batch: PositiveInt | None = operational(None)
    learning_rate: float = Field(1e-4, ge=0)
    warmup_steps: int = Field(0, ge=0)
    decay: Literal["constant", "cosine"] = "constant"
    decay_steps: PositiveInt | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)
    gradient_clip: float = Field(1.0, ge=0)
    ema_decay: float = Field(0.9999, ge=0, le=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "EngineConfig":
        if self.precision != "fp32" and self.zero_stage == 0:
            raise ValueError(f"precision {self.precision} needs zero_stage 1, 2 or 3, with one process too; set one")
        if (self.decay == "cosine") != (self.decay_steps is not None):
            raise ValueError("decay cosine and decay_steps (the step where it reaches zero) go together; set both")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; both must lie in [0, 1)")
        return self

    @property
    def dtype(self) -> torch.dtype:
        """What the module computes in."""
        return DTYPES[self.precision]

    def rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0): linear warm-up, then constant or half a cosine down to zero."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.decay_steps is None:
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, self.decay_steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def accumulation(self, batch_size: int, num_ranks: int) -> tuple[int, int]:
        """(micro batch, micro-steps per step) that make the global batch; UserError when it can't be divided so."""
        if batch_size % num_ranks:
            raise UserError(
                f"data.batch_size={batch_size} can't be shared by {num_ranks} processes; make it a multiple of them"
            )
        share = batch_size // num_ranks
        micro_batch = self.micro_batch or share
        if share % micro_batch:
            raise UserError(
                f"engine.micro_batch={micro_batch} does not divide the {share} samples of a process "
                f"(batch {batch_size} on {num_ranks}); take a divisor of {share}"
            )
        return micro_batch, share // micro_batch


@dataclass(frozen=True)
class StepResult:
    """applied: False when gradients were not finite and every rank skipped the step. grad_norm: before clipping."""

    applied: bool
    grad_norm: float


@dataclass(frozen=True)
class _Piece:
    """Where a part of a parameter lies in this rank's master tensors: masters[master][offset : offset + length]."""

    start: int  # of the part in the flattened parameter
    length: int
    master: int
    offset: int


class Engine:
    """A module in training: parameters in `config.precision`, fp32 master weights and AdamW moments, sharded by ZeRO.

    The module is converted in place and moved to the device. `trains(name)` says which parameters train; the others
    lose `requires_grad`, are in no optimizer group and in no saved file. All collective: every rank calls alike.
    """

    def __init__(self, module: nn.Module, config: EngineConfig, trains: Callable[[str], bool], batch_size: int) -> None:
        start()
        self.config = config
        self.micro_batch, self.accumulation = config.accumulation(batch_size, world())
        if config.precision == "fp16" and device().type == "cpu":
            raise UserError("engine.precision=fp16: a CPU has no fp16 training; use bf16 or fp32")
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trains(name))
            parameter.data = parameter.data.contiguous()  # ZeRO flattens; memory formats do not survive that
        _take_from_first(module)
        self._shapes = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
        if not self._shapes:
            raise UserError("no parameter of the module trains; check what the stage freezes")
        self.frozen_digest = _digest(module)
        # Rank 0 keeps the module as it came: buffers and frozen layers in full precision, for export and sampling.
        self._original = copy.deepcopy(module) if rank() == 0 else None
        weights = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        module.to(device())
        self._deepspeed: Any = _wrap(module, config, self.micro_batch, self.accumulation)
        self._parameters = {name: p for name, p in module.named_parameters() if name in self._shapes}
        self._pieces = {name: self._locate(p, self._shapes[name]) for name, p in self._parameters.items()}
        self._fill_masters(weights)
        self._micro_steps = 0

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """The module's forward pass."""
        return self._deepspeed(*inputs, **keywords)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, averaged over the ranks, to those of the step. `accumulation` calls a step."""
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        self._micro_steps += 1
        if self._micro_steps < self.accumulation:
            self._deepspeed.step()

    def step(self, learning_rate: float) -> StepResult:
        """Clip, update, clear the gradients. Not finite anywhere: nobody updates anything."""
        if self._micro_steps != self.accumulation:
            raise RuntimeError(f"step after {self._micro_steps} of {self.accumulation} backward passes")
        self._micro_steps = 0
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.config.zero_stage == 0:
            return self._plain_step()
        self._deepspeed.step()
        applied = bool(self._deepspeed.was_step_applied())
        norm = self._deepspeed.get_global_grad_norm()
        return StepResult(applied, float(norm) if applied and norm is not None else math.inf)

    def masters(self) -> list[Tensor]:
        """This rank's fp32 master weights, as flat fragments: what the moving average follows."""
        optimizer, stage = self._deepspeed.optimizer, self.config.zero_stage
        if stage == 0:
            return [parameter.data for parameter in self._parameters.values()]
        if stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        if stage == 1 and self.config.precision == "bf16":  # DeepSpeed has an optimizer of its own for this pair
            return [partition.detach() for partition in optimizer.fp32_groups_flat_partition]
        return list(optimizer.single_partition_of_fp32_groups)

    @torch.no_grad()
    def gather(self, values: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """Whole tensors from fragments laid out like `masters()`: fp32 by parameter name on rank 0's CPU, else None."""
        state = {}
        for name, shape in self._shapes.items():
            whole = torch.zeros(shape.numel(), dtype=torch.float32, device=values[0].device)
            for piece in self._pieces[name]:
                part = values[piece.master].reshape(-1)[piece.offset : piece.offset + piece.length]
                whole[piece.start : piece.start + piece.length] = part
            if world() > 1:  # every element has one owner, the others add zeros
                dist.reduce(whole, 0)
            if rank() == 0:
                state[name] = whole.view(shape).cpu()
        if self._original is None:
            return None
        parameters = {name for name, _ in self._original.named_parameters()}
        buffers = {name: value for name, value in self._original.state_dict().items() if name not in parameters}
        return {**state, **buffers}

    def network(self, state: dict[str, Tensor]) -> nn.Module:
        """A copy of the module for inference with the gathered weights `state`, on the device. Rank 0 only."""
        assert self._original is not None
        network = copy.deepcopy(self._original)
        network.load_state_dict(state, strict=False)  # the frozen parameters are the original's already
        return network.to(device(), self.config.dtype).requires_grad_(False).eval()

    def checkpoint_bytes(self) -> int:
        """About how much a checkpoint takes on disk, over all ranks: engine, moving average, two exports."""
        assert self._original is not None
        trained = sum(shape.numel() for shape in self._shapes.values())
        return trained * (3 * 4 + self.config.dtype.itemsize + 4 + 2 * 4)

    def save(self, folder: Path) -> None:
        """Write masters, moments and loss scale of all ranks into folder/engine."""
        # The version entry is what DeepSpeed's converter to another number of ranks asks for.
        client_state = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
        self._deepspeed.save_checkpoint(
            str(folder), tag=FOLDER, client_state=client_state, save_latest=False, exclude_frozen_parameters=True
        )
        if rank() == 0:  # DeepSpeed leaves copies of its conversion scripts there: code has no place in a checkpoint
            for script in folder.glob("zero_to_*.py"):
                script.unlink()

    def load(self, folder: Path) -> None:
        """Read what `save` wrote with the same ranks, stage and precision, into an engine that has not stepped yet.

        DeepSpeed's files are pickles: only ever load a folder that this run wrote.
        """
        with _quiet():
            path, _ = self._deepspeed.load_checkpoint(str(folder), tag=FOLDER, load_module_strict=False)
        if path is None:
            raise UserError(f"{folder / FOLDER}: DeepSpeed found no checkpoint there; remove {folder.name} and go on")

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self._deepspeed.destroy()

    def _plain_step(self) -> StepResult:
        """Stage 0: gradients are whole and already equal on all ranks, so that all of them decide alike."""
        parameters = [p for p in self._parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        applied = bool(norm.isfinite())
        if not applied:
            self._deepspeed.zero_grad()  # AdamW leaves a parameter without a gradient alone
        elif self.config.gradient_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.gradient_clip, norm)
        self._deepspeed.step()
        return StepResult(applied, float(norm) if applied else math.inf)

    def _locate(self, parameter: Any, shape: torch.Size) -> list[_Piece]:
        stage, optimizer = self.config.zero_stage, self._deepspeed.optimizer
        if stage == 0:
            if rank() > 0:  # all have the whole; when pieces are put together every element needs one owner
                return []
            index = next(i for i, p in enumerate(self._parameters.values()) if p is parameter)
            return [_Piece(0, shape.numel(), index, 0)]
        if stage == 3:
            master, offset, partition = optimizer.grad_position[optimizer.get_param_id(parameter)]
            first = partition * rank()
            length = min(partition, shape.numel() - first)
            return [_Piece(first, length, master, offset)] if length > 0 else []
        mapping = parameter._hp_mapping
        if mapping is None:  # no element of it belongs to this rank
            return []
        own, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
        return [_Piece(own.start, own.numel, mapping.param_group_index, flat.start)]

    @torch.no_grad()
    def _fill_masters(self, weights: dict[str, Tensor]) -> None:
        """DeepSpeed makes its fp32 masters from the rounded parameters; here they get the weights as they came."""
        masters = self.masters()
        for name, pieces in self._pieces.items():
            for piece in pieces:
                part = weights[name].reshape(-1)[piece.start : piece.start + piece.length]
                masters[piece.master].view(-1)[piece.offset : piece.offset + piece.length] = part.to(masters[0].device)


def _wrap(module: nn.Module, config: EngineConfig, micro_batch: int, accumulation: int) -> Any:
    if device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    if device().index is not None:  # DeepSpeed takes it for the number of the GPU
        os.environ["LOCAL_RANK"] = str(device().index)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls torch by names that torch has deprecated: every step, and nothing that a user could mend.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # On a CPU DeepSpeed would compile a shared-memory op here for minutes, and look for compilers to list what else it
    # could build. Nothing of ours needs any of it.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    with _quiet():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    settings = deepspeed_settings(config, micro_batch, accumulation)
    with _quiet():
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def _quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """DeepSpeed prints memory statistics and traces of its loading past its own logger."""
    return contextlib.redirect_stdout(io.StringIO())


def deepspeed_settings(config: EngineConfig, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's own configuration: precision and communication stated, nothing inherited."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": config.zero_stage, "overlap_comm": device().type == "cuda"},
        "data_types": {"grad_accum_dtype": "fp32"},  # unset, gradients add up in the module's own precision
        "communication_data_type": "fp32",
        # At stage 0 the engine clips by itself; unset, DeepSpeed clips at 1.
        "gradient_clipping": config.gradient_clip if config.zero_stage else 0.0,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if config.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    if config.precision == "fp16":
        settings["fp16"] = {"enabled": True, "initial_scale_power": 16}
    return settings


@torch.no_grad()
def _take_from_first(module: nn.Module) -> None:
    """Every rank starts from rank 0's weights, in full precision."""
    if world() == 1:
        return
    for tensor in [*module.parameters(), *module.buffers()]:
        shared = tensor.detach().to(device()).contiguous()
        dist.broadcast(shared, 0)
        tensor.copy_(shared)


def _digest(module: nn.Module) -> str:
    """sha256 over names and bytes of the parameters that do not train: a resumed run must stand on the same ones."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
