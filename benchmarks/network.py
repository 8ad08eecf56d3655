"""Our U-Net against those of diffusers: time, memory, and what a sampler costs beside the network.

    python -m benchmarks.network [--pairs 7] [--threads N] [--cases image video samplers] [--modes eager compiled]
                                 [--precisions float32 bfloat16] [--batches 1 8] [--against NETWORK ...]
                                 [--out docs/network-speed.md]

image: UNet2DConditionModel, a smaller Stable Diffusion 1 with the same weights on both sides. video: per FLOP, against
UNet3DConditionModel and UNetMotionModel of the same widths. samplers: what is done beside the network, guidance and the
denoiser's float64 among it, for each evaluation of a network that costs nothing, as a share of one of the video network
on the same latents. The report is written after each case.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.timing import Ratio, flops, paired, peak_memory
from stages.public_configs import unet_config
from videodiff.batch import Condition
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.guidance import ClassifierFree
from videodiff.diffusion.samplers import DDIM, DDPM, DPMSolver, Heun, Langevin, PredictorCorrector, SamplerConfig
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.networks.tokenizer import declare_torchvision_ops
from videodiff.networks.unet import TemporalConfig, UNet, UNetConfig
from videodiff.networks.weights import unet_names

declare_torchvision_ops()
import diffusers  # noqa: E402  # its import of torchvision needs the line above

WIDTHS, CROSS, TOKENS, FRAMES = (128, 256, 512, 512), 768, 77, 8
SIDE = {"image": 32, "video": 16}  # latent height and width
SMALL = (2, {"image": 16, "video": 16})  # frames and sides where a large batch of the whole takes hours
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES, BACKWARD = (1, 8), (False, True)
MATRIX = {"cpu": 2048, "cuda": 8192}  # side of the matrices whose product is the measured rate
VIDEO_PEERS = ("UNet3DConditionModel", "UNetMotionModel")
SAMPLER_STEPS = 20
SAMPLERS = (DDIM, DDPM, DPMSolver, Heun, Langevin, PredictorCorrector)


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


def call_of(
    which: str, batch: int, dtype: str, backward: bool, device: str, compiled: bool, small: bool = False
) -> Callable[[], Tensor]:
    """A forward call, or forward and backward, of a network on inputs of its own form; small: as SMALL says."""
    network = make(which).to(device, DTYPES[dtype]).train(backward).requires_grad_(backward)
    for weight in network.parameters():
        if weight.dim() == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    video = which not in ("ours image", "UNet2DConditionModel")
    frames, sides = SMALL if small else (FRAMES, SIDE)
    frames, side = (frames, sides["video"]) if video else (1, sides["image"])
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
        if which == "UNetMotionModel":  # its pipeline, and not the network, gives every frame the text
            text = text.repeat_interleave(frames, 0)

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


def matrix_rate(dtype: torch.dtype, device: str) -> float:
    """FLOPs a second of the device's own matrix product, the best of five."""
    side = MATRIX[device]
    x = torch.ones(side, side, device=device, dtype=dtype)
    product = paired(lambda: x @ x, lambda: x @ x, 5)
    return 2 * side**3 / min(product.ours, product.theirs)


def compare(
    ours: str,
    theirs: str,
    per_flop: bool,
    pairs: int,
    device: str,
    modes: Sequence[str],
    precisions: Sequence[str],
    batches: Sequence[int],
) -> list[str]:
    """Rows of a Markdown table: one for each precision, batch size, direction and mode."""
    rows = []
    rates = {name: matrix_rate(dtype, device) for name, dtype in DTYPES.items()}
    emulated = rates["bfloat16"] < rates["float32"]
    for dtype, batch, backward, mode in itertools.product(precisions, batches, BACKWARD, modes):
        small = emulated and dtype == "bfloat16" and batch > 1
        # What one sample takes, `batch` take as many times.
        work = [batch * flops(call_of(w, 1, dtype, backward, device, False, small)) for w in (ours, theirs)]
        one, other = (
            call_of(which, batch, dtype, backward, device, mode == "compiled", small) for which in (ours, theirs)
        )
        if not per_flop and dtype == "float32" and not backward:
            _agree(one(), other())
        memory = [peak_memory(call) for call in (one, other)]
        ratio = paired(one, other, pairs, (work[0], work[1]) if per_flop else (1.0, 1.0))
        shares = [100 * w / t / rates[dtype] for w, t in zip(work, (ratio.ours, ratio.theirs), strict=True)]
        what = ("forward + backward" if backward else "forward") + (", compiled" if mode == "compiled" else "")
        what += ", small" if small else ""
        rows.append(
            f"| {theirs} | {dtype} | {batch} | {what} | {_shown(ratio)} | {_pair(memory)} | {_pair(shares, ' %')} |"
        )
        print(rows[-1], flush=True)
    return rows


def _agree(ours: Tensor, theirs: Tensor) -> None:
    difference = (ours.flatten() - theirs.flatten()).abs().max() / theirs.abs().max()
    if difference > 1e-4:
        raise RuntimeError(f"the two networks differ by {difference:.1e} of the largest value: the race is void")


