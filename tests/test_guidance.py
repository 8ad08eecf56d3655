from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian import Mixture, at
from torch import Tensor

from videodiff.batch import Condition
from videodiff.config import build, load, save, to_dict
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.guidance import ClassifierFree
from videodiff.diffusion.prediction import Estimate, Prediction, target
from videodiff.diffusion.samplers import DDIM
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError
from videodiff.parts import Sampling
from videodiff.seeding import normals

PLAIN, ZERO = NoiseSchedule(), NoiseSchedule(zero_terminal_snr=True)
B, SHAPE = 2, (3, 4, 2, 2)
S = 0.5
M0, M_TEXT, M_IMAGE = 0.2, torch.tensor([0.3, -0.5]), torch.tensor([0.8, 0.1])
X_T = normals(SHAPE, 0, "noise", range(B))
T = torch.tensor([1000, 400])


class GaussianNetwork:
    """The best v for data N(m, S^2) whose mean m is M0 plus what text and image add; counts the rows it is shown."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self.rows.append(len(x))
        t = time.long() + 1
        alpha, sigma = (c.to(x).view(-1, 1, 1, 1, 1) for c in (ZERO.alpha(t), ZERO.sigma(t)))
        m = torch.full((len(x),), M0)
        for tokens in condition.text:
            m = m + tokens[:, 0, 0]
        if condition.known is not None:
            m = m + condition.known[:, 0, 0, 0, 0]
        m = m.view(-1, 1, 1, 1, 1)
        x0 = m + alpha * S**2 / (alpha**2 * S**2 + sigma**2) * (x - alpha * m)
        return target("v", x0, (x - alpha * x0) / sigma, ZERO.alpha(t), ZERO.sigma(t))


def condition(text: bool = True, image: bool = True) -> Condition:
    known_mask = torch.zeros(B, 1, *SHAPE[1:])
    known_mask[:, :, 0] = 1
    return Condition(
        text=(M_TEXT.view(B, 1, 1).expand(B, 3, 4),) if text else (),
        text_mask=(torch.ones(B, 3, dtype=torch.bool),) if text else (),
        known=M_IMAGE.view(B, 1, 1, 1, 1) * known_mask.expand(B, *SHAPE) if image else None,
        known_mask=known_mask if image else None,
    )


def guided(text: float, image: float, given: Condition) -> tuple[Tensor, list[int]]:
    network = GaussianNetwork()
    estimate = ClassifierFree(text=text, image=image)(Denoiser(network, ZERO, "v"), given)(X_T, T)
    alpha, sigma = (c.float().view(-1, 1, 1, 1, 1) for c in (ZERO.alpha(T), ZERO.sigma(T)))
    torch.testing.assert_close(alpha * estimate.x0 + sigma * estimate.eps, X_T, rtol=0, atol=2e-5)
    return estimate.x0, network.rows


def alone(given: Condition) -> Tensor:
    return Denoiser(GaussianNetwork(), ZERO, "v").estimate(X_T, T, given).x0


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("text", "image"), [(7.5, 2.0), (2.0, 7.5), (0.0, 3.0), (1.0, 0.5)])
def test_emus_equation_in_one_forward(text: float, image: float) -> None:
    c = condition()
    nothing, picture, both = alone(c.without("text", "image")), alone(c.without("text")), alone(c)
    x0, rows = guided(text, image, c)
    close(x0, nothing + image * (picture - nothing) + text * (both - picture))
    assert rows == [(2 if text == 0 else 3) * B]


def test_both_scales_1_are_the_plain_denoiser() -> None:
    x0, rows = guided(1, 1, condition())
    assert torch.equal(x0, alone(condition()))
    assert rows == [B]


def test_both_scales_0_are_the_unconditional_denoiser() -> None:
    x0, rows = guided(0, 0, condition())
    assert torch.equal(x0, alone(condition().without("text", "image")))
    assert rows == [B]


def test_equal_scales_are_single_guidance() -> None:
    x0, rows = guided(3, 3, condition())
    nothing = alone(condition().without("text", "image"))
    close(x0, nothing + 3 * (alone(condition()) - nothing))
    assert rows == [2 * B]


def test_image_scale_1_guides_by_text_from_the_image() -> None:
    x0, rows = guided(7.5, 1, condition())
    picture = alone(condition().without("text"))
    close(x0, picture + 7.5 * (alone(condition()) - picture))
    assert rows == [2 * B]


@pytest.mark.parametrize("given", [condition(image=False), condition().without("image")], ids=["absent", "null"])
def test_without_known_frames_only_the_text_scale_counts(given: Condition) -> None:
    x0, rows = guided(4, 2, given)
    nothing = alone(given.without("text"))
    close(x0, nothing + 4 * (alone(given) - nothing))
    assert rows == [2 * B]
    assert guided(1, 9, given)[1] == [B]


def test_without_text_only_the_image_scale_counts() -> None:
    given = condition(text=False)
    x0, rows = guided(4, 2, given)
    nothing = alone(given.without("image"))
    close(x0, nothing + 2 * (alone(given) - nothing))
    assert rows == [2 * B]


def test_without_any_condition_there_is_nothing_to_guide() -> None:
    x0, rows = guided(4, 2, Condition())
    assert torch.equal(x0, alone(Condition()))
    assert rows == [B]


@pytest.mark.parametrize(("text", "image"), [(1.0, 1.0), (3.0, 2.0), (0.0, 0.0)])
def test_guided_gaussians_are_sampled_in_closed_form(text: float, image: float) -> None:
    # Answers of equal deviation differ in their means only, so guidance samples N(m0 + w_i m_I + w_p m_p, S^2).
    network = GaussianNetwork()
    denoise = ClassifierFree(text=text, image=image)(Denoiser(network, ZERO, "v"), condition())
    at_0 = DDIM(steps=500)(denoise, torch.zeros(B, *SHAPE), ZERO)
    at_1 = DDIM(steps=500)(denoise, torch.ones(B, *SHAPE), ZERO)
    mean = (M0 + image * M_IMAGE + text * M_TEXT).view(B, 1, 1, 1, 1).expand(B, *SHAPE)
    torch.testing.assert_close(at_0, mean, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(at_1 - at_0, torch.full_like(mean, S), rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    "data",
    [{"text": -1}, {"image": float("nan")}, {"scale": 2}, {"rescale": 1.5}, {"interval": [2, 1]}, {"interval": [-1, 1]},
     {"interval": [1, 1]}, {"interval": 3}, {"interval": [1, float("inf")]}],
)  # fmt: skip
def test_impossible_scales_are_refused(data: dict[str, object]) -> None:
    with pytest.raises(UserError):
        build(ClassifierFree, data, "guidance.yaml")


@pytest.mark.parametrize(
    "guidance", [ClassifierFree(text=5, image=2), ClassifierFree(rescale=0.7, interval=(0.3, 5)),
                 ClassifierFree(interval=(0.3, None))]
)  # fmt: skip
def test_guidance_is_its_configuration(guidance: ClassifierFree, tmp_path: Path) -> None:
    assert build(ClassifierFree, to_dict(guidance), "here") == guidance
    save(guidance, tmp_path / "guidance.yaml")
    assert load(ClassifierFree, tmp_path / "guidance.yaml") == guidance


def test_a_card_from_before_rescale_and_interval_reads_the_same() -> None:
    old = build(Sampling, {"guidance": {"text": 3.0, "image": 1.0}, "sampler": {"kind": "ddim", "steps": 9}}, "card")
    assert old == Sampling(guidance=ClassifierFree(text=3, image=1, rescale=0, interval=None), sampler=DDIM(steps=9))


def both(network: Callable[..., Tensor], guidance: ClassifierFree, prediction: Prediction = "v") -> Estimate:
    return guidance(Denoiser(network, PLAIN, prediction), condition())(X_T, T)


def smooth(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """Some network that hears what it is told."""
    told = torch.stack([tokens[:, 0, 0] for tokens in condition.text]).sum(0)
    told = told + condition.known[:, 0, 0, 0, 0]  # type: ignore[index]
    return torch.tanh(x * (0.5 + told.view(-1, 1, 1, 1, 1))) + told.view(-1, 1, 1, 1, 1) * x.cos()


def deviation(prediction: Prediction, estimate: Estimate) -> Tensor:
    """Of what the network would have put out for this estimate, [B]."""
    return target(prediction, estimate.x0, estimate.eps, PLAIN.alpha(T), PLAIN.sigma(T)).flatten(1).std(1)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("scales", [(7.5, 2.0), (4.0, 1.0), (0.0, 0.0)])
def test_rescaled_guidance_keeps_the_deviation(prediction: Prediction, scales: tuple[float, float]) -> None:
    text, image = scales
    plain = both(smooth, ClassifierFree(text=1, image=1), prediction)
    guided = both(smooth, ClassifierFree(text=text, image=image), prediction)
    wanted, had = deviation(prediction, plain), deviation(prediction, guided)
    assert ((had / wanted - 1).abs() > 0.1).all()
    for phi in (0.7, 1.0):
        estimate = both(smooth, ClassifierFree(text=text, image=image, rescale=phi), prediction)
        torch.testing.assert_close(
            deviation(prediction, estimate), phi * wanted + (1 - phi) * had, rtol=1e-4, atol=1e-5
        )
        alpha, sigma = (c.float().view(-1, 1, 1, 1, 1) for c in (PLAIN.alpha(T), PLAIN.sigma(T)))
        torch.testing.assert_close(alpha * estimate.x0 + sigma * estimate.eps, X_T, rtol=0, atol=1e-4)


def test_rescaling_is_per_sample_and_asks_only_for_what_it_measures() -> None:
    def rows(guidance: ClassifierFree) -> int:
        network = GaussianNetwork()
        guidance(Denoiser(network, ZERO, "v"), condition())(X_T, T)
        return network.rows[0]

    assert rows(ClassifierFree(text=0, image=0, rescale=0.5)) == 2 * B  # the full condition is measured, at weight 0
    assert rows(ClassifierFree(text=1, image=1, rescale=0.5)) == B
    guidance = ClassifierFree(text=5, image=2, rescale=1)
    whole = both(smooth, guidance)
    one = guidance(Denoiser(smooth, PLAIN, "v"), condition().select(slice(1, 2)))(X_T[1:], T[1:])
    close(one.x0, whole.x0[1:])


def rows_at(interval: tuple[float, float | None], t: int, given: Condition, image: float = 1) -> int:
    network = GaussianNetwork()
    guidance = ClassifierFree(text=5, image=image, interval=interval)
    guidance(Denoiser(network, ZERO, "v"), given)(X_T, torch.full((B,), t))
    return sum(network.rows)


@pytest.mark.parametrize("image", [1, 2])
def test_outside_of_the_interval_the_text_costs_no_pass(image: float) -> None:
    noise = float(ZERO.sigma(torch.tensor(400)) / ZERO.alpha(torch.tensor(400)))
    within, outside = (2 * B, B) if image == 1 else (3 * B, 2 * B)  # a scale of 1 needs no answer without the image
    assert rows_at((0.9 * noise, 1.1 * noise), 400, condition(), image) == within
    assert rows_at((1.1 * noise, None), 400, condition(), image) == outside
    assert rows_at((0.0, 0.9 * noise), 400, condition(), image) == outside
    assert rows_at((0.5, None), 1000, condition(), image) == within  # zero terminal SNR: infinite noise
    assert rows_at((0.5, 1e9), 1000, condition(), image) == outside
    assert rows_at((0.5, 1e9), 1000, condition(image=False), image) == B  # no known frames: no scale is theirs
    assert rows_at((0.5, 1e9), 1000, condition(text=False), image) == outside  # nor an interval where there is no text


def test_a_loop_with_an_interval_is_guided_within_it() -> None:
    network, steps = GaussianNetwork(), 40
    guidance = ClassifierFree(text=5, image=2, interval=(0.5, 3.0))
    DDIM(steps=steps)(guidance(Denoiser(network, ZERO, "v"), condition()), X_T, ZERO)
    t = torch.tensor(ZERO.times(steps))
    noise = ZERO.sigma(t) / ZERO.alpha(t)
    assert network.rows == [3 * B if 0.5 < level <= 3.0 else 2 * B for level in noise.tolist()]
    assert 0 < sum(rows == 3 * B for rows in network.rows) < steps


@pytest.mark.parametrize("image", [0, 1, 2])
def test_rows_at_different_noise_levels_are_each_treated_as_alone(image: float) -> None:
    guidance = ClassifierFree(text=5, image=image, interval=(0.0, 2.0))  # t = 400 within, t = 1000 outside
    mixed = guidance(Denoiser(smooth, PLAIN, "v"), condition())(X_T, T)
    close(mixed.x0[:1], both(smooth, ClassifierFree(text=image, image=image)).x0[:1])
    close(mixed.x0[1:], both(smooth, ClassifierFree(text=5, image=image)).x0[1:])
    close(mixed.eps[1:], both(smooth, ClassifierFree(text=5, image=image)).eps[1:])


@pytest.mark.parametrize("t", [100, 900])
@pytest.mark.parametrize("w", [0.5, 3.0])
def test_guidance_between_gaussians_is_gaussian(w: float, t: int) -> None:
    # Unconditional data N(m0, s0^2), conditional data N(m1, s1^2) with s1 < s0: the scores mix to one of precision
    # (1 - w) / v0 + w / v1, and so does the guided noise.
    (m0, s0), (m1, s1) = (0.2, 0.8), (0.9, 0.4)

    def network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        told = condition.text_mask[0].all(1).double().view(-1, 1, 1, 1, 1)  # the null text keeps one token alone
        m, s = m0 + (m1 - m0) * told, s0 + (s1 - s0) * told
        t = time.long() + 1
        alpha, sigma = (c.view(-1, 1, 1, 1, 1) for c in (PLAIN.alpha(t), PLAIN.sigma(t)))
        return sigma * (x - alpha * m) / (alpha**2 * s**2 + sigma**2)

    times, x = torch.full((B,), t), X_T.double()
    denoiser = Denoiser(network, PLAIN, "eps", torch.float64)
    estimate = ClassifierFree(text=w)(denoiser, condition(image=False))(x, times)
    alpha, sigma = (float(c[0]) for c in (PLAIN.alpha(times), PLAIN.sigma(times)))
    v0, v1 = (alpha**2 * s**2 + sigma**2 for s in (s0, s1))
    precision = (1 - w) / v0 + w / v1
    mean = alpha * ((1 - w) * m0 / v0 + w * m1 / v1) / precision
    torch.testing.assert_close(-estimate.eps / sigma, -precision * (x - mean), rtol=0, atol=1e-9)


MEANS = torch.tensor([[0.9, 0.2], [-0.6, 0.5], [0.1, -0.8]], dtype=torch.float64)
CLASS = 1


def guided_mixture(guidance: ClassifierFree, mixture: Mixture, x: Tensor, t: int) -> Tensor:
    """eps [B,2] of a network that answers for the whole mixture, and for one class of it where it is told the text."""

    def network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        flat, t = x.flatten(1), time.long() + 1
        told = condition.text_mask[0].all(1, keepdim=True)  # the null text keeps one token alone
        answers = (one(flat, t).eps for one in (mixture.conditional(CLASS), mixture.unconditional))
        return torch.where(told, *answers).view_as(x)

    denoiser = Denoiser(network, mixture.schedule, "eps", torch.float64)
    estimate = guidance(denoiser, condition(image=False))(x.view(B, 2, 1, 1, 1), torch.full((B,), t))
    alpha, sigma = at(mixture.schedule, t)
    torch.testing.assert_close(alpha * estimate.x0 + sigma * estimate.eps, x.view(B, 2, 1, 1, 1), rtol=0, atol=1e-12)
    return estimate.eps.flatten(1)


def scores(mixture: Mixture, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Of the mixture and of the class, [B,2]: differences of their log densities."""
    h = 1e-5

    def log_densities(x: Tensor) -> Tensor:
        joint = mixture.log_joint(x, torch.full((B,), t))
        return torch.stack([joint.logsumexp(1), joint[:, CLASS]])

    steps = h * torch.eye(2, dtype=torch.float64)
    slopes = [(log_densities(x + step) - log_densities(x - step)) / (2 * h) for step in steps]
    whole, one = torch.stack(slopes, dim=2)
    return whole, one


