import math

import pytest
import torch
from torch import Tensor

from videodiff.config import build, to_dict
from videodiff.diffusion.guidance import ClassifierGuidance, class_log_prob, classifier_loss
from videodiff.diffusion.prediction import Estimate
from videodiff.diffusion.schedule import NoiseSchedule
from videodiff.errors import UserError
from videodiff.networks.classifier import ClassifierConfig, NoisyClassifier
from videodiff.networks.unet import TemporalConfig, UNetConfig
from videodiff.seeding import normals

ZERO = NoiseSchedule(zero_terminal_snr=True)
SMALL = {"channels": 3, "model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "head_channels": 8}
CONFIG = ClassifierConfig(encoder=UNetConfig(**SMALL, attention_levels=(False, True)), num_classes=5)


def awake(network: NoisyClassifier) -> NoisyClassifier:
    """With random numbers in place of the zeros at the end of each branch, through which no input shows."""
    with torch.no_grad():
        for i, (_, parameter) in enumerate(sorted(network.named_parameters())):
            if not parameter.any():
                parameter.copy_(0.2 * normals(parameter.shape, 0, "awake", [i])[0])
    return network.eval()


def clip(frames: int = 4, clips: int = 2) -> Tensor:
    return normals((3, frames, 8, 8), 0, "clip", range(clips))


@pytest.mark.parametrize("pooling", ["attention", "mean"])
@pytest.mark.parametrize("frames", [1, 4])
def test_logits_of_images_and_clips(pooling: str, frames: int) -> None:
    network = NoisyClassifier(CONFIG.model_copy(update={"pooling": pooling}))
    time = torch.tensor([3.0, 900.0])
    assert torch.equal(network(clip(frames), time), torch.zeros(2, 5))  # all classes are equally likely at first
    logits = awake(network)(clip(frames), time)
    assert logits.shape == (2, 5)
    assert logits.std() > 0.01
    torch.testing.assert_close(network(clip(frames)[1:], time[1:]), logits[1:])
    assert not torch.allclose(network(clip(frames), time.flip(0)), logits)


def test_pooling_is_obeyed_and_nothing_is_left_of_the_decoder() -> None:
    by_attention = NoisyClassifier(CONFIG)
    by_mean = NoisyClassifier(CONFIG.model_copy(update={"pooling": "mean"}))
    assert {n.split(".")[0] for n in set(by_attention.state_dict()) ^ set(by_mean.state_dict())} == {"pool"}
    assert not any(name.startswith(("encoder.up", "encoder.conv_out")) for name in by_mean.state_dict())
    by_mean.load_state_dict(awake(by_attention).state_dict(), strict=False)
    time = torch.zeros(2)
    assert not torch.allclose(by_mean(clip(), time), by_attention(clip(), time))


@pytest.mark.parametrize("temporal", [False, True])
def test_the_order_of_frames_needs_temporal_layers(temporal: bool) -> None:
    encoder = UNetConfig(**SMALL, attention_levels=(False, True), temporal=TemporalConfig() if temporal else None)
    network = awake(NoisyClassifier(ClassifierConfig(encoder=encoder, num_classes=2)))
    forwards, backwards = (network(x, torch.zeros(2)) for x in (clip(), clip().flip(2)))
    assert torch.allclose(forwards, backwards, atol=1e-5) == (not temporal)


def test_half_precision_gives_float32_logits() -> None:
    network = awake(NoisyClassifier(CONFIG)).requires_grad_(False)
    exact = network(clip(), torch.zeros(2))
    logits = network.bfloat16()(clip(), torch.zeros(2))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact, rtol=0, atol=0.05 * float(exact.abs().max()))


def test_it_learns_and_guides() -> None:
    # Two classes, bright and dark: after a few steps it tells them at little noise, and its gradient leads towards the
    # class that is asked for.
    torch.manual_seed(0)
    encoder = UNetConfig(channels=1, model_channels=8, channel_mult=(1,), num_res_blocks=1, attention_levels=(False,),
                         head_channels=8)  # fmt: skip
    network = NoisyClassifier(ClassifierConfig(encoder=encoder, num_classes=2, pooling="mean"))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    first = 0.0
    for step in range(40):
        numbers = torch.arange(32) + 32 * step
        labels = numbers % 2
        x0 = (2.0 * labels - 1).view(-1, 1, 1, 1, 1).expand(-1, 1, 1, 4, 4)
        loss = classifier_loss(network, x0, labels, ZERO, 0, numbers).mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert loss.item() < 0.6 * first
    network.eval().requires_grad_(False)
    sign = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1, 1).expand(2, 1, 1, 4, 4)
    assert network(sign, torch.zeros(2)).argmax(1).tolist() == [0, 1]

    def denoise(x_t: Tensor, t: Tensor) -> Estimate:
        return Estimate(x_t, x_t)

    guided = ClassifierGuidance()(denoise, class_log_prob(network, [1, 0]))
    with torch.no_grad():
        shift = guided(torch.zeros(2, 1, 1, 4, 4), torch.tensor([300, 300])).shift
    assert shift is not None
    assert shift[0].mean() > 0 > shift[1].mean()


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"context_dims": (8,)}, "encoder.context_dims is set"),
        ({"pooled_dim": 8}, "encoder.pooled_dim is set"),
        ({"known_channels": True}, "encoder.known_channels is set"),
        ({"learn_variance": True}, "encoder.learn_variance is set"),
        ({"temporal": {"fps": True}}, "encoder.temporal.fps is set"),
        ({"head_channels": 7, "attention_levels": (False, False)}, "head_channels 7"),
    ],
)
def test_impossible_classifiers_are_refused(encoder: dict[str, object], message: str) -> None:
    whole = {**SMALL, "attention_levels": (False, True), **encoder}
    with pytest.raises(UserError, match=message):
        build(ClassifierConfig, {"encoder": whole, "num_classes": 2}, "here")


def test_one_class_is_refused_and_a_wrong_input_named() -> None:
    with pytest.raises(UserError, match="num_classes"):
        build(ClassifierConfig, {"encoder": to_dict(CONFIG.encoder), "num_classes": 1}, "here")
    with pytest.raises(ValueError, match=r"the network takes \[B,3,T,H,W\]"):
        NoisyClassifier(CONFIG)(torch.zeros(2, 4, 1, 8, 8), torch.zeros(2))


def test_a_classifier_is_its_configuration() -> None:
    assert build(ClassifierConfig, to_dict(CONFIG), "here") == CONFIG
