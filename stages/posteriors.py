"""What the autoencoder makes of clips, kept: a frame is encoded once, in whatever windows it comes.

Shapes: B clips, T frames, H W pixels, C latent channels, h w latent size.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

import torch
from torch import Tensor

from videodiff.networks.autoencoder import Autoencoder

HASHERS, POOLED_BYTES = 8, 1 << 16  # threads that hash frames, for frames worth handing over


class PosteriorCache:
    """The autoencoder's posteriors of frames, encoded once each and found again by their pixels: whatever windows of a
    clip are drawn, its frames are the same.

    Exact: a frame is encoded in a group of fixed size, so that its latents do not depend on the batch it is met in.
    """

    def __init__(self, autoencoder: Autoencoder, bytes_left: int) -> None:
        self.autoencoder, self.bytes_left = autoencoder, bytes_left
        self.known: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._pool = ThreadPoolExecutor(HASHERS)

    def __call__(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B,C,T,h,w] float32 of uint8 clips [B,T,H,W,3]."""
        flat = frames.flatten(0, 1)
        keys = list((self._pool.map if flat[0].nbytes > POOLED_BYTES else map)(_digest, flat))
        found = {key: self.known[key] for key in keys if key in self.known}
        missing = [(key, frame) for key, frame in dict(zip(keys, flat, strict=True)).items() if key not in found]
        size = self.autoencoder.config.chunk
        for start in range(0, len(missing), size):
            group = missing[start : start + size]
            whole = [frame for _, frame in group] + [group[-1][1]] * (size - len(group))
            for (key, _), posterior in zip(group, self._encode(whole), strict=False):
                found[key] = posterior
                self._keep(key, posterior)
        parts = zip(*(found[key] for key in keys), strict=True)
        mean, std = (torch.stack(part).unflatten(0, frames.shape[:2]).transpose(1, 2).contiguous() for part in parts)
        return mean, std

    @torch.no_grad()
    def _encode(self, frames: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Of frames [H,W,3], as if they were a clip's."""
        clip = torch.stack(frames)[None].to(next(self.autoencoder.parameters()).device)
        posterior = self.autoencoder.encode_clip(clip)
        return list(zip(posterior.mean[0].unbind(1), posterior.std[0].unbind(1), strict=True))

    def _keep(self, key: bytes, posterior: tuple[Tensor, Tensor]) -> None:
        size = sum(part.nbytes for part in posterior)
        if size <= self.bytes_left:
            self.known[key] = (posterior[0].clone(), posterior[1].clone())  # alone, not with its whole group
            self.bytes_left -= size


def _digest(frame: Tensor) -> bytes:
    return blake2b(frame.contiguous().numpy().data, digest_size=16, key=str(tuple(frame.shape)).encode()).digest()
