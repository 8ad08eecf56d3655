import pytest
import torch
from torch import Tensor

from videodiff.batch import Condition
from videodiff.config import build, to_dict
from videodiff.diffusion.denoiser import Denoiser
from videodiff.diffusion.guidance import ClassifierFree
from videodiff.diffusion.prediction import target
from videodiff.diffusion.samplers import DDIM
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError
from videodiff.seeding import normals

ZERO = NoiseSchedule(zero_terminal_snr=True)
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


@pytest.mark.parametrize("data", [{"text": -1}, {"image": float("nan")}, {"scale": 2}])
def test_impossible_scales_are_refused(data: dict[str, object]) -> None:
    with pytest.raises(UserError):
        build(ClassifierFree, data, "guidance.yaml")


def test_guidance_is_its_configuration() -> None:
    guidance = ClassifierFree(text=5, image=2)
    assert build(ClassifierFree, to_dict(guidance), "here") == guidance
