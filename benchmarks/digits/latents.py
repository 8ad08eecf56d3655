"""Latent against pixel diffusion at equal compute, on single pictures of the built-in world at 64x64.

The latent network works on the bundled autoencoder's 8x8 latents; the pixel network is the same U-Net with three levels
more on top, so that both have as many channels at 8x8 and below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.digits.bench import BATCH, Bench
from benchmarks.digits.cache import digest
from benchmarks.digits.judge import Score, share
from benchmarks.digits.report import claim, picture, save_grid, table
from benchmarks.digits.train import denoiser_loss, fit, seeded
from benchmarks.timing import flops
from data_pipeline.world import ATTRIBUTES, Combination, draw_train, render, rng, sample_scene
from data_pipeline.world_reader import read_image
from videodiff.batch import Condition
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.loss import DiffusionLoss
from videodiff.diffusion.samplers import DDIM
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.model import Model
from videodiff.networks.unet import UNet, UNetConfig
from videodiff.seeding import normals

SIZE = 64
SEEN = ("colour", "shape", "size", "background")  # what a single picture shows
WIDTH_AT_8 = 64
STEPS = 20
SCHEDULE = NoiseSchedule(zero_terminal_snr=True)

Shares = dict[str, Score]  # attribute, their "mean", or "all" at once -> share of pictures that show what was asked for


@dataclass(frozen=True)
class Side:
    """One of the two, trained. flops: of one forward pass for one picture."""

    flops: float
    parameters: int
    steps: int
    shares: Shares
    pictures: Tensor  # [N, 3, 1, 64, 64]


def run(bench: Bench) -> str:
    settings, autoencoder = bench.settings, Model.load("demo").autoencoder
    pictures, words = _world(settings.world_pictures, "train")
    real, asked = _world(settings.world_samples, "asked")
    known = encode_words(words)

    def encoded(frames: Tensor) -> Tensor:
        return torch.cat([autoencoder.encode(part[:, :, 0]).mean for part in frames.split(BATCH)])[:, :, None]

    def decoded(latents: Tensor) -> Tensor:
        return autoencoder.decode(latents[:, :, 0], BATCH)[:, :, None]

    with torch.no_grad():
        latents = bench.cache.tensors("world-latents", len(pictures), lambda: {"x": encoded(pictures)})["x"]
        rebuilt = decoded(encoded(real))
        decoding = flops(lambda: decoded(latents[:1]))
    shape = {
        "num_res_blocks": 1,
        "feed_forward_factor": 2.0,
        "head_channels": WIDTH_AT_8 // 2,
        "pooled_dim": known.shape[1],
    }
    low = UNetConfig(channels=8, model_channels=WIDTH_AT_8, channel_mult=(1, 2), attention_levels=(True, True), **shape)
    high = UNetConfig(
        channels=3,
        model_channels=WIDTH_AT_8 // 8,
        channel_mult=(1, 2, 4, 8, 16),
        attention_levels=(False, False, False, True, True),
        **shape,
    )
    sides = {
        "latent": _side(bench, "latent", low, latents, known, asked, decoded),
        "pixel": _side(bench, "pixel", high, pictures, known, asked, lambda x: x),
    }
    ceilings = {"real pictures": shares(real, asked), "real, through the autoencoder": shares(rebuilt, asked)}
    save_grid(bench.pictures, "latents", [("real", real[:10]), *((n, s.pictures[:10]) for n, s in sides.items())])
    return _report(bench, sides, ceilings, decoding)


def _world(count: int, split: str) -> tuple[Tensor, list[Combination]]:
    """First frames [N, 3, 1, 64, 64] in [-1, 1] of training combinations, and what they show."""
    combinations = [draw_train(rng("latents", split, i)) for i in range(count)]
    scenes = [sample_scene(c, "latents", split, i) for i, c in enumerate(combinations)]
    frames = torch.from_numpy(np.stack([render(scene, SIZE, 1, 8.0) for scene in scenes]))
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1, combinations


def encode_words(combinations: list[Combination]) -> Tensor:
    """The attributes that a picture shows, one-hot beside each other [N, E]."""
    columns = []
    for name in SEEN:
        values = ATTRIBUTES[name]
        index = torch.tensor([values.index(getattr(c, name)) for c in combinations])
        columns.append(F.one_hot(index, len(values)))
    return torch.cat(columns, 1).float()


def shares(pictures: Tensor, asked: list[Combination]) -> Shares:
    """How many pictures [N, 3, 1, H, W] the reader of the world reads as what was asked for."""
    frames = ((pictures[:, :, 0].permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    readings = [read_image(frame) for frame in frames]
    hits = {
        name: torch.tensor([getattr(r, name).value == getattr(c, name) for r, c in zip(readings, asked, strict=True)])
        for name in SEEN
    }
    each = torch.stack(list(hits.values()))
    return {name: share(hit) for name, hit in {**hits, "mean": each.float().mean(0), "all": each.all(0)}.items()}


def _side(
    bench: Bench,
    name: str,
    config: UNetConfig,
    data: Tensor,
    known: Tensor,
    asked: list[Combination],
    decode: Callable[[Tensor], Tensor],
) -> Side:
    settings = bench.settings
    network = seeded(lambda: UNet(config))
    denoiser = Denoiser(network, SCHEDULE, "v")
    told, wanted = Condition(pooled=known), Condition(pooled=encode_words(asked))
    with torch.no_grad():
        forward = flops(lambda: network(data[:1], torch.zeros(1), told.select(slice(1))))
    # A backward pass costs two forward ones.
    steps = max(1, round(settings.world_flops / (3 * forward * settings.world_batch)))
    loss = denoiser_loss(denoiser, DiffusionLoss(), data, told)
    key = (config, steps, len(data), settings.world_batch, settings.learning_rate)

    def train() -> dict[str, Tensor]:
        fit(network, loss, steps, settings.world_batch, settings.learning_rate)
        return network.state_dict()

    network.load_state_dict(bench.cache.tensors(f"world-{name}", key, train))
    network.eval().requires_grad_(False)

    def draw() -> dict[str, Tensor]:
        noise = normals(data.shape[1:], 0, "start", range(len(asked)))
        parts = [slice(i, i + 50) for i in range(0, len(asked), 50)]
        made = [DDIM(steps=STEPS)(denoiser.bind(wanted.select(p)), noise[p], SCHEDULE) for p in parts]
        with torch.no_grad():
            return {"pictures": decode(torch.cat(made)).clamp(-1, 1)}

    pictures = bench.cache.tensors(f"world-{name}-samples", (digest(key), len(asked)), draw)["pictures"]
    return Side(forward, sum(network.num_parameters()), steps, shares(pictures, asked), pictures)


def _report(bench: Bench, sides: dict[str, Side], ceilings: dict[str, Shares], decoding: float) -> str:
    settings = bench.settings
    costs = [
        [
            name,
            f"{s.parameters:,}",
            f"{s.flops / 1e6:.0f}",
            f"{s.steps:,}",
            f"{3e-12 * s.flops * s.steps * settings.world_batch:.1f}",
        ]
        for name, s in sides.items()
    ]
    rows = {**{name: s.shares for name, s in sides.items()}, **ceilings}
    latent, pixel = (sides[name].shares for name in ("latent", "pixel"))
    return "\n\n".join(
        [
            f"Single pictures of the built-in world, 64x64, told their {', '.join(SEEN)}: {settings.world_pictures:,} "
            f"to train on, batches of {settings.world_batch}, as many steps as make up equal floating-point "
            "operations. The latent network works on the bundled autoencoder's 8x8 latents, the pixel network is the "
            "same U-Net with three levels more on top. Training the autoencoder isn't counted; it serves all stages "
            f"and was done before. Decoding a picture costs {decoding / 1e6:.0f} million operations, once for {STEPS} "
            "steps of DDIM.",
            table(
                ["diffusion", "parameters", "million operations a pass", "steps", "10^12 operations of training"], costs
            ),
            f"Share of N = {settings.world_samples} pictures that the world's reader reads as what was asked for, ± "
            "one standard deviation, without guidance.",
            table(["pictures", *SEEN, "mean", "all"], [[name, *found.values()] for name, found in rows.items()]),
            claim(
                "Latent diffusion, section 4.1: at equal compute diffusion of latents is better than that of pixels.",
                pixel["mean"].below(latent["mean"]),
                f"attributes right in the mean: latent {latent['mean']}, pixel {pixel['mean']}; all at once, which "
                f"training of minutes hardly reaches: {latent['all']} and {pixel['all']}",
                "training of minutes, not days, and pictures of 64x64, where pixels are cheapest.",
            ),
            picture("latents", "Real pictures, and the two samples for the same words."),
        ]
    )
