"""What holds for every sampler: each is led by data ~ N(m, s^2), whose best denoiser is known in closed form.

A new member of the union is tested here at once.
"""

import itertools
from dataclasses import replace
from typing import get_args

import pytest
import torch
from gaussian import PLAIN, ZERO, AnySampler, M, S, affine, at, generators, oracle
from pydantic import TypeAdapter
from torch import Tensor

from stages.cli import SamplerChoice
from stages.pipeline import adjusted
from videodiff.batch import Condition
from videodiff.config import Config, build, to_dict
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.prediction import Estimate
from videodiff.diffusion.samplers import DDIM, DDPM, DPMSolver, Heun, Langevin, PredictorCorrector, Sampler, SamplerKind
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError
from videodiff.networks.unet import UNet, UNetConfig
from videodiff.parts import Sampling
from videodiff.seeding import normals

MEMBERS: list[type[AnySampler]] = list(get_args(get_args(Sampler)[0]))
SAMPLERS = [member() for member in MEMBERS]
VARIANTS: list[AnySampler] = [
    *SAMPLERS,
    DDIM(eta=0.5),
    DDIM(eta=1),
    DDIM(spacing="linspace"),
    DDPM(variance="beta"),
    DPMSolver(spacing="linspace"),
    Heun(rho=3),
    Langevin(corrections=2, snr=0.3),
    PredictorCorrector(corrections=3),
]
COUNT = 8_000


def with_steps(sampler: AnySampler, steps: int) -> AnySampler:
    return sampler.model_copy(update={"steps": steps})


def moments(sampler: AnySampler, schedule: NoiseSchedule) -> tuple[float, float, float]:
    """Mean, deviation, and five standard errors of the deviation (0 where both are exact)."""
    if not sampler.random:
        return *affine(sampler, schedule), 0.0
    noise = normals((COUNT,), 0, "noise", [0])
    x = sampler(oracle(schedule), noise, schedule, generators(1)).double()
    return x.mean().item(), x.std().item(), 5 * S / (2 * COUNT) ** 0.5


@pytest.mark.parametrize("sampler", VARIANTS, ids=str)
def test_samples_converge_to_the_data(sampler: AnySampler) -> None:
    # All end with the clean data expected at the first noisy step: its deviation is a little smaller than the data's.
    alpha, sigma = at(ZERO, 1)
    truth = S * alpha * S / (alpha**2 * S**2 + sigma**2) ** 0.5
    assert truth == pytest.approx(S, rel=0.005)
    errors = []
    for steps in (4, 16, 64, 256):
        mean, deviation, tolerance = moments(with_steps(sampler, steps), ZERO)
        errors.append(abs(deviation - truth))
    assert mean == pytest.approx(M, abs=2 * tolerance + 1e-9)
    assert all(later < former / 1.5 + tolerance for former, later in itertools.pairwise(errors))
    assert errors[-1] < 0.08 * S


@pytest.mark.parametrize("schedule", [PLAIN, ZERO], ids=["plain", "zero"])
@pytest.mark.parametrize("sampler", [s for s in VARIANTS if not s.random], ids=str)
def test_samplers_without_randomness_follow_the_exact_flow(sampler: AnySampler, schedule: NoiseSchedule) -> None:
    # The probability flow of Gaussian data keeps (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2). From N(0, 1) at t = N,
    # where the plain schedule still holds a part alpha m of the mean, it makes a bias, which is the flow's own.
    alpha, sigma = at(schedule, 1000)
    scale = S / (alpha**2 * S**2 + sigma**2) ** 0.5
    mean, deviation = affine(with_steps(sampler, 1000), schedule)
    assert mean == pytest.approx(M - scale * alpha * M, rel=3e-3)
    assert deviation == pytest.approx(scale, rel=1.5e-2)


@pytest.mark.parametrize("sampler", VARIANTS, ids=str)
def test_one_step_from_pure_noise_is_the_mean(sampler: AnySampler) -> None:
    # At alpha = 0 nothing is known of x0 but its mean; the limit of each formula must be finite and say so.
    noise = normals((3, 4), 0, "noise", range(2))
    made = with_steps(sampler, 1)(oracle(ZERO), noise, ZERO, generators(2))
    torch.testing.assert_close(made, torch.full_like(noise, M))


