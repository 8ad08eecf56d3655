"""How much of everything: the sizes of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The whole benchmark. Chosen once for its length on two cores; the same for all that is compared."""

    num_steps: int = 1000  # T
    width: int = 16  # model_channels of the U-Nets of digits
    train_steps: int = 2500
    feature_steps: int = 1500  # of the two classifiers
    batch: int = 32
    learning_rate: float = 1e-3
    num_samples: int = 500  # as many as there are test digits, which they are compared with
    num_bounds: int = 100  # digits of each split whose likelihood is bounded
    num_inverted: int = 100
    resamples: int = 200
    step_counts: tuple[int, ...] = (5, 10, 20, 50, 100)  # S, and num_steps besides
    inversion_steps: tuple[int, ...] = (10, 20, 50, 100, 200, 500)  # likewise
    evaluations: tuple[int, ...] = (5, 10, 20, 50, 100, 200)  # budgets of the solvers
    guided_steps: int = 50
    classifier_scales: tuple[float, ...] = (0, 0.5, 1, 2, 4, 8, 16)
    free_scales: tuple[float, ...] = (0, 1, 1.5, 2, 3, 5, 8)  # code scales: 1 + w of the paper
    world_flops: float = 1.2e13  # of training each network of the built-in world, forward and backward
    world_batch: int = 32
    world_pictures: int = 4000
    world_samples: int = 200

    @property
    def sampler_steps(self) -> tuple[int, ...]:
        return (*(s for s in self.step_counts if s < self.num_steps), self.num_steps)


# Runs every line in seconds and measures nothing.
QUICK = Settings(
    num_steps=20,
    width=8,
    train_steps=3,
    feature_steps=20,
    batch=16,
    num_samples=20,
    num_bounds=4,
    num_inverted=4,
    resamples=5,
    step_counts=(5, 10),
    inversion_steps=(5, 10),
    evaluations=(5, 10),
    guided_steps=5,
    classifier_scales=(0, 4),
    free_scales=(0, 1, 3),
    world_flops=2e9,
    world_batch=2,
    world_pictures=4,
    world_samples=4,
)
