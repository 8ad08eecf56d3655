"""Pictures against pictures (PSNR, SSIM), and what a picture looks like: light, colour, blackness, sharpness.

Shapes: N pictures uint8 [N,H,W,3]; every figure is given for each picture, as float64 [N].
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from videodiff.errors import UserError
from videodiff.metrics.samples import Floats, Pictures, pictures_of

EQUAL_DB = 99.0  # PSNR of equal pictures, so that means stay finite
WINDOW, SPREAD = 11, 1.5  # pixels of SSIM's window, and the standard deviation of its weights
_DARK = 24  # grey levels: what is darker in all channels is black in a video's limited range
_LUMA = np.array([0.299, 0.587, 0.114])  # Rec. 601


def psnr(pictures: Pictures, truth: Pictures) -> Floats:
    """Peak signal-to-noise ratios [N] in dB, EQUAL_DB at most. UserError for other shapes."""
    a, b = _two(pictures, truth)
    return np.array([clip_psnr(x, y) for x, y in zip(a, b, strict=True)])


def clip_psnr(a: np.ndarray, b: np.ndarray) -> float:
    """The ratio of all values of two uint8 arrays of one shape together, in dB; EQUAL_DB at most."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return EQUAL_DB if error == 0 else min(EQUAL_DB, 10 * math.log10(255**2 / error))


def ssim(pictures: Pictures, truth: Pictures) -> Floats:
    """Structural similarities [N], at most 1 (Wang et al. 2004, eq. 13), each a mean over windows and channels.

    Windows lie wholly within the picture, as in the paper; libraries that pad the picture first differ a little at
    its edges. UserError for other shapes, and pictures smaller than a window of 11 pixels.
    """
    a, b = _two(pictures, truth)
    if min(a.shape[1:3]) < WINDOW:
        raise UserError(f"ssim: pictures of {a.shape[2]}x{a.shape[1]} pixels; its window needs {WINDOW} each way")
    return np.array([_ssim(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(a, b, strict=True)])


def _ssim(x: Floats, y: Floats) -> float:
    C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mu_x, mu_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mu_x**2, _blurred(y * y) - mu_y**2
    covariance = _blurred(x * y) - mu_x * mu_y
    light = (2 * mu_x * mu_y + C1) / (mu_x**2 + mu_y**2 + C1)
    return float(np.mean(light * (2 * covariance + C2) / (var_x + var_y + C2)))


def _blurred(x: Floats) -> Floats:
    """Gaussian means over all whole windows: [H,W,3] to [H-10,W-10,3]."""
    weights = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SPREAD) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        size = x.shape[axis] - WINDOW + 1
        x = sum(w * x.take(range(i, i + size), axis) for i, w in enumerate(weights))
    return x


def looks(pictures: Pictures) -> dict[str, Floats]:
    """What pictures look like, name -> [N]; a set's means and deviations beside those of real pictures tell a shift.

    brightness, contrast: mean and standard deviation of the luma, 0 to 1. saturation: mean of HSV's, 0 to 1.
    colourfulness: in grey levels (Hasler and Suesstrunk 2003, M3). red, green, blue: means, 0 to 1. black: share of
    pixels without light. sharpness: variance of the luma's Laplacian, in grey levels squared. UserError for pictures
    smaller than 3 pixels.
    """
    x = pictures_of(pictures, "pictures")
    if min(x.shape[1:3]) < 3:
        raise UserError(f"looks: pictures of {x.shape[2]}x{x.shape[1]} pixels; sharpness needs 3 each way")
    rows = [_looks(picture) for picture in x]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _looks(picture: npt.NDArray[np.uint8]) -> dict[str, Any]:
    x = picture.astype(np.float64)
    luma, greatest, least = x @ _LUMA, x.max(-1), x.min(-1)
    means = x.mean((0, 1)) / 255
    across, yellow = x[..., 0] - x[..., 1], (x[..., 0] + x[..., 1]) / 2 - x[..., 2]
    inner = luma[1:-1, 1:-1]
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * inner
    return {
        "brightness": luma.mean() / 255,
        "contrast": luma.std() / 255,
        "saturation": np.mean((greatest - least) / np.maximum(greatest, 1)),
        "colourfulness": np.hypot(across.std(), yellow.std()) + 0.3 * np.hypot(across.mean(), yellow.mean()),
        "red": means[0],
        "green": means[1],
        "blue": means[2],
        "black": np.mean(greatest < _DARK),
        "sharpness": laplacian.var(),
    }


def _two(pictures: Pictures, truth: Pictures) -> tuple[Pictures, Pictures]:
    a, b = pictures_of(pictures, "pictures"), pictures_of(truth, "truth")
    if a.shape != b.shape:
        raise UserError(f"truth: {list(b.shape)}, but pictures are {list(a.shape)}; give the same number and size")
    return a, b
