"""What a loader yields and what a network is told.

B batch, C latent channels, T frames, H W height and width (pixels in a VideoBatch, latents in a Condition),
L tokens, D width of a text tower, E width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

OptionalTensor = TypeVar("OptionalTensor", Tensor, Tensor | None)


@dataclass(frozen=True)
class Encoded:
    """What a model's frozen encoders made of a batch beforehand: posteriors of its clips, features of its captions.

    In half precision as they are stored: what a step computes with, it makes float32 of on its own device.
    """

    mean: Tensor  # [B, C, T, H, W] in latents
    std: Tensor  # the posterior's standard deviation, of the same shape
    text: tuple[Tensor, ...]  # one [B, L, D] for each text tower
    text_mask: tuple[Tensor, ...]  # bool [B, L] for each
    pooled: Tensor | None  # [B, E]

    def __getitem__(self, rows: slice) -> Encoded:
        """Some of the samples."""
        text, mask = (tuple(x[rows] for x in towers) for towers in (self.text, self.text_mask))
        return Encoded(self.mean[rows], self.std[rows], text, mask, None if self.pooled is None else self.pooled[rows])


@dataclass(frozen=True)
class VideoBatch:
    """Decoded clips in the order of the run.

    `numbers` are positions in the run's endless sequence of samples: they alone decide noise, noise level and dropout
    of a sample. `weight` is 0 for a clip that could not be decoded: it keeps its slot and adds nothing to the loss.
    """

    frames: Tensor  # uint8 [B, T, H, W, 3]
    captions: tuple[str, ...]
    fps: Tensor  # float32 [B], frames per second
    numbers: Tensor  # int64 [B]
    keys: tuple[str, ...]  # names of the samples in their shards
    weight: Tensor  # float32 [B]
    paraphrases: tuple[str, ...] = ()  # of each sample another of its captions, or its only one again
    negatives: tuple[str, ...] = ()  # of each sample a caption that is wrong about it, "" where none is told
    labels: tuple[str, ...] = ()  # of each sample what its JSON says at `data.label`, where the data names one
    encoded: Encoded | None = None  # of encoded shards, whose frames are not known: [B, T, 0, 0, 3]

    def __len__(self) -> int:
        return self.frames.shape[0]

    def select(self, rows: slice) -> VideoBatch:
        """Some of the samples."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[rows] for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class Condition:
    """All that a network is told besides the noisy latents and their noise level. Absent parts are () or None.

    The null value of a part, used for dropout in training and for guidance in sampling alike: text is zeros with a
    mask that keeps the first token (attention needs one), or `null_text` with the mask as it is (Stable Diffusion's
    empty caption); pooled text is zeros; the image is `known` and `known_mask` all zeros. The frame rate and the hint
    are never dropped.
    """

    text: tuple[Tensor, ...] = ()  # one [B, L, D] for each text tower
    text_mask: tuple[Tensor, ...] = ()  # bool [B, L] for each, True for tokens to attend to
    pooled: Tensor | None = None  # [B, E]
    known: Tensor | None = None  # [B, C, T, H, W] latents of the known frames, 0 elsewhere
    known_mask: Tensor | None = None  # [B, 1, T, H, W], 1 on known frames
    fps: Tensor | None = None  # [B], frames per second
    hint: Tensor | None = None  # [B, 1, H, W] in pixels, in [0, 1]: what a ControlNet follows
    null_text: tuple[Tensor, ...] = ()  # one [B, L, D] for each text tower, tokens that stand for no text; () for zeros

    @property
    def has_text(self) -> bool:
        return bool(self.text) or self.pooled is not None

    @property
    def has_image(self) -> bool:
        """Whether any frame is known; looks into the mask, so it waits for the device."""
        return self.known_mask is not None and bool(self.known_mask.any())

    def without(self, *parts: Literal["text", "image"]) -> Condition:
        """The same condition with the named parts at their null value for every sample."""
        unknown = set(parts) - {"text", "image"}
        if unknown:
            raise ValueError(f"a condition has the parts 'text' and 'image', not {sorted(unknown)}")
        everything = torch.ones(1, dtype=torch.bool)
        return self.drop(everything & ("text" in parts), everything & ("image" in parts))

    def drop(self, text: Tensor, image: Tensor) -> Condition:
        """The parts of single samples at their null value: `text` and `image` are bool [B], True where dropped."""
        null_text = self.null_text or tuple(torch.zeros_like(tokens) for tokens in self.text)
        masks = self.text_mask
        if not self.null_text:
            first_token = [torch.arange(mask.shape[1], device=mask.device) == 0 for mask in masks]
            masks = tuple(
                torch.where(text.to(mask.device)[:, None], first, mask)
                for mask, first in zip(masks, first_token, strict=True)
            )
        return replace(
            self,
            text=tuple(_choose(tokens, null, text) for tokens, null in zip(self.text, null_text, strict=True)),
            text_mask=masks,
            pooled=_zero(self.pooled, text),
            known=_zero(self.known, image),
            known_mask=_zero(self.known_mask, image),
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """On another device; tokens, pooled text, known latents, their mask and the hint in `dtype`.

        Masks stay bool; `fps` keeps its own dtype, because bfloat16 cannot tell 29.97 from 30.
        """
        moved = self._map(lambda x: x.to(device=device))
        given = ("pooled", "known", "known_mask", "hint")
        return replace(
            moved,
            text=tuple(tokens.to(dtype=dtype) for tokens in moved.text),
            null_text=tuple(tokens.to(dtype=dtype) for tokens in moved.null_text),
            **{name: x.to(dtype=dtype) for name in given if (x := getattr(moved, name)) is not None},
        )

    def select(self, index: slice | Sequence[int] | Tensor) -> Condition:
        """Some of the samples, in the order of `index`."""
        return self._map(lambda x: x[index])

    @staticmethod
    def stack(conditions: Sequence[Condition]) -> Condition:
        """One condition out of several, along B. They must have the same parts in the same shapes (ValueError)."""
        first, *_ = conditions

        def joined(name: str) -> Tensor | tuple[Tensor, ...] | None:
            values = [getattr(c, name) for c in conditions]
            if isinstance(values[0], tuple):
                return tuple(torch.cat(tower) for tower in zip(*values, strict=True))
            if any((v is None) != (values[0] is None) for v in values):
                raise ValueError(f"conditions with and without {name!r} cannot be stacked: give all of them one")
            return None if values[0] is None else torch.cat(values)

        return replace(first, **{field.name: joined(field.name) for field in fields(Condition)})  # type: ignore[arg-type]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        def mapped(value: Tensor | tuple[Tensor, ...] | None) -> Tensor | tuple[Tensor, ...] | None:
            if isinstance(value, tuple):
                return tuple(function(x) for x in value)
            return None if value is None else function(value)

        return replace(self, **{field.name: mapped(getattr(self, field.name)) for field in fields(self)})  # type: ignore[arg-type]


def _zero(x: OptionalTensor, dropped: Tensor) -> OptionalTensor:
    """`x` [B, ...] with zeros where `dropped` [B] (or [1]) holds."""
    return x if x is None else _choose(x, torch.zeros_like(x), dropped)


def _choose(x: Tensor, null: Tensor, dropped: Tensor) -> Tensor:
    """`null` where `dropped` [B] (or [1]) holds, else `x`, both [B, ...]; NaN goes too, which a product would keep."""
    return torch.where(dropped.to(x.device).view(-1, *[1] * (x.dim() - 1)), null, x)
