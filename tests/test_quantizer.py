"""Vector quantisation: the nearest code by brute force, the gradients, the losses' closed forms, latents and codes."""

import math

import pytest
import torch
from torch import Tensor

from videodiff.config import ConfigError, build
from videodiff.networks import quantizer as module
from videodiff.networks.autoencoder import Autoencoder, AutoencoderConfig, to_float
from videodiff.networks.quantizer import Quantizer, QuantizerConfig, codebook_use, straight_through

CONFIG = AutoencoderConfig(
    latent_channels=3, patch=1, widths=(8, 16), chunk=3, quantizer=QuantizerConfig(codebook_size=20)
)
LDM = CONFIG.model_copy(update={"layout": "ldm", "norm_groups": 4})


def make(config: AutoencoderConfig = CONFIG) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(config).eval()


def clips(*shape: int) -> Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("distances", [2**24, 100], ids=["at once", "in pieces"])
def test_the_nearest_code_is_found(distances: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DISTANCES", distances)
    torch.manual_seed(0)
    quantizer = Quantizer(QuantizerConfig(codebook_size=40), channels=5)
    latent = torch.randn(3, 5, 4, 6)
    code, indices = quantizer(latent)
    assert code.shape == latent.shape
    assert indices.shape == (3, 4, 6)
    rows = latent.permute(0, 2, 3, 1).reshape(-1, 5)
    for row, index, found in zip(rows, indices.flatten(), code.permute(0, 2, 3, 1).reshape(-1, 5), strict=True):
        distance = (quantizer.codebook - row).square().sum(1)
        assert index == distance.argmin()
        assert torch.equal(found, quantizer.codebook[index])


def test_straight_through_shows_the_code_and_passes_the_gradient() -> None:
    latent = (1e3 * torch.randn(2, 3, 4, 4)).requires_grad_()
    code = torch.randn(2, 3, 4, 4, requires_grad=True)
    seen = straight_through(latent, code)
    assert torch.equal(seen, code)  # to the last bit, also beside latents a thousand times as large
    gradient = torch.randn(2, 3, 4, 4)
    seen.backward(gradient)
    assert torch.equal(latent.grad, gradient)
    assert code.grad is None


def test_the_losses_are_their_closed_forms() -> None:
    latent = torch.full((2, 3, 2, 2), 1.0, requires_grad=True)
    code = torch.full((2, 3, 2, 2), 4.0, requires_grad=True)
    loss = Quantizer(QuantizerConfig(codebook_size=2, commitment=0.5), 3).loss(latent, code)
    torch.testing.assert_close(loss, torch.full((2,), 9.0 + 0.5 * 9.0))
    loss.sum().backward()
    # d/de (z - e)^2 = 2 (e - z) for the codes alone, commitment * 2 (z - e) for the latents alone; 12 values a picture.
    torch.testing.assert_close(code.grad, torch.full_like(code, 2 * 3.0 / 12))
    torch.testing.assert_close(latent.grad, torch.full_like(latent, -0.5 * 2 * 3.0 / 12))


def test_codebook_use() -> None:
    perplexity, used = codebook_use(torch.tensor([5, 5, 5, 5, 0, 0, 0, 0]))
    assert perplexity.item() == pytest.approx(4)
    assert used.item() == pytest.approx(0.5)
    perplexity, used = codebook_use(torch.tensor([3, 1]))
    assert perplexity.item() == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert codebook_use(torch.tensor([9, 0, 0]))[0].item() == pytest.approx(1)


@pytest.mark.parametrize("config", [CONFIG, LDM], ids=["light", "ldm"])
def test_latents_are_before_the_codebook_and_the_decoder_sees_codes(config: AutoencoderConfig) -> None:
    network = make(config)
    frames = clips(2, 4, 8, 8)
    posterior = network.encode_clip(frames)
    assert posterior.mean.shape == (2, 3, 4, 4, 4)
    assert not posterior.std.any()
    assert torch.equal(posterior.sample(torch.randn_like(posterior.mean)), posterior.mean)
    raw = posterior.mean.transpose(1, 2).flatten(0, 1)
    assert network.quantizer is not None
    code, _ = network.quantizer(raw)
    assert not torch.equal(code, raw)
    pictures = network.decode_clip(posterior.mean)
    assert torch.equal(network.decode_clip(code.unflatten(0, (2, 4)).transpose(1, 2)), pictures)
    # The training pass decodes the same codes.
    made, latent, codes, indices = network(to_float(frames))
    torch.testing.assert_close(latent, raw, atol=1e-5, rtol=0)
    assert torch.equal(codes, network.quantizer.codebook[indices].permute(0, 3, 1, 2))
    torch.testing.assert_close(made, network.decode(raw), atol=1e-5, rtol=0)


def test_normalised_latents_are_quantised_in_their_own_units() -> None:
    network = make()
    frames = clips(2, 3, 8, 8)
    pictures = network.decode_clip(network.encode_clip(frames).mean)
    network.set_latent_statistics(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 0.1, 2.0]))
    assert (network.decode_clip(network.encode_clip(frames).mean).int() - pictures.int()).abs().max() <= 1


def test_every_parameter_trains_and_pictures_are_learned() -> None:
    network = make().train()
    assert network.quantizer is not None
    frames = to_float(clips(1, 2, 8, 8))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        made, latent, code, _ = network(frames)
        error = (made - frames).abs().mean()
        optimizer.zero_grad()
        (error + network.quantizer.loss(latent, code).mean()).backward()
        if not losses:
            assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
        optimizer.step()
        losses.append(error.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_gaussian_latent_has_no_codebook() -> None:
    names = {name.partition(".")[0] for name in Autoencoder(CONFIG.model_copy(update={"quantizer": None})).state_dict()}
    assert names == {"encoder", "decoder", "latent_mean", "latent_std"}
    assert make().state_dict()["quantizer.codebook"].shape == (20, 3)


@pytest.mark.parametrize(
    ("quantizer", "key"),
    [({"codebook_size": 1}, "codebook_size"), ({"codebook_size": 8, "commitment": -1.0}, "commitment"), ({}, "size")],
)
def test_a_codebook_that_can_not_be_is_refused(quantizer: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"quantizer\..*{key}"):
        build(AutoencoderConfig, {"quantizer": quantizer}, "the test")


def test_a_code_has_a_channel() -> None:
    with pytest.raises(ValueError, match=r"channels 0.* latent_channels"):
        Quantizer(QuantizerConfig(codebook_size=4), 0)
