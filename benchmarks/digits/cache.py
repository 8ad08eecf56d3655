"""What was computed once is kept, so that the command goes on where it was interrupted."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def digest(key: object) -> str:
    """Short name of everything that a result depends on, told by its repr."""
    return blake2b(repr(key).encode(), digest_size=6).hexdigest()


class Cache:
    """A folder of tensors. A key names the settings; code is not part of it: after changing that, delete the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def tensors(self, name: str, key: object, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` gave for this name and key, now or in an earlier run."""
        path = self.folder / f"{name}-{digest(key)}.safetensors"
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making it just now
            if path.exists():
                return load_file(path)
            start = time.perf_counter()
            made = {k: v.detach().contiguous() for k, v in make().items()}
            unfinished = path.with_suffix(".part")
            save_file(made, unfinished)
            unfinished.replace(path)
            print(f"  {name}: {time.perf_counter() - start:.1f} s", flush=True)
        return load_file(path)
