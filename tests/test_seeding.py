import numpy as np
import pytest
import torch

from videodiff.seeding import generator, normals, uniform, uniforms


def first_draws(*key: int | str) -> list[float]:
    return torch.rand(4, generator=generator(*key)).tolist()


def test_a_key_always_gives_the_same_draws() -> None:
    assert first_draws(3, "noise", 17) == first_draws(3, "noise", 17)
    assert first_draws(3, "noise", 17) == first_draws(np.int64(3), "noise", int(torch.tensor(17)))


def test_different_keys_give_different_draws() -> None:
    keys: list[tuple[int | str, ...]] = [(1, 23), (12, 3), (123,), ("1", 23), ("12", "3"), ("1", "23"), ("123",)]
    keys += [(), ("",), ("", ""), (-1,), (2**63,)]
    keys += [(0, purpose, n) for purpose in ("noise", "time") for n in range(500)]
    assert len({tuple(first_draws(*key)) for key in keys}) == len(keys)


def test_a_key_holds_no_fractions() -> None:
    with pytest.raises(TypeError):
        generator(7.5)  # type: ignore[arg-type]


def test_a_samples_noise_does_not_depend_on_its_batch() -> None:
    whole = normals((4, 3, 5), 7, "noise", torch.arange(6))
    assert whole.shape == (6, 4, 3, 5)
    assert whole.dtype == torch.float32
    for order in ([5], [2, 0], [4, 4, 1]):
        assert torch.equal(normals((4, 3, 5), 7, "noise", order), whole[order])
    assert torch.equal(uniforms(7, "time", [3, 1]), uniforms(7, "time", range(6))[[3, 1]])


def test_rows_are_the_draws_of_their_own_generators() -> None:
    for row, number in zip(normals((4, 3, 5), 7, "noise", [9, 2]), (9, 2), strict=True):
        assert torch.equal(row, torch.randn(4, 3, 5, generator=generator(7, "noise", number)))
    assert uniform(7, "time", 3) == float(uniforms(7, "time", [3])[0])


def test_samples_purposes_and_seeds_are_independent() -> None:
    families = [(seed, purpose) for seed in (0, 1) for purpose in ("noise", "posterior")]
    rows = torch.cat([normals((4096,), seed, purpose, range(4)) for seed, purpose in families])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / 4096**0.5


def test_draws_have_the_right_moments() -> None:
    z = normals((64,), 0, "noise", range(500)).double()
    assert abs(z.mean().item()) < 5 / z.numel() ** 0.5
    assert abs(z.var().item() - 1) < 5 * (2 / z.numel()) ** 0.5
    u = uniforms(0, "time", range(4000))
    assert u.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() < 1
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed by chance once in a thousand.
    distance = (u.sort().values - torch.arange(4000) / 4000).abs().max().item()
    assert distance < 1.95 / 4000**0.5


def test_no_samples_are_no_rows() -> None:
    assert normals((2, 3), 0, "noise", []).shape == (0, 2, 3)
    assert uniforms(0, "time", []).shape == (0,)
    assert uniforms(0, "time", [], (2, 3)).shape == (0, 2, 3)
    assert torch.equal(uniforms(7, "crop", [3, 1], (2, 3)), uniforms(7, "crop", range(6), (2, 3))[[3, 1]])
