"""The autoencoder: chunks, neighbours, units, its loss against closed forms, and that it learns."""

import math

import pytest
import torch
from torch import Tensor

from videodiff.config import ConfigError, build
from videodiff.networks.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    AutoencoderLoss,
    crops,
    edges,
    kl_divergence,
    to_float,
)

CONFIG = AutoencoderConfig(latent_channels=3, patch=1, widths=(8, 16), num_res_blocks=1, chunk=3)


LDM = CONFIG.model_copy(update={"layout": "ldm", "norm_groups": 4})


def make(config: AutoencoderConfig = CONFIG) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(config).eval()


def clips(*shape: int) -> Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def test_shapes_and_factor() -> None:
    network = make()
    posterior = network.encode_clip(clips(2, 5, 8, 12))
    assert network.factor == 2
    assert posterior.mean.shape == posterior.std.shape == (2, 3, 5, 4, 6)
    assert (posterior.std > 0).all()
    frames = network.decode_clip(posterior.mean)
    assert frames.shape == (2, 5, 8, 12, 3)
    assert frames.dtype == torch.uint8
    patched = Autoencoder(CONFIG.model_copy(update={"patch": 2}))
    assert patched.factor == 4
    assert patched.encode_clip(clips(1, 1, 8, 12)).mean.shape == (1, 3, 1, 2, 3)
    assert Autoencoder(AutoencoderConfig()).factor == 8


