from typing import get_args

import pytest
import torch
from torch import Tensor

from videodiff.batch import Condition
from videodiff.config import build, to_dict
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.loss import DiffusionLoss, sample_times
from videodiff.diffusion.prediction import Prediction, target
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError

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


@pytest.mark.parametrize("data", [{"gamma": 0}, {"gamma": -1}, {"weighting": "p2"}])
def test_impossible_losses_are_refused(data: dict[str, object]) -> None:
    with pytest.raises(UserError):
        build(DiffusionLoss, data, "loss.yaml")


def test_a_loss_is_its_configuration() -> None:
    loss = DiffusionLoss(weighting="min_snr", gamma=3)
    assert build(DiffusionLoss, to_dict(loss), "here") == loss


def test_times_cover_the_schedule_evenly() -> None:
    schedule = NoiseSchedule(num_steps=10)
    t = sample_times(schedule, seed=0, numbers=torch.arange(5000))
    assert t.dtype == torch.int64
    counts = torch.bincount(t, minlength=11)
    assert counts[0] == 0
    assert len(counts) == 11
    chi_squared = ((counts[1:] - 500.0) ** 2 / 500).sum()
    assert chi_squared < 27.9  # 9 degrees of freedom: passed by chance once in a thousand


def test_a_samples_time_does_not_depend_on_its_batch() -> None:
    whole = sample_times(PLAIN, 3, torch.arange(20))
    assert torch.equal(sample_times(PLAIN, 3, torch.tensor([7, 2])), whole[[7, 2]])
    assert not torch.equal(sample_times(PLAIN, 4, torch.arange(20)), whole)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifted_times_follow_their_distribution(shift: float) -> None:
    numbers, N = 5000, 1000
    t = sample_times(NoiseSchedule(num_steps=N), seed=0, numbers=torch.arange(numbers), shift=shift)
    assert t.min() >= 1
    assert t.max() <= N
    for share in (0.2, 0.5, 0.9):
        below = share / (shift - (shift - 1) * share)  # the u whose shifted value is `share`
        assert abs(float((t <= share * N).double().mean()) - below) < 4 * (below * (1 - below) / numbers) ** 0.5 + 1 / N
