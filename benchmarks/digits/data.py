"""scikit-learn's handwritten digits: 1,797 scans of 8x8 pixels with 17 grey levels, in a fixed split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from videodiff.batch import Condition
from videodiff.seeding import generator

LEVELS = 17
CLASSES = 10
NUM_TEST = 500


@dataclass(frozen=True)
class Digits:
    """Pictures float32 [N, 1, 1, 8, 8] in [-1, 1], labels int64 [N]."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load() -> Digits:
    """The split is drawn once for all; writers aren't told apart in the data, so one may be in both halves."""
    bunch = load_digits()
    pictures = torch.from_numpy(bunch.images).float()[:, None, None] / ((LEVELS - 1) / 2) - 1
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=generator("digits", "split"))
    test, train = order[:NUM_TEST], order[NUM_TEST:]
    return Digits(pictures[train], labels[train], pictures[test], labels[test])


def to_grid(pictures: Tensor) -> Tensor:
    """Generated pictures on the grey levels that the data has."""
    half = (LEVELS - 1) / 2
    return (pictures.clamp(-1, 1) * half).round() / half


def told(labels: Tensor) -> Condition:
    """A network is told a digit as pooled text: one-hot, zeros for none."""
    return Condition(pooled=F.one_hot(labels, CLASSES).float())
