"""Our U-Net against those of diffusers: time, memory, and what a sampler costs beside the network.

    python -m benchmarks.network [--pairs 7] [--threads N] [--cases image video samplers] [--out docs/network-speed.md]

image: UNet2DConditionModel, a smaller Stable Diffusion 1 with the same weights on both sides. video: per FLOP, against
UNet3DConditionModel and UNetMotionModel of the same widths. samplers: seconds a step with a network that costs nothing,
as a share of a step of the image network.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import Ratio, paired, peak_memory
from stages.public_configs import unet_config
from videodiff.batch import Condition
from videodiff.diffusion.prediction import Estimate
from videodiff.diffusion.samplers import DDIM, DDPM, DPMSolver, Heun
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.networks.text import declare_torchvision_ops
from videodiff.networks.unet import TemporalConfig, UNet, UNetConfig
from videodiff.networks.weights import unet_names

declare_torchvision_ops()
import diffusers  # noqa: E402  # its import of torchvision needs the line above

WIDTHS, CROSS, TOKENS, FRAMES = (128, 256, 512, 512), 768, 77, 8
SIDE = {"image": 32, "video": 16}  # latent height and width
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES, BACKWARD = (1, 8), (False, True)
SAMPLER_STEPS, SAMPLER_SHAPE = 20, (1, 8, 16, 32, 32)  # latents of a clip of 16 frames of 256x256 pixels


def peer_image() -> Any:
    """The same weights each time."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(block_out_channels=WIDTHS, cross_attention_dim=CROSS, attention_head_dim=8)


def peer_video(kind: str) -> Any:
    if kind == "UNet3DConditionModel":
        return diffusers.UNet3DConditionModel(block_out_channels=WIDTHS, cross_attention_dim=CROSS)
    return diffusers.UNetMotionModel(block_out_channels=WIDTHS, cross_attention_dim=CROSS)


def our_image() -> UNet:
    """The same shape as `peer_image`, read from the configuration that diffusers writes."""
    with tempfile.TemporaryDirectory() as folder:
        peer_image().save_config(folder)
        config, _ = unet_config(Path(folder) / "config.json")
    return UNet(config)


def our_video() -> UNet:
    config = our_image().config
    temporal = TemporalConfig(text_attention=False, first_frame_attention=False)
    return UNet(UNetConfig(**{**config.model_dump(), "temporal": temporal, "known_channels": True}))


def make(which: str) -> nn.Module:
    if which == "ours image":
        network = our_image()
        peer, names = peer_image().state_dict(), unet_names(network.config, network.state_dict())
        network.load_state_dict({ours: peer[theirs] for ours, theirs in names.items()})
        return network
    if which == "ours video":
        return our_video()
    return peer_image() if which == "UNet2DConditionModel" else peer_video(which)


def call_of(which: str, batch: int, dtype: str, backward: bool, device: str, compiled: bool) -> Callable[[], Tensor]:
    """A forward call, or forward and backward, of a network on inputs of its own form."""
    network = make(which).to(device, DTYPES[dtype], memory_format=torch.channels_last).train(backward)
    network.requires_grad_(backward)
    video = which not in ("ours image", "UNet2DConditionModel")
    frames, side = (FRAMES, SIDE["video"]) if video else (1, SIDE["image"])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, frames, side, side, generator=generator).to(device, DTYPES[dtype])
    text = torch.randn(batch, TOKENS, CROSS, generator=generator).to(device, DTYPES[dtype])
    time = torch.full((batch,), 500.0, device=device)
    forward: Callable[..., Any] = torch.compile(network) if compiled else network
    if which.startswith("ours"):
        known = {"known": torch.zeros_like(x), "known_mask": torch.zeros_like(x[:, :1])} if video else {}
        condition = Condition((text,), (torch.ones(batch, TOKENS, dtype=torch.bool, device=device),), **known)

        def run() -> Tensor:
            return forward(x, time, condition)
    else:
        inputs = x if video else x[:, :, 0].contiguous(memory_format=torch.channels_last)

        def run() -> Tensor:
            return forward(inputs, time, encoder_hidden_states=text, return_dict=False)[0]

    def step() -> Tensor:
        if not backward:
            with torch.inference_mode():
                return run()
        network.zero_grad(set_to_none=True)
        out = run()
        out.float().square().mean().backward()
        return out.detach()

    return step


def bfloat16_is_slow(device: str, side: int = 1024) -> bool:
    """Whether matrices of bfloat16 multiply slower than those of float32 here, as on CPUs that only emulate them."""
    first, other = (torch.ones(side, side, device=device, dtype=dtype) for dtype in DTYPES.values())
    return paired(lambda: other @ other, lambda: first @ first, 5).median > 1


