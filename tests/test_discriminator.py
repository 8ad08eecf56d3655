"""The discriminator: hinge losses and the adaptive weight in closed form, patches, and that it learns to tell."""

import pytest
import torch
from torch import nn

from videodiff.networks.discriminator import (
    DiscriminatorConfig,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)


def logits(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(1, 1, 1, -1)


def test_hinge_losses_are_their_closed_forms() -> None:
    # Real above 1 and made below -1 cost nothing; the others by how far they are from there, halved.
    assert discriminator_loss(logits(2.0, 1.0), logits(-1.0, -3.0)).item() == 0
    assert discriminator_loss(logits(0.5, -1.0), logits(0.0, 2.0)).item() == pytest.approx(
        0.5 * ((0.5 + 2.0) / 2 + (1.0 + 3.0) / 2)
    )
    assert generator_loss(logits(0.5, -2.5)).item() == pytest.approx(1.0)
    one_each = torch.stack([logits(0.0)[0], logits(4.0)[0]])
    assert generator_loss(one_each).tolist() == [0.0, -4.0]
    assert discriminator_loss(one_each, -one_each).tolist() == [1.0, 0.0]


def test_the_adaptive_weight_equals_the_pulls_on_the_last_layer() -> None:
    """A last layer y = w h: by hand, d/dw sum|y - x| = sum sign(y - x) h and d/dw (-mean D y) = -mean D h."""
    hidden, target = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 9.0, 1.0])
    weight = torch.tensor(2.0, requires_grad=True)
    made = weight * hidden
    (by_error,) = torch.autograd.grad((made - target).abs().sum(), weight, retain_graph=True)
    (by_adversary,) = torch.autograd.grad(-(0.01 * made).mean(), weight)
    assert by_error.item() == pytest.approx(1.0 - 2.0 + 3.0)
    assert by_adversary.item() == pytest.approx(-0.02)
    assert adaptive_weight(by_error, by_adversary).item() == pytest.approx(2.0 / (0.02 + 1e-4))


def test_the_adaptive_weight_is_of_lengths_and_bounded() -> None:
    assert adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([[0.0], [2.0]])).item() == pytest.approx(5 / 2.0001)
    assert adaptive_weight(torch.tensor([3.0]), torch.tensor([0.0])).item() == pytest.approx(1e4)
    assert adaptive_weight(torch.tensor([0.0]), torch.tensor([1.0])).item() == 0


def test_patches_of_each_size_and_the_published_shape() -> None:
    for layers, size in ((1, 8), (2, 32), (3, 24), (3, 64)):
        config = DiscriminatorConfig(width=8, num_layers=layers)
        made = PatchDiscriminator(config)(torch.zeros(1, 3, size, size))
        assert made.shape == (1, 1, config.patches(size), config.patches(size))
    assert DiscriminatorConfig(num_layers=3).patches(16) < 1
    # pix2pix's discriminator of 70x70 patches: a patch's logit hears of 70x70 pixels.
    pictures = torch.zeros(1, 3, 128, 128, requires_grad=True)
    made = PatchDiscriminator(DiscriminatorConfig(width=4))
    made.layers = nn.Sequential(*(layer for layer in made.layers if not isinstance(layer, nn.GroupNorm)))
    made(pictures)[0, 0, 7, 7].backward()
    assert pictures.grad is not None
    heard = pictures.grad[0].abs().sum(0).nonzero()
    assert (heard.amax(0) - heard.amin(0) + 1).tolist() == [70, 70]


def test_a_picture_is_judged_alone() -> None:
    torch.manual_seed(0)
    network, pictures = PatchDiscriminator(DiscriminatorConfig(width=8, num_layers=2)), torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(network(pictures)[1:2], network(pictures[1:2]), atol=1e-5, rtol=0)


def test_it_learns_to_tell_made_from_real() -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(DiscriminatorConfig(width=8, num_layers=2))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    losses = []
    for _ in range(40):
        coarse = torch.rand(8, 3, 4, 4) * 2 - 1
        real = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)  # squares with sharp edges
        made = nn.functional.interpolate(coarse, size=16, mode="bilinear")  # the same, blurred
        loss = discriminator_loss(network(real), network(made)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.3)
    assert losses[-1] < 0.5