@pytest.mark.parametrize("t", [200, 500, 900])
@pytest.mark.parametrize("w", [0.5, 3.0])
def test_guidance_within_a_mixture_mixes_the_scores(w: float, t: int) -> None:
    mixture, x = Mixture(PLAIN, MEANS), normals((2,), 0, "points", range(B)).double()
    (whole, one), (alpha, sigma) = scores(mixture, x, t), at(PLAIN, t)
    mixed, noise = (1 - w) * whole + w * one, sigma / alpha
    assert (mixed - one).abs().max() > 0.01

    def check(expected: Tensor, **more: Any) -> None:
        eps = guided_mixture(ClassifierFree(text=w, **more), mixture, x, t)
        torch.testing.assert_close(-eps / sigma, expected, rtol=1e-6, atol=1e-6)

    check(mixed)
    check(mixed, interval=(0.9 * noise, 1.1 * noise))
    check(one, interval=(1.1 * noise, None))
    check(one, interval=(0.0, 0.9 * noise))
    # Of two numbers the deviation is half their distance.
    factor = (one[:, 0] - one[:, 1]).abs() / (mixed[:, 0] - mixed[:, 1]).abs()
    check(mixed * (0.3 + 0.7 * factor)[:, None], rescale=0.7)
    check(mixed * (0.3 + 0.7 * factor)[:, None], rescale=0.7, interval=(0.9 * noise, None))
    check(one, rescale=0.7, interval=(0.0, 0.9 * noise))


def test_the_learned_variance_is_that_of_the_full_condition() -> None:
    class Learned(Denoiser):
        def estimate(self, x_t: Tensor, t: Tensor, condition: Condition) -> Estimate:
            plain = super().estimate(x_t, t, condition)
            told = condition.text_mask[0].all(1).view(-1, 1, 1, 1, 1)
            return Estimate(plain.x0, plain.eps, torch.where(told, 0.8, 0.1).expand_as(x_t))

    denoiser = Learned(GaussianNetwork(), ZERO, "v")
    for guidance in (
        ClassifierFree(text=5, image=2),
        ClassifierFree(text=5, rescale=0.5),
        ClassifierFree(text=5, interval=(0, 2)),
    ):
        fraction = guidance(denoiser, condition())(X_T, T).variance_fraction
        assert fraction is not None
        assert fraction.unique().tolist() == [pytest.approx(0.8)]
