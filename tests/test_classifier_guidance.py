"""Classifier guidance and autoguidance where all densities are known."""

from collections.abc import Callable

import pytest
import torch
from gaussian import PLAIN, ZERO, AnySampler, Mixture, S, at, generators, oracle
from torch import Tensor

from videodiff.config import build, to_dict
from videodiff.diffusion.guidance import Autoguidance, ClassifierGuidance, class_log_prob, classifier_loss
from videodiff.diffusion.prediction import Estimate, add_noise
from videodiff.diffusion.samplers import DDIM, DDPM, DPMSolver, Heun, PredictorCorrector
from videodiff.diffusion.samplers.base import Ask, asker, at_times, folded
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError
from videodiff.seeding import normals

MEANS = torch.tensor([[0.9, 0.2], [-0.6, 0.5], [0.1, -0.8]], dtype=torch.float64)
LABEL = 1


def log_prob(mixture: Mixture, k: int = LABEL) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x_t, t: mixture.log_joint(x_t, t).log_softmax(1)[:, k]


def points(count: int = 5) -> Tensor:
    return normals((2,), 0, "points", range(count)).double()


def guided_eps(mixture: Mixture, scale: float, x: Tensor, t: int) -> Tensor:
    """The eps that samplers with algorithm 2 use."""
    guided = ClassifierGuidance(scale=scale)(mixture.unconditional, log_prob(mixture))
    return folded(guided(x, torch.full((len(x),), t)), x, *at(mixture.schedule, t)).eps


