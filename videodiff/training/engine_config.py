"""How a module is optimized: one configuration of ours, and what DeepSpeed is told of it."""

import math
import shutil
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, model_validator

from videodiff.config import Config, operational
from videodiff.errors import UserError

FOLDER = "engine"  # of the training state, in a checkpoint
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class EngineConfig(Config):
    """How a module is optimized. `micro_batch` is per rank and forward pass; None takes the rank's whole share.

    accumulation_dtype: what gradients add up in over micro-batches; communication_dtype: what they travel in.
    offload_optimizer: masters and moments live in the CPU's memory, and AdamW steps there (ZeRO 1 to 3).
    offload_parameters: so do a rank's parameters while they are not used (ZeRO 3).
    compiled_adam: DeepSpeed's own AdamW in place of torch's; it is compiled at the first start.
    compiled_network: forward and backward pass through torch.compile (ZeRO 0 to 2). The first step takes a minute or
    more; worth it for long runs on a GPU, where a small network's many kernels take longer to start than to run.
    """

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
    accumulation_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    communication_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    offload_optimizer: bool = operational(False)
    offload_parameters: bool = operational(False)
    compiled_adam: bool = operational(False)
    compiled_network: bool = operational(False)

    @model_validator(mode="after")
    def _fits_together(self) -> "EngineConfig":
        if self.precision != "fp32" and self.zero_stage == 0:
            raise ValueError(f"precision {self.precision} needs zero_stage 1, 2 or 3, with one process too; set one")
        if (self.decay == "cosine") != (self.decay_steps is not None):
            raise ValueError("decay cosine and decay_steps (the step where it reaches zero) go together; set both")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3; set one")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3; set it")
        if self.compiled_network and self.zero_stage == 3:
            raise ValueError("compiled_network: ZeRO 3 fetches parameters layer by layer; use zero_stage 0, 1 or 2")
        if self.accumulation_dtype not in ("fp32", self.precision):
            raise ValueError(
                f"accumulation_dtype is {self.accumulation_dtype}; take fp32 or the precision, {self.precision}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; both must lie in [0, 1)")
        return self

    @property
    def dtype(self) -> torch.dtype:
        """What the module computes in."""
        return DTYPES[self.precision]

    def on(self, num_ranks: int) -> "EngineConfig":
        """What it comes to on so many ranks: one alone, in fp32 and with nothing offloaded, has nothing to shard, and
        takes stage 0 in place of 1 or 2. The steps are the same, without copies that cost a fifth of a small one."""
        if num_ranks == 1 and self.zero_stage in (1, 2) and self.precision == "fp32" and not self.offload_optimizer:
            return self.model_copy(update={"zero_stage": 0})
        return self

    def rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0): linear warm-up, then constant or half a cosine down to zero."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.decay_steps is None:
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, self.decay_steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def shares(self, batch_size: int, num_ranks: int) -> tuple[int, int]:
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


def deepspeed_settings(
    config: EngineConfig, micro_batch: int, accumulation: int, trained: int, on_cuda: bool
) -> dict[str, Any]:
    """DeepSpeed's own configuration: precision and communication stated, nothing inherited."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": on_cuda,
            # DeepSpeed would hold buffers of 500 million values for a network of two million as well.
            "reduce_bucket_size": bucket(trained),
            "allgather_bucket_size": bucket(trained),
        },
        "data_types": {"grad_accum_dtype": config.accumulation_dtype},  # unset, it is the module's own precision
        "communication_data_type": config.communication_dtype,
        # At stage 0 the engine clips by itself; unset, DeepSpeed clips at 1.
        "gradient_clipping": config.gradient_clip if config.zero_stage else 0.0,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    for wished, key in ((config.offload_optimizer, "offload_optimizer"), (config.offload_parameters, "offload_param")):
        if wished:
            settings["zero_optimization"][key] = {"device": "cpu", "pin_memory": on_cuda}
    if config.offload_optimizer:
        settings["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW steps on a CPU as well
    if config.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    if config.precision == "fp16":
        settings["fp16"] = {"enabled": True, "initial_scale_power": 16}
    return settings


def bucket(trained: int) -> int:
    """Values that travel between ranks at once, with `trained` parameters in all."""
    return min(trained + trained % 2, 500_000_000)  # DeepSpeed wants an even one


def check_compiler(config: EngineConfig, on_cuda: bool) -> None:
    """Refuse (UserError) what would have to be compiled where nothing can."""
    adam = "g++" if config.offload_optimizer or not on_cuda else "nvcc"
    # On a GPU torch.compile brings its own compiler (Triton), but for a C one that links what starts the kernels.
    for key, needed in (("compiled_adam", adam), ("compiled_network", "gcc" if on_cuda else "g++")):
        if getattr(config, key) and shutil.which(needed) is None:
            raise UserError(f"engine.{key}: {needed} is not found, which compiles it; install it or leave it out")
