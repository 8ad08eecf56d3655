"""Which networks judge by features, and which perceptual distance: `--judges FILE`, else the model's own text tower."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field

from stages.evaluation.measures import Gauge, has_flow
from videodiff import config as configs
from videodiff.config import Config
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks.features import BundledFeatures, FeatureConfig, open_features
from videodiff.networks.perceptual import PerceptualConfig, load_perceptual
from videodiff.parts import sha256


class Judges(Config):
    """features: networks from local files, see `videodiff.networks.features`. perceptual: LPIPS from a local file."""

    features: tuple[FeatureConfig, ...] = Field(
        (BundledFeatures(takes="pictures"), BundledFeatures(takes="clips")), description="networks that judge"
    )
    perceptual: PerceptualConfig | None = None


def open_gauge(
    path: Path | None, model: Model, size: int, device: torch.device, tower: bool = False
) -> tuple[Gauge, dict[str, str]]:
    """What measures clips, and what is left out for which reason: without a file a model needs no text tower.

    tower: the model's own text tower is what is judged, so that it is among them whatever the file names.
    Raises UserError for a file that can't be read, and networks that it names and that can't be opened.
    """
    judges = Judges() if path is None else configs.load(Judges, path)
    own = Judges().features if tower else ()
    features = (*(each for each in own if each not in judges.features), *judges.features)
    skipped: dict[str, str] = {}
    extractors = []
    try:
        for number, config in enumerate(features):
            extractors.append(open_features(config, model, device, f"features.{number}"))
    except UserError as error:
        if path is not None:
            raise
        skipped["features of the model's own text tower"] = without(model, str(error))
    perceptual, name = None, None
    if judges.perceptual is not None:
        perceptual = load_perceptual(judges.perceptual, size).to(device)
        files = filter(None, (judges.perceptual.path, judges.perceptual.linear))
        name = f"LPIPS, sha256 {' and '.join(sha256(Path(file)) for file in files)}"
    flow = has_flow()
    if not flow:
        skipped["motion"] = "optical flow needs OpenCV; pip install 'videodiff[eval]'"
    return Gauge(extractors, perceptual, name, flow, device), skipped


def without(model: Model, text: str) -> str:
    """What is said of a model without the place where it lies: results hold no paths."""
    return text.replace(str(model.folder), "the model")
