"""Which motion a measured path shows: each motion's model is fitted to it, and the one that explains it best is named.

A path is position, diameter and angle at known frames. Every model is linear in its unknowns (for circling, at each of
many rates), runs at a constant rate, and keeps constant what it doesn't move: so shuffled frames, jumps, mixtures and
objects that turn fit none of them.
"""

from __future__ import annotations

import numpy as np

POSITION_NOISE = 0.012  # of the frame side: deviations that a viewer doesn't notice
DIAMETER_NOISE = 0.04  # relative
ANGLE_NOISE = 6.0  # degrees
LIMIT = 3.0  # root mean square deviation, in units of the noise, past which a model doesn't explain a path
UNEXPLAINED = 0.15  # greatest share of the moving quantity's variance that a model may leave (a jump leaves 0.25)
LEAST_TRAVEL, LEAST_GROWTH, LEAST_ARC = 0.05, 0.07, 60.0
LEAST_SLANT = 1.7  # the longer way of a diagonal over the shorter one: 30 to 60 degrees
ORBIT_RANGE = (0.1, 0.32)  # radius in frame sides


def _unwrap(angle: np.ndarray, symmetry: float) -> np.ndarray:
    return np.unwrap(angle, period=symmetry) if symmetry else np.zeros_like(angle)


def _residual(columns: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares: (solution, values - fit)."""
    solution, *_ = np.linalg.lstsq(columns, values, rcond=None)
    return solution, values - columns @ solution


def _circle(time: np.ndarray, xy: np.ndarray) -> tuple[float, bool]:
    """(mean square deviation from the best orbit, whether its radius and arc are those of an orbit)."""
    best, valid = np.inf, False
    zero, one = np.zeros_like(time), np.ones_like(time)
    target = np.concatenate([xy[:, 0], xy[:, 1]])
    for arc in np.deg2rad(np.arange(LEAST_ARC, 400, 20)):
        for turn in (arc, -arc):
            cos, sin = np.cos(turn * time), np.sin(turn * time)
            columns = np.stack([np.r_[one, zero], np.r_[zero, one], np.r_[cos, sin], np.r_[-sin, cos]], 1)
            solution, rest = _residual(columns, target)
            deviation = float(np.mean(rest**2))
            if deviation < best:
                radius = float(np.hypot(solution[2], solution[3]))
                best, valid = deviation, ORBIT_RANGE[0] < radius < ORBIT_RANGE[1]
    return best, valid


def read_motion(path: np.ndarray, frames: np.ndarray, symmetry: float) -> tuple[str | None, float]:
    """(motion or None, confidence in 0..1) of a path [T,4] of x, y, diameter (frame sides) and angle (degrees) at the
    frame numbers [T]; `symmetry` is the angle after which the shape looks the same, 0 if it always does."""
    time = (frames - frames[0]) / max(1, frames[-1] - frames[0])
    line = np.stack([np.ones_like(time), time], 1)
    measured = np.stack(
        [
            path[:, 0] / POSITION_NOISE,
            path[:, 1] / POSITION_NOISE,
            np.log(path[:, 2]) / DIAMETER_NOISE,
            _unwrap(path[:, 3], symmetry) / ANGLE_NOISE,
        ],
        1,
    )
    constant = np.mean((measured - measured.mean(0)) ** 2, 0)  # x, y, diameter, angle that stay
    slope, rest = _residual(line, measured)
    moving = np.mean(rest**2, 0)  # ... that change at a constant rate
    # Growth is linear in the diameter itself, not in its logarithm.
    ratio = path[:, 2] / path[:, 2].mean()
    growth_fit, growth_rest = _residual(line, ratio)
    growth = growth_fit[1] / growth_fit[0]
    travel_x, travel_y = slope[1, 0] * POSITION_NOISE, slope[1, 1] * POSITION_NOISE
    is_diagonal = min(travel_x, -travel_y) > max(LEAST_TRAVEL, max(travel_x, -travel_y) / LEAST_SLANT)
    orbit, is_orbit = _circle(time, path[:, :2])

    still = float(constant.sum())
    candidates = (  # name, whether it is large enough, mean square of what moves: about its mean, about the model
        ("right" if travel_x > 0 else "left", abs(travel_x) > LEAST_TRAVEL, constant[0], moving[0]),
        ("down" if travel_y > 0 else "up", abs(travel_y) > LEAST_TRAVEL, constant[1], moving[1]),
        ("diagonal", is_diagonal, constant[0] + constant[1], moving[0] + moving[1]),
        ("growing", growth > LEAST_GROWTH, constant[2], np.mean((growth_rest / DIAMETER_NOISE) ** 2)),
        ("circling", is_orbit, constant[0] + constant[1], 2 * orbit / POSITION_NOISE**2),
    )
    deviations = {"still": still}
    for name, enough, before, after in candidates:
        if enough and after < UNEXPLAINED * before:
            deviations[name] = still - before + after
    scores = {name: float(np.sqrt(max(value, 0.0))) for name, value in deviations.items()}
    order = sorted(scores, key=lambda name: scores[name])
    best = scores[order[0]]
    if best >= LIMIT:
        return None, 0.0
    second = scores[order[1]] if len(order) > 1 else LIMIT
    return order[0], (1 - best / LIMIT) * min(1.0, 2 * (1 - best / max(second, 1e-9)))
