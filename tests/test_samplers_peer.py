"""Samplers against a peer's loops. The "network" is any smooth function of (x, t): both sides must lead it to the same
result.

The peer works with its own float32 tables. Over a whole loop they cost some 1e-6, and 3e-5 where eps is divided by a
small alpha and states reach 50: so 1e-5 of the largest value, with float64 states.

Our predictor-corrector has no peer: ScoreSdeVeScheduler walks a variance-exploding chain between levels of its own
(sigma_min to sigma_max, states x / alpha, no betas), and its corrector's step comes from norms of the score and of the
drawn noise, averaged over the batch, where ours follows from the level alone.
"""

import numpy as np
import pytest
import torch
from gaussian import PLAIN, ZERO, generators
from torch import Tensor

from videodiff.diffusion.prediction import Denoise, Estimate, Prediction, split
from videodiff.diffusion.samplers import DDIM, DDPM, DPMSolver, Heun, invert
from videodiff.diffusion.schedule import NoiseSchedule, Spacing
from videodiff.seeding import normals

COSINE = NoiseSchedule(kind="cosine")
# Leading times of a schedule with zero terminal SNR are refused, see test_samplers.
TABLES = pytest.mark.parametrize(
    ("schedule", "prediction", "spacing"),
    [
        (schedule, prediction, spacing)
        for schedule, prediction in ((ZERO, "v"), (ZERO, "x0"), (PLAIN, "eps"), (PLAIN, "v"), (COSINE, "v"))
        for spacing in ("trailing", "leading")
        if (schedule, spacing) != (ZERO, "leading")
    ],
)
PEER_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
STEPS = 20
NOISE = normals((3, 4, 4), 0, "noise", range(2)).double()


def network(x: Tensor, t: float) -> Tensor:
    return torch.tanh(x + 0.3) * (0.4 + t / 2000) - 0.1 * x


def fraction(x: Tensor, t: float) -> Tensor:
    return torch.sigmoid(x + t / 1000)


def denoiser(schedule: NoiseSchedule, prediction: Prediction, learned: bool = False) -> Denoise:
    def denoise(x: Tensor, t: Tensor) -> Estimate:
        time = float(t[0])
        estimate = split(prediction, network(x, time), x, schedule.alpha(t), schedule.sigma(t))
        return Estimate(estimate.x0, estimate.eps, fraction(x, time) if learned else None)

    return denoise


def settings(schedule: NoiseSchedule, prediction: Prediction, spacing: str) -> dict[str, object]:
    return {
        "num_train_timesteps": 1000,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": {"scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}[schedule.kind],
        "prediction_type": PEER_NAMES[prediction],
        "timestep_spacing": spacing,
    }


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))


def table_loop(  # type: ignore[no-untyped-def]
    peer,
    schedule: NoiseSchedule,
    spacing: str,
    learned: bool = False,
    variance_at_end: bool = False,
    **options: object,
) -> Tensor:
    peer.set_timesteps(STEPS)
    assert [int(t) + 1 for t in peer.timesteps] == schedule.times(STEPS, spacing)  # type: ignore[arg-type]
    x = NOISE
    for t in peer.timesteps:
        output = network(x, int(t) + 1)
        if learned:
            output = torch.cat([output, 2 * fraction(x, int(t) + 1) - 1], dim=1)
        step = peer.step(output, t, x, **options)
        x = step.prev_sample
    # With a variance that is not 0 there, the peer's DDPM adds noise to clean data unless it comes from its index 0.
    # What it adds it to is its x0.
    return step.pred_original_sample if variance_at_end else x


@TABLES
# A hair below 1: at 1 the peer takes the root of a difference that rounding makes negative on some processors.
@pytest.mark.parametrize("eta", [0.0, 0.6, 1 - 1e-7])
def test_ddim(schedule: NoiseSchedule, prediction: Prediction, spacing: str, eta: float) -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    peer = schedulers.DDIMScheduler(
        **settings(schedule, prediction, spacing),
        clip_sample=False,
        set_alpha_to_one=True,
        rescale_betas_zero_snr=schedule.zero_terminal_snr,
    )
    sampler = DDIM(steps=STEPS, spacing=spacing, eta=eta)  # type: ignore[arg-type]
    ours = sampler(denoiser(schedule, prediction), NOISE, schedule, generators(2))
    close(ours, table_loop(peer, schedule, spacing, eta=eta, generator=generators(2)))


