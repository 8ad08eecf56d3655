"""Networks of the well-known distances, and any other that a TorchScript file holds.

Shapes: n pictures or clips of a chunk, T frames, S picture size, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videodiff.errors import UserError
from videodiff.networks.features.configs import (
    I3DFeatures,
    InceptionFeatures,
    TorchScriptFeatures,
    VideoMAEFeatures,
)
from videodiff.networks.features.extractor import AS_IS, CROPPED, SQUEEZED, FeatureExtractor, resized
from videodiff.networks.features.files import checked_sha256, fill, is_script, load_script, read_state
from videodiff.networks.features.inception import CLASSES, SIZE, WIDTH, make_inception
from videodiff.networks.features.videomae import load_videomae, weights_of

I3D_SIZE = 224
ANY_SIZE = 64  # of what a file that resizes itself is tried out on
ANY_FRAMES = 16


def open_inception(config: InceptionFeatures, device: torch.device, key: str) -> FeatureExtractor:
    """Our network with a file's weights, or the file itself where it is TorchScript."""
    path = Path(config.path)
    digest = checked_sha256(key, path, config.sha256)
    if is_script(path):
        return _inception_script(config, digest, device, key)
    try:
        network, state = make_inception(read_state(key, path), config.variant)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{key}.variant: {path} {error}; state {key}.variant, one of {', '.join(CLASSES)}") from None
    fill(network, state, f"{key}.path", path, f"Inception v3 ({network.variant})")
    network.to(device)
    fid = network.variant == "fid"

    def look(x: Tensor, classify: bool) -> tuple[Tensor, Tensor | None]:
        features = network((x - 128) / 128 if fid else x / 127.5 - 1)
        return features, network.probabilities(features) if classify else None

    return FeatureExtractor(
        kind=config.kind,
        name=f"Inception v3 ({'FID' if fid else 'torchvision'})",
        sha256=digest,
        takes="pictures",
        size=SIZE,
        resize=SQUEEZED,
        values="(x - 128) / 128" if fid else "[-1, 1]",
        dimension=WIDTH,
        device=device,
        batch=config.batch,
        prepare=lambda frames: resized(frames, SIZE)[:, 0],
        look=look,
        classes=None if network.fc is None else network.fc.out_features,
    )


def _inception_script(config: InceptionFeatures, digest: str, device: torch.device, key: str) -> FeatureExtractor:
    """The file has its own resizing, which leaves what has its size as it is, and takes bytes (0 to 255)."""
    script = load_script(key, Path(config.path), config.sha256, device)
    probe = torch.zeros(1, 3, SIZE, SIZE, device=device)
    dimension = _tried(script, probe, Path(config.path), key, return_features=True)
    try:  # without the last layer's bias, as the Inception score has it
        classes = _tried(script, probe, Path(config.path), key, no_output_bias=True)
    except UserError:
        classes = None

    def look(x: Tensor, classify: bool) -> tuple[Tensor, Tensor | None]:
        return _called(script, x, return_features=True), _called(script, x, no_output_bias=True) if classify else None

    return FeatureExtractor(
        kind=config.kind,
        name="Inception v3 (FID, TorchScript)",
        sha256=digest,
        takes="pictures",
        size=SIZE,
        resize=SQUEEZED,
        values="[0, 255]",
        dimension=dimension,
        device=device,
        batch=config.batch,
        prepare=lambda frames: resized(frames, SIZE)[:, 0],
        look=look,
        classes=classes,
    )


def open_videomae(config: VideoMAEFeatures, device: torch.device, key: str) -> FeatureExtractor:
    """The encoder in the middle of a square crop, as it was trained."""
    folder = Path(config.path)
    weights = weights_of(folder, key)
    digest = checked_sha256(key, weights, config.sha256)
    network, values = load_videomae(folder, read_state(key, weights), key)
    network.to(device)

    def look(x: Tensor, classify: bool) -> tuple[Tensor, Tensor | None]:
        return network(x), None

    return FeatureExtractor(
        kind=config.kind,
        name=f"VideoMAE ({len(network.layers)} layers of width {network.width})",
        sha256=digest,
        takes="clips",
        size=network.size,
        resize=CROPPED,
        values=values,
        frames=network.frames,
        dimension=network.width,
        device=device,
        batch=config.batch,
        prepare=lambda frames: resized(frames, network.size, crop=True).transpose(1, 2),
        look=look,
    )


