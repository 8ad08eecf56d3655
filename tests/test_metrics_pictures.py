"""PSNR and SSIM against closed forms and torchmetrics; the looks of pictures that were drawn to have them."""

import math

import numpy as np
import pytest
import torch

from tests.metric_peers import disc, peer
from videodiff.errors import UserError
from videodiff.metrics.pictures import EQUAL_DB, looks, psnr, ssim


def noisy(picture: np.ndarray, deviation: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, deviation, picture.shape)
    return (picture + noise).clip(0, 255).astype(np.uint8)


def full(*colour: int) -> np.ndarray:
    return np.full((1, 16, 16, 3), colour, np.uint8)


TRUTH = np.stack([disc(20, 30), disc(40, 25), disc(30, 30)])
OTHER = np.stack([noisy(TRUTH[0], 5), noisy(TRUTH[1], 40), TRUTH[2]])


def test_psnr_of_a_known_error() -> None:
    assert psnr(full(100, 100, 100), full(110, 100, 100)).tolist() == pytest.approx([10 * math.log10(255**2 * 3 / 100)])
    assert psnr(full(0, 0, 0), full(255, 255, 255)) == pytest.approx([0])
    assert psnr(TRUTH, TRUTH).tolist() == [EQUAL_DB] * 3


def test_psnr_and_ssim_are_torchmetrics_for_each_picture() -> None:
    peers = peer("functional.image")
    a, b = (torch.from_numpy(x).permute(0, 3, 1, 2).double() for x in (OTHER, TRUTH))
    theirs = peers.peak_signal_noise_ratio(a[:2], b[:2], 255.0, reduction="none", dim=(1, 2, 3))
    assert psnr(OTHER, TRUTH)[:2] == pytest.approx(theirs.numpy(), rel=1e-6)
    _, maps = peers.structural_similarity_index_measure(a, b, data_range=255.0, return_full_image=True)
    inner = maps[:, :, 5:-5, 5:-5].mean(
        (1, 2, 3)
    )  # they pad first; windows that lie within the picture are the paper's
    assert ssim(OTHER, TRUTH) == pytest.approx(inner.numpy(), rel=1e-9)


def test_ssim_of_even_pictures_is_the_formula_and_order_of_faults_is_kept() -> None:
    C1 = (0.01 * 255) ** 2
    light = (2 * 100 * 150 + C1) / (100**2 + 150**2 + C1)
    assert ssim(full(100, 100, 100), full(150, 150, 150)) == pytest.approx([light])
    found = ssim(OTHER, TRUTH)
    assert found[2] == pytest.approx(1)
    assert found[1] < found[0] < 1
    assert ssim(TRUTH, OTHER) == pytest.approx(found)


def test_looks_of_plain_colours() -> None:
    pictures = np.concatenate(
        [full(255, 0, 0), full(128, 128, 128), full(0, 0, 0), full(10, 23, 5), full(255, 255, 255)]
    )
    found = looks(pictures)
    assert found["brightness"] == pytest.approx([0.299, 128 / 255, 0, (2.99 + 13.501 + 0.57) / 255, 1], abs=1e-9)
    assert found["saturation"] == pytest.approx([1, 0, 0, 18 / 23, 0])
    assert found["black"].tolist() == [0, 0, 1, 1, 0]
    assert (found["red"][0], found["green"][0], found["blue"][0]) == (1, 0, 0)
    # Colourfulness of plain red: 0.3 times the length of the means (255, 127.5).
    assert found["colourfulness"] == pytest.approx([0.3 * math.hypot(255, 127.5), 0, 0, 0.3 * math.hypot(13, 11.5), 0])
    for name in ("contrast", "sharpness"):
        assert found[name] == pytest.approx(np.zeros(5), abs=1e-9)


def test_looks_of_halves_and_checks() -> None:
    half = np.zeros((1, 8, 8, 3), np.uint8)
    half[:, :, 4:] = 200
    board = np.zeros((1, 8, 8, 3), np.uint8)
    board[0, ::2, ::2] = board[0, 1::2, 1::2] = 100
    assert looks(half)["contrast"] == pytest.approx([100 / 255])
    assert looks(half)["black"] == pytest.approx([0.5])
    assert looks(board)["sharpness"] == pytest.approx([400.0**2])  # the Laplacian is +-400


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: psnr(TRUTH, TRUTH[:2]), r"truth: \[2, 64, 64, 3\], but pictures are \[3, 64, 64, 3\]"),
        (lambda: psnr(TRUTH / 255, TRUTH), r"pictures are uint8 \[N,H,W,3\], not float64"),
        (lambda: ssim(TRUTH[:, :10], TRUTH[:, :10]), "pictures of 64x10 pixels; its window needs 11 each way"),
        (lambda: looks(TRUTH[:, :2]), "pictures of 64x2 pixels"),
    ],
)
def test_pictures_without_a_figure_are_refused(call, problem: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=problem):
        call()
