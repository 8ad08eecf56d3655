"""The variational bound against closed forms: for Gaussian data every term of it is known."""

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor

from videodiff.batch import Condition
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.likelihood import Bound, variational_bound
from videodiff.diffusion.prediction import Denoise, Estimate, Prediction, add_noise, target
from videodiff.diffusion.reverse import bound_term, log_bin_probability, log_variance, log_variance_bounds
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError
from videodiff.seeding import generator, normals

MEAN, DEVIATION = 0.3, 0.5  # of the data
ENTROPY = 0.5 * math.log(2 * math.pi * math.e * DEVIATION**2)
SCHEDULES = [
    NoiseSchedule(kind="linear", num_steps=10, beta_start=0.01, beta_end=0.5),
    NoiseSchedule(kind="cosine", num_steps=50),
    NoiseSchedule(num_steps=20, beta_start=0.01, beta_end=0.3, zero_terminal_snr=True, snr_shift=2.0),
]


def pairs(chain: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(chain), torch.tensor([*chain[1:], 0])


def squared_error(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Of the best x0 estimate: the variance of x0 given x_t."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return (DEVIATION * sigma) ** 2 / ((alpha * DEVIATION) ** 2 + sigma**2)


def true_variance(schedule: NoiseSchedule, t: Tensor, s: Tensor) -> Tensor:
    """Of x_s given x_t: Gaussian, since the data is."""
    alpha, sigma, alpha_s, sigma_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
    variance = (alpha_s * DEVIATION) ** 2 + sigma_s**2
    return variance - (alpha / alpha_s * variance) ** 2 / ((alpha * DEVIATION) ** 2 + sigma**2)


def prior_gap(schedule: NoiseSchedule, t: int) -> float:
    """KL(q(x_t) || N(0, 1)), t the first of the chain."""
    alpha, sigma = schedule.alpha(torch.tensor(t)), schedule.sigma(torch.tensor(t))
    variance = (alpha * DEVIATION) ** 2 + sigma**2
    return float(0.5 * (variance + (alpha * MEAN) ** 2 - 1 - variance.log()))


def expected_prior(schedule: NoiseSchedule, t: int) -> float:
    """Mean over the data of KL(q(x_t | x0) || N(0, 1))."""
    alpha, sigma = schedule.alpha(torch.tensor(t)), schedule.sigma(torch.tensor(t))
    return float(0.5 * (alpha**2 * (MEAN**2 + DEVIATION**2) + sigma**2 - 1 - 2 * sigma.log()))


def oracle(schedule: NoiseSchedule, chain: list[int] | None = None, learned: bool = True) -> Denoise:
    """The best denoiser, with the true variance of each step of the chain."""
    earlier = dict(zip(*(x.tolist() for x in pairs(chain or list(range(schedule.num_steps, 0, -1)))), strict=True))

    def denoise(x_t: Tensor, t: Tensor) -> Estimate:
        s = torch.tensor([earlier[int(time)] for time in t])
        shape = (-1, *[1] * (x_t.dim() - 1))
        alpha, sigma, error = (
            c.view(shape) for c in (schedule.alpha(t), schedule.sigma(t), squared_error(schedule, t))
        )
        x0 = MEAN + alpha * error / sigma**2 * (x_t - alpha * MEAN)
        lower, upper = log_variance_bounds(schedule, t, s)
        fraction = (true_variance(schedule, t, s).log() - lower) / (upper - lower)
        fraction = fraction.view(shape).expand(x_t.shape) if learned else None
        return Estimate(x0, (x_t - alpha * x0) / sigma, variance_fraction=fraction)

    return denoise


def expected_terms(schedule: NoiseSchedule, chain: list[int], fraction: float | None) -> Tensor:
    """Mean of each term over data and noise. It is quadratic in both: three Gauss-Hermite nodes are exact."""
    nodes, weights = torch.tensor([[-(3**0.5), 0, 3**0.5], [1 / 6, 2 / 3, 1 / 6]], dtype=torch.float64)
    x0, eps = (grid.reshape(-1, 1) for grid in torch.meshgrid(MEAN + DEVIATION * nodes, nodes, indexing="ij"))
    weight, n = torch.outer(weights, weights).reshape(-1), len(chain)
    (t, s) = (times.repeat_interleave(9) for times in pairs(chain))
    x0, eps = x0.repeat(n, 1), eps.repeat(n, 1)
    estimate = oracle(schedule, chain)(add_noise(x0, eps, t, schedule), t)
    assert estimate.variance_fraction is not None
    at = estimate.variance_fraction if fraction is None else torch.full_like(x0, fraction)
    terms = bound_term(x0, estimate.x0, log_variance(at, schedule, t, s), schedule, t, s, None)
    return (terms.view(n, 9) * weight).sum(1)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("stride", [1, 3])
def test_with_the_true_variance_the_bound_is_the_likelihood(schedule: NoiseSchedule, stride: int) -> None:
    chain = list(range(schedule.num_steps, 0, -stride))
    terms = expected_terms(schedule, chain, None)
    t, s = pairs(chain)
    lower, _ = log_variance_bounds(schedule, t, s)
    known = 0.5 * (true_variance(schedule, t, s).log() - lower)[:-1]  # what x_s tells of x0 beyond x_t
    torch.testing.assert_close(terms[:-1], known, rtol=1e-8, atol=1e-12)
    total = float(terms.sum()) + expected_prior(schedule, chain[0])
    assert total == pytest.approx(ENTROPY + prior_gap(schedule, chain[0]), rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("fraction", [0.0, 1.0, 0.3])
def test_another_variance_costs_its_divergence(schedule: NoiseSchedule, fraction: float) -> None:
    chain = list(range(schedule.num_steps, 0, -1))
    t, s = pairs(chain)
    chosen = log_variance(torch.full((len(t),), fraction, dtype=torch.float64), schedule, t, s)
    ratio = true_variance(schedule, t, s) / chosen.exp()
    extra = 0.5 * (ratio - 1 - ratio.log())
    difference = expected_terms(schedule, chain, fraction) - expected_terms(schedule, chain, None)
    torch.testing.assert_close(difference, extra, rtol=1e-8, atol=1e-12)


def test_the_bound_converges_to_the_likelihood_as_steps_grow() -> None:
    gaps = []
    for N in (40, 160, 640):
        schedule = NoiseSchedule(kind="linear", num_steps=N, beta_start=0.1 / N, beta_end=20 / N)
        chain = list(range(N, 0, -1))
        gaps.append(float(expected_terms(schedule, chain, 1.0).sum()) + expected_prior(schedule, N) - ENTROPY)
    assert all(before > 3 * after > 0 for before, after in pairwise(gaps)), gaps
    assert gaps[-1] < 0.01


def data(dimensions: int = 256, samples: int = 64) -> Tensor:
    return MEAN + DEVIATION * normals((1, 1, dimensions // 16, 16), 0, "data", range(samples)).double()


def bound(denoise: Denoise, x0: Tensor, schedule: NoiseSchedule, **options: object) -> Bound:
    return variational_bound(denoise, x0, schedule, [generator("bound", i) for i in range(len(x0))], **options)  # type: ignore[arg-type]


def assert_mean(values: Tensor, expected: float, largest_error: float) -> None:
    error = float(values.std()) / len(values) ** 0.5
    assert error < largest_error  # or the test could not fail
    assert abs(float(values.mean()) - expected) < 4 * error


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_measured_bound_is_the_expected_one(schedule: NoiseSchedule) -> None:
    N = schedule.num_steps
    measured = bound(oracle(schedule), data(), schedule)
    assert measured.times == tuple(range(N, 0, -1))
    assert measured.steps.shape == measured.squared_errors.shape == (N, 64)
    assert_mean(measured.nats_per_latent_dimension(), ENTROPY + prior_gap(schedule, N), 0.015)
    t = torch.tensor(N)
    q = torch.distributions.Normal(schedule.alpha(t) * data(), schedule.sigma(t).expand(data().shape))
    prior = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(measured.prior, prior, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_fixed_variances(variance: str) -> None:
    schedule, fraction = SCHEDULES[0], {"small": 0.0, "large": 1.0}[variance]
    expected = float(expected_terms(schedule, list(range(10, 0, -1)), fraction).sum()) + expected_prior(schedule, 10)
    measured = bound(oracle(schedule, learned=False), data(), schedule, variance=variance)
    assert_mean(measured.nats_per_latent_dimension(), expected, 0.03)


@pytest.mark.parametrize("schedule", SCHEDULES[::2], ids=str)
def test_progressive_decoding_follows_the_rate_distortion_of_gaussian_data(schedule: NoiseSchedule) -> None:
    t, s = pairs(list(range(schedule.num_steps, 0, -1)))
    rate, distortion = bound(oracle(schedule), data(), schedule).rate_distortion()
    steps = 0.5 * (true_variance(schedule, t, s).log() - log_variance_bounds(schedule, t, s)[0])
    sent = torch.cat([torch.tensor([expected_prior(schedule, schedule.num_steps)]).double(), steps[:-1]]).cumsum(0)
    torch.testing.assert_close(rate, sent, rtol=0.02, atol=2e-3)  # nats: a latent has no bits
    torch.testing.assert_close(distortion, squared_error(schedule, t).sqrt(), rtol=0.02, atol=0)
    assert (rate.diff() > 0).all()
    assert (distortion.diff() < 0).all()


def test_grey_levels_cost_the_entropy_of_their_bins() -> None:
    schedule, levels = SCHEDULES[0], 256
    width = 2 / (levels - 1)
    x0 = ((data() / 4 + 1) / width).round() * width - 1  # far within [-1, 1]

    def denoise(x_t: Tensor, t: Tensor) -> Estimate:
        alpha, sigma = (c.view(-1, 1, 1, 1, 1) for c in (schedule.alpha(t), schedule.sigma(t)))
        scale = DEVIATION**2 / 16
        x0 = MEAN / 4 + alpha * scale / (alpha**2 * scale + sigma**2) * (x_t - alpha * MEAN / 4)
        return Estimate(x0, (x_t - alpha * x0) / sigma)

    pixels, density = (bound(denoise, x0, schedule, levels=n) for n in (levels, None))
    bits, nats = pixels.bits_per_dimension(), density.nats_per_latent_dimension()
    # A bin this fine against sigma_1 = 0.1 holds its width times the density.
    torch.testing.assert_close(bits, (nats - math.log(width)) / math.log(2), rtol=0, atol=2e-3)
    assert torch.equal(pixels.steps[:-1], density.steps[:-1])
    (rate, distortion), (rate_of_latents, same) = pixels.rate_distortion(), density.rate_distortion()
    torch.testing.assert_close(rate, rate_of_latents / math.log(2), rtol=1e-12, atol=0)
    assert torch.equal(distortion, same)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("deviation", [1e-3, 0.02, 0.4, 5.0])
def test_bins_hold_all_of_the_mass(levels: int, deviation: float) -> None:
    mean = torch.linspace(-1.5, 1.5, 13, dtype=torch.float64)[:, None]
    x = torch.linspace(-1, 1, levels, dtype=torch.float64).expand(13, levels)
    log_p = log_bin_probability(x, mean.expand_as(x), torch.full_like(x, deviation), levels)
    assert log_p.isfinite().all()
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(13, dtype=torch.float64), rtol=1e-9, atol=0)
    normal, half = torch.distributions.Normal(mean, deviation), 1 / (levels - 1)
    mass = (normal.cdf(x + half) - normal.cdf(x - half))[:, 1:-1]
    torch.testing.assert_close(log_p.exp()[:, 1:-1], mass, rtol=1e-9, atol=1e-15)


def test_far_tails_have_a_probability_and_a_gradient() -> None:
    x, mean = torch.tensor([-1.0, 0.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, -1.0, -1.0], requires_grad=True)
    deviation = torch.full((4,), 1e-2, requires_grad=True)
    log_p = log_bin_probability(x, mean, deviation, 256)
    assert log_p.isfinite().all()
    assert log_p[1].item() == pytest.approx(log_p[2].item(), rel=1e-5)  # a mirror image
    assert log_p[1].item() == pytest.approx(-0.5 * ((1 - 1 / 255) / 1e-2) ** 2, rel=2e-3)
    log_p.sum().backward()
    for gradient in (mean.grad, deviation.grad):
        assert gradient is not None
        assert gradient.isfinite().all()
        assert (gradient != 0).all()


@pytest.mark.parametrize("levels", [17, None])
def test_terms_that_are_not_taken_leave_the_gradient_alone(levels: int | None) -> None:
    """Near alpha = 0 an estimate from eps is far from any grey level: the mass of its bin is no number in float32, and
    it is not asked for either, since only the last step has bins."""
    schedule = NoiseSchedule(kind="cosine", num_steps=1000)
    t = torch.tensor([1, 2, 500, 999, 1000])
    x0 = (torch.arange(40.0).view(1, 1, 40) % 17 / 8 - 1).expand(5, 1, 40)
    estimate = (x0 + torch.tensor([0.1, 0.3, 1.0, 3e3, 1e6]).view(5, 1, 1) * torch.randn(x0.shape)).requires_grad_()
    log_sigma = log_variance(torch.full(x0.shape, 0.5), schedule, t, t - 1).float().requires_grad_()
    nats = bound_term(x0, estimate, log_sigma, schedule, t, t - 1, levels)
    assert nats.isfinite().all()
    for gradient in torch.autograd.grad(nats.sum(), (estimate, log_sigma)):
        assert gradient.isfinite().all()
        assert (gradient.flatten(1).abs().amax(1) > 0).all()


def test_no_distance_is_too_far_for_a_bin() -> None:
    mean = torch.tensor([0.0, 10.0, 1e3, 1e6, -1e6, 1e9])
    log_p = log_bin_probability(torch.zeros(6), mean, torch.full((6,), 0.03), 17)
    assert log_p.isfinite().all()
    assert (log_p[:4].diff() < 0).all()
    assert log_p[5] < log_p[3]


@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_the_bound_is_the_same_in_the_words_of_every_prediction(prediction: Prediction) -> None:
    schedule = SCHEDULES[1]

    def network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        t = time.long() + 1
        truth = oracle(schedule)(x, t)
        assert truth.variance_fraction is not None
        said = target(prediction, truth.x0, truth.eps, schedule.alpha(t), schedule.sigma(t))
        return torch.cat([said, 2 * truth.variance_fraction - 1], dim=1)

    denoiser = Denoiser(network, schedule, prediction, torch.float64, variance="learned_range")
    x0, times = data(samples=4), list(range(50, 0, -1))
    ours, known = (bound(d, x0, schedule, times=times) for d in (denoiser.bind(Condition()), oracle(schedule)))
    torch.testing.assert_close(ours.steps, known.steps, rtol=1e-6, atol=1e-6)
    fixed = bound(oracle(schedule, learned=False), x0, schedule)
    assert (fixed.nats > ours.nats + 1).all()


def test_bounds_of_the_variance_are_improved_ddpms() -> None:
    schedule = NoiseSchedule()
    alpha_bar, t = schedule.alpha_bar, torch.arange(1, 1001)
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    posterior = betas * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    lower, upper = log_variance_bounds(schedule, t, t - 1)
    torch.testing.assert_close(upper, betas.log(), rtol=1e-9, atol=0)
    torch.testing.assert_close(lower, torch.cat([posterior[1:2], posterior[1:]]).log(), rtol=1e-9, atol=0)  # clipped
    lower, upper = log_variance_bounds(schedule, torch.tensor([1000, 600]), torch.tensor([0, 0]))
    assert torch.equal(lower, upper)  # there is no step 2t -> t to clip with


@pytest.mark.parametrize("t", [2, 300, 1000])
def test_learned_range_is_diffusers(t: int) -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    schedule = NoiseSchedule(kind="linear", beta_start=1e-4, beta_end=0.02)
    peer = schedulers.DDPMScheduler(variance_type="learned_range")
    v = torch.linspace(-1, 1, 7)
    at = torch.full((7,), t)
    own = log_variance((v.double() + 1) / 2, schedule, at, at - 1)
    theirs = peer._get_variance(t - 1, predicted_variance=v)
    torch.testing.assert_close(own, theirs.double(), rtol=1e-4, atol=0)


def test_what_has_no_bits_is_not_given_any() -> None:
    schedule, x0 = SCHEDULES[0], data(samples=2)
    latents = bound(oracle(schedule), x0, schedule)
    with pytest.raises(UserError, match="nats_per_latent_dimension"):
        latents.bits_per_dimension()
    pixels = bound(oracle(schedule), x0.clamp(-1, 1).mul(8).round() / 8, schedule, levels=17)
    with pytest.raises(UserError, match="bits_per_dimension"):
        pixels.nats_per_latent_dimension()


def test_impossible_questions_are_refused() -> None:
    schedule, x0 = SCHEDULES[0], data(samples=2)
    on_grid = x0.clamp(-1, 1).mul(8).round() / 8
    for levels, values in ((17, x0), (16, on_grid), (17, on_grid + 1)):
        with pytest.raises(UserError, match=f"levels={levels}: x0 holds"):
            bound(oracle(schedule), values, schedule, levels=levels)
    with pytest.raises(UserError, match="at least 2"):
        bound(oracle(schedule), x0, schedule, levels=1)
    for times in ([], [5, 5], [11, 3], [3, 0], [1, 2]):
        with pytest.raises(UserError, match=r"decreasing steps within 1\.\.10"):
            bound(oracle(schedule), x0, schedule, times=times)
    with pytest.raises(ValueError, match="1 generators for 2 samples"):
        variational_bound(oracle(schedule), x0, schedule, [generator(0)])
    guided = Estimate(x0, x0, shift=x0)
    with pytest.raises(UserError, match="without guidance"):
        bound(lambda x_t, t: guided, x0, schedule)