def open_i3d(config: I3DFeatures, device: torch.device, key: str) -> FeatureExtractor:
    """Features before the last layer's classes, as the Fréchet video distance has them."""
    path = Path(config.path)
    digest = checked_sha256(key, path, config.sha256)
    script = load_script(key, path, config.sha256, device)
    plain = config.call == "plain"
    told = {} if plain else {"rescale": True, "resize": True, "return_features": True}

    def prepare(frames: Tensor) -> Tensor:
        if plain:
            return (resized(frames, I3D_SIZE) / 127.5 - 1).transpose(1, 2)
        return frames.permute(0, 4, 1, 2, 3).contiguous()

    probe = torch.zeros(1, config.frames, I3D_SIZE, I3D_SIZE, 3, dtype=torch.uint8)
    return FeatureExtractor(
        kind=config.kind,
        name=f"I3D ({config.call})",
        sha256=digest,
        takes="clips",
        size=I3D_SIZE if plain else None,
        resize=SQUEEZED if plain else AS_IS,
        values="[-1, 1]" if plain else "[0, 255]",
        frames=config.frames,
        dimension=_tried(script, prepare(probe).to(device), path, key, **told),
        device=device,
        batch=config.batch,
        prepare=prepare,
        look=_looking(script, **told),
    )


def open_torchscript(config: TorchScriptFeatures, device: torch.device, key: str) -> FeatureExtractor:
    """A file that is called with pictures or clips and nothing else."""
    path, (black, white) = Path(config.path), config.range
    digest = checked_sha256(key, path, config.sha256)
    script = load_script(key, path, config.sha256, device)
    pictures = config.takes == "pictures"

    def prepare(frames: Tensor) -> Tensor:
        x = resized(frames, config.size) * ((white - black) / 255) + black
        return x[:, 0] if pictures else x.transpose(1, 2)

    def look(x: Tensor, classify: bool) -> tuple[Tensor, Tensor | None]:
        found = _called(script, x)
        if not classify:
            return found, None
        if config.classes == "logits":
            return found, found.softmax(dim=1)
        if found.min() < 0 or (found.sum(dim=1) - 1).abs().max() > 1e-3:
            raise UserError(f"{key}.classes: what {path} gives are no probabilities; say classes: logits")
        return found, found

    side, count = config.size or ANY_SIZE, 1 if pictures else config.frames or ANY_FRAMES
    probe = torch.zeros(1, count, side, side, 3, dtype=torch.uint8)
    dimension = _tried(script, prepare(probe).to(device), path, key)
    return FeatureExtractor(
        kind=config.kind,
        name=config.name,
        sha256=digest,
        takes=config.takes,
        size=config.size,
        resize=AS_IS if config.size is None else SQUEEZED,
        values=f"[{black:g}, {white:g}]",
        frames=config.frames,
        dimension=dimension,
        device=device,
        batch=config.batch,
        prepare=prepare,
        look=look,
        classes=None if config.classes is None else dimension,
    )


def _looking(script: Any, **told: bool) -> Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]:
    def look(x: Tensor, classify: bool) -> tuple[Tensor, Tensor | None]:
        return _called(script, x, **told), None

    return look


def _called(script: Any, x: Tensor, **told: bool) -> Tensor:
    # Without the optimizer, which specializes a script in its first calls, so that equal calls may give unequal bits.
    with torch.jit.optimized_execution(False):
        found: Tensor = script(x, **told)
        return found


@torch.inference_mode()
def _tried(script: Any, probe: Tensor, path: Path, key: str, **told: bool) -> int:
    """D of what a script gives for one picture or clip; UserError where it can't be called so or gives other."""
    call = f"f({list(probe.shape)}{''.join(f', {name}=True' for name in told)})"
    try:
        found = _called(script, probe, **told)
    except (RuntimeError, TypeError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{key}.path: {path} can't be called as {call}: {lines[-1].strip()}; check {key}.kind"
        ) from None
    shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if not isinstance(shape, list) or len(shape) != 2 or shape[0] != 1:
        raise UserError(f"{key}.path: {path} gives {shape} for {call}; it must give one vector, [1, D]")
    return int(shape[1])