@pytest.mark.parametrize("sampler", VARIANTS, ids=str)
def test_two_steps_from_pure_noise_pass_through_the_exact_state(sampler: AnySampler) -> None:
    # x_s given x_N is alpha_s E[x0] + sigma_s eps for whichever sampler: normal with that mean, and deviation sigma_s
    # if what comes from x_N and what is drawn add up. The larger variance is 1 there, right for white data alone.
    seen: list[tuple[float, Tensor]] = []

    def watched(x_t: Tensor, t: Tensor) -> Estimate:
        seen.append((float(t[0]), x_t))
        return oracle(ZERO)(x_t, t)

    noise = normals((COUNT,), 0, "noise", [0])
    made = with_steps(sampler, 2)(watched, noise, ZERO, generators(1))
    assert made.isfinite().all()
    (first, _), (s, x_s) = seen[:2]
    alpha, sigma = at(ZERO, s)
    assert first == 1000
    assert 1 <= s < 1000
    assert x_s.mean().item() == pytest.approx(alpha * M, abs=5 / COUNT**0.5)
    deviation = 1.0 if isinstance(sampler, DDPM) and sampler.variance == "beta" else sigma
    assert x_s.std().item() == pytest.approx(deviation, rel=5 / (2 * COUNT) ** 0.5)


@pytest.mark.parametrize("sampler", VARIANTS, ids=str)
def test_a_sampler_is_a_function_of_noise_and_generators(sampler: AnySampler) -> None:
    sampler, noise = with_steps(sampler, 6), normals((6,), 0, "noise", range(2))
    made = sampler(oracle(ZERO), noise, ZERO, generators(2))
    assert torch.equal(made, sampler(oracle(ZERO), noise, ZERO, generators(2)))
    other = sampler(oracle(ZERO), noise, ZERO, generators(2, first=7))
    assert torch.equal(made, other) == (not sampler.random)
    if not sampler.random:
        assert torch.equal(made, sampler(oracle(ZERO), noise, ZERO))


@pytest.mark.parametrize("sampler", VARIANTS, ids=str)
def test_a_sample_does_not_depend_on_its_batch(sampler: AnySampler) -> None:
    sampler, noise = with_steps(sampler, 6), normals((2, 3), 0, "noise", range(4))
    whole = sampler(oracle(ZERO), noise, ZERO, generators(4))
    some = sampler(oracle(ZERO), noise[[3, 1]], ZERO, [generators(1, first=i)[0] for i in (3, 1)])
    torch.testing.assert_close(some, whole[[3, 1]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", VARIANTS, ids=str)
def test_progress_precision_and_gradients(sampler: AnySampler) -> None:
    seen: list[tuple[int, int]] = []
    weight = torch.ones((), requires_grad=True)

    def denoise(x_t: Tensor, t: Tensor) -> Estimate:
        assert x_t.dtype == torch.float32
        estimate = oracle(ZERO)(x_t, t)
        return Estimate(weight * estimate.x0, estimate.eps)

    noise = normals((2,), 0, "noise", [0]).bfloat16()
    made = with_steps(sampler, 3)(denoise, noise, ZERO, generators(1), lambda done, steps: seen.append((done, steps)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert made.dtype == torch.float32
    assert not made.requires_grad


@pytest.mark.parametrize("sampler", VARIANTS, ids=str)
@pytest.mark.parametrize("schedule", [PLAIN, ZERO, NoiseSchedule(kind="cosine", num_steps=50)], ids=str)
def test_times_fall_within_the_trained_ones(sampler: AnySampler, schedule: NoiseSchedule) -> None:
    times = with_steps(sampler, 7).times(schedule)
    assert len(times) == 7
    assert all(former > later for former, later in itertools.pairwise(times))
    assert times[-1] >= 1
    assert times[0] <= schedule.num_steps
    if schedule.zero_terminal_snr:
        assert times[0] == schedule.num_steps


@pytest.mark.parametrize("sampler", [s for s in VARIANTS if s.random], ids=str)
def test_random_samplers_need_a_generator_for_each_sample(sampler: AnySampler) -> None:
    with pytest.raises(UserError, match="one generator per sample"):
        sampler(oracle(ZERO), normals((2,), 0, "noise", range(3)), ZERO)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_another_number_of_generators_is_an_error(sampler: AnySampler) -> None:
    with pytest.raises(ValueError, match="2 generators for 3 samples"):
        sampler(oracle(ZERO), normals((2,), 0, "noise", range(3)), ZERO, generators(2))


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if hasattr(s, "spacing")], ids=str)
def test_more_steps_than_the_schedule_has_are_refused(sampler: AnySampler) -> None:
    with pytest.raises(UserError, match="1 to 1000"):
        with_steps(sampler, 1001)(oracle(ZERO), torch.zeros(1, 2), ZERO, generators(1))


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if hasattr(s, "spacing")], ids=str)
def test_leading_steps_are_refused_with_zero_terminal_snr(sampler: AnySampler) -> None:
    leading = sampler.model_copy(update={"spacing": "leading", "steps": 20})
    with pytest.raises(UserError, match="spacing: trailing"):
        leading(oracle(ZERO), torch.zeros(1, 2), ZERO, generators(1))
    assert leading(oracle(PLAIN), torch.zeros(1, 2), PLAIN, generators(1)).isfinite().all()


