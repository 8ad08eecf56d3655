"""A plan in words and numbers: `videodiff plan`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stages.assemble import load_stage
from stages.plan import USABLE, Plan, plan
from videodiff.errors import UserError
from videodiff.training.engine_config import EngineConfig
from videodiff.training.gpus import GIB, GPUS


def report(
    path: Path,
    overrides: Sequence[str],
    nodes: int,
    gpus_per_node: int,
    gpu_name: str,
    efficiency: float,
    network: float,
    price: float | None,
) -> list[str]:
    """The lines of a plan; UserError for a GPU that is not known, or what `plan` refuses."""
    if gpu_name not in GPUS:
        raise UserError(f"--gpu {gpu_name}: not known; known are {', '.join(GPUS)}")
    gpu, config = GPUS[gpu_name], load_stage(path, overrides)
    made = plan(path, overrides, nodes * gpus_per_node)
    peak = gpu.flops_fp32 if config.engine.precision == "fp32" else gpu.flops
    seconds = made.step_operations / (made.gpus * peak * efficiency)
    samples = config.data.batch_size / seconds
    hours = seconds * config.run.steps / 3600
    lines = [
        f"{path}: stage {made.stage} on {nodes} x {gpus_per_node} {gpu_name} ({gpu.memory / GIB:.0f} GiB each)",
        f"  parameters         {_count(made.parameters)}, {_count(made.trained)} of them trained",
        f"  batch              {config.data.batch_size} = {made.gpus} GPUs x {made.accumulation} x {made.micro_batch}",
        f"  a sample           {made.work.forward / 1e12:.3g} TFLOP forward, {made.work.backward / 1e12:.3g} backward; "
        f"{made.latent_positions:,} latent positions; {made.pixel_bytes / 1e6:.2f} MB of decoded pixels",
        "  memory per GPU     GiB: states + activations + buffers + encoders",
    ]
    engine = config.engine.on(made.gpus)  # as training takes it
    for stage, memory in made.memory.items():
        parts = " + ".join(
            f"{part / GIB:.2f}" for part in (memory.states, memory.activations, memory.buffers, memory.encoders)
        )
        fits = "fits" if memory.total <= USABLE * gpu.memory else "does not fit"
        mark = "->" if stage == engine.zero_stage else "  "
        sent = made.communication[stage] / 1e9
        lines.append(
            f"  {mark} ZeRO {stage}          {memory.total / GIB:.2f} = {parts}; {fits}; sends {sent:.2f} GB a step"
        )
    lines += [
        f"  at {100 * efficiency:.0f} % of the peak  {seconds:.3g} s a step, {86400 / seconds:,.0f} steps a day, "
        f"{samples:,.1f} samples, {samples * made.latent_positions:,.0f} positions and "
        f"{samples * made.pixel_bytes / 1e6:,.0f} MB of pixels a second",
        f"  {config.run.steps:,} steps         {hours:,.1f} hours, {hours * made.gpus:,.0f} GPU hours"
        + (f", {hours * made.gpus * price:,.0f} at {price:g} an hour" if price is not None else ""),
        *(f"  note: {note}" for note in made.notes),
    ]
    if held := made.memory[engine.zero_stage].host:
        lines.append(f"  offloaded          {held * gpus_per_node / GIB:.1f} GiB in the memory of each node")
    link = gpu.link if nodes == 1 else min(gpu.link, network * 1e9)
    checkpointed = getattr(config, "activation_checkpointing", False)
    problems = _problems(made, engine, checkpointed, gpu_name, seconds, link)
    return lines + [f"  warning: {problem}" for problem in problems]


def _problems(
    made: Plan, engine: EngineConfig, checkpointed: bool, gpu_name: str, seconds: float, link: float
) -> list[str]:
    gpu, problems, stage = GPUS[gpu_name], [], engine.zero_stage
    memory = made.memory[stage]
    if memory.total > USABLE * gpu.memory:
        ways = [f"--zero-stage {z}" for z, m in made.memory.items() if z > stage and m.total <= USABLE * gpu.memory][:1]
        if memory.activations > 0.3 * memory.total:
            if not checkpointed:
                ways.append("activation_checkpointing=true")
            if made.micro_batch > 1:
                ways.append(f"engine.micro_batch={made.micro_batch // 2}")
        ways += ["engine.offload_optimizer=true"] if stage > 0 and not engine.offload_optimizer else []
        ways = ways or ["a GPU with more memory", "a smaller network"]
        has = USABLE * gpu.memory / GIB
        problems.append(f"ZeRO {stage} needs {memory.total / GIB:.1f} GiB of {has:.1f}; try {' or '.join(ways)}")
    if (sending := made.communication[stage] / link) > seconds:
        problems.append(
            f"sending {made.communication[stage] / 1e9:.1f} GB takes {sending:.2f} s at {link / 1e9:.0f} GB/s, longer "
            "than the step's work: take a larger batch or fewer GPUs"
        )
    return problems


def _count(number: int) -> str:
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return str(number)
