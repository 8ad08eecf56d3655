"""Random numbers that follow from names, not from history.

Every draw is keyed by what it is for, e.g. (seed, "noise", sample number): a sample meets the same noise whatever
its batch, rank or worker, and a resumed run needs no generator state.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from operator import index

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on `key` alone; (1, "2") and (12,) and ("1", 2) are three different keys.

    The key is hashed to 64 bits. Torch's CPU generator keeps the lower 32 of them, so that among n keys about
    n^2 / 2^33 pairs share their draws: of no statistical weight, but not a guarantee of uniqueness.
    """
    # With its length before each text, no two keys run together; index() refuses a float, which int() would cut.
    text = "".join(f"s{len(part)}:{part}" if isinstance(part, str) else f"i{index(part)};" for part in key)
    seed = int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
    return torch.Generator().manual_seed(seed)


def normals(shape_one: Sequence[int], seed: int, purpose: str, numbers: Iterable[int] | Tensor) -> Tensor:
    """Standard normals [B, *shape_one] float32 on the CPU; row i is drawn from generator(seed, purpose, numbers[i])."""
    rows = [torch.randn(tuple(shape_one), generator=generator(seed, purpose, n)) for n in _integers(numbers)]
    return torch.stack(rows) if rows else torch.empty(0, *shape_one)


def uniforms(seed: int, purpose: str, numbers: Iterable[int] | Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform float64 [B, *shape] in [0, 1) on the CPU; row i comes from generator(seed, purpose, numbers[i])."""
    rows = [torch.rand(shape, generator=generator(seed, purpose, n), dtype=torch.float64) for n in _integers(numbers)]
    return torch.stack(rows) if rows else torch.empty(0, *shape, dtype=torch.float64)


def _integers(numbers: Iterable[int] | Tensor) -> list[int]:
    return [int(n) for n in (numbers.tolist() if isinstance(numbers, Tensor) else numbers)]