def _shown(ratio: Ratio) -> str:
    times = f"{ratio.ours * 1e3:.0f} / {ratio.theirs * 1e3:.0f}"
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) | {ratio.verdict} | {times}"


def _pair(values: Sequence[float], unit: str = "") -> str:
    return " / ".join(f"{value:.0f}{unit}" for value in values)


def samplers(pairs: int, device: str) -> list[str]:
    """Rows: what is done beside the network for each evaluation, against an evaluation of the video network."""
    shape = (1, 4, FRAMES, SIDE["video"], SIDE["video"])
    text, mask = torch.randn(1, TOKENS, CROSS, device=device), torch.ones(1, TOKENS, dtype=torch.bool, device=device)
    condition = Condition((text,), (mask,))
    network = call_of("ours video", 2, "float32", False, device, False)  # with and without the text
    noise = torch.randn(shape, device=device)
    rows = []
    for kind in SAMPLERS:
        sampler: SamplerConfig = kind(steps=SAMPLER_STEPS)  # type: ignore[operator]
        evaluations = 0

        def nothing(x: Tensor, _: Tensor, __: Condition) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return torch.zeros_like(x)

        denoiser = Denoiser(nothing, NoiseSchedule(), "eps")
        denoise = ClassifierFree(text=7.5)(denoiser, condition)

        def run(sampler: SamplerConfig = sampler, denoise: Any = denoise, denoiser: Denoiser = denoiser) -> Tensor:
            return sampler(denoise, noise, denoiser.schedule, [torch.Generator().manual_seed(0)])

        run()
        count = evaluations
        ratio = paired(run, network, pairs, (count, 1.0))
        rows.append(
            f"| {kind.__name__} | {count} | {ratio.ours / count * 1e3:.2f} | {ratio.theirs * 1e3:.0f} "
            f"| {100 * ratio.median:.2f} % ({100 * ratio.low:.2f} to {100 * ratio.high:.2f}) |"
        )
        print(rows[-1], flush=True)
    return rows


HEAD = (
    "| against | precision | batch | what | time, ours / theirs (95 %) | verdict | ms | extra MiB | of matrix rate |\n"
    + "|---" * 9
    + "|"
)
SAMPLER_HEAD = (
    "| sampler | evaluations | ms beside the network | ms of the network | share (95 %) |\n" + "|---" * 5 + "|"
)


def main(given: argparse.Namespace) -> None:
    """Run the cases and print, or write, their tables."""
    if given.threads:
        torch.set_num_threads(given.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    modes = given.modes or (["eager", "compiled"] if device == "cuda" else ["eager"])
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    rates = ", ".join(f"{name} {matrix_rate(dtype, device) / 1e9:.0f}" for name, dtype in DTYPES.items())
    told = {name: value if isinstance(value, list) else [value] for name, value in vars(given).items() if value}
    command = "python -m benchmarks.network" + "".join(
        f" --{name} {' '.join(map(str, values))}" for name, values in told.items() if name != "out"
    )
    lines = [
        "# Speed of the networks",
        "",
        f"`{command}`: {machine}, {torch.get_num_threads()} threads, PyTorch "
        f"{torch.__version__}, diffusers {diffusers.__version__}. Ratios of paired calls in one run, below 1: ours is "
        "faster. Extra MiB: peak beyond weights and inputs, ours / theirs. The last column is the share of the rate of "
        f"the machine's own matrix product (GFLOP/s of {MATRIX[device]} squared: {rates}). Where bfloat16 is slower "
        "than float32, because it is emulated, the large batch is of small inputs: "
        f"{SMALL[0]} frames, or pictures of {SMALL[1]['image']}x{SMALL[1]['image']}.",
    ]
    size = f"{FRAMES} frames of {SIDE['video']}x{SIDE['video']}"
    how = (given.pairs, device, modes, given.precisions or list(DTYPES), given.batches or BATCHES)
    tables: dict[str, tuple[str, Callable[[], list[str]]]] = {
        "image": (
            f"## Image: the same weights, latents of {SIDE['image']}x{SIDE['image']}\n\n{HEAD}",
            lambda: compare("ours image", "UNet2DConditionModel", False, *how),
        ),
        "video": (
            f"## Video: time per FLOP, {size}\n\n{HEAD}",
            lambda: [row for peer in given.against or VIDEO_PEERS for row in compare("ours video", peer, True, *how)],
        ),
        "samplers": (
            f"## Samplers: what an evaluation costs beside the network, {size}\n\n{SAMPLER_HEAD}",
            lambda: samplers(given.pairs, device),
        ),
    }
    for case in given.cases or list(tables):
        head, rows = tables[case]
        lines += ["", head, *rows()]
        if given.out is not None:
            given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
            Console().print(f"wrote {given.out}")


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what is left out is None, and stands for all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cases", nargs="+", choices=["image", "video", "samplers"])
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], help="[both on a GPU, eager on a CPU]")
    parser.add_argument("--precisions", nargs="+", choices=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--against", nargs="+", choices=VIDEO_PEERS, help="of the video networks")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parsed())