@pytest.mark.parametrize("t", [1, 200, 600, 999])
@pytest.mark.parametrize("schedule", [PLAIN, ZERO], ids=["plain", "zero"])
def test_scale_1_is_the_conditional_denoiser(schedule: NoiseSchedule, t: int) -> None:
    # p(x_t) p(y | x_t) is p(x_t | y) but for a constant: Bayes.
    mixture, x = Mixture(schedule, MEANS), points()
    expected = mixture.conditional(LABEL)(x, torch.full((len(x),), t)).eps
    torch.testing.assert_close(guided_eps(mixture, 1.0, x, t), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("t", [100, 500, 900])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_guided_score_is_that_of_p_times_p_of_y_to_the_scale(scale: float, t: int) -> None:
    mixture, x, h = Mixture(PLAIN, MEANS), points(), 1e-5

    def log_density(x_t: Tensor) -> Tensor:
        joint = mixture.log_joint(x_t, torch.full((len(x_t),), t))
        return joint.logsumexp(1) + scale * joint.log_softmax(1)[:, LABEL]

    steps = h * torch.eye(2, dtype=torch.float64)
    score = torch.stack([(log_density(x + step) - log_density(x - step)) / (2 * h) for step in steps], dim=1)
    _, sigma = at(PLAIN, t)
    torch.testing.assert_close(-guided_eps(mixture, scale, x, t) / sigma, score, rtol=1e-6, atol=1e-6)
    # The same by classifier-free guidance of the exact denoisers: their difference is the classifier's gradient.
    times = torch.full((len(x),), t)
    free = Autoguidance(scale=scale)(mixture.conditional(LABEL), mixture.unconditional)(x, times)
    torch.testing.assert_close(guided_eps(mixture, scale, x, t), free.eps, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "sampler",
    [DDIM(steps=100), DDPM(steps=300, variance="beta"), DPMSolver(steps=100), Heun(steps=60),
     PredictorCorrector(steps=200)],
    ids=str,
)  # fmt: skip
def test_samples_of_the_whole_become_samples_of_the_class(sampler: AnySampler) -> None:
    mixture, count = Mixture(ZERO, MEANS.float()), 3000
    noise = normals((count, 2), 0, "noise", [0])

    def flat(x_t: Tensor, t: Tensor) -> Estimate:  # one generator for all: [1, count, 2] there is [count, 2] here
        estimate = guided(x_t[0], t.expand(count))
        return Estimate(*(part[None] for part in (estimate.x0, estimate.eps)), None, estimate.shift[None])  # type: ignore[index]

    guided = ClassifierGuidance(scale=1.0)(mixture.unconditional, log_prob(mixture))
    made = sampler(flat, noise, ZERO, generators(1))[0].double()
    torch.testing.assert_close(made.mean(0), MEANS[LABEL], rtol=0, atol=0.04)
    torch.testing.assert_close(made.std(0), torch.full((2,), S, dtype=torch.float64), rtol=0, atol=0.03)


def one_step(sampler: DDIM | DDPM, ask: Ask, x: Tensor, t: int, s: int) -> Tensor:
    """x_s from x_t with random numbers that are 0."""
    return next(iter(sampler.path(ask, x, at_times(PLAIN, [t, s]), torch.zeros_like)))


def test_one_step_of_both_algorithms() -> None:
    mixture, x, scale, (t, s) = Mixture(PLAIN, MEANS), points(), 2.5, (600, 550)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = at(PLAIN, t), at(PLAIN, s)
    state = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_prob(mixture)(state, torch.full((len(x),), t)).sum(), state)
    plain = asker(mixture.unconditional)
    guided = asker(ClassifierGuidance(scale=scale)(mixture.unconditional, log_prob(mixture)))

    beta = 1 - alpha_t**2 / alpha_s**2
    for sampler, variance in ((DDPM(variance="beta"), beta), (DDPM(), sigma_s**2 / sigma_t**2 * beta)):
        moved = one_step(sampler, guided, x, t, s) - one_step(sampler, plain, x, t, s)
        torch.testing.assert_close(moved, scale * variance * gradient, rtol=1e-9, atol=1e-12)

    eps = plain(x, t).eps - sigma_t * scale * gradient  # algorithm 2
    expected = alpha_s * (x - sigma_t * eps) / alpha_t + sigma_s * eps
    torch.testing.assert_close(one_step(DDIM(), guided, x, t, s), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_gradient_is_there_without_grad_mode(mode: Callable[[], object]) -> None:
    mixture, x, t = Mixture(PLAIN, MEANS), points(), torch.full((5,), 300)
    guided = ClassifierGuidance(scale=2)(mixture.unconditional, log_prob(mixture))
    expected = guided(x, t).shift
    with mode():  # type: ignore[attr-defined]
        shift = guided(points(), torch.full((5,), 300)).shift
    assert expected is not None
    assert shift is not None
    assert expected.abs().max() > 0.1
    assert not shift.requires_grad
    torch.testing.assert_close(shift, expected, rtol=0, atol=1e-12)


def test_two_classifiers_add_up_and_none_costs_nothing() -> None:
    mixture, x, t = Mixture(PLAIN, MEANS), points(), torch.full((5,), 300)
    once = ClassifierGuidance(scale=1)(mixture.unconditional, log_prob(mixture))
    twice = ClassifierGuidance(scale=2)(once, log_prob(mixture, k=2))
    other = ClassifierGuidance(scale=2)(mixture.unconditional, log_prob(mixture, k=2))
    torch.testing.assert_close(twice(x, t).shift, once(x, t).shift + other(x, t).shift, rtol=0, atol=1e-12)  # type: ignore[operator]
    assert ClassifierGuidance(scale=0)(mixture.unconditional, log_prob(mixture)) == mixture.unconditional


def test_class_log_prob_reads_logits() -> None:
    asked: list[Tensor] = []

    def classifier(x: Tensor, time: Tensor) -> Tensor:
        asked.append(time)
        return mixture.log_joint(x, time.long() + 1) + 3.0  # logits are free up to a constant

    mixture, x, t = Mixture(PLAIN, MEANS), points(3), torch.tensor([1, 500, 1000])
    found = class_log_prob(classifier, [0, 1, 2])(x, t)
    torch.testing.assert_close(found, mixture.log_joint(x, t).log_softmax(1).diagonal())
    assert asked[0].tolist() == [0, 499, 999]  # as the denoisers' networks
    assert asked[0].dtype == torch.float32


def test_wrong_shapes_and_labels_are_errors() -> None:
    mixture, x, t = Mixture(PLAIN, MEANS), points(3), torch.full((3,), 500)

    def classifier(x: Tensor, time: Tensor) -> Tensor:
        return mixture.log_joint(x, time.long() + 1)

    with pytest.raises(ValueError, match=r"log_prob gave \[3, 3\] for 3 samples"):
        ClassifierGuidance()(mixture.unconditional, mixture.log_joint)(x, t)
    with pytest.raises(ValueError, match="give one per sample"):
        class_log_prob(classifier, [0, 1])(x, t)
    with pytest.raises(ValueError, match=r"not all within 0\.\.2"):
        class_log_prob(classifier, [0, 1, 3])(x, t)
    with pytest.raises(ValueError, match=r"not all within 0\.\.2"):
        classifier_loss(classifier, x, torch.tensor([0, -1, 2]), PLAIN, 0, torch.arange(3))


def test_the_loss_is_the_cross_entropy_of_noised_data() -> None:
    mixture, numbers, labels = Mixture(PLAIN, MEANS), torch.tensor([7, 3, 9]), torch.tensor([0, 2, 1])
    seen: list[tuple[Tensor, Tensor]] = []

    def classifier(x: Tensor, time: Tensor) -> Tensor:
        seen.append((x, time.long() + 1))
        return mixture.log_joint(x, time.long() + 1)

    x0 = MEANS[labels]
    loss = classifier_loss(classifier, x0, labels, PLAIN, 5, numbers)
    (x_t, t) = seen[0]
    torch.testing.assert_close(x_t, add_noise(x0, normals((2,), 5, "noise", numbers).double(), t, PLAIN))
    torch.testing.assert_close(loss, -mixture.log_joint(x_t, t).log_softmax(1)[torch.arange(3), labels])
    some = classifier_loss(classifier, x0[[2, 0]], labels[[2, 0]], PLAIN, 5, numbers[[2, 0]])
    torch.testing.assert_close(some, loss[[2, 0]])


# --- autoguidance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("t", [100, 900])
def test_autoguidance_of_gaussians_is_gaussian(scale: float, t: int) -> None:
    # The weaker model's data is wider: scores add up to one of precision w / v1 + (1 - w) / v0.
    x, times = points(), torch.full((5,), t)
    estimate = Autoguidance(scale=scale)(oracle(PLAIN, 0.7, 0.3), oracle(PLAIN, 0.5, 0.6))(x, times)
    alpha, sigma = at(PLAIN, t)
    v1, v0 = (alpha**2 * s**2 + sigma**2 for s in (0.3, 0.6))
    precision = scale / v1 + (1 - scale) / v0
    mean = alpha * (scale * 0.7 / v1 + (1 - scale) * 0.5 / v0) / precision
    torch.testing.assert_close(-estimate.eps / sigma, -precision * (x - mean), rtol=0, atol=1e-9)
    torch.testing.assert_close(alpha * estimate.x0 + sigma * estimate.eps, x, rtol=0, atol=1e-12)


def test_autoguidance_keeps_what_the_strong_model_says_besides() -> None:
    def strong(x_t: Tensor, t: Tensor) -> Estimate:
        return Estimate(x_t, x_t, torch.full_like(x_t, 0.3), torch.full_like(x_t, 2.0))

    def weak(x_t: Tensor, t: Tensor) -> Estimate:
        raise AssertionError("asked")

    x, t = points(), torch.full((5,), 300)
    assert Autoguidance(scale=1)(strong, weak) is strong
    estimate = Autoguidance(scale=2)(strong, oracle(PLAIN))(x, t)
    assert estimate.variance_fraction is not None
    assert estimate.shift is not None
    assert (estimate.variance_fraction.unique().item(), estimate.shift.unique().item()) == (0.3, 2.0)


@pytest.mark.parametrize("kind", [Autoguidance, ClassifierGuidance])
def test_scales_are_configuration(kind: type[Autoguidance] | type[ClassifierGuidance]) -> None:
    assert build(kind, to_dict(kind(scale=3)), "here") == kind(scale=3)
    with pytest.raises(UserError, match="scale"):
        build(kind, {"scale": -1}, "here")
