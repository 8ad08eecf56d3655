"""What single samplers promise beyond what holds for all of them."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from gaussian import PLAIN, ZERO, AnySampler, M, S, affine, at, coefficients, generators, oracle
from torch import Tensor

from videodiff.diffusion.prediction import Denoise, Estimate
from videodiff.diffusion.reverse import log_variance, log_variance_bounds
from videodiff.diffusion.samplers import DDIM, DDPM, DPMSolver, Heun, Langevin, PredictorCorrector, invert
from videodiff.diffusion.samplers.base import asker, at_times, folded
from videodiff.diffusion.samplers.langevin import langevin_step
from videodiff.diffusion.schedule import NoiseSchedule, Spacing
from videodiff.errors import UserError
from videodiff.seeding import normals

BOTH = pytest.mark.parametrize("schedule", [PLAIN, ZERO], ids=["plain", "zero"])


def recorded(denoise: Denoise) -> tuple[Denoise, list[tuple[Tensor, Tensor]]]:
    """The same denoiser, and a list of the (x_t, t) that it is asked about."""
    asked: list[tuple[Tensor, Tensor]] = []

    def watched(x_t: Tensor, t: Tensor) -> Estimate:
        asked.append((x_t, t))
        return denoise(x_t, t)

    return watched, asked


def shifted(denoise: Denoise, shift: Callable[[Tensor, Tensor], Tensor]) -> Denoise:
    def with_shift(x_t: Tensor, t: Tensor) -> Estimate:
        estimate = denoise(x_t, t)
        return Estimate(estimate.x0, estimate.eps, estimate.variance_fraction, shift(x_t, t))

    return with_shift


# --- DDIM and DDPM ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_ddim_converges_to_the_data(spacing: Spacing) -> None:
    moments = [affine(DDIM(steps=steps, spacing=spacing), ZERO) for steps in (5, 10, 25, 50, 100, 200, 400)]
    # The path through the mean is straight, so the mean is exact; the deviation converges at about first order.
    assert all(mean == pytest.approx(M, abs=1e-12) for mean, _ in moments)
    errors = [abs(deviation - S) for _, deviation in moments]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[-2] / 1.6 < errors[-3] / 1.6**2


@pytest.mark.parametrize("sampler", [DDPM(), DDIM(eta=1), DDIM(eta=0.5)], ids=str)
def test_the_small_variance_is_too_narrow_and_never_too_wide(sampler: AnySampler) -> None:
    n = 50_000
    noise, errors = normals((n,), 0, "noise", [0]), []
    for steps in (5, 20, 100, 1000):
        x = sampler.model_copy(update={"steps": steps})(oracle(ZERO), noise, ZERO, generators(1)).double()
        assert abs(x.mean().item() - M) < 5 * S / n**0.5
        errors.append(S - x.std().item())
    assert errors[0] > errors[1] > errors[2] > 3 * errors[3]
    assert 0 < errors[3] < 0.04 * S


def test_ddim_converges_to_the_data_as_the_schedule_gets_finer() -> None:
    errors = []
    for n in (1, 2, 4):
        schedule = NoiseSchedule(num_steps=1000 * n, beta_start=8.5e-4 / n, beta_end=1.2e-2 / n, zero_terminal_snr=True)
        errors.append(abs(affine(DDIM(steps=1000 * n), schedule)[1] - S) / S)
    assert errors[2] < errors[1] / 1.8 < errors[0] / 1.8**2
    assert errors[2] < 0.004


def test_zero_terminal_snr_removes_the_bias_of_the_mean() -> None:
    # Without it sampling starts from N(0, 1) where the model expects N(alpha_N m, ...) (Lin et al., section 3.1).
    (mean_plain, _), (mean_zero, _) = (affine(DDIM(steps=1000), schedule) for schedule in (PLAIN, ZERO))
    assert mean_zero == pytest.approx(M, abs=1e-12)
    assert abs(mean_plain - M) > 0.01


@BOTH
def test_ddim_with_eta_1_and_all_steps_is_ddpm(schedule: NoiseSchedule) -> None:
    noise = normals((6,), 0, "noise", range(3)).double()
    ddim = DDIM(steps=1000, eta=1.0)(oracle(schedule), noise, schedule, generators(3))
    ddpm = DDPM(steps=1000)(oracle(schedule), noise, schedule, generators(3))
    torch.testing.assert_close(ddim, ddpm, rtol=0, atol=1e-9)


def test_eta_is_not_ignored() -> None:
    noise = normals((6,), 0, "noise", range(2))
    plain = DDIM(steps=10)(oracle(ZERO), noise, ZERO)
    assert not torch.allclose(plain, DDIM(steps=10, eta=0.5)(oracle(ZERO), noise, ZERO, generators(2)))


@BOTH
def test_learned_variance_lies_between_the_fixed_ones(schedule: NoiseSchedule) -> None:
    noise = normals((6,), 0, "noise", range(2)).double()

    def made(fraction: float) -> Tensor:
        def denoise(x_t: Tensor, t: Tensor) -> Estimate:
            estimate = oracle(schedule)(x_t, t)
            return Estimate(estimate.x0, estimate.eps, torch.full_like(x_t, fraction))

        return DDPM(steps=20, variance="learned")(denoise, noise, schedule, generators(2))

    for fraction, name in ((0.0, "beta_tilde"), (1.0, "beta")):
        fixed = DDPM(steps=20, variance=name)(oracle(schedule), noise, schedule, generators(2))  # type: ignore[arg-type]
        torch.testing.assert_close(made(fraction), fixed, rtol=0, atol=1e-12)
    assert made(0.5).isfinite().all()
    assert not torch.allclose(made(0.5), made(0.0))


def test_with_the_true_variance_few_steps_are_exact() -> None:
    """q(x_s | x_t) of Gaussian data is Gaussian: a network that learned its variance passes through the true marginals
    at any stride, which neither fixed variance does."""
    count, sampler = 20_000, DDPM(steps=4, variance="learned")
    times = [int(t) for t in sampler.times(ZERO)]
    earlier = dict(zip(times, [*times[1:], 0], strict=True))
    alpha_bar = ZERO.alpha_bar

    def spread_at(s: int) -> float:
        return float(alpha_bar[s] * S**2 + 1 - alpha_bar[s]) ** 0.5

    def fraction(t: int) -> float:
        """Where the true variance lies: that of x_s, of deviation spread_at(s), of which x_t is a noisy multiple."""
        s = earlier[t]
        kept = float(alpha_bar[t] / alpha_bar[s])
        true = 1 / (1 / spread_at(s) ** 2 + kept / (1 - kept))
        lower, upper = (float(x) for x in log_variance_bounds(ZERO, torch.tensor([t]), torch.tensor([s])))
        return (math.log(true) - lower) / (upper - lower)

    def deviations(sampler: DDPM) -> dict[int, float]:
        seen = {}

        def denoise(x_t: Tensor, t: Tensor) -> Estimate:
            estimate, time = oracle(ZERO)(x_t, t), int(t[0])
            seen[time] = float(x_t.std())
            told = torch.full_like(x_t, fraction(time)) if sampler.variance == "learned" and earlier[time] else None
            return Estimate(estimate.x0, estimate.eps, torch.zeros_like(x_t) if told is None else told)

        sampler(denoise, normals((count,), 0, "noise", [0]).double(), ZERO, generators(1))
        return seen

    wanted = {t: spread_at(t) for t in times}
    tolerance = 5 / (2 * count) ** 0.5
    assert deviations(sampler) == pytest.approx(wanted, rel=tolerance)
    for variance in ("beta", "beta_tilde"):
        off = deviations(DDPM(steps=4, variance=variance))  # type: ignore[arg-type]
        assert any(abs(off[t] / wanted[t] - 1) > 2 * tolerance for t in times)


def test_the_learned_variance_is_the_one_that_is_trained() -> None:
    # What is sampled with is what the bound is computed with, also over strided steps.
    x, fraction, (t, s) = torch.zeros(1, 9, dtype=torch.float64), torch.linspace(0, 1, 9).double()[None], (600, 550)
    drawn = torch.ones_like(x)

    def denoise(x_t: Tensor, t: Tensor) -> Estimate:
        return Estimate(torch.zeros_like(x_t), torch.zeros_like(x_t), fraction)

    made = next(iter(DDPM(variance="learned").path(asker(denoise), x, at_times(PLAIN, [t, s]), lambda _: drawn)))
    expected = log_variance(fraction, PLAIN, torch.tensor([t]), torch.tensor([s]))
    torch.testing.assert_close(made.square().log(), expected, rtol=0, atol=1e-9)


def test_a_learned_variance_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="variance: beta_tilde"):
        DDPM(steps=5, variance="learned")(oracle(ZERO), torch.zeros(1, 2), ZERO, generators(1))


# --- score shift ------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("t", [1, 400, 1000])
def test_a_folded_shift_moves_the_score_and_keeps_the_state(schedule: NoiseSchedule, t: int) -> None:
    alpha, sigma = at(schedule, t)
    x_t, shift = (normals((5,), 0, name, range(2)).double() for name in ("x", "shift"))
    before = oracle(schedule)(x_t, torch.tensor([t, t]))
    after = folded(Estimate(before.x0, before.eps, None, shift), x_t, alpha, sigma)
    torch.testing.assert_close(alpha * after.x0 + sigma * after.eps, x_t, rtol=0, atol=1e-12)
    assert after.shift is None
    if alpha > 0:
        torch.testing.assert_close(-after.eps / sigma, -before.eps / sigma + shift, rtol=0, atol=1e-9)
    else:
        assert torch.equal(after.eps, before.eps)


@pytest.mark.parametrize(
    "sampler",
    [DDIM(), DDIM(eta=1), DDPM(), DDPM(variance="beta"), DPMSolver(), Heun(), Langevin(corrections=2, snr=0.3),
     PredictorCorrector()],
    ids=str,
)  # fmt: skip
def test_a_shift_leads_to_the_shifted_density(sampler: AnySampler) -> None:
    # To the data N(m, s^2) comes a reading y = x0 + r z. Then p(y | x_t) is normal around E[x0 | x_t], so its gradient
    # is known, and p(x0 | y) has precision 1/s^2 + 1/r^2: the shift must lead from one to the other.
    r, y, count = 0.2, 1.3, 8_000

    def gradient(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = coefficients(ZERO, t, x_t)
        slope = alpha * S**2 / (alpha**2 * S**2 + sigma**2)
        variance = S**2 * sigma**2 / (alpha**2 * S**2 + sigma**2) + r**2
        return slope * (y - M - slope * (x_t - alpha * M)) / variance

    precision = 1 / S**2 + 1 / r**2
    mean, deviation = (M / S**2 + y / r**2) / precision, precision**-0.5
    noise = normals((count,), 0, "noise", [0])
    errors = []
    for steps in (20, 80, 320):
        sampler = sampler.model_copy(update={"steps": steps})
        x = sampler(shifted(oracle(ZERO), gradient), noise, ZERO, generators(1)).double()
        errors.append(max(abs(x.mean().item() - mean), abs(x.std().item() - deviation)))
    assert errors[2] < errors[1] / 1.5 + 0.005
    assert errors[1] < errors[0] / 1.5 + 0.005
    assert errors[2] < 0.05  # without the shift the mean alone would be off by 0.4


# --- inversion --------------------------------------------------------------------------------------------------------


@BOTH
def test_the_round_trip_of_inversion_closes_as_steps_grow(schedule: NoiseSchedule) -> None:
    data = M + S * normals((64,), 0, "data", [0]).double()
    errors = []
    for steps in (5, 10, 20, 50, 100, 200, 500, 1000):
        noise = invert(oracle(schedule), data, schedule, steps)
        errors.append((DDIM(steps=steps)(oracle(schedule), noise, schedule) - data).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]
    assert errors[-1] < 1e-5


@BOTH
def test_inversion_follows_the_exact_flow(schedule: NoiseSchedule) -> None:
    data = M + S * normals((64,), 0, "data", [0]).double()
    alpha, sigma = at(schedule, schedule.num_steps)
    exact = alpha * M + (alpha**2 * S**2 + sigma**2) ** 0.5 * (data - M) / S
    steps = (50, 100, 200, 1000)
    errors = [float((invert(oracle(schedule), data, schedule, n) - exact).abs().max()) for n in steps]
    assert all(fine < coarse / 1.6 for coarse, fine in itertools.pairwise(errors))
    assert errors[-1] < 0.003


def test_inversion_of_one_step_progress_and_errors() -> None:
    seen: list[tuple[int, int]] = []
    data = torch.full((2, 3), M)
    noise = invert(oracle(ZERO), data.bfloat16(), ZERO, 4, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert noise.dtype == torch.float32
    assert invert(oracle(PLAIN), data, PLAIN, 1).isfinite().all()
    with pytest.raises(UserError, match="1 to 1000"):
        invert(oracle(ZERO), data, ZERO, 1001)


# --- solvers ----------------------------------------------------------------------------------------------------------


def error_of_flow(sampler: AnySampler, steps: int) -> float:
    """How far, relative to the truth, the spread of the states is off after steps even in log-SNR from t = N to 1."""
    first, last = PLAIN.log_snr(torch.tensor([1000, 1])).tolist()
    times = PLAIN.time(torch.linspace(first, last, steps + 1, dtype=torch.float64)[1:-1]).tolist()
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    *_, x = sampler.path(asker(oracle(PLAIN)), points, at_times(PLAIN, [1000, *times, 1]), torch.zeros_like)
    (alpha, sigma), (alpha_N, sigma_N) = at(PLAIN, 1), at(PLAIN, 1000)
    truth = ((alpha**2 * S**2 + sigma**2) / (alpha_N**2 * S**2 + sigma_N**2)) ** 0.5
    return abs((x[1] - x[0]).item() / truth - 1)


@pytest.mark.parametrize(("sampler", "order"), [(DDIM(), 1), (DPMSolver(), 2), (Heun(), 2)], ids=str)
def test_order_of_convergence(sampler: AnySampler, order: int) -> None:
    # The step to clean data is left out: it is of first order for all.
    errors = [error_of_flow(sampler, steps) for steps in (50, 100, 200)]
    for coarse, fine in itertools.pairwise(errors):
        assert 2 ** (order - 0.4) < coarse / fine < 2 ** (order + 0.4)
    assert errors[-1] < 0.01


def test_network_evaluations() -> None:
    noise = torch.zeros(1, 2)
    for sampler, count in (
        (DDIM(steps=7), 7), (DDPM(steps=7), 7), (DPMSolver(steps=7), 7), (Heun(steps=7), 13),
        (Langevin(steps=7, corrections=3), 22), (PredictorCorrector(steps=7, corrections=2), 19),
    ):  # fmt: skip
        denoise, asked = recorded(oracle(PLAIN))
        sampler(denoise, noise, PLAIN, generators(1))
        assert len(asked) == count


def test_levels_of_karras() -> None:
    # EDM, eq. 5, between the schedule's own ends, 14.61 and 0.0292; zero terminal SNR starts at N and then at 80.
    sampler = Heun(steps=5, rho=7)
    for schedule, first in ((PLAIN, 0), (ZERO, 1)):
        times = torch.tensor(sampler.times(schedule), dtype=torch.float64)
        noise = schedule.sigma(times) / schedule.alpha(times)
        low, high = (noise[i].item() ** (1 / 7) for i in (-1, first))
        steps = noise[first:] ** (1 / 7)
        torch.testing.assert_close(steps, torch.linspace(high, low, 5 - first, dtype=torch.float64), rtol=1e-9, atol=0)
        assert times[-1].item() == pytest.approx(1, abs=1e-9)
        assert times[0].item() == 1000
    assert noise[1].item() == pytest.approx(80, rel=1e-9)


def test_levels_of_langevin_are_geometric() -> None:
    times = torch.tensor(Langevin(steps=6, noise_min=0.1, noise_max=10).times(PLAIN), dtype=torch.float64)
    noise = PLAIN.sigma(times) / PLAIN.alpha(times)
    torch.testing.assert_close(noise, 10 * 0.01 ** (torch.arange(6).double() / 5), rtol=1e-9, atol=0)


def test_a_range_of_noise_that_the_schedule_has_not_is_refused() -> None:
    with pytest.raises(UserError, match="choose others"):
        Heun(noise_min=20, noise_max=80)(oracle(PLAIN), torch.zeros(1, 2), PLAIN)


@pytest.mark.parametrize("snr", [0.16, 0.4])
def test_langevin_widens_its_level_as_predicted(snr: float) -> None:
    # Of a Gaussian of variance v the chain makes v / (1 - delta / 4v), delta = (2 snr sigma)^2.
    (alpha, sigma), g = at(PLAIN, 700), generators(1)[0]
    variance = alpha**2 * S**2 + sigma**2
    ask, x = asker(oracle(PLAIN)), torch.zeros(1, 20_000, dtype=torch.float64)
    for _ in range(200):
        x = langevin_step(ask, x, (700, alpha, sigma), snr, lambda y: torch.randn(y.shape, generator=g, dtype=y.dtype))
    predicted = variance / (1 - snr**2 * sigma**2 / variance)
    assert x.mean().item() == pytest.approx(alpha * M, abs=5 / 20_000**0.5)
    assert x.var().item() == pytest.approx(predicted, rel=5 * (2 / 20_000) ** 0.5)
    assert predicted < 1.2 * variance


def test_corrections_repair_what_a_predictor_got_wrong() -> None:
    # At few steps the predictor's own error makes the samples too narrow; corrections take out a part of it.
    noise = normals((20_000,), 0, "noise", [0])
    few, many = (
        PredictorCorrector(steps=50, corrections=c, snr=0.3)(oracle(PLAIN), noise, PLAIN, generators(1)).std().item()
        for c in (1, 8)
    )
    alone = DDPM(steps=50)(oracle(PLAIN), noise, PLAIN, generators(1)).std().item()
    assert abs(few - S) < 0.9 * abs(alone - S)
    assert abs(many - S) < 0.75 * abs(alone - S)
