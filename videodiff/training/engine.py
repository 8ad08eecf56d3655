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
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from videodiff.errors import UserError
from videodiff.training import fragments
from videodiff.training.distributed import device, raise_from_first, rank, start, world
from videodiff.training.engine_config import FOLDER, EngineConfig, check_compiler, deepspeed_settings
from videodiff.training.fragments import Fragments, Part

__all__ = ["Engine", "EngineConfig", "StepResult"]

MASTER, AVERAGE = "master", "average"  # kinds of values in a checkpoint, beside AdamW's two
MOMENTS = ("exp_avg", "exp_avg_sq")
_LINEAR = torch.nn.functional.linear  # ZeRO 3 puts one of its own in this place, for the whole process and for good
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of fp16's loss scale


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
    resume: a folder that `save` wrote, on however many ranks, at whatever ZeRO stage; the engine goes on from it.
    """

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        trains: Callable[[str], bool],
        batch_size: int,
        resume: Path | None = None,
    ) -> None:
        start()
        self.config = config
        self.micro_batch, self.accumulation = config.shares(batch_size, world())
        if config.precision == "fp16" and device().type == "cpu":
            raise UserError("engine.precision=fp16: a CPU has no fp16 training; use bf16 or fp32")
        freeze(module, trains)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # the masters come from here
            parameter.data = parameter.data.contiguous()  # ZeRO flattens; memory formats do not survive that
        self._shapes = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
        if not self._shapes:
            raise UserError("no parameter of the module trains; check what the stage freezes")
        if resume is not None:
            raise_from_first(_read_weights(module, self._shapes, resume / FOLDER) if rank() == 0 else None)
        _take_from_first(module)
        self.frozen_digest = frozen_digest(module)
        # Rank 0 keeps the module as it came: buffers and frozen layers in full precision, for export and sampling.
        self._original = copy.deepcopy(module) if rank() == 0 else None
        weights = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        module.to(device())
        if config.compiled_network:
            module.compile()  # in place: names of parameters stay as they are
        self._deepspeed: Any = _wrap(module, config, self.micro_batch, self.accumulation)
        if config.zero_stage == 0 and world() == 1:  # its all-reduce would copy all gradients twice, for nobody
            self._deepspeed.enable_backward_allreduce = False
        self._parameters = {name: p for name, p in module.named_parameters() if name in self._shapes}
        self._pieces = {name: self._locate(p, self._shapes[name]) for name, p in self._parameters.items()}
        self._owns = config.zero_stage > 0 or rank() == 0  # at stage 0 all have the whole, and one speaks for it
        self._fill_masters(weights)
        if resume is not None:
            self._resume(Fragments(resume / FOLDER))
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
        if self.config.zero_stage == 3:  # what gets no gradient in the next step must not meet this one's again
            self._deepspeed.optimizer.grad_partitions_flat_buffer.zero_()
        elif not applied and self.config.offload_optimizer:
            # DeepSpeed 0.19 keeps what a skipped step added up for the CPU: no later step would be finite any more.
            sums = self._deepspeed.optimizer.averaged_gradients
            sums.update(dict.fromkeys(sums))
        norm = self._deepspeed.get_global_grad_norm()
        return StepResult(applied, float(norm) if applied and norm is not None else math.inf)

    def masters(self) -> list[Tensor]:
        """This rank's fp32 master weights, as flat fragments: what the moving average follows."""
        return [master.detach() for master in self._optimized()]

    def _optimized(self) -> list[Tensor]:
        """The tensors that AdamW steps, and knows its state by."""
        optimizer, stage = self._deepspeed.optimizer, self.config.zero_stage
        if stage == 0:
            return list(self._parameters.values())
        if stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        if hasattr(optimizer, "fp32_groups_flat_partition"):  # DeepSpeed has one of its own for stage 1 in bf16
            return list(optimizer.fp32_groups_flat_partition)
        return list(optimizer.single_partition_of_fp32_groups)

    @torch.no_grad()
    def gather(self, values: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """Whole tensors from fragments laid out like `masters()`: fp32 by parameter name on rank 0's CPU, else None."""
        state = {}
        for name, shape in self._shapes.items():
            whole = torch.zeros(shape.numel(), dtype=torch.float32, device=device())  # offloaded values are elsewhere
            for piece in self._pieces[name] if self._owns else ():
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
        return trained * (3 + 1 + 2) * 4

    def save(self, folder: Path, average: Sequence[Tensor] = ()) -> None:
        """Write this rank's masters, moments and counters, and the moving average, into folder/engine."""
        held = {MASTER: self.masters(), AVERAGE: average}
        counters: dict[str, float] = {}
        if states := [self._adamw.state[tensor] for tensor in self._optimized() if tensor in self._adamw.state]:
            held |= {moment: [state[moment] for state in states] for moment in MOMENTS}
            counters["steps"] = float(states[0]["step"])
        if self.config.precision == "fp16":
            scaler = self._deepspeed.optimizer.loss_scaler
            counters |= {name: float(getattr(scaler, name)) for name in SCALER}
        parts = [
            Part(kind, name, piece.start, values[piece.master].reshape(-1)[piece.offset : piece.offset + piece.length])
            for kind, values in held.items() if values
            for name, pieces in self._pieces.items() if self._owns
            for piece in pieces
        ]  # fmt: skip
        fragments.write(folder / FOLDER, rank(), parts, counters)

    def verify(self, folder: Path) -> str | None:
        """What is missing of the state that all ranks wrote into a folder; None when it is whole. Not collective."""
        try:
            state = Fragments(folder / FOLDER)
            if self.config.zero_stage and len(state) != world():
                return (
                    f"{len(state)} of {world()} ranks' files are there: run.dir must lie on a disk that all nodes share"
                )
            state.check(MASTER, self._shapes)
        except (UserError, SafetensorError) as error:
            return str(error)
        return None

    @torch.no_grad()
    def load_average(self, folder: Path, average: Sequence[Tensor]) -> None:
        """Fill tensors laid out like `masters()` with the average that `save` wrote into `folder`."""
        self._fill(Fragments(folder / FOLDER), AVERAGE, average)

    def _resume(self, state: Fragments) -> None:
        """Moments and counters; the weights are there already."""
        if "steps" in state.counters:
            for tensor in self._optimized():
                step: Any = torch.tensor(state.counters["steps"], dtype=torch.float32, device=tensor.device)
                if self.config.compiled_adam:
                    step = int(state.counters["steps"])
                moments = {moment: torch.zeros_like(tensor, requires_grad=False) for moment in MOMENTS}
                self._adamw.state[tensor] = {"step": step, **moments}
            for moment in MOMENTS:
                self._fill(state, moment, [self._adamw.state[tensor][moment] for tensor in self._optimized()])
        if self.config.precision == "fp16":
            scaler = self._deepspeed.optimizer.loss_scaler
            for name in SCALER:
                setattr(scaler, name, type(getattr(scaler, name))(state.counters[name]))

    @property
    def _adamw(self) -> Any:
        return self._deepspeed.basic_optimizer

    @torch.no_grad()
    def _fill(self, state: Fragments, kind: str, tensors: Sequence[Tensor]) -> None:
        for name, pieces in self._pieces.items():
            for piece in pieces:
                own = tensors[piece.master].view(-1)[piece.offset : piece.offset + piece.length]
                own.copy_(state.read(kind, name, piece.start, piece.length))

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers, and give torch its own functions back."""
        self._deepspeed.destroy()
        torch.nn.functional.linear = _LINEAR

    def _plain_step(self) -> StepResult:
        """Stage 0: gradients are whole and already equal on all ranks, so that all of them decide alike."""
        parameters = list(self._parameters.values())
        for parameter in parameters:
            if parameter.grad is None:  # the all-reduce of several ranks makes zeros of it too
                parameter.grad = torch.zeros_like(parameter)
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
        if self.config.zero_stage == 3:  # behind the last rank's values lies padding that nobody has written
            for master in masters:
                master.zero_()
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
    on_cuda = device().type == "cuda"
    check_compiler(config, on_cuda)
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    if not config.compiled_adam:
        optimizer: Any = torch.optim.AdamW(trained, **options, fused=True)
    elif config.offload_optimizer or not on_cuda:
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(trained, **options, adamw_mode=True)
    else:
        optimizer = deepspeed.ops.adam.FusedAdam(trained, **options, adam_w_mode=True)
    count = sum(parameter.numel() for parameter in trained)
    settings = deepspeed_settings(config, micro_batch, accumulation, count, on_cuda)
    with _quiet():
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def _quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """DeepSpeed prints memory statistics and traces of its loading past its own logger."""
    return contextlib.redirect_stdout(io.StringIO())


@torch.no_grad()
def _read_weights(module: nn.Module, shapes: dict[str, torch.Size], folder: Path) -> str | None:
    """Give the module the master weights of a checkpoint; returns the problem."""
    try:
        state = Fragments(folder)
        state.check(MASTER, shapes)
        parameters = dict(module.named_parameters())
        for name, shape in shapes.items():
            parameters[name].copy_(state.read(MASTER, name, 0, shape.numel()).view(shape))
    except (UserError, SafetensorError) as error:
        return str(error)
    return None


@torch.no_grad()
def _take_from_first(module: nn.Module) -> None:
    """Every rank starts from rank 0's weights, in full precision."""
    if world() == 1:
        return
    for tensor in [*module.parameters(), *module.buffers()]:
        shared = tensor.detach().to(device()).contiguous()
        dist.broadcast(shared, 0)
        tensor.copy_(shared)


def freeze(module: nn.Module, trains: Callable[[str], bool]) -> None:
    """Only the parameters whose names ``trains`` holds for get gradients."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trains(name))


def frozen_digest(module: nn.Module) -> str:
    """sha256 over names and bytes of the parameters that do not train: a resumed run must stand on the same ones."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
