"""What a denoiser refuses when it is built. What it computes is tested with losses and samplers."""

import pytest
import torch

from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"prediction": "epsilon"}, "prediction 'epsilon' is none of eps, x0, v"),
        ({"variance": "learned"}, "variance 'learned' is none of fixed, learned_range"),
        ({"dtype": torch.int64}, "can't hold noise"),
        ({"prediction": "eps", "schedule": NoiseSchedule(zero_terminal_snr=True)}, "set prediction: v"),
    ],
)
def test_what_there_is_not_is_refused(given: dict[str, object], problem: str) -> None:
    settings: dict[str, object] = {"schedule": NoiseSchedule(), "prediction": "v", **given}
    with pytest.raises(UserError, match=problem):
        Denoiser(lambda x, time, condition: x, **settings)  # type: ignore[arg-type]
