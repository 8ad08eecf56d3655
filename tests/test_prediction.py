from typing import get_args

import pytest
import torch

from videodiff.batch import Condition
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.prediction import Prediction, add_noise, check_pair, split, target
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError

PREDICTIONS: list[Prediction] = list(get_args(Prediction))
PLAIN, ZERO = NoiseSchedule(), NoiseSchedule(zero_terminal_snr=True)
PAIRS = [(p, s) for p in PREDICTIONS for s in (PLAIN, ZERO) if not (p == "eps" and s is ZERO)]
T = torch.tensor([1, 2, 500, 999, 1000])


def states(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(5, 2, 3, 4, 4, generator=g, dtype=dtype), torch.randn(5, 2, 3, 4, 4, generator=g, dtype=dtype)


@pytest.mark.parametrize(("prediction", "schedule"), PAIRS)
def test_split_undoes_target_at_every_step(prediction: Prediction, schedule: NoiseSchedule) -> None:
    x0, eps = states()
    alpha, sigma = schedule.alpha(T), schedule.sigma(T)
    x_t = add_noise(x0, eps, T, schedule)
    estimate = split(prediction, target(prediction, x0, eps, alpha, sigma), x_t, alpha, sigma)
    torch.testing.assert_close(estimate.x0, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(estimate.eps, eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("prediction", "schedule"), PAIRS)
def test_any_estimate_explains_the_noisy_state(prediction: Prediction, schedule: NoiseSchedule) -> None:
    x_t, output = states()
    alpha, sigma = schedule.alpha(T), schedule.sigma(T)
    e = split(prediction, output, x_t, alpha, sigma)
    a, s = (c.view(-1, 1, 1, 1, 1) for c in (alpha, sigma))
    torch.testing.assert_close(a * e.x0 + s * e.eps, x_t, rtol=0, atol=1e-12)
    torch.testing.assert_close(target(prediction, e.x0, e.eps, alpha, sigma), output, rtol=0, atol=1e-12)


def test_targets_are_what_the_papers_say() -> None:
    x0, eps = states()
    alpha, sigma = torch.full((5,), 0.6, dtype=torch.float64), torch.full((5,), 0.8, dtype=torch.float64)
    assert torch.equal(target("eps", x0, eps, alpha, sigma), eps)
    assert torch.equal(target("x0", x0, eps, alpha, sigma), x0)
    torch.testing.assert_close(target("v", x0, eps, alpha, sigma), 0.6 * eps - 0.8 * x0)


def test_pure_noise_under_v_says_minus_x0() -> None:
    x0, eps = states()
    t = torch.full((5,), 1000)
    assert torch.equal(add_noise(x0, eps, t, ZERO), eps)
    assert torch.equal(target("v", x0, eps, ZERO.alpha(t), ZERO.sigma(t)), -x0)


def test_noisy_states_have_the_variance_of_the_schedule() -> None:
    g = torch.Generator().manual_seed(0)
    x0, eps = 0.5 * torch.randn(5, 40_000, generator=g), torch.randn(5, 40_000, generator=g)
    variance = add_noise(x0, eps, T, PLAIN).double().var(dim=1)
    torch.testing.assert_close(variance, 0.25 * PLAIN.alpha(T) ** 2 + PLAIN.sigma(T) ** 2, rtol=0.04, atol=0)


def test_clean_data_stays_clean() -> None:
    x0, eps = states()
    assert torch.equal(add_noise(x0, eps, torch.zeros(5, dtype=torch.long), PLAIN), x0)


@pytest.mark.parametrize(
    ("dtype", "state"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_states_are_at_least_float32(dtype: torch.dtype, state: torch.dtype) -> None:
    x0, eps = states(dtype)
    assert add_noise(x0, eps, T, PLAIN).dtype == state
    e = split("v", eps, x0, PLAIN.alpha(T), PLAIN.sigma(T))
    assert {e.x0.dtype, e.eps.dtype, target("v", x0, eps, PLAIN.alpha(T), PLAIN.sigma(T)).dtype} == {state}


def test_eps_with_zero_terminal_snr_is_refused_with_the_way_out() -> None:
    for refuse in (lambda: check_pair("eps", ZERO), lambda: Denoiser(lambda x, t, c: x, ZERO, "eps")):
        with pytest.raises(UserError, match=r"prediction: v .*zero_terminal_snr: false") as error:
            refuse()
        assert "\n" not in str(error.value)
    for prediction, schedule in PAIRS:
        check_pair(prediction, schedule)


def test_a_network_sees_published_times_and_its_own_precision() -> None:
    seen = {}

    def network(x: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
        seen.update(x=x.dtype, time=time, pooled=condition.pooled)
        return x

    x_t, _ = states(torch.float32)
    denoiser = Denoiser(network, ZERO, "v", dtype=torch.bfloat16)
    estimate = denoiser.bind(Condition(pooled=torch.ones(5, 3)))(x_t, T)
    assert seen["x"] == torch.bfloat16
    assert seen["pooled"].dtype == torch.bfloat16
    assert seen["time"].dtype == torch.float32
    assert seen["time"].tolist() == [0, 1, 499, 998, 999]
    assert estimate.x0.dtype == torch.float32


@pytest.mark.parametrize(("prediction", "schedule"), PAIRS)
def test_a_denoiser_whose_network_is_right_is_right(prediction: Prediction, schedule: NoiseSchedule) -> None:
    x0, eps = states()

    def network(x: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
        t = time.long() + 1
        return target(prediction, x0, eps, schedule.alpha(t), schedule.sigma(t))

    denoiser = Denoiser(network, schedule, prediction, dtype=torch.float64)
    estimate = denoiser.estimate(add_noise(x0, eps, T, schedule), T, Condition())
    torch.testing.assert_close(estimate.x0, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(estimate.eps, eps, rtol=0, atol=1e-12)
