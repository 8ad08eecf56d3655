"""Text-image towers that judge: the model's own, and a public CLIP. They compare pictures with captions too.

Shapes: n pictures or clips of a chunk, S picture size, D features.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks.features.configs import BundledFeatures, OpenClipFeatures
from videodiff.networks.features.extractor import CROPPED, STRIP, FeatureExtractor, film_strip, resized
from videodiff.networks.features.files import checked_sha256, fill
from videodiff.networks.text import ContrastiveTextModel, public_clip
from videodiff.parts import TextPart


def open_bundled(config: BundledFeatures, model: Model | None, device: torch.device, key: str) -> FeatureExtractor:
    """Vectors of length 1 of film strips and of captions. By the averaged weights, unless the text stage is the newest
    one and the raw ones were chosen: then it is the tower that is judged."""
    if model is None:
        raise UserError(f"{key}.kind: bundled needs a model, whose text stage it is; name one, or another kind")
    part = model.part("text")
    assert isinstance(part, TextPart)
    if part.network.pretrained is not None or part.network.padding != "masked" or part.vocabulary is None:
        raise UserError(
            f"{key}.kind: bundled, but the text stage of {model.folder} is a public tower, which saw no film strips; "
            "take kind: open_clip with the path of its weights"
        )
    files = {name: getattr(part, name) for name in ("vocabulary", "words")}
    paths = {name: None if file is None else str(model.path(file)) for name, file in files.items()}
    network = ContrastiveTextModel(part.network.model_copy(update=paths))
    weights = model.chosen("text")
    state = {f"clip.{name}": value for name, value in model.state("text").items()}
    fill(network, state, f"{key}.kind: bundled", model.path(weights), "a tower for texts and pictures")
    network.to(device)
    size = part.network.image_size

    def look(x: Tensor, classify: bool) -> tuple[Tensor, Tensor | None]:
        return network.clip.encode_image(x / 127.5 - 1, normalize=True), None

    return FeatureExtractor(
        kind=config.kind,
        name=f"the model's own text-image tower, {'film strips' if config.takes == 'clips' else 'still film strips'}",
        sha256=weights.sha256,
        takes=config.takes,
        size=size,
        resize=STRIP,
        values="[-1, 1]",
        dimension=part.network.embed_dim,
        device=device,
        batch=config.batch,
        prepare=lambda frames: film_strip(frames, size),
        look=look,
        write=lambda captions: network.clip.encode_text(network.tokenize(captions).to(device), normalize=True),
    )


def open_clip_tower(config: OpenClipFeatures, device: torch.device, key: str) -> FeatureExtractor:
    """Vectors of length 1 of pictures, brought to the tower as in its training, and of captions."""
    digest = checked_sha256(key, Path(config.path), config.sha256)
    clip, tokenizer, picture = public_clip(config.name, config.path, key)
    clip.to(device)
    size = picture["size"] if isinstance(picture["size"], int) else picture["size"][0]
    mean, deviation = (255 * torch.tensor(picture[name], device=device)[:, None, None] for name in ("mean", "std"))

    def look(x: Tensor, classify: bool) -> tuple[Tensor, Tensor | None]:
        return clip.encode_image((x - mean) / deviation, normalize=True), None

    return FeatureExtractor(
        kind=config.kind,
        name=f"open_clip {config.name}",
        sha256=digest,
        takes="pictures",
        size=size,
        resize=CROPPED,
        values="OpenAI's mean and deviation",
        dimension=int(clip.visual.output_dim),
        device=device,
        batch=config.batch,
        prepare=lambda frames: resized(frames, size, crop=True)[:, 0],
        look=look,
        write=lambda captions: clip.encode_text(tokenizer(captions).to(device), normalize=True),
    )
