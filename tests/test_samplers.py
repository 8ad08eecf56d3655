"""Samplers against truth: data ~ N(m, s^2), whose best denoiser is known in closed form, and a peer's loops."""

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from videodiff.config import Config, build, to_dict
from videodiff.diffusion.prediction import Denoise, Estimate, Prediction, split
from videodiff.diffusion.samplers import DDIM, DDPM, Sampler
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError
from videodiff.seeding import generator, normals

PLAIN, ZERO = NoiseSchedule(), NoiseSchedule(zero_terminal_snr=True)
M, S = 0.7, 0.3  # mean and deviation of the data


def oracle(schedule: NoiseSchedule, m: float = M, s: float = S) -> Denoise:
    """E[x0 | x_t] for x0 ~ N(m, s^2): regression of x0 on x_t = alpha x0 + sigma eps."""

    def denoise(x_t: Tensor, t: Tensor) -> Estimate:
        alpha, sigma = (c.view(-1, *[1] * (x_t.dim() - 1)).to(x_t) for c in (schedule.alpha(t), schedule.sigma(t)))
        x0 = m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x_t - alpha * m)
        return Estimate(x0, (x_t - alpha * x0) / sigma)

    return denoise


def moments_of_ddim(steps: int, schedule: NoiseSchedule, **options: object) -> tuple[float, float]:
    """Mean and deviation of what DDIM makes of N(0, 1): its map is affine for Gaussian data, so two points tell."""
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    at_0, at_1 = DDIM(steps=steps, **options)(oracle(schedule), points, schedule).flatten().tolist()  # type: ignore[arg-type]
    return at_0, at_1 - at_0


def generators(n: int) -> list[torch.Generator]:
    return [generator(0, "steps", i) for i in range(n)]


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_ddim_converges_to_the_data(spacing: str) -> None:
    moments = [moments_of_ddim(steps, ZERO, spacing=spacing) for steps in (5, 10, 25, 50, 100, 200, 400)]
    # The path through the mean is straight, so the mean is exact; the deviation converges at about first order.
    assert all(mean == pytest.approx(M, abs=1e-12) for mean, _ in moments)
    errors = [abs(deviation - S) for _, deviation in moments]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[-2] / 1.6 < errors[-3] / 1.6**2


def test_ddim_converges_to_the_data_as_the_schedule_gets_finer() -> None:
    errors = []
    for n in (1, 2, 4):
        schedule = NoiseSchedule(num_steps=1000 * n, beta_start=8.5e-4 / n, beta_end=1.2e-2 / n, zero_terminal_snr=True)
        errors.append(abs(moments_of_ddim(1000 * n, schedule)[1] - S) / S)
    assert errors[2] < errors[1] / 1.8 < errors[0] / 1.8**2
    assert errors[2] < 0.004


def test_zero_terminal_snr_removes_the_bias_of_the_mean() -> None:
    # Without it sampling starts from N(0, 1) where the model expects N(alpha_N m, ...) (Lin et al., section 3.1).
    (mean_plain, _), (mean_zero, _) = (moments_of_ddim(1000, schedule) for schedule in (PLAIN, ZERO))
    assert mean_zero == pytest.approx(M, abs=1e-12)
    assert abs(mean_plain - M) > 0.01


@pytest.mark.parametrize("schedule", [PLAIN, ZERO], ids=["plain", "zero"])
def test_ddim_follows_the_exact_flow(schedule: NoiseSchedule) -> None:
    # The probability flow of Gaussian data keeps (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2).
    N = torch.tensor(1000)
    alpha, sigma = schedule.alpha(N).item(), schedule.sigma(N).item()
    scale = S / (alpha**2 * S**2 + sigma**2) ** 0.5
    mean, deviation = moments_of_ddim(1000, schedule)
    assert mean == pytest.approx(M - scale * alpha * M, rel=3e-3)
    assert deviation == pytest.approx(scale, rel=1.5e-2)


@pytest.mark.parametrize("sampler", [DDPM(), DDIM(eta=1), DDIM(eta=0.5)], ids=str)
def test_random_samplers_converge_to_the_data(sampler: DDIM | DDPM) -> None:
    n = 50_000
    noise, errors = normals((n,), 0, "noise", [0]), []
    for steps in (5, 20, 100, 1000):
        x = sampler.model_copy(update={"steps": steps})(oracle(ZERO), noise, ZERO, generators(1)).double()
        assert abs(x.mean().item() - M) < 5 * S / n**0.5
        errors.append(S - x.std().item())
    assert errors[0] > errors[1] > errors[2] > 3 * errors[3]  # the small variance makes it too narrow, never too wide
    assert 0 < errors[3] < 0.04 * S


@pytest.mark.parametrize("sampler", [DDIM(steps=1), DDIM(steps=1, eta=1), DDPM(steps=1)])
def test_one_step_from_pure_noise_is_the_mean(sampler: DDIM | DDPM) -> None:
    # At alpha = 0 nothing is known of x0 but its mean; the limit of each formula must be finite and say so.
    noise = normals((3, 4), 0, "noise", range(2))
    torch.testing.assert_close(sampler(oracle(ZERO), noise, ZERO, generators(2)), torch.full_like(noise, M))


