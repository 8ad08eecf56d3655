"""Numbers that papers and their code publish, where they are defaults here; see `docs/architecture.md` for those that
are not. Sources are named beside them."""

from typing import Any

import pytest

from stages.image import ImageStage
from videodiff.config import Config
from videodiff.diffusion.guidance import ClassifierFree, ClassifierGuidance
from videodiff.diffusion.loss import DiffusionLoss
from videodiff.diffusion.samplers import DDIM, DDPM, DPMSolver, Heun, Langevin, PredictorCorrector
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.diffusion.times import LossSecondMoment
from videodiff.networks.autoencoder import AutoencoderLoss
from videodiff.networks.discriminator import DiscriminatorConfig
from videodiff.networks.perceptual import PerceptualConfig
from videodiff.networks.quantizer import QuantizerConfig
from videodiff.networks.unet import TemporalConfig, UNetConfig
from videodiff.training.engine import EngineConfig

PUBLISHED: list[tuple[str, type[Config], dict[str, Any]]] = [
    ("DDPM's code", EngineConfig, {"gradient_clip": 1.0, "ema_decay": 0.9999}),
    ("DDPM, section 4: T = 1000, beta-tilde", DDPM, {"steps": 1000, "variance": "beta_tilde", "spacing": "trailing"}),
    ("improved DDPM, eq. 16", DiffusionLoss, {"variance_weight": 0.001}),
    ("improved DDPM's LossSecondMomentResampler", LossSecondMoment, {"history": 10, "uniform_prob": 0.001}),
    ("min-SNR, section 4", DiffusionLoss, {"gamma": 5.0}),
    ("DDIM, eq. 16; zero terminal SNR, table 2", DDIM, {"eta": 0.0, "spacing": "trailing"}),
    ("DPM-Solver++: 15 to 20 steps", DPMSolver, {"steps": 20, "spacing": "trailing"}),
    ("EDM, table 1: 35 evaluations", Heun, {"steps": 18, "noise_min": 0.002, "noise_max": 80.0, "rho": 7.0}),
    ("score SDE, appendix G", PredictorCorrector, {"corrections": 1, "snr": 0.16}),
    ("score SDE, appendix G", Langevin, {"snr": 0.16}),
    (
        "Stable Diffusion and Emu Video",
        NoiseSchedule,
        {"kind": "scaled_linear", "num_steps": 1000, "beta_start": 8.5e-4, "beta_end": 1.2e-2, "snr_shift": 1.0},
    ),
    ("ADM's code, 64x64", ClassifierGuidance, {"scale": 1.0}),
    ("ADM, section 3; Emu Video, table 1", UNetConfig, {"head_channels": 64, "channel_mult": (1, 2, 4, 4)}),
    ("Emu Video, section 3: 8 latent channels", UNetConfig, {"channels": 8, "num_res_blocks": 2}),
    ("Emu Video, section 3", TemporalConfig, {"kernel": 3}),
    ("Emu Video, section 3: w_p", ClassifierFree, {"text": 7.5}),
    ("latent diffusion's autoencoder_kl_32x32x4.yaml", AutoencoderLoss, {"kl_weight": 1e-6, "edge_weight": 1.0}),
    ("the same", PerceptualConfig, {"weight": 1.0}),
    (
        "the same; pix2pix, section 6.1.2",
        DiscriminatorConfig,
        {"weight": 0.5, "start": 50_001, "width": 64, "num_layers": 3},
    ),
    ("VQ-VAE, section 3.2", QuantizerConfig, {"commitment": 0.25}),
]


@pytest.mark.parametrize(("source", "config", "numbers"), PUBLISHED, ids=lambda value: getattr(value, "__name__", None))
def test_defaults_are_the_published_numbers(source: str, config: type[Config], numbers: dict[str, Any]) -> None:
    assert {key: config.model_fields[key].default for key in numbers} == numbers, source


def test_the_image_stage_trains_by_the_published_recipe() -> None:
    defaults = {key: field.default for key, field in ImageStage.model_fields.items()}
    assert defaults["dropout"].text == 0.1  # classifier-free guidance, table 1: p_uncond
    assert defaults["prediction"] == "v"  # with zero terminal SNR: Lin et al., section 3.2; Emu Video at 512 pixels
    assert defaults["schedule"] == NoiseSchedule(zero_terminal_snr=True)
    assert defaults["loss"] == DiffusionLoss(weighting="simple", time_shift=1.0, offset_noise=0.0)
