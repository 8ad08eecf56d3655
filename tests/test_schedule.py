import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from videodiff.config import build, to_dict
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError

EMU = NoiseSchedule()
# alpha_bar after 1000 steps of published schedules, computed apart in float64.
PUBLISHED = [
    (EMU, 4.660098513e-3),
    (NoiseSchedule(kind="linear"), 1.578962931e-3),  # AnimateDiff
    (NoiseSchedule(beta_start=0.0015, beta_end=0.0195), 1.423039752e-4),  # latent diffusion
    (NoiseSchedule(kind="linear", beta_start=1e-4, beta_end=0.02), 4.035829765e-5),  # DDPM
    (NoiseSchedule(kind="cosine"), 2.428766907e-9),
]
ALL = [s.model_copy(update={"zero_terminal_snr": zero}) for s, _ in PUBLISHED for zero in (False, True)]


@pytest.mark.parametrize(("schedule", "terminal"), PUBLISHED)
def test_terminal_alpha_bar_of_published_schedules(schedule: NoiseSchedule, terminal: float) -> None:
    assert schedule.alpha_bar.dtype == torch.float64
    assert schedule.alpha_bar[-1].item() == pytest.approx(terminal, rel=1e-9)


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_noise_grows_from_clean_data(schedule: NoiseSchedule) -> None:
    t = torch.arange(schedule.num_steps + 1)
    alpha, sigma, snr = schedule.alpha(t), schedule.sigma(t), schedule.snr(t)
    assert (alpha[0], sigma[0], snr[0]) == (1, 0, math.inf)
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()
    assert (snr.diff() < 0).all()
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-15)
    torch.testing.assert_close(snr[1:], (alpha / sigma)[1:] ** 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("plain", [s for s, _ in PUBLISHED], ids=str)
def test_zero_terminal_snr_is_exact(plain: NoiseSchedule) -> None:
    zero = plain.model_copy(update={"zero_terminal_snr": True})
    assert zero.alpha_bar[-1] == 0
    assert zero.snr(torch.tensor(1000)) == 0
    assert zero.sigma(torch.tensor(1000)) == 1
    assert zero.alpha_bar[1].item() == pytest.approx(plain.alpha_bar[1].item(), rel=1e-15)  # the first noisy step
    # Lin et al., algorithm 1: an affine map of sqrt(alpha_bar), so that ratios of differences stay.
    old, new = plain.alpha_bar[1:].sqrt(), zero.alpha_bar[1:].sqrt()
    relative = [(x - x[-1]) / (x[0] - x[-1]) for x in (old, new)]
    torch.testing.assert_close(relative[0], relative[1], rtol=0, atol=1e-14)


def test_cosine_is_the_squared_cosine_where_betas_are_not_clipped() -> None:
    schedule = NoiseSchedule(kind="cosine", num_steps=4000)
    t = torch.arange(0, 3900, dtype=torch.float64)
    f = torch.cos((t / 4000 + 0.008) / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(schedule.alpha_bar[:3900], f / f[0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("num_steps", [2, 7, 10, 1000])
def test_times_decrease_within_the_schedule(spacing: str, num_steps: int) -> None:
    schedule = NoiseSchedule(num_steps=num_steps)
    for steps in {1, 2, 3, 7, 10, 50, 333, 667, 999, 1000}:
        if steps > num_steps:
            continue
        times = schedule.times(steps, spacing)  # type: ignore[arg-type]
        assert len(times) == steps
        assert all(a > b for a, b in pairwise(times))
        assert num_steps >= times[0]
        assert times[-1] >= 1
    assert schedule.times(num_steps, spacing) == list(range(num_steps, 0, -1))  # type: ignore[arg-type]


def test_spacings() -> None:
    assert EMU.times(4) == [1000, 750, 500, 250]
    assert EMU.times(4, "leading") == [751, 501, 251, 1]
    assert EMU.times(4, "linspace") == [1000, 667, 334, 1]
    assert EMU.times(1, "linspace") == [1000]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(UserError, match="1 to 1000"):
        EMU.times(steps)


def test_leading_times_are_refused_where_they_miss_the_only_pure_noise() -> None:
    zero = EMU.model_copy(update={"zero_terminal_snr": True})
    with pytest.raises(UserError, match=r"leading begins at 951 of 1000 .* spacing: trailing"):
        zero.times(20, "leading")
    assert zero.times(1000, "leading")[0] == 1000
    assert zero.times(20, "linspace")[0] == zero.times(20)[0] == 1000


def test_unknown_spacing_is_refused() -> None:
    with pytest.raises(UserError, match="trailing, leading or linspace"):
        EMU.times(4, "quadratic")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value"), [("num_steps", 1), ("num_steps", 7.5), ("kind", "sigmoid"), ("beta_start", 0.5), ("beta_end", 1)]
)
def test_impossible_schedules_are_refused(key: str, value: object) -> None:
    with pytest.raises(UserError, match=r"schedule\.yaml"):
        build(NoiseSchedule, {key: value}, "schedule.yaml")
    with pytest.raises(ValidationError):
        NoiseSchedule(**{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"kind": "linear", "beta_start": 0.9, "beta_end": 0.99}, r"alpha_bar from 0\.1 to 0, .* smaller betas"),
        (
            {"kind": "linear", "beta_start": 0.9, "beta_end": 0.99, "zero_terminal_snr": True},
            "can't tell all steps apart",
        ),
        ({"beta_start": 1e-20, "beta_end": 1e-20}, r"from 1 to 1, .* can't tell all steps apart"),
        ({"snr_shift": 1e-30}, r"snr_shift 1e-30 .* nearer to 1"),
        ({"kind": "cosine", "beta_start": 1e-4}, r"beta_start 0\.0001 does nothing with kind cosine; leave it out"),
        ({"kind": "cosine", "beta_end": 0.02}, r"beta_end 0\.02 does nothing with kind cosine"),
    ],
)
def test_numbers_that_make_no_schedule_are_refused(values: dict[str, object], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        build(NoiseSchedule, values, "schedule.yaml")


def test_the_shared_table_does_not_remember_who_asked_first() -> None:
    t = torch.tensor([1, 77])
    with torch.device("meta"), torch.inference_mode():
        schedule = NoiseSchedule(num_steps=77)
        assert schedule.alpha_bar.device.type == "cpu"
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (weight * schedule.alpha(t)).sum().backward()
    assert torch.equal(weight.grad, schedule.alpha(t))  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_a_schedule_is_its_configuration(schedule: NoiseSchedule) -> None:
    assert build(NoiseSchedule, to_dict(schedule), "here") == schedule


SHIFTED = [
    EMU.model_copy(update={"snr_shift": s, "zero_terminal_snr": zero}) for s in (0.25, 3.0) for zero in (False, True)
]


@pytest.mark.parametrize("schedule", [*ALL, *SHIFTED, NoiseSchedule(num_steps=2, zero_terminal_snr=True)], ids=str)
def test_log_snr_and_time_are_inverse_over_the_whole_schedule(schedule: NoiseSchedule) -> None:
    N = schedule.num_steps
    whole = torch.arange(N + 1)
    torch.testing.assert_close(schedule.log_snr(whole), schedule.snr(whole).log(), rtol=1e-12, atol=1e-9)
    t = torch.cat([torch.logspace(-9, 0, 40, dtype=torch.float64), torch.linspace(0, N, 1717, dtype=torch.float64)])
    t = t.sort().values.unique()
    log_snr = schedule.log_snr(t)
    assert log_snr.dtype == torch.float64
    assert (log_snr.diff() < 0).all()
    assert log_snr[0] == math.inf
    assert (log_snr[-1] == -math.inf) == schedule.zero_terminal_snr
    torch.testing.assert_close(schedule.time(log_snr), t, rtol=1e-9, atol=1e-9)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-14)
    torch.testing.assert_close(2 * (alpha / sigma).log()[1:-1], log_snr[1:-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_whole_float_times_give_the_tables_entries_exactly(schedule: NoiseSchedule) -> None:
    t = torch.arange(schedule.num_steps + 1)
    for of in (schedule.alpha, schedule.sigma, schedule.snr, schedule.log_snr):
        assert torch.equal(of(t.double()), of(t))
        assert of(t.float().view(7, 11, 13)).shape == (7, 11, 13)


def test_log_snr_is_linear_between_steps() -> None:
    t = torch.arange(1, 1000)
    below, above = EMU.log_snr(t), EMU.log_snr(t + 1)
    torch.testing.assert_close(EMU.log_snr(t + 0.25), 0.75 * below + 0.25 * above, rtol=1e-12, atol=1e-12)


def test_next_to_an_infinite_log_snr_the_vanishing_ratio_is_linear() -> None:
    zero, one, last = EMU.model_copy(update={"zero_terminal_snr": True}), torch.tensor(1), torch.tensor(999)
    fraction = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    ratio = zero.sigma(fraction) / zero.alpha(fraction)
    torch.testing.assert_close(ratio, fraction * zero.sigma(one) / zero.alpha(one), rtol=1e-12, atol=0)
    ratio = zero.alpha(999 + fraction) / zero.sigma(999 + fraction)
    torch.testing.assert_close(ratio, (1 - fraction) * zero.alpha(last) / zero.sigma(last), rtol=1e-9, atol=0)


@pytest.mark.parametrize("t", [-0.1, 1000.1, math.nan])
def test_times_outside_the_schedule_are_refused(t: float) -> None:
    for of in (EMU.alpha, EMU.sigma, EMU.log_snr):
        with pytest.raises(ValueError, match=r"0\.\.1000"):
            of(torch.tensor([5.0, t]))


@pytest.mark.parametrize("t", [-1, 1001, 2000])
def test_steps_outside_the_table_are_refused(t: int) -> None:
    for of in (EMU.alpha, EMU.sigma, EMU.snr):
        with pytest.raises(ValueError, match=rf"times \[5, {t}\] are not all within 0\.\.1000"):
            of(torch.tensor([5, t]))


def test_more_noise_than_the_schedule_has_is_refused() -> None:
    with pytest.raises(ValueError, match="zero_terminal_snr"):
        EMU.time(torch.tensor([0.0, -6.0]))
    assert EMU.model_copy(update={"zero_terminal_snr": True}).time(torch.tensor(-60.0)) < 1000


@pytest.mark.parametrize("plain", [s for s, _ in PUBLISHED], ids=str)
@pytest.mark.parametrize("shift", [0.5, 1.0, 4.0])
def test_snr_shift_divides_every_snr(plain: NoiseSchedule, shift: float) -> None:
    t = torch.arange(1, 1001)
    shifted = plain.model_copy(update={"snr_shift": shift})
    torch.testing.assert_close(shifted.snr(t) * shift, plain.snr(t), rtol=1e-9, atol=0)
    assert shifted.alpha_bar[0] == 1
    zero = shifted.model_copy(update={"zero_terminal_snr": True})
    assert zero.alpha_bar[-1] == 0
    assert zero.alpha_bar[1].item() == pytest.approx(shifted.alpha_bar[1].item(), rel=1e-15)
    assert (zero.alpha_bar.diff() < 0).all()


@pytest.mark.parametrize("zero", [False, True])
def test_snr_shift_is_cogvideox_s(zero: bool) -> None:
    peer = pytest.importorskip("diffusers.schedulers").CogVideoXDDIMScheduler(
        snr_shift_scale=3.0, rescale_betas_zero_snr=zero
    )
    own = EMU.model_copy(update={"snr_shift": 3.0, "zero_terminal_snr": zero})
    torch.testing.assert_close(own.alpha_bar[1:], peer.alphas_cumprod.double(), rtol=1e-6, atol=1e-9)


# One step of linspace is numpy's first number there, the cleanest time: nothing can be sampled from it.
TABLES = [(s, n) for s in ("trailing", "leading", "linspace") for n in (1, 4, 10, 25, 50, 333, 1000)]


@pytest.mark.parametrize(("spacing", "steps"), [pair for pair in TABLES if pair != ("linspace", 1)])
def test_spacings_are_diffusers(spacing: str, steps: int) -> None:
    peer = pytest.importorskip("diffusers.schedulers").DDIMScheduler(timestep_spacing=spacing)
    peer.set_timesteps(steps)
    assert [int(t) + 1 for t in peer.timesteps] == EMU.times(steps, spacing)  # type: ignore[arg-type]
