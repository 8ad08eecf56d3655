"""Steps of training on a GPU at the sizes people train: seconds, memory, and the share of the card's peak.

    python -m benchmarks.train_gpu [--steps 8] [--share 0.8] [--most 64] [--seconds 600] [--networks image video]
                                   [--how eager compiled] [--out docs/training-speed-gpu.md]

image: Stable Diffusion 1.5's network, all of it trained (configs/sd/image_15.yaml). video: the same with temporal
layers, 8 frames, its spatial half frozen. A step is the engine's: forward, backward, clipping, AdamW, the average; bf16
under ZeRO 1, random weights and latents, no data and no autoencoder. The batch is the largest power of two that the
plan's own count of activations puts into `--share` of the memory, `--most` at most. No row begins after `--seconds`.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from stages.assemble import load_stage
from stages.image import ImageStage
from stages.plan import buffers, states
from videodiff import resources
from videodiff.batch import Condition
from videodiff.networks.unet import TemporalConfig, UNet, UNetConfig, is_temporal
from videodiff.networks.work import TOKENS, Work, count
from videodiff.training.ema import EMA
from videodiff.training.engine import Engine, EngineConfig
from videodiff.training.gpus import by_device_name

FACTOR, FRAMES, WARM_UP = 8, {"image": 1, "video": 8}, 3
SIZES = (256, 512)
GIB = 2**30


@dataclass(frozen=True)
class Mode:
    """How the network is run."""

    compiled: bool
    checkpointing: bool

    def __str__(self) -> str:
        kept = "activations again" if self.checkpointing else "activations kept"
        return f"{'compiled' if self.compiled else 'eager'}, {kept}"


MODES = (Mode(False, False), Mode(False, True), Mode(True, False), Mode(True, True))


def network_config(which: str) -> UNetConfig:
    """The network of a case."""
    stage = load_stage(resources.path("configs/sd/image_15.yaml"))
    assert isinstance(stage, ImageStage)
    if which == "image":
        return stage.network
    return stage.network.model_copy(update={"temporal": TemporalConfig(), "known_channels": True})


def trains(which: str) -> Callable[[str], bool]:
    return is_temporal if which == "video" else lambda name: True


def work(which: str, size: int, checkpointing: bool) -> Work:
    """Of one sample."""
    with torch.device("meta"):
        network = UNet(network_config(which))
    network.checkpointing = checkpointing
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(trains(which)(name))
    return count(network, FRAMES[which], size // FACTOR, size // FACTOR, torch.bfloat16)


def inputs(config: UNetConfig, batch: int, frames: int, size: int, device: torch.device) -> tuple[Any, ...]:
    """What the network is called with."""
    side = size // FACTOR
    x = torch.randn(batch, config.channels, frames, side, side, device=device, dtype=torch.bfloat16)
    text = torch.randn(batch, TOKENS, config.context_dims[0], device=device, dtype=torch.bfloat16)
    mask = torch.ones(batch, TOKENS, dtype=torch.bool, device=device)
    shown = {"known": torch.zeros_like(x), "known_mask": torch.zeros_like(x[:, :1])} if config.known_channels else {}
    fps = torch.full((batch,), 8.0, device=device)
    return x, torch.full((batch,), 500.0, device=device), Condition((text,), (mask,), fps=fps, **shown)


def time_steps(engine: Engine, average: EMA, given: tuple[Any, ...], steps: int) -> tuple[float, float]:
    """Median seconds of a step, and the most bytes that were allocated."""
    taken = []
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        engine.backward(engine(*given).float().square().mean())
        engine.step(1e-5)
        average.update(engine.masters(), number, 0.999)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return median(taken[WARM_UP:]), torch.cuda.max_memory_allocated()


def rows(which: str, given: argparse.Namespace, until: float) -> Iterator[str]:
    """A row for each mode and size, while there is time."""
    device, config = torch.device("cuda"), network_config(which)
    gpu, total = by_device_name(torch.cuda.get_device_name()), torch.cuda.mem_get_info()[1]
    with device:
        network = UNet(config).train()
    engine_config = EngineConfig(precision="bf16", zero_stage=1)
    engine = Engine(network, engine_config, trains(which), 1)
    if engine._original is not None:  # a run keeps it in the CPU's memory, where its module was made
        engine._original.cpu()
    average = EMA(engine.masters())
    parameters = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    held = states(parameters, trained, 1, engine_config, 1) + buffers(parameters, trained, engine_config, 1)
    for mode in MODES:
        if ("compiled" if mode.compiled else "eager") not in given.how:
            continue
        if mode.compiled and network._compiled_call_impl is None:
            network.compile()
        for size in SIZES:
            if time.monotonic() > until:
                return
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
            network.checkpointing = mode.checkpointing
            costs = work(which, size, mode.checkpointing)
            fits = int((given.share * total - held) / costs.kept)
            batch = min(given.most, 1 << max(0, fits.bit_length() - 1))
            told = f"| {which} ({trained / 1e6:.0f} of {parameters / 1e6:.0f} M trained) | {size} | {batch} | {mode} | "
            began = time.perf_counter()
            try:
                called = inputs(config, batch, FRAMES[which], size, device)
                seconds, most = time_steps(engine, average, called, given.steps)
            except torch.cuda.OutOfMemoryError:
                yield told + "out of memory | | | | |"
                continue
            operations = (costs.forward + costs.backward) * batch
            share = f"{100 * operations / seconds / gpu.flops:.1f} %" if gpu else "-"
            yield told + (
                f"{1 / seconds:.2f} | {batch / seconds:.1f} | {share} | {most / GIB:.1f} | "
                f"{(held + costs.kept * batch) / GIB:.1f} |"
            )
            print(f"{which} {size} {mode}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def main(given: argparse.Namespace) -> None:
    """Measure, and write the report after each row."""
    if not torch.cuda.is_available():
        raise SystemExit("error: no GPU is found here, and this measures nothing else; see benchmarks.train for CPUs")
    until = time.monotonic() + given.seconds
    command = f"python -m benchmarks.train_gpu --steps {given.steps} --share {given.share:g} --most {given.most} "
    command += f"--networks {' '.join(given.networks)} --how {' '.join(given.how)}"
    lines = [
        "# Speed of training on a GPU",
        "",
        f"`{command}` on one {torch.cuda.get_device_name()} ({platform.machine()}), PyTorch {torch.__version__}.",
        "Stable Diffusion 1.5's network, and the same with temporal layers on 8 frames with its spatial half frozen;",
        "our engine's steps in bf16 under ZeRO 1 (forward, backward, clipping, AdamW, average), random latents. MFU:",
        "the operations of forward and backward pass, nothing counted twice, of the card's dense peak in bf16.",
        "Planned: the states, buffers and activations that `videodiff plan` reckons.",
        "",
        "| network | pixels | batch | how | steps/s | samples/s | MFU | memory, GiB | planned |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    console = Console()
    for which in given.networks:
        for row in rows(which, given, until):
            lines.append(row)
            console.print(row, markup=False, soft_wrap=True)
            if given.out is not None:
                given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each row, after three that are not")
    parser.add_argument("--share", type=float, default=0.8, help="of the memory, for states and activations")
    parser.add_argument("--most", type=int, default=64, help="samples of a batch at most")
    parser.add_argument("--seconds", type=float, default=600.0, help="no row begins after so many")
    parser.add_argument("--networks", nargs="+", default=["image", "video"], choices=["image", "video"])
    parser.add_argument("--how", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    main(parser.parse_args())