def flops(call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def compare(ours: str, theirs: str, per_flop: bool, pairs: int, device: str, compiled: bool) -> list[str]:
    """Rows of a Markdown table: one for each precision, batch size and direction."""
    rows = []
    slow = bfloat16_is_slow(device)
    for dtype in DTYPES:
        for batch in BATCHES[: 1 if slow and dtype == "bfloat16" else None]:
            for backward in BACKWARD:
                setting = (batch, dtype, backward, device, compiled)
                one, other = call_of(ours, *setting), call_of(theirs, *setting)
                if not per_flop and dtype == "float32" and not backward:
                    _agree(one(), other())
                work = (flops(one), flops(other)) if per_flop else (1.0, 1.0)
                memory = [peak_memory(call) for call in (one, other)]
                ratio = paired(one, other, pairs, work)
                what = "forward + backward" if backward else "forward"
                rows.append(f"| {theirs} | {dtype} | {batch} | {what} | {_shown(ratio)} | {_pair(memory)} |")
                print(rows[-1], flush=True)
    return rows


def _agree(ours: Tensor, theirs: Tensor) -> None:
    difference = (ours.flatten() - theirs.flatten()).abs().max() / theirs.abs().max()
    if difference > 1e-4:
        raise RuntimeError(f"the two networks differ by {difference:.1e} of the largest value: the race is void")


def _shown(ratio: Ratio) -> str:
    times = f"{ratio.ours * 1e3:.0f} / {ratio.theirs * 1e3:.0f}"
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) | {ratio.verdict} | {times}"


def _pair(memory: Sequence[float]) -> str:
    return " / ".join(f"{value:.0f}" for value in memory)


def samplers(pairs: int, device: str) -> list[str]:
    """Rows: seconds that a sampler's step takes without the network, against a step of the image network."""
    schedule = NoiseSchedule()
    zero = torch.zeros(SAMPLER_SHAPE, device=device)

    def denoise(x_t: Tensor, t: Tensor) -> Estimate:
        return Estimate(zero, x_t)

    network = call_of("ours image", 1, "float32", False, device, False)
    rows = []
    for sampler in (DDIM(steps=SAMPLER_STEPS), DDPM(steps=SAMPLER_STEPS), DPMSolver(steps=SAMPLER_STEPS),
                    Heun(steps=SAMPLER_STEPS)):  # fmt: skip
        noise = torch.randn(SAMPLER_SHAPE, device=device)
        generators = [torch.Generator().manual_seed(0)]

        def run(sampler: Any = sampler, noise: Tensor = noise, generators: Any = generators) -> Tensor:
            return sampler(denoise, noise, schedule, generators)

        ratio = paired(run, network, pairs, (SAMPLER_STEPS, 1.0))
        rows.append(
            f"| {type(sampler).__name__} | {ratio.ours / SAMPLER_STEPS * 1e3:.3f} | {ratio.theirs * 1e3:.1f} "
            f"| {100 * ratio.median:.2f} % ({100 * ratio.low:.2f} to {100 * ratio.high:.2f}) |"
        )
        print(rows[-1], flush=True)
    return rows


HEAD = (
    "| against | precision | batch | what | time, ours / theirs (95 %) | verdict | ms | extra MiB |\n"
    + "|---" * 8
    + "|"
)
SAMPLER_HEAD = "| sampler | ms a step without the network | ms of the network | share (95 %) |\n" + "|---" * 4 + "|"


def main(cases: Sequence[str], pairs: int, threads: int | None, compiled: bool, out: Path | None) -> None:
    """Run the cases and print, or write, their tables."""
    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    lines = [
        "# Speed of the networks",
        "",
        f"`python -m benchmarks.network --pairs {pairs}`: {machine}, {torch.get_num_threads()} threads, PyTorch "
        f"{torch.__version__}, diffusers {diffusers.__version__}{', compiled' if compiled else ''}. Ratios of paired "
        "calls in one run, below 1: ours is faster. Extra MiB: peak beyond weights and inputs, ours / theirs. Where "
        "bfloat16 is emulated and slower than float32, it is measured at batch 1 alone.",
    ]
    if "image" in cases:
        lines += ["", f"## Image: the same weights, latents of {SIDE['image']}x{SIDE['image']}", "", HEAD]
        lines += compare("ours image", "UNet2DConditionModel", False, pairs, device, compiled)
    if "video" in cases:
        size = f"{FRAMES} frames of {SIDE['video']}x{SIDE['video']}"
        lines += ["", f"## Video: time per FLOP, {size}", "", HEAD]
        for peer in ("UNet3DConditionModel", "UNetMotionModel"):
            lines += compare("ours video", peer, True, pairs, device, compiled)
    if "samplers" in cases:
        lines += ["", "## Samplers: what a step costs beside the network", "", SAMPLER_HEAD]
        lines += samplers(pairs, device)
    text = "\n".join(lines) + "\n"
    if out is not None:
        out.write_text(text, encoding="utf-8")
        Console().print(f"wrote {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["image", "video", "samplers"])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compiled", action="store_true", help="torch.compile both networks")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    given = parser.parse_args()
    main(given.cases, given.pairs, given.threads, given.compiled, given.out)
