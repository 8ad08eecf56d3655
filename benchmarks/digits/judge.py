"""What judges generated digits: Frechet distance, precision and recall in a classifier's features, and label accuracy.

N pictures, D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor, nn

from benchmarks.digits.data import CLASSES, Digits

NEIGHBOURS = 3  # of precision and recall
FEATURES = 32


@dataclass(frozen=True)
class Score:
    """A figure and its standard deviation under resampling.

    resampled: the figure of each resample, where all resampled alike: sample i of each starts from the same noise, and
    what they have in common doesn't blur their difference.
    """

    value: float
    deviation: float
    resampled: tuple[float, ...] = ()

    def __str__(self) -> str:
        # Two digits of the deviation, and the figure as far as they go.
        places = 3 if self.deviation <= 0 else max(0, 1 - math.floor(math.log10(self.deviation)))
        return f"{self.value:.{places}f} ± {self.deviation:.{places}f}"

    def below(self, other: Score) -> bool | None:
        """Whether this is the smaller one; None where two deviations of the difference don't tell."""
        deviation = (self.deviation**2 + other.deviation**2) ** 0.5
        if self.resampled and len(self.resampled) == len(other.resampled):
            deviation = float(np.std(np.subtract(self.resampled, other.resampled)))
        if abs(self.value - other.value) <= 2 * deviation:
            return None
        return self.value < other.value


def share(hits: Tensor) -> Score:
    """Of True in [N], or the mean of shares [N], whose deviation is smaller, if anything: it is the binomial's, with
    one hit and one miss more so that it is never 0."""
    n, p = len(hits), (float(hits.sum()) + 1) / (len(hits) + 2)
    return Score(float(hits.float().mean()), (p * (1 - p) / n) ** 0.5)


class FeatureNet(nn.Module):
    """A small convolutional classifier of clean digits; its penultimate layer are the features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, FEATURES),
            nn.ReLU(),
        )
        self.leave = nn.Linear(FEATURES, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """[N, 1, 1, 8, 8] -> [N, D]."""
        return self.body(x[:, :, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.features(x))


class Judge:
    """Compares with the test digits, which neither the generators nor the two classifiers were trained on."""

    def __init__(self, network: FeatureNet, digits: Digits, resamples: int) -> None:
        self.network, self.digits, self.resamples = network, digits, resamples
        # Distances are told in units of the spread of real digits: a classifier's features have no scale of their own.
        self.scale = 1.0
        self.scale = float(self._features(digits.test).var(0).sum()) ** -0.5
        self.real = self._features(digits.test)
        # Another kind of classifier than those that guide or give features; a support vector machine on pixels.
        self.machine = SVC().fit(digits.train.flatten(1).numpy(), digits.train_labels.numpy())

    def network_accuracy(self) -> Score:
        with torch.no_grad():
            said = self.network(self.digits.test).argmax(1)
        return share(said == self.digits.test_labels)

    def accuracy(self, pictures: Tensor, labels: Tensor) -> Score:
        """Share of pictures that the support vector machine reads as their labels."""
        said = torch.from_numpy(self.machine.predict(pictures.flatten(1).numpy()))
        return share(said == labels)

    def frechet(self, pictures: Tensor) -> Score:
        """Frechet distance of the features of pictures and of test digits; its deviation by resampling the former."""
        generated, real = self._features(pictures).numpy(), self.real.numpy()
        draws = np.random.default_rng(0).integers(len(generated), size=(self.resamples, len(generated)))
        resampled = tuple(frechet_distance(generated[draw], real) for draw in draws)
        return Score(frechet_distance(generated, real), float(np.std(resampled)), resampled)

    def precision(self, pictures: Tensor) -> Score:
        """Share of the pictures that lie among the test digits (Kynkaanniemi et al. 1904.06991, eq. 1-2)."""
        return share(among(self._features(pictures), self.real))

    def recall(self, pictures: Tensor) -> Score:
        """Share of the test digits that lie among the pictures: their diversity."""
        return share(among(self.real, self._features(pictures)))

    @torch.no_grad()
    def _features(self, pictures: Tensor) -> Tensor:
        return self.scale * self.network.features(pictures).double()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of the normal distributions with the moments of a and b [N, D] (FID's formula)."""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    # The trace of (cov_a cov_b)^1/2, through a product that is symmetric.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def among(points: Tensor, others: Tensor) -> Tensor:
    """Which of points [N, D] lie within the distance from one of `others` to its k-th neighbour, bool [N]."""
    radii = torch.cdist(others, others).kthvalue(NEIGHBOURS + 1, dim=1).values  # the nearest is itself
    return (torch.cdist(points, others) <= radii).any(1)
