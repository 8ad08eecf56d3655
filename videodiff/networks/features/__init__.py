"""What judges pictures and clips by features: networks from local files behind one interface (`FeatureExtractor`)."""

from __future__ import annotations

import torch

from videodiff.model import Model
from videodiff.networks.features.configs import (
    BundledFeatures,
    FeatureConfig,
    I3DFeatures,
    InceptionFeatures,
    OpenClipFeatures,
    TorchScriptFeatures,
    VideoMAEFeatures,
)
from videodiff.networks.features.extractor import FeatureExtractor
from videodiff.networks.features.judges import open_i3d, open_inception, open_torchscript, open_videomae
from videodiff.networks.features.towers import open_bundled, open_clip_tower

__all__ = [
    "BundledFeatures",
    "FeatureConfig",
    "FeatureExtractor",
    "I3DFeatures",
    "InceptionFeatures",
    "OpenClipFeatures",
    "TorchScriptFeatures",
    "VideoMAEFeatures",
    "open_features",
]


def open_features(
    config: FeatureConfig, model: Model | None, device: torch.device | str, key: str = "features"
) -> FeatureExtractor:
    """The frozen network of a configuration on `device`; `key` names the configuration in errors.

    model: the judged one, for kind bundled. UserError for files that are missing, have another sha256 or hold another
    network's weights.
    """
    device = torch.device(device)
    if isinstance(config, BundledFeatures):
        return open_bundled(config, model, device, key)
    if isinstance(config, OpenClipFeatures):
        return open_clip_tower(config, device, key)
    if isinstance(config, InceptionFeatures):
        return open_inception(config, device, key)
    if isinstance(config, VideoMAEFeatures):
        return open_videomae(config, device, key)
    return open_i3d(config, device, key) if isinstance(config, I3DFeatures) else open_torchscript(config, device, key)