@TABLES
@pytest.mark.parametrize(
    ("variance", "theirs"), [("beta_tilde", "fixed_small"), ("beta", "fixed_large"), ("learned", "learned_range")]
)
def test_ddpm(schedule: NoiseSchedule, prediction: Prediction, spacing: str, variance: str, theirs: str) -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    peer = schedulers.DDPMScheduler(
        **settings(schedule, prediction, spacing),
        clip_sample=False,
        variance_type=theirs,
        rescale_betas_zero_snr=schedule.zero_terminal_snr,
    )
    learned = variance == "learned"
    sampler = DDPM(steps=STEPS, spacing=spacing, variance=variance)  # type: ignore[arg-type]
    ours = sampler(denoiser(schedule, prediction, learned), NOISE, schedule, generators(2))
    theirs_made = table_loop(peer, schedule, spacing, learned, variance != "beta_tilde", generator=generators(2))
    close(ours, theirs_made)


@pytest.mark.parametrize("schedule", [PLAIN, COSINE], ids=["plain", "cosine"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_inversion(schedule: NoiseSchedule, spacing: Spacing) -> None:
    # The peer's pipelines ask the network at the time that a step leads to, DDIM's eq. 13 and we at the one it leaves;
    # here both are asked as we do. eps alone: the first step asks at the first noisy time, and the peer reads the
    # answer by the coefficients of clean data. Those leave eps what it is, but v would be taken for eps.
    schedulers = pytest.importorskip("diffusers.schedulers")
    peer = schedulers.DDIMInverseScheduler(**settings(schedule, "eps", spacing), clip_sample=False)
    peer.set_timesteps(STEPS)
    times = [int(t) + 1 for t in peer.timesteps]
    assert times == schedule.times(STEPS, spacing)[::-1]
    x = data = torch.tanh(NOISE)
    for t, asked in zip(peer.timesteps, [times[0], *times[:-1]], strict=True):
        x = peer.step(network(x, asked), t, x).prev_sample
    ours = invert(denoiser(schedule, "eps"), data, schedule, STEPS, spacing)
    close(ours, x)


@pytest.mark.parametrize(("schedule", "prediction"), [(PLAIN, "eps"), (PLAIN, "x0"), (PLAIN, "v"), (COSINE, "v")])
def test_dpm_solver(schedule: NoiseSchedule, prediction: Prediction) -> None:
    # Not with zero terminal SNR: the peer puts alpha_bar = 2^-24 in place of 0 there, where ours takes the limit.
    schedulers = pytest.importorskip("diffusers.schedulers")
    peer = schedulers.DPMSolverMultistepScheduler(
        **settings(schedule, prediction, "trailing"),
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    ours = DPMSolver(steps=STEPS)(denoiser(schedule, prediction), NOISE, schedule)
    close(ours, table_loop(peer, schedule, "trailing"))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_heun_with_edm_steps(prediction: Prediction) -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    peer = schedulers.HeunDiscreteScheduler(**settings(PLAIN, prediction, "linspace"), use_karras_sigmas=True)
    # Both find times by inverting the table: rounding it to float32 moves them by up to 1e-3. The peer gets ours.
    torch.testing.assert_close(peer.alphas_cumprod.double(), PLAIN.alpha_bar[1:], rtol=1e-5, atol=0)
    peer.alphas_cumprod = PLAIN.alpha_bar[1:].clone()
    peer.set_timesteps(STEPS)
    sampler = Heun(steps=STEPS)
    alpha_bar = PLAIN.alpha_bar[-1].item()
    seen: list[float] = []
    x = NOISE / alpha_bar**0.5  # the peer's state is x / alpha
    for t in peer.timesteps:
        seen.append(float(t) + 1)
        x = peer.step(network(peer.scale_model_input(x, t), float(t) + 1), t, x).prev_sample
    np.testing.assert_allclose(seen[::2], sampler.times(PLAIN), rtol=1e-5)
    close(sampler(denoiser(PLAIN, prediction), NOISE, PLAIN), x)
