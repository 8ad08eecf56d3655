import pytest
import torch

from videodiff.config import build, to_dict
from videodiff.diffusion.loss import DiffusionLoss
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.diffusion.times import LossHistory, LossSecondMoment, sample_times
from videodiff.errors import UserError

PLAIN = NoiseSchedule()


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


# --- importance sampling ----------------------------------------------------------------------------------------------

STEPS = 10
# Deviation of the losses at each time is far from even, as the bound's is.
SIZES = torch.logspace(2, -1, STEPS, dtype=torch.float64)


def filled(history: int = 4, uniform_prob: float = 0.001) -> LossHistory:
    kept = LossHistory(LossSecondMoment(history=history, uniform_prob=uniform_prob), STEPS)
    for factor in range(1, history + 1):
        kept.update(torch.arange(1, STEPS + 1), SIZES * factor)
    return kept


def test_times_are_uniform_until_every_one_has_its_history() -> None:
    history = LossHistory(LossSecondMoment(history=2), STEPS)
    every = torch.arange(1, STEPS + 1)
    history.update(every, SIZES)
    history.update(every[:-1], SIZES[:-1])
    t, weight = history.draw(0, torch.arange(2000))
    assert (weight == 1).all()
    assert ((torch.bincount(t, minlength=STEPS + 1)[1:] - 200.0) ** 2 / 200).sum() < 27.9  # once in a thousand
    history.update(every[-1:], SIZES[-1:])
    assert not (history.draw(0, torch.arange(2000))[1] == 1).any()


def test_probabilities_are_those_of_improved_ddpm() -> None:
    history = filled()
    moments = SIZES * ((1 + 4 + 9 + 16) / 4) ** 0.5
    expected = 0.999 * moments / moments.sum() + 0.001 / STEPS
    torch.testing.assert_close(history.probabilities(), expected, rtol=1e-12, atol=0)
    assert history.probabilities().sum().item() == pytest.approx(1, abs=1e-12)


def test_drawn_times_follow_the_probabilities_and_weights_undo_them() -> None:
    history, n = filled(uniform_prob=0.2), 5000
    p = history.probabilities()
    t, weight = history.draw(3, torch.arange(n))
    counts = torch.bincount(t, minlength=STEPS + 1)[1:]
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 27.9
    torch.testing.assert_close(weight, 1 / (STEPS * p[t - 1]), rtol=1e-12, atol=0)
    losses = torch.linspace(1, 3, STEPS, dtype=torch.float64)
    every = 1 / (STEPS * p) * losses
    assert float((p * every).sum()) == pytest.approx(2.0)  # unbiased: the mean over p is that over uniform times
    error = float((p * (every - 2) ** 2).sum() / n) ** 0.5
    assert abs(float((weight * losses[t - 1]).mean()) - 2) < 4 * error


def test_the_best_probabilities_make_the_weighted_loss_nearly_constant() -> None:
    history = filled(uniform_prob=1e-9)
    t, weight = history.draw(3, torch.arange(500))
    weighted = weight * SIZES[t - 1]
    assert float(weighted.std() / weighted.mean()) < 1e-6
    uniform = SIZES[sample_times(NoiseSchedule(num_steps=STEPS), 3, torch.arange(500)) - 1]
    assert float(uniform.std() / uniform.mean()) > 1


def test_the_oldest_loss_makes_room_and_bad_ones_are_left_out() -> None:
    history = LossHistory(LossSecondMoment(history=3), 2)
    t = torch.tensor([1, 1, 2, 1, 1, 1, 2])
    history.update(t, torch.tensor([1.0, 2.0, 7.0, 3.0, 4.0, torch.nan, torch.inf]))
    assert history.losses.tolist() == [[2, 3, 4], [7, 0, 0]]
    assert history.counts.tolist() == [3, 1]


def test_a_samples_draw_depends_on_its_number_and_the_history_alone() -> None:
    history = filled()
    t, weight = history.draw(1, torch.arange(50))
    again, again_weight = history.draw(1, torch.tensor([30, 4]))
    assert torch.equal(again, t[[30, 4]])
    assert torch.equal(again_weight, weight[[30, 4]])


def test_a_history_goes_on_where_it_was_stored() -> None:
    history, other = filled(), LossHistory(LossSecondMoment(history=4), STEPS)
    other.load_state(history.state())
    for kept in (history, other):
        kept.update(torch.tensor([3]), torch.tensor([5.0]))
    assert torch.equal(history.probabilities(), other.probabilities())
    with pytest.raises(ValueError, match=r"shape \[10, 4\], this run keeps \[10, 5\]"):
        LossHistory(LossSecondMoment(history=5), STEPS).load_state(history.state())


def test_losses_of_zero_leave_times_uniform() -> None:
    history = LossHistory(LossSecondMoment(history=1), 4)
    history.update(torch.arange(1, 5), torch.zeros(4))
    assert history.probabilities().tolist() == [0.25] * 4


@pytest.mark.parametrize("data", [{"history": 0}, {"uniform_prob": 0.0}, {"uniform_prob": 1.5}])
def test_impossible_histories_are_refused(data: dict[str, object]) -> None:
    with pytest.raises(UserError, match="importance"):
        build(DiffusionLoss, {"importance": data}, "loss.yaml")


def test_impossible_times_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps 0"):
        LossHistory(LossSecondMoment(), 0)
    for shift in (-1.0, 0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"shift .* orders no times"):
            sample_times(NoiseSchedule(), 0, torch.arange(3), shift)


def test_a_loss_draws_by_its_history() -> None:
    loss, numbers = DiffusionLoss(importance=LossSecondMoment(history=4)), torch.arange(30)
    assert build(DiffusionLoss, to_dict(loss), "here") == loss
    schedule, history = NoiseSchedule(num_steps=STEPS), filled()
    for own, wanted in zip(loss.draw_times(schedule, 2, numbers, history), history.draw(2, numbers), strict=True):
        assert torch.equal(own, wanted)
    t, weight = DiffusionLoss(time_shift=3.0).draw_times(schedule, 2, numbers)
    assert torch.equal(t, sample_times(schedule, 2, numbers, 3.0))
    assert (weight == 1).all()
