"""What all tests share: one thread per process, this machine's CPU, nothing from the network, and a toy model."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported, and inherited by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("patient", deadline=None)  # a busy machine is no failure
settings.load_profile("patient")


def write_toy_model(folder: Path) -> Path:
    """A model of all five stages with random weights: 32x32 pixels, 4 frames at 8 fps, interpolated to 7."""
    import torch

    from videodiff import config as configs
    from videodiff.diffusion.guidance import ClassifierFree
    from videodiff.diffusion.samplers import DDIM
    from videodiff.diffusion.schedule import NoiseSchedule
    from videodiff.model_folder import write_weights
    from videodiff.networks.autoencoder import Autoencoder, AutoencoderConfig
    from videodiff.networks.text import ContrastiveTextModel, TextConfig
    from videodiff.networks.tokenizer import build_vocabulary
    from videodiff.networks.unet import TemporalConfig, UNet, UNetConfig
    from videodiff.parts import (
        DESCRIPTION,
        VOCABULARY,
        WORDS,
        AutoencoderPart,
        DiffusionPart,
        File,
        ModelConfig,
        Sampling,
        TextPart,
        sha256,
    )

    folder.mkdir(parents=True)
    captions = ["a large red circle moving left on a white background", "a small blue square stands still on black"]
    vocabulary, words = folder / VOCABULARY, folder / WORDS
    build_vocabulary(captions, vocabulary, words, num_merges=400)
    spatial = UNetConfig(
        channels=4,
        model_channels=16,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_levels=(True,),
        head_channels=8,
        context_dims=(16,),
        pooled_dim=16,
    )
    temporal = spatial.model_copy(update={"temporal": TemporalConfig(fps=True), "known_channels": True})
    shape = {"width": 16, "layers": 1, "heads": 2, "context_length": 16, "embed_dim": 16}
    text = TextConfig(**shape, image_size=32, image_width=16, image_layers=1, image_heads=2)
    autoencoder = AutoencoderConfig(latent_channels=4, patch=4, widths=(16, 16))
    files = {"vocabulary": str(vocabulary), "words": str(words)}

    def weights(stage: str, network: torch.nn.Module) -> File:
        for parameter in network.parameters():  # layers that start at zero would leave nothing to compare
            parameter.data += 0.1 * torch.randn_like(parameter)
        state = network.state_dict()
        if isinstance(network, ContrastiveTextModel):
            state = {name.removeprefix("clip."): value for name, value in state.items()}
        if stage in ("video", "interpolation"):
            state = {name: value for name, value in state.items() if name not in network.spatial_state()}
        return write_weights(folder, f"{stage}.safetensors", state)

    def diffusion(stage: str, network: UNetConfig, frames: int, factor: int = 1) -> DiffusionPart:
        return DiffusionPart(
            network=network,
            schedule=NoiseSchedule(zero_terminal_snr=True),
            prediction="v",
            size=32,
            frames=frames,
            fps=8.0 * factor,
            factor=factor,
            sampling=Sampling(sampler=DDIM(steps=3), guidance=ClassifierFree(text=2.0, image=1.5)),
            weights=weights(stage, UNet(network)),
        )

    with torch.random.fork_rng():
        torch.manual_seed(0)
        description = ModelConfig(
            autoencoder=AutoencoderPart(network=autoencoder, weights=weights("autoencoder", Autoencoder(autoencoder))),
            text=TextPart(
                network=text,
                weights=weights("text", ContrastiveTextModel(text.model_copy(update=files))),
                vocabulary=File(name=VOCABULARY, sha256=sha256(vocabulary)),
                words=File(name=WORDS, sha256=sha256(words)),
            ),
            image=diffusion("image", spatial, 1),
            video=diffusion("video", temporal, 4),
            interpolation=diffusion("interpolation", temporal, 5, factor=2),
        )
    configs.save(description, folder / DESCRIPTION)
    return folder


def write_toy_classifier(toy: Path, folder: Path, classes: tuple[str, ...]) -> Path:
    """The toy model with a classifier of its latents: random weights, of which each class has those of its name."""
    import torch

    from videodiff import config as configs
    from videodiff.model import Model
    from videodiff.model_folder import carry, write_weights
    from videodiff.networks.classifier import ClassifierConfig, NoisyClassifier
    from videodiff.parts import DESCRIPTION, ClassifierPart
    from videodiff.seeding import generator

    folder.mkdir(parents=True)
    base = Model.load(toy)
    told = {"context_dims": (), "pooled_dim": None}
    network = ClassifierConfig(
        encoder=base.diffusion("image").network.model_copy(update=told), num_classes=len(classes), pooling="mean"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = {
            name: value + 0.1 * torch.randn_like(value) for name, value in NoisyClassifier(network).state_dict().items()
        }
    width = state["leave.weight"].shape[1]
    state["leave.weight"] = torch.stack([torch.randn(width, generator=generator("class", name)) for name in classes])
    state["leave.bias"] = torch.zeros(len(classes))
    part = ClassifierPart(
        network=network,
        schedule=base.diffusion("image").schedule,
        attribute="shape",
        classes=classes,
        size=32,
        weights=write_weights(folder, "classifier.safetensors", state),
    )
    configs.save(carry(base, folder).model_copy(update={"classifier": part}), folder / DESCRIPTION)
    return folder


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a toy model with random weights; shared, so copy it before you change it."""
    return write_toy_model(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="session")
def toy_classifier(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the toy model with a classifier of shapes; shared, so copy it before you change it."""
    shapes = ("circle", "cross", "square", "triangle")
    return write_toy_classifier(toy_model, tmp_path_factory.mktemp("toy") / "classifier", shapes)