@pytest.mark.parametrize("schedule", [PLAIN, ZERO], ids=["plain", "zero"])
def test_ddim_with_eta_1_and_all_steps_is_ddpm(schedule: NoiseSchedule) -> None:
    noise = normals((6,), 0, "noise", range(3)).double()
    ddim = DDIM(steps=1000, eta=1.0)(oracle(schedule), noise, schedule, generators(3))
    ddpm = DDPM(steps=1000)(oracle(schedule), noise, schedule, generators(3))
    torch.testing.assert_close(ddim, ddpm, rtol=0, atol=1e-9)


def test_eta_0_is_deterministic_and_eta_is_not_ignored() -> None:
    noise = normals((6,), 0, "noise", range(2))
    plain = DDIM(steps=10)(oracle(ZERO), noise, ZERO)
    assert torch.equal(plain, DDIM(steps=10)(oracle(ZERO), noise, ZERO, generators(2)))
    assert not torch.allclose(plain, DDIM(steps=10, eta=0.5)(oracle(ZERO), noise, ZERO, generators(2)))


@pytest.mark.parametrize("sampler", [DDIM(steps=10), DDIM(steps=10, eta=1), DDPM(steps=10)])
def test_a_sample_does_not_depend_on_its_batch(sampler: DDIM | DDPM) -> None:
    noise = normals((2, 3), 0, "noise", range(4))
    whole = sampler(oracle(ZERO), noise, ZERO, generators(4))
    some = sampler(oracle(ZERO), noise[[3, 1]], ZERO, [generator(0, "steps", i) for i in (3, 1)])
    torch.testing.assert_close(some, whole[[3, 1]], rtol=1e-6, atol=1e-6)


def test_random_samplers_need_a_generator_for_each_sample() -> None:
    noise = normals((2,), 0, "noise", range(3))
    for sampler in (DDPM(steps=5), DDIM(steps=5, eta=0.1)):
        with pytest.raises(UserError, match="one generator per sample"):
            sampler(oracle(ZERO), noise, ZERO)
        with pytest.raises(ValueError, match="2 generators for 3 samples"):
            sampler(oracle(ZERO), noise, ZERO, generators(2))


def test_progress_and_precision() -> None:
    seen: list[tuple[int, int]] = []
    noise = normals((2,), 0, "noise", [0]).bfloat16()
    x = DDIM(steps=3)(oracle(ZERO), noise, ZERO, on_step=lambda done, steps: seen.append((done, steps)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert x.dtype == torch.float32


def test_more_steps_than_the_schedule_has_are_refused() -> None:
    with pytest.raises(UserError, match="1 to 1000"):
        DDIM(steps=1001)(oracle(ZERO), torch.zeros(1, 2), ZERO)


class Chosen(Config):
    sampler: Sampler


@pytest.mark.parametrize("sampler", [DDIM(steps=7, eta=0.25, spacing="leading"), DDPM(steps=9)])
def test_a_sampler_is_its_configuration(sampler: DDIM | DDPM) -> None:
    assert build(Chosen, to_dict(Chosen(sampler=sampler)), "here").sampler == sampler
    assert type(TypeAdapter(Sampler).validate_python({"kind": sampler.kind})) is type(sampler)


@pytest.mark.parametrize(
    "data", [{"kind": "ddim", "steps": 0}, {"kind": "ddim", "steps": 7.5}, {"kind": "ddim", "eta": 2}]
)
def test_impossible_samplers_are_refused(data: dict[str, object]) -> None:
    with pytest.raises(UserError):
        build(Chosen, {"sampler": data}, "here")


# A peer's loops. The "network" is any smooth function of (x, t): both sides must lead it to the same result.


def network(x: Tensor, t: int) -> Tensor:
    return torch.tanh(x + 0.3) * (0.4 + t / 2000) - 0.1 * x


PEER_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def peers_result(peer, steps: int, noise: Tensor, **options: object) -> Tensor:  # type: ignore[no-untyped-def]
    peer.set_timesteps(steps)
    x = noise
    for t in peer.timesteps:
        x = peer.step(network(x, int(t) + 1), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(ZERO, "v"), (ZERO, "x0"), (PLAIN, "eps"), (PLAIN, "v"), (NoiseSchedule(kind="cosine"), "v")],
)
@pytest.mark.parametrize("sampler_type", [DDIM, DDPM])
def test_agreement_with_diffusers(
    sampler_type: type[DDIM] | type[DDPM], schedule: NoiseSchedule, prediction: Prediction, spacing: str
) -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    settings = {
        "num_train_timesteps": 1000,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": {"scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}[schedule.kind],
        "prediction_type": PEER_NAMES[prediction],
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "clip_sample": False,
    }

    def denoise(x: Tensor, t: Tensor) -> Estimate:
        return split(prediction, network(x, int(t[0])), x, schedule.alpha(t), schedule.sigma(t))

    noise, steps = normals((3, 4, 4), 0, "noise", range(2)), 20
    if sampler_type is DDIM:
        ours = DDIM(steps=steps, spacing=spacing, eta=0.6)(denoise, noise, schedule, generators(2))  # type: ignore[arg-type]
        peer = schedulers.DDIMScheduler(**settings, set_alpha_to_one=True)
        theirs = peers_result(peer, steps, noise, eta=0.6, generator=generators(2))
    else:
        ours = DDPM(steps=steps, spacing=spacing)(denoise, noise, schedule, generators(2))  # type: ignore[arg-type]
        peer = schedulers.DDPMScheduler(**settings, variance_type="fixed_small")
        theirs = peers_result(peer, steps, noise, generator=generators(2))
    assert [int(t) + 1 for t in peer.timesteps] == schedule.times(steps, spacing)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