@pytest.mark.parametrize("sampler", VARIANTS, ids=str)
def test_what_a_classifier_claims_of_pure_noise_changes_nothing(sampler: AnySampler) -> None:
    # x_N is independent of x0, and so of whatever a class says of x0; one step earlier it is not.
    sampler, noise = with_steps(sampler, 3), normals((6,), 0, "noise", range(2))
    second = sampler.times(ZERO)[1]

    def shifted(at: float) -> Tensor:
        def denoise(x_t: Tensor, t: Tensor) -> Estimate:
            shift = 5.0 * (t[:, None] == at) * torch.ones_like(x_t)
            return replace(oracle(ZERO)(x_t, t), shift=shift)

        return sampler(denoise, noise, ZERO, generators(2))

    plain = sampler(oracle(ZERO), noise, ZERO, generators(2))
    assert torch.equal(shifted(ZERO.num_steps), plain)
    assert not torch.allclose(shifted(second), plain)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_real_network_is_led_to_finite_latents(sampler: AnySampler) -> None:
    # What the oracle can't show: times between steps pass the network's embedding, and its output has the right shape.
    config = UNetConfig(channels=2, model_channels=8, channel_mult=(1,), num_res_blocks=1, attention_levels=(False,),
                        head_channels=8)  # fmt: skip
    denoise = Denoiser(UNet(config).eval(), ZERO, "v").bind(Condition())
    noise = normals((2, 1, 4, 4), 0, "noise", range(2))
    made = with_steps(sampler, 4)(denoise, noise, ZERO, generators(2))
    assert made.shape == noise.shape
    assert made.isfinite().all()


class Chosen(Config):
    sampler: Sampler


@pytest.mark.parametrize("sampler", [*VARIANTS, DDIM(steps=7, eta=0.25, spacing="leading")], ids=str)
def test_a_sampler_is_its_configuration(sampler: AnySampler) -> None:
    assert build(Chosen, to_dict(Chosen(sampler=sampler)), "here").sampler == sampler
    assert type(TypeAdapter(Sampler).validate_python({"kind": sampler.kind})) is type(sampler)


def test_every_kind_can_be_named() -> None:
    kinds = tuple(sampler.kind for sampler in SAMPLERS)
    assert get_args(SamplerKind) == kinds
    assert tuple(choice.value for choice in SamplerChoice) == kinds


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_generate_can_ask_for_any_sampler(sampler: AnySampler) -> None:
    asked = adjusted(Sampling(sampler=DDIM(steps=9)), sampler=sampler.kind, steps=4)
    assert asked.sampler == with_steps(type(sampler)(), 4)


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "ddim", "steps": 0},
        {"kind": "ddim", "steps": 7.5},
        {"kind": "ddim", "eta": 2},
        {"kind": "ddpm", "variance": "large"},
        {"kind": "dpm_solver", "order": 3},
        {"kind": "heun", "rho": 0},
        {"kind": "heun", "noise_min": 2, "noise_max": 1},
        {"kind": "langevin", "snr": 1},
        {"kind": "langevin", "corrections": 0},
        {"kind": "predictor_corrector", "snr": 0},
        {"kind": "euler"},
    ],
)
def test_impossible_samplers_are_refused(data: dict[str, object]) -> None:
    with pytest.raises(UserError):
        build(Chosen, {"sampler": data}, "here")
