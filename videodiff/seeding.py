"""Random numbers that follow from names, not from history.

Every draw is keyed by what it is for, e.g. (seed, "noise", sample number): a sample meets the same noise whatever
its batch, rank or worker, and a resumed run needs no generator state.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from operator import index

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on `key` alone; (1, "2") and (12,) and ("1", 2) are three different keys.

    The key is hashed to 64 bits. Torch's CPU generator keeps the lower 32 of them, so that among n keys about
    n^2 / 2^33 pairs share their draws: of no statistical weight, but not a guarantee of uniqueness.
    """
    return torch.Generator().manual_seed(_number(_hashed(*key)))


def normals(shape_one: Sequence[int], seed: int, purpose: str, numbers: Iterable[int] | Tensor) -> Tensor:
    """Standard normals [B, *shape_one] float32 on the CPU; row i is drawn from generator(seed, purpose, numbers[i])."""
    shape = tuple(shape_one)
    rows = [torch.randn(shape, generator=own) for own in _each(seed, purpose, numbers)]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def uniforms(seed: int, purpose: str, numbers: Iterable[int] | Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform float64 [B, *shape] in [0, 1) on the CPU; row i comes from generator(seed, purpose, numbers[i])."""
    rows = [torch.rand(shape, generator=own, dtype=torch.float64) for own in _each(seed, purpose, numbers)]
    return torch.stack(rows) if rows else torch.empty(0, *shape, dtype=torch.float64)


def uniform(seed: int, purpose: str, number: int) -> float:
    """One uniform number in [0, 1) from generator(seed, purpose, number)."""
    return torch.rand((), generator=generator(seed, purpose, number), dtype=torch.float64).item()


def _each(seed: int, purpose: str, numbers: Iterable[int] | Tensor) -> Iterator[torch.Generator]:
    """generator(seed, purpose, n) of each number, to be used up before the next is asked for.

    One object that is seeded anew, and one beginning of the key's hash: every training step draws a few numbers for
    each of its samples, and in a small network's step on a GPU that is what takes the time.
    """
    before, own = _hashed(seed, purpose), torch.Generator()
    for number in numbers.tolist() if isinstance(numbers, Tensor) else numbers:
        hashed = before.copy()
        hashed.update(_spelled(int(number)))
        yield own.manual_seed(_number(hashed))


def _hashed(*key: int | str) -> "hashlib.blake2b":
    return hashlib.blake2b(b"".join(map(_spelled, key)), digest_size=8)


def _spelled(part: int | str) -> bytes:
    """With its length before each text, no two keys run together; index() refuses a float, which int() would cut."""
    if isinstance(part, str):
        return f"s{len(part)}:{part}".encode(errors="surrogatepass")
    return f"i{index(part)};".encode()


def _number(hashed: "hashlib.blake2b") -> int:
    return int.from_bytes(hashed.digest(), "little")
