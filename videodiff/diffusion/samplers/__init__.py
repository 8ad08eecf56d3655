"""Samplers: pure functions from (denoise, noise, schedule) to clean data. A choice of one is named by its `kind`."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from videodiff.diffusion.samplers.base import Generators, OnStep, SamplerConfig
from videodiff.diffusion.samplers.ddim import DDIM, invert
from videodiff.diffusion.samplers.ddpm import DDPM
from videodiff.diffusion.samplers.dpm_solver import DPMSolver
from videodiff.diffusion.samplers.edm import Heun
from videodiff.diffusion.samplers.langevin import Langevin, PredictorCorrector

__all__ = [
    "DDIM",
    "DDPM",
    "DPMSolver",
    "Generators",
    "Heun",
    "Langevin",
    "OnStep",
    "PredictorCorrector",
    "Sampler",
    "SamplerConfig",
    "SamplerKind",
    "invert",
]

Sampler: TypeAlias = Annotated[
    DDIM | DDPM | DPMSolver | Heun | Langevin | PredictorCorrector, Field(discriminator="kind")
]
SamplerKind: TypeAlias = Literal["ddim", "ddpm", "dpm_solver", "heun", "langevin", "predictor_corrector"]