@pytest.mark.parametrize("config", [CONFIG, LDM], ids=["light", "ldm"])
def test_chunked_is_unchunked(config: AutoencoderConfig) -> None:
    network = make(config)
    frames = clips(2, 7, 8, 8)
    whole = network.encode(to_float(frames))
    chunked = network.encode_clip(frames)  # by 3, 3 and 1
    torch.testing.assert_close(chunked.mean.transpose(1, 2).flatten(0, 1), whole.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(chunked.std.transpose(1, 2).flatten(0, 1), whole.std, atol=1e-5, rtol=0)
    for chunk in (1, 2, 5, 14):
        torch.testing.assert_close(network.decode(whole.mean, chunk), network.decode(whole.mean), atol=1e-5, rtol=0)


def test_a_clip_depends_on_no_neighbour() -> None:
    network = make()
    frames = clips(3, 4, 8, 8)
    together = network.encode_clip(frames)
    for index in range(3):
        alone = network.encode_clip(frames[index : index + 1])
        assert torch.equal(alone.mean[0], together.mean[index])
        assert torch.equal(alone.std[0], together.std[index])
    made = network.decode_clip(together.mean)
    assert torch.equal(network.decode_clip(together.mean[1:2])[0], made[1])


def test_chunks_bound_what_goes_through_at_once() -> None:
    network = make()
    seen = []
    network.encoder.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    network.decoder.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    network.decode_clip(network.encode_clip(clips(2, 7, 8, 8)).mean)
    assert seen == [3, 3, 1] * 4


def test_latents_are_normalised_and_come_back() -> None:
    network = make()
    frames = clips(4, 3, 8, 8)
    raw = network.encode_clip(frames)
    pictures = network.decode_clip(raw.mean)
    mean, std = raw.mean.mean(dim=(0, 2, 3, 4)), raw.mean.std(dim=(0, 2, 3, 4))
    network.set_latent_statistics(mean, std)
    normalised = network.encode_clip(frames)
    torch.testing.assert_close(normalised.mean.mean(dim=(0, 2, 3, 4)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.mean.std(dim=(0, 2, 3, 4)), torch.ones(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.std * std[:, None, None, None], raw.std)
    # The same pictures, up to a rounding step of uint8.
    assert (network.decode_clip(normalised.mean).int() - pictures.int()).abs().max() <= 1
    again = make()
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.encode_clip(frames).mean, normalised.mean)


@pytest.mark.parametrize("std", [[1.0, 0.0, 1.0], [1.0, math.nan, 1.0]])
def test_statistics_without_spread_are_refused(std: list[float]) -> None:
    with pytest.raises(ValueError, match="std > 0"):
        make().set_latent_statistics(torch.zeros(3), torch.tensor(std))


def test_stable_diffusions_autoencoder_has_its_published_size() -> None:
    # The number of weights in the published vae/ folders of Stable Diffusion 1.5 and 2.1.
    shape = {"latent_channels": 4, "patch": 1, "widths": (128, 256, 512, 512), "num_res_blocks": 2}
    with torch.device("meta"):
        network = Autoencoder(AutoencoderConfig(layout="ldm", norm_groups=32, **shape))
    assert sum(parameter.numel() for parameter in network.parameters()) == 83_653_863
    assert network.factor == 8


def test_norm_groups_change_the_output_and_must_divide() -> None:
    frames = to_float(clips(1, 1, 8, 8))
    means = [make(LDM.model_copy(update={"norm_groups": groups})).encode(frames).mean for groups in (2, 4)]
    assert (means[0] - means[1]).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="norm_groups 5 does not divide the width 64"):
        build(AutoencoderConfig, {"norm_groups": 5}, "the test")


def test_a_level_without_channels_is_refused() -> None:
    with pytest.raises(ConfigError, match="widths"):
        build(AutoencoderConfig, {"widths": [8, 0]}, "the test")


def test_wrong_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of 2"):
        make().encode_clip(clips(1, 1, 7, 8))
    with pytest.raises(ValueError, match="uint8"):
        make().encode_clip(torch.zeros(1, 1, 8, 8, 3))


@pytest.mark.parametrize("shape", [(1, 4, 2, 4, 4), (1, 3, 4, 4), (3, 2, 4, 4)])
def test_a_latent_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    network, latent = make(), torch.zeros(shape)
    with pytest.raises(ValueError, match=r"the latent has shape .*, not \[B,C,T,h,w\] with C = 3"):
        network.decode_clip(latent)
    if shape != (1, 3, 4, 4):
        with pytest.raises(ValueError, match=r"the latent has shape .*, not \[N,C,h,w\] with C = 3"):
            network.decode(latent)


def test_pictures_without_three_colours_are_refused() -> None:
    with pytest.raises(ValueError, match=r"frames have shape \[1, 1, 8, 8\], not \[N,3,H,W\]"):
        make().encode(torch.zeros(1, 1, 8, 8))


def test_a_sample_has_the_posteriors_mean_and_std() -> None:
    network = make()
    posterior = network.encode(to_float(clips(1, 1, 8, 8)))
    noise = torch.randn(4000, *posterior.mean.shape[1:], generator=torch.Generator().manual_seed(1))
    samples = posterior.sample(noise)
    torch.testing.assert_close(samples.mean(0, keepdim=True), posterior.mean, atol=0.08, rtol=0)
    torch.testing.assert_close(samples.std(0, keepdim=True), posterior.std, atol=0, rtol=0.08)


def test_uint8_and_float_are_inverse() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    frames = to_float(every)
    assert frames.min() == -1
    assert frames.max() == 1
    assert torch.equal(((frames + 1) * 127.5).round().byte().permute(0, 2, 3, 1), every)


def test_kl_is_the_closed_form() -> None:
    mean = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    log_variance = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    wanted = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(kl_divergence(mean, log_variance), wanted)


def test_the_loss_looks_at_edges() -> None:
    target = -torch.ones(1, 3, 16, 16)
    target[..., 8:] = 1  # one upright edge between columns 7 and 8
    near, far = target.clone(), target.clone()
    near[..., 7] += 0.5
    far[..., 1] += 0.5
    seen = edges(target)[0, 0]
    assert seen[:, 5:10].min() == 1
    assert seen[:, :5].max() == 0
    assert seen[:, 10:].max() == 0
    by_weight = {weight: AutoencoderLoss(edge_weight=weight) for weight in (1.0, 7.0)}
    plain = [by_weight[1.0].error(picture, target).item() for picture in (near, far)]
    assert plain[0] == pytest.approx(plain[1]) == pytest.approx(0.5 / 16)
    weighted = [by_weight[7.0].error(picture, target).item() for picture in (near, far)]
    assert weighted[0] / weighted[1] == pytest.approx(7)
    # A constant error costs the same whatever the weights: frames with many edges do not count more.
    assert by_weight[7.0].error(target + 0.5, target).item() == pytest.approx(0.5)


def test_the_loss_squares_what_it_is_told_to() -> None:
    target = torch.zeros(1, 3, 8, 8)
    assert AutoencoderLoss(square_weight=2.0).error(target - 0.5, target).item() == pytest.approx(0.5 + 2 * 0.25)


def test_crops_hold_an_edge_and_whole_cells() -> None:
    size, step = 16, 8
    frames = -torch.ones(1, 3, 64, 64)
    frames[..., 40:46, 21:27] = 1
    frames = torch.cat([frames, -torch.ones(1, 3, 64, 64)]).repeat_interleave(200, 0)
    # The frame's own place, to be read off the pieces.
    frames[:, 2] += 1e-3 * torch.arange(64.0)[:, None] / 64 + 1e-5 * torch.arange(64.0) / 64
    uniform = torch.rand(400, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pieces = crops(frames, size, step, uniform)
    assert pieces.shape == (400, 3, size, size)
    assert torch.equal(pieces, crops(frames, size, step, uniform))
    tiles = frames.unfold(2, size, step).unfold(3, size, step)  # [N,3,7,7,size,size], all that the rule allows
    same = (tiles == pieces[:, :, None, None]).all(dim=-1).all(dim=-1).all(dim=1)
    assert torch.equal(same.flatten(1).sum(1), torch.ones(400, dtype=torch.long))
    near = edges(frames)[:, 0].unfold(1, size, step).unfold(2, size, step).amax(dim=(-1, -2)) > 0.5
    assert (near & same)[:200].flatten(1).any(1).float().mean() > 0.95
    # Without an edge all corners come up.
    assert same[200:].any(0).float().mean() > 0.9


def test_crops_look_for_what_moves_before_a_ground_full_of_edges() -> None:
    size, times = 16, 8
    ground = ((torch.arange(64)[:, None] // 8 + torch.arange(64) // 8) % 2).float().expand(times, 3, 64, 64) - 0.5
    moving, still = ground.clone(), ground.clone()
    for time in range(times):
        moving[time, 0, 30:36, 8 + 6 * time : 14 + 6 * time] = 1
        still[time, 0, 30:36, 30:36] = 1
    found = {}
    for name, clip in (("moving", moving), ("still", still)):
        frames = clip.repeat(100, 1, 1, 1)
        uniform = torch.rand(len(frames), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        # Red is 1 in the object alone.
        found[name] = (crops(frames, size, 8, uniform, times)[:, 0] == 1).flatten(1).any(1).float().mean()
    assert found["moving"] > 2 * found["still"] > 0


def test_rms_norm_measures_each_position_alone() -> None:
    config = AutoencoderConfig(latent_channels=3, widths=(16, 16), norm="rms", attention=False)
    norm = config.make_norm(16)
    x = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), wanted)
    # No attention and no common norm: what is far away changes nothing.
    network = Autoencoder(config).eval()
    frames = torch.zeros(1, 3, 128, 128)
    other = frames.clone()
    other[..., 96:, 96:] = 1
    with torch.no_grad():
        one, two = (network.encode(picture).mean for picture in (frames, other))
    assert torch.equal(one[..., :8, :8], two[..., :8, :8])
    assert not torch.equal(one, two)


def test_rms_norm_is_refused_where_groups_are_meant() -> None:
    for more in ({"layout": "ldm"}, {"norm_groups": 4}):
        with pytest.raises(ValueError, match="norm"):
            AutoencoderConfig(widths=(16, 16), norm="rms", **more)


def test_the_loss_is_per_frame() -> None:
    target = torch.zeros(3, 3, 8, 8)
    made = target + torch.tensor([0.0, 0.1, 0.2])[:, None, None, None]
    torch.testing.assert_close(AutoencoderLoss().error(made, target), torch.tensor([0.0, 0.1, 0.2]))


def test_the_loss_is_that_of_latent_diffusion_over_the_values_of_a_frame() -> None:
    """Rombach et al.: |x - x'| summed over a picture, and 1e-6 of the divergence summed over its latent."""
    frames, made = (torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    mean, log_variance = torch.full((2, 4, 2, 3), 3.0), torch.full((2, 4, 2, 3), -2.0)
    theirs = (frames - made).abs().sum((1, 2, 3)) + 1e-6 * kl_divergence(mean, log_variance)
    loss = AutoencoderLoss()
    ours = loss.error(made, frames) + loss.divergence(kl_divergence(mean, log_variance), frames)
    torch.testing.assert_close(ours * frames[0].numel(), theirs)


def test_every_parameter_trains_and_a_picture_is_learned() -> None:
    network = make().train()
    frames = to_float(clips(1, 1, 8, 8).repeat_interleave(2, 0))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(len(losses)))
        reconstruction, mean, log_variance = network(frames, noise)
        loss = (AutoencoderLoss().error(reconstruction, frames) + 1e-6 * kl_divergence(mean, log_variance)).mean()
        optimizer.zero_grad()
        loss.backward()
        if not losses:
            still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
            assert not still
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
