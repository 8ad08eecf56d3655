from typing import get_args

import pytest
import torch
from torch import Tensor

from videodiff.batch import Condition
from videodiff.config import build, to_dict
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.loss import DiffusionLoss
from videodiff.diffusion.prediction import Prediction, add_noise, target
from videodiff.diffusion.reverse import bound_term, log_variance
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError
from videodiff.seeding import normals

PREDICTIONS: list[Prediction] = list(get_args(Prediction))
PLAIN, ZERO = NoiseSchedule(), NoiseSchedule(zero_terminal_snr=True)
T = torch.tensor([1, 50, 300, 700, 1000])
G = torch.Generator().manual_seed(0)
X0, EPS, WRONG = (torch.randn(5, 2, 3, 4, 4, generator=G, dtype=torch.float64) for _ in range(3))


def claims(x0: Tensor, schedule: NoiseSchedule, prediction: Prediction) -> Denoiser:
    """A denoiser that says x0, whatever it is shown, in the words of `prediction`."""

    def network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        t = time.long() + 1
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        a, s = (c.view(-1, 1, 1, 1, 1) for c in (alpha, sigma))
        return target(prediction, x0, (x - a * x0) / s, alpha, sigma)

    return Denoiser(network, schedule, prediction, dtype=torch.float64)


@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_truth_costs_nothing(weighting: str, prediction: Prediction) -> None:
    loss = DiffusionLoss(weighting=weighting)(claims(X0, PLAIN, prediction), X0, EPS, T, Condition())  # type: ignore[arg-type]
    assert loss.shape == (5,)
    assert loss.max() < 1e-20


