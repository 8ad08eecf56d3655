"""Several text towers side by side: each gives tokens of its own to a cross-attention of its own (Girdhar et al. 2023).

Shapes: B captions, L tokens and D width of each tower, E width of the pooled vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from videodiff.batch import Condition
from videodiff.networks.t5 import T5Tower
from videodiff.networks.text import TextFeatures, TextTower


@dataclass(frozen=True)
class JointFeatures:
    """What each tower makes of the same captions, in the order of the towers. The first gives the pooled vector."""

    towers: tuple[TextFeatures, ...]

    @property
    def pooled(self) -> Tensor | None:
        return self.towers[0].pooled

    def condition(self, fps: Tensor) -> Condition:
        """The condition of these captions at fps [B], without known frames."""
        null: tuple[Tensor, ...] = ()
        if any(features.null is not None for features in self.towers):
            # Towers without tokens for no text have zeros, and then any mask will do: attention over equal tokens
            # gives the same whichever of them it sees.
            null = tuple(torch.zeros_like(f.tokens) if f.null is None else f.null for f in self.towers)
        return Condition(
            text=tuple(features.tokens for features in self.towers),
            text_mask=tuple(features.mask for features in self.towers),
            null_text=null,
            pooled=self.pooled,
            fps=fps,
        )


class TextTowers(nn.Module):
    """Frozen towers behind the one door of a single tower. widths: D of each; embed_dim: E of the first, or None."""

    def __init__(self, towers: Sequence[TextTower | T5Tower]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)
        self.widths = tuple(tower.width for tower in towers)
        self.embed_dim = towers[0].embed_dim

    def encode(self, captions: Sequence[str]) -> JointFeatures:
        """Features of the captions from every tower, each cutting what is too long for it."""
        return JointFeatures(tuple(tower.encode(captions) for tower in self.towers))  # type: ignore[operator]

    def lost_words(self, caption: str) -> list[str]:
        """The words at the end that at least one tower does not see."""
        return max((tower.lost_words(caption) for tower in self.towers), key=len)  # type: ignore[operator]

    def unknown_words(self, caption: str) -> list[str]:
        """The words that at least one tower was not trained on, each once."""
        return list(dict.fromkeys(word for t in self.towers for word in t.unknown_words(caption)))  # type: ignore[operator]
