"""The perceptual distance: LPIPS's formula written down again, and files that are not what they should be."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from videodiff.errors import UserError
from videodiff.networks.perceptual import PerceptualConfig, VGGDistance, load_perceptual
from videodiff.parts import sha256

LAYERS = {0: 4, 2: 4, 5: 6, 7: 6, 10: 8, 12: 8, 14: 8, 17: 8, 19: 8, 21: 8, 24: 8, 26: 8, 28: 8}  # VGG16, narrow
ENDS = (2, 7, 14, 21, 28)


def vgg() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state, channels = {}, 3
    for number, width in LAYERS.items():
        state[f"features.{number}.weight"] = torch.randn(width, channels, 3, 3) / (3 * channels**0.5)
        state[f"features.{number}.bias"] = 0.1 * torch.randn(width)
        channels = width
    return state


def linear() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {f"lin{i}.model.1.weight": torch.rand(1, LAYERS[end], 1, 1) for i, end in enumerate(ENDS)}


def pictures(count: int = 2, size: int = 32) -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(2)
    return tuple(torch.rand(count, 3, size, size, generator=numbers) * 2 - 1 for _ in range(2))


def lpips(state: dict[str, Tensor], weights: dict[str, Tensor] | None, made: Tensor, real: Tensor) -> Tensor:
    """Zhang et al. 2018, eq. 1, on the layers of torchvision's VGG16, picture by picture."""
    modules: list[nn.Module] = []
    for number in range(30):
        if number in LAYERS:
            conv = nn.Conv2d(*reversed(state[f"features.{number}.weight"].shape[:2]), 3, padding=1)
            conv.weight.data, conv.bias.data = (state[f"features.{number}.{part}"] for part in ("weight", "bias"))
            modules.append(conv)
        else:
            modules.append(nn.MaxPool2d(2) if number in (4, 9, 16, 23) else nn.ReLU())

    def features(picture: Tensor) -> list[Tensor]:
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[..., None, None]
        x, found = (picture - shift) / scale, []
        for number, layer in enumerate(modules):
            x = layer(x)
            if number - 1 in ENDS:
                found.append(F.normalize(x, dim=0))
        return found

    def distance(one: Tensor, other: Tensor) -> Tensor:
        total = torch.zeros(())
        for block, (a, b) in enumerate(zip(features(one), features(other), strict=True)):
            squares = (a - b).square()
            if weights is not None:
                squares = squares * weights[f"lin{block}.model.1.weight"][0]
            total = total + squares.sum(0).mean()
        return total

    return torch.stack([distance(one, other) for one, other in zip(made, real, strict=True)])


@pytest.mark.parametrize("weights", [None, linear()], ids=["plain", "weighted"])
def test_it_is_the_published_formula(weights: dict[str, Tensor] | None) -> None:
    made, real = pictures()
    network = VGGDistance({**vgg(), **(weights or {})})
    with torch.no_grad():
        torch.testing.assert_close(network(made, real), lpips(vgg(), weights, made, real))


def test_equal_pictures_have_no_distance_and_gradients_are_finite() -> None:
    made, real = pictures()
    network = VGGDistance(vgg())
    assert not network(made, made).any()
    assert (network(made, real) > 0).all()
    assert network.state_dict().keys() == dict(network.named_buffers()).keys()  # nothing that would train
    black = torch.full((1, 3, 32, 32), -1.0, requires_grad=True)
    dead = {name: torch.zeros_like(value) for name, value in vgg().items()}  # no channel answers to anything
    VGGDistance(dead)(black, real[:1]).sum().backward()
    assert black.grad is not None
    assert black.grad.isfinite().all()


def test_files_of_each_kind_give_the_same(tmp_path: Path) -> None:
    made, real = pictures()
    wanted = VGGDistance({**vgg(), **linear()})(made, real)
    classifier = {"classifier.0.weight": torch.zeros(2, 2)}  # what torchvision's file holds besides
    save_file({**vgg(), **classifier}, tmp_path / "vgg.safetensors")
    torch.save({**vgg(), **linear()}, tmp_path / "both.pth")
    torch.save(linear(), tmp_path / "lin.pth")
    torch.jit.trace(VGGDistance({**vgg(), **linear()}), (made, real)).save(tmp_path / "script.pt")
    for settings in (
        {
            "path": "vgg.safetensors",
            "linear": str(tmp_path / "lin.pth"),
            "sha256": sha256(tmp_path / "vgg.safetensors"),
        },
        {"path": "both.pth"},
        {"path": "script.pt", "sha256": sha256(tmp_path / "script.pt").upper()},
    ):
        config = PerceptualConfig(**{**settings, "path": str(tmp_path / settings["path"])})
        network = load_perceptual(config, 32)
        torch.testing.assert_close(network(made, real), wanted)
        assert not any(parameter.requires_grad for parameter in network.parameters())


class _OneNumber(nn.Module):
    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        return (made - real).abs().mean()


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    names = ("vgg", "lin", "short", "narrow")
    vgg_file, lin_file, short, narrow = (tmp_path / f"{name}.safetensors" for name in names)
    save_file(vgg(), vgg_file)
    save_file(linear(), lin_file)
    save_file({name: value for name, value in vgg().items() if name != "features.28.bias"}, short)
    save_file({**vgg(), "features.5.weight": torch.zeros(6, 5, 3, 3)}, narrow)
    script, text, pickle = tmp_path / "script.pt", tmp_path / "text.pth", tmp_path / "pickle.pth"
    torch.jit.script(_OneNumber()).save(script)
    text.write_text("no weights")
    torch.save(nn.Linear(2, 2), pickle)  # a pickled module would run code
    for settings, problem in (
        ({"path": tmp_path / "none.pth"}, "perceptual.path: .* is no file"),
        ({"path": vgg_file, "linear": tmp_path / "none.pth"}, "perceptual.linear: .* is no file"),
        ({"path": vgg_file, "linear": vgg_file}, "perceptual.linear: .* holds no lin0"),
        ({"path": vgg_file, "sha256": "0" * 64}, "perceptual.sha256: .* not 0000"),
        ({"path": lin_file}, "holds no features.0.weight"),
        ({"path": short}, "holds no features.28.bias"),
        ({"path": narrow}, r"features.5.weight is \[6, 5, 3, 3\]"),
        ({"path": text}, "holds no named weights"),
        ({"path": pickle}, "holds no named weights"),
        ({"path": script}, "perceptual.sha256: missing"),
        ({"path": script, "sha256": sha256(script)}, r"gives \[\] for two pairs"),
    ):
        config = PerceptualConfig(**{key: str(value) for key, value in settings.items()})
        with pytest.raises(UserError, match=problem) as refused:
            load_perceptual(config, 32)
        assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(UserError, match="can't compare pictures of 8x8"):
        load_perceptual(PerceptualConfig(path=str(vgg_file)), 8)