@pytest.mark.parametrize(
    ("prediction", "per_x0"), [("x0", lambda snr: snr * 0 + 1), ("eps", lambda snr: snr), ("v", lambda snr: snr + 1)]
)
def test_simple_loss_of_a_wrong_x0(prediction: Prediction, per_x0) -> None:  # type: ignore[no-untyped-def]
    loss = DiffusionLoss()(claims(WRONG, PLAIN, prediction), X0, EPS, T, Condition())
    error = ((WRONG - X0) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss, per_x0(PLAIN.snr(T)) * error, rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_one_loss_for_all_predictions(prediction: Prediction, gamma: float) -> None:
    loss = DiffusionLoss(weighting="min_snr", gamma=gamma)
    measured = loss(claims(WRONG, PLAIN, prediction), X0, EPS, T, Condition())
    error = ((WRONG - X0) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(measured, PLAIN.snr(T).clamp(max=gamma) * error, rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_min_snr_trains_the_step_at_which_sampling_starts(prediction: Prediction) -> None:
    weight = DiffusionLoss(weighting="min_snr").weight(ZERO.snr(torch.arange(1, 1001)), prediction)
    assert weight[-1] == 1
    assert (weight > 0).all()
    assert weight.isfinite().all()


def test_known_values_of_min_snr() -> None:
    snr = torch.tensor([0.5, 5.0, 20.0], dtype=torch.float64)
    loss = DiffusionLoss(weighting="min_snr")
    torch.testing.assert_close(loss.weight(snr, "eps"), torch.tensor([1, 1, 0.25], dtype=torch.float64))
    torch.testing.assert_close(loss.weight(snr, "v"), torch.tensor([1 / 3, 5 / 6, 5 / 21], dtype=torch.float64))
    torch.testing.assert_close(loss.weight(snr, "x0"), torch.tensor([0.5, 5, 5], dtype=torch.float64))


def test_the_loss_reaches_the_network() -> None:
    scale = torch.nn.Parameter(torch.zeros(()))
    denoiser = Denoiser(lambda x, time, condition: scale * x, ZERO, "v")
    DiffusionLoss()(denoiser, X0.float(), EPS.float(), T, Condition()).sum().backward()
    assert scale.grad is not None
    assert scale.grad.abs() > 0


def test_a_samples_loss_does_not_depend_on_its_batch() -> None:
    loss, denoiser = DiffusionLoss(weighting="min_snr"), Denoiser(lambda x, time, condition: x.tanh(), ZERO, "v")
    whole = loss(denoiser, X0, EPS, T, Condition())
    for i in range(5):
        one = slice(i, i + 1)
        alone = loss(denoiser, X0[one], EPS[one], T[one], Condition())
        torch.testing.assert_close(alone, whole[one], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "data",
    [
        {"gamma": 0},
        {"gamma": -1},
        {"weighting": "p2"},
        {"variance_weight": 0},
        {"levels": 1},
        {"offset_noise": -1},
        {"gamma": 3},
    ],
)
def test_impossible_losses_are_refused(data: dict[str, object]) -> None:
    with pytest.raises(UserError):
        build(DiffusionLoss, data, "loss.yaml")


def test_a_loss_is_its_configuration() -> None:
    loss = DiffusionLoss(weighting="min_snr", gamma=3)
    assert build(DiffusionLoss, to_dict(loss), "here") == loss


def test_two_choices_of_times_are_refused() -> None:
    with pytest.raises(UserError, match=r"time_shift 2\.0 and importance both .* importance: null"):
        build(DiffusionLoss, {"time_shift": 2.0, "importance": {}}, "loss.yaml")


# --- learned variance and the bound -----------------------------------------------------------------------------------


def claims_both(x0: Tensor, v: Tensor, schedule: NoiseSchedule) -> Denoiser:
    """As `claims`, in words of v-prediction, with the variance channels `v` beside it."""
    plain = claims(x0, schedule, "v").network
    return Denoiser(
        lambda x, time, condition: torch.cat([plain(x, time, condition), v], dim=1),
        schedule,
        "v",
        torch.float64,
        variance="learned_range",
    )


@pytest.mark.parametrize("schedule", [PLAIN, ZERO], ids=["plain", "zero"])
@pytest.mark.parametrize("levels", [None, 17])
def test_the_bound_is_its_term_in_bits(schedule: NoiseSchedule, levels: int | None) -> None:
    v, t = torch.linspace(-1.5, 1.5, X0.numel(), dtype=torch.float64).view(X0.shape), T
    clean = (X0.clamp(-2, 2) * 4).round() / 8 if levels else X0
    for denoiser, fraction in (
        (claims_both(WRONG, v, schedule), (v + 1) / 2),
        (claims(WRONG, schedule, "v"), torch.zeros_like(v)),  # a fixed variance is beta_tilde
    ):
        loss = DiffusionLoss(weighting="vlb", levels=levels)(denoiser, clean, EPS, t, Condition())
        log_sigma = log_variance(fraction, schedule, t, t - 1)
        nats = bound_term(clean, WRONG, log_sigma, schedule, t, t - 1, levels)
        torch.testing.assert_close(loss, 1000 * nats / (96 * torch.tensor(2.0).double().log()), rtol=1e-5, atol=1e-9)


def test_the_hybrid_trains_the_variance_and_leaves_the_mean_to_the_simple_loss() -> None:
    def gradients(loss: DiffusionLoss) -> tuple[Tensor, Tensor, Tensor]:
        mean, v = WRONG.clone().requires_grad_(), torch.full_like(WRONG, 0.2).requires_grad_()
        value = loss(claims_both(mean, v, ZERO), X0, EPS, T, Condition())
        value.sum().backward()
        assert mean.grad is not None
        return value.detach(), mean.grad, v.grad if v.grad is not None else torch.zeros_like(v)

    hybrid, of_mean, of_v = gradients(DiffusionLoss(variance_weight=0.01))
    bound, _, bound_of_v = gradients(DiffusionLoss(weighting="vlb"))
    simple = DiffusionLoss()(claims(WRONG, ZERO, "v"), X0, EPS, T, Condition())
    mean = WRONG.clone().requires_grad_()
    DiffusionLoss()(claims(mean, ZERO, "v"), X0, EPS, T, Condition()).sum().backward()
    torch.testing.assert_close(hybrid, simple + 0.01 * bound, rtol=1e-9, atol=0)
    torch.testing.assert_close(of_mean, mean.grad, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(of_v, 0.01 * bound_of_v, rtol=1e-9, atol=1e-20)
    assert (of_v.flatten(1).abs().amax(1) > 0).all()


def test_the_bound_moves_the_mean_too() -> None:
    mean = WRONG.clone().requires_grad_()
    loss = DiffusionLoss(weighting="vlb")(claims(mean, PLAIN, "v"), X0, EPS, T, Condition())
    loss.sum().backward()
    assert mean.grad is not None
    assert mean.grad.isfinite().all()
    assert torch.equal(mean.grad.sign(), (WRONG - X0).sign())


def test_a_learned_variance_finds_the_size_of_the_errors() -> None:
    """The best fraction under the bound is that of the mean square distance between the posterior's mean and ours."""
    t = torch.full((5,), 500)
    fractions = torch.linspace(-1, 1, 41, dtype=torch.float64)
    small = X0 + 0.02 * WRONG  # an error far below the step's noise asks for beta_tilde
    bounds = []
    for v in fractions:
        denoiser = claims_both(small, v.expand(X0.shape), PLAIN)
        bounds.append(DiffusionLoss(weighting="vlb")(denoiser, X0, EPS, t, Condition()).mean())
    assert torch.stack(bounds).argmin() == 0
    alpha_bar = PLAIN.alpha_bar
    a, b = alpha_bar[500], alpha_bar[499]
    coefficient, beta, tilde = b.sqrt() * (1 - a / b) / (1 - a), 1 - a / b, (1 - b) / (1 - a) * (1 - a / b)
    middle = (0.5 * (beta.log() + tilde.log())).exp()  # v = 0
    off = ((middle - tilde).sqrt() / coefficient).expand(X0.shape)
    bounds = []
    for v in fractions:
        denoiser = claims_both(X0 + off, v.expand(X0.shape), PLAIN)
        bounds.append(DiffusionLoss(weighting="vlb")(denoiser, X0, EPS, t, Condition()).mean())
    assert torch.stack(bounds).argmin() == 20


def test_a_network_with_the_wrong_number_of_channels_is_refused() -> None:
    single = claims(WRONG, ZERO, "v").network
    with pytest.raises(ValueError, match=r"gives 2 channels .* learned_range takes 4: set network\.learn_variance"):
        Denoiser(single, ZERO, "v", torch.float64, variance="learned_range").estimate(X0, T, Condition())
    double = claims_both(WRONG, WRONG, ZERO).network
    with pytest.raises(ValueError, match=r"gives 4 channels .* fixed takes 2"):
        DiffusionLoss()(Denoiser(double, ZERO, "v", torch.float64), X0, EPS, T, Condition())


def test_a_sampler_gets_the_fraction_within_its_bounds() -> None:
    v = torch.linspace(-3, 3, X0.numel(), dtype=torch.float64).view(X0.shape)
    estimate = claims_both(WRONG, v, ZERO).estimate(add_noise(X0, EPS, T, ZERO), T, Condition())
    assert estimate.variance_fraction is not None
    assert torch.equal(estimate.variance_fraction, ((v + 1) / 2).clamp(0, 1))
    torch.testing.assert_close(estimate.x0, WRONG, rtol=1e-9, atol=1e-9)
    assert claims(WRONG, ZERO, "v").estimate(X0, T, Condition()).variance_fraction is None


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_without_an_offset_is_the_samples_own() -> None:
    noise = DiffusionLoss().draw_noise((2, 3, 4, 4), 5, torch.arange(3))
    assert torch.equal(noise, normals((2, 3, 4, 4), 5, "noise", range(3)))


def test_offset_noise_moves_whole_channels() -> None:
    strength, numbers = 0.5, torch.arange(400)
    noise = DiffusionLoss(offset_noise=strength).draw_noise((3, 2, 4, 4), 5, numbers).double()
    offset = noise - normals((3, 2, 4, 4), 5, "noise", numbers)
    torch.testing.assert_close(offset, offset[:, :, :1, :1, :1].expand_as(offset), rtol=0, atol=1e-6)
    drawn = offset[:, :, 0, 0, 0] / strength
    assert abs(float(drawn.mean())) < 4 / 1200**0.5
    assert abs(float(drawn.var()) - 1) < 4 * (2 / 1200) ** 0.5
    assert (torch.corrcoef(drawn.T) - torch.eye(3)).abs().max() < 4 / 400**0.5  # channels apart
    alone = DiffusionLoss(offset_noise=strength).draw_noise((3, 2, 4, 4), 5, numbers[[7]])
    assert torch.equal(alone, noise[[7]].float())


@pytest.mark.parametrize(
    ("eps", "t", "problem"),
    [
        (EPS[:, :, :1], T, r"eps has shape \[5, 2, 1, 4, 4\], not \[5, 2, 3, 4, 4\], its \[B,\.\.\.\] as x0"),
        (EPS[:1], T, r"eps has shape \[1, "),
        (EPS, T[:1], r"t has shape \[1\], not \[5\], its \[B\]"),
        (EPS, T[:, None], r"t has shape \[5, 1\]"),
        (EPS, T + 1, r"times \[2, 51, 301, 701\] are not all within 0\.\.1000"),
    ],
)
def test_noise_and_times_that_do_not_fit_are_refused(eps: Tensor, t: Tensor, problem: str) -> None:
    for call in (
        lambda: DiffusionLoss()(claims(WRONG, ZERO, "v"), X0, eps, t, Condition()),
        lambda: add_noise(X0, eps, t, ZERO),
    ):
        with pytest.raises(ValueError, match=problem):
            call()


@pytest.mark.parametrize("shape", [(5, 2, 3, 4, 1), (5, 2, 1, 4, 4), (1, 2, 3, 4, 4), (5, 2)])
def test_a_network_that_answers_in_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    denoiser = Denoiser(lambda x, time, condition: torch.zeros(shape), ZERO, "v")
    with pytest.raises(ValueError, match=r"network's output has shape .*, not \[5, 2, 3, 4, 4\], its \[B,C,T,H,W\]"):
        DiffusionLoss()(denoiser, X0, EPS, T, Condition())
    with pytest.raises(ValueError, match=r"t has shape \[1\], not \[5\]"):
        denoiser.estimate(X0, T[:1], Condition())
