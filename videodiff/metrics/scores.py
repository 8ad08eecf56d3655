"""Scores by classes and captions: inception score, CLIP score, retrieval recall; and how far raters agree.

Shapes: N pictures, M captions, D features, C classes or categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from videodiff.errors import UserError
from videodiff.metrics.samples import Features, blocks, matrix, refuse_few, two


def inception_score(probabilities: Features, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016), 1 to C.

    probabilities: [N,C], rows that sum to 1; splits are consecutive, so that samples in the order of their classes want
    shuffling before. Raises UserError for logits, and for fewer samples than splits.
    """
    if splits < 1:
        raise UserError(f"inception: splits={splits}; give at least 1")
    p = matrix(probabilities, "probabilities").double()
    if bool((p < 0).any()) or bool(((p.sum(1) - 1).abs() > 1e-3).any()):
        raise UserError("probabilities: some row is negative or doesn't sum to 1; give the softmax, not the logits")
    refuse_few("inception", len(p), "probabilities", splits)
    scores = []
    for part in torch.tensor_split(p, splits):
        marginal = part.mean(0)
        # xlogy is 0 at 0; a class that the split never shows has marginal 0, and p = 0 with it.
        divergence = (torch.xlogy(part, part) - torch.xlogy(part, marginal)).sum(1)
        scores.append(float(divergence.mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def clip_scores(pictures: Features, captions: Features) -> Tensor:
    """100 max(cos, 0) [N] float64 of each picture's features [N,D] with its caption's (Hessel et al. 2021).

    The paper's own weight is 2.5 rather than 100. UserError for other shapes, zeros, and what is not finite.
    """
    x, y = two(pictures, captions, ("pictures", "captions"))
    if len(x) != len(y):
        raise UserError(f"captions: {len(y)} of them for {len(x)} pictures; give one for each picture, in their order")
    return 100 * (_unit(x, "pictures") * _unit(y, "captions")).sum(1).clamp(min=0)


def retrieval_recall(
    pictures: Features,
    captions: Features,
    picture_of: Sequence[int] | None = None,
    ranks: Sequence[int] = (1, 5, 10),
    alike: Sequence[int] | None = None,
) -> dict[str, float]:
    """Shares "text_to_image_r1", "image_to_text_r1", ... of queries with a right answer among the first of their list.

    picture_of: for each caption the number of its picture, by default the caption's own number. A picture's query is
    right when any of its captions is in time. A wrong answer as near as the right one counts as nearer: features that
    are all alike find nothing. alike: for each picture a number, equal for those whose captions say the same: each is
    as right for the other's captions as for its own. Raises UserError for ranks that no list can miss, and pictures
    without a caption.
    """
    x, y = two(pictures, captions, ("pictures", "captions"))
    a, b = _unit(x, "pictures"), _unit(y, "captions")
    owner = torch.arange(len(b)) if picture_of is None else torch.as_tensor(list(picture_of), dtype=torch.int64)
    if len(owner) != len(b) or owner.unique().tolist() != list(range(len(a))):
        raise UserError(
            f"picture_of: {len(owner)} numbers for {len(b)} captions of {len(a)} pictures; give each caption the "
            f"number of its picture, 0 to {len(a) - 1}, and each picture a caption"
        )
    if not ranks or min(ranks) < 1:
        raise UserError(f"ranks {list(ranks)}: give whole numbers of at least 1")
    refuse_few("retrieval", len(a), "pictures", max(ranks))
    said = torch.arange(len(a)) if alike is None else torch.as_tensor(list(alike), dtype=torch.int64)
    if len(said) != len(a):
        raise UserError(f"alike: {len(said)} numbers for {len(a)} pictures; give one for each")
    said_by, said = said[owner].to(a.device), said.to(a.device)
    places = {"text_to_image": _places(b, a, said_by, said), "image_to_text": _places(a, b, said, said_by)}
    return {f"{way}_r{rank}": float((p < rank).double().mean()) for way, p in places.items() for rank in ranks}


def fleiss_kappa(counts: npt.NDArray[Any]) -> float:
    """Agreement of raters beyond chance (Fleiss 1971, eq. 8): 1 all agree, 0 as by chance.

    counts: whole numbers [N,C]: how many raters put item n into category c, the same number in all for each item.
    Raises UserError for other counts, and where all ratings are of one category, which leaves kappa undefined.
    """
    table = np.asarray(counts)
    if table.ndim != 2 or table.size == 0 or not np.issubdtype(table.dtype, np.integer) or table.min() < 0:
        raise UserError(f"counts: whole numbers [N,C] of at least 0 expected, not {table.dtype} {list(table.shape)}")
    raters = int(table[0].sum())
    if raters < 2 or (table.sum(1) != raters).any():
        raise UserError(
            f"counts: {sorted({int(n) for n in table.sum(1)})[:4]} raters an item; kappa needs the same number of at "
            "least 2 for each: leave items with missing ratings out"
        )
    shares = table.sum(0) / table.sum()
    chance = float((shares**2).sum())
    if np.count_nonzero(table.sum(0)) == 1:
        raise UserError("counts: all ratings are of one category, so kappa is not defined; report the shares instead")
    seen = float(((table.astype(np.float64) ** 2).sum(1) - raters).mean() / (raters * (raters - 1)))
    return (seen - chance) / (1 - chance)


def _places(queries: Tensor, answers: Tensor, asked: Tensor, owned: Tensor) -> Tensor:
    """For each query, how many wrong answers come before its best right one. asked and owned: numbers that are equal
    where an answer is right."""
    found = []
    for start, rows in blocks(queries, len(answers)):
        near = rows @ answers.T
        right = asked[start : start + len(rows), None] == owned
        best = near.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        found.append(((near >= best - 1e-12) & ~right).sum(1))
    return torch.cat(found)


def _unit(x: Tensor, what: str) -> Tensor:
    if not bool(x.any(1).all()):
        raise UserError(f"{what}: features of zeros have no direction; leave such samples out and count them")
    return torch.nn.functional.normalize(x.double(), dim=1)
