"""Scores against closed forms, published examples and torchmetrics; what samples must be to have a figure at all."""

import math
import warnings

import numpy as np
import pytest
import torch

from tests.metric_peers import Same, normals, peer
from videodiff.errors import UserError
from videodiff.metrics.samples import caution, draws, least_samples, matrix, pictures_of
from videodiff.metrics.scores import clip_scores, fleiss_kappa, inception_score, retrieval_recall


def test_inception_score_runs_from_one_to_the_number_of_classes() -> None:
    sure = torch.eye(5).repeat(20, 1)
    assert inception_score(sure) == (pytest.approx(5, rel=1e-12), pytest.approx(0, abs=1e-12))
    assert inception_score(torch.full((100, 5), 0.2))[0] == pytest.approx(1, rel=1e-12)
    assert inception_score(torch.eye(5)[:1].repeat(100, 1))[0] == pytest.approx(1, rel=1e-12)  # one class only
    by_class = torch.eye(5).repeat_interleave(20, 0)
    assert inception_score(by_class, 5)[0] == pytest.approx(1, rel=1e-12)
    assert inception_score(by_class, 1)[0] == pytest.approx(5, rel=1e-12)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore`", "ignore:std")
def test_inception_score_is_torchmetrics() -> None:
    logits = 2 * normals(60, 7).float()
    theirs = peer("image.inception").InceptionScore(feature=Same(), splits=1)
    theirs.update(logits)
    ours = inception_score(logits.softmax(1), splits=1)
    assert ours[0] == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


def test_clip_score_is_a_clipped_cosine_for_each_picture() -> None:
    pictures = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    captions = torch.tensor([[3.0, 0.0], [5.0, 0.0], [-1.0, 0.0]])
    assert clip_scores(pictures, captions).tolist() == pytest.approx([100, 100 / math.sqrt(2), 0], abs=1e-6)
    with pytest.raises(UserError, match="captions: 2 of them for 3 pictures"):
        clip_scores(pictures, captions[:2])
    with pytest.raises(UserError, match="captions: features of zeros"):
        clip_scores(pictures, 0 * captions)


def test_retrieval_counts_both_ways_with_several_captions() -> None:
    """Pictures lie on the axes; picture 0 has two captions, of which one is nearer to picture 1 and then to 2."""
    pictures = torch.eye(12)
    captions = torch.eye(12)[[0, 0, *range(1, 12)]]
    captions[1] = 0.2 * pictures[0] + 0.9 * pictures[1] + 0.3 * pictures[2]
    found = retrieval_recall(pictures, captions, [0, 0, *range(1, 12)])
    assert found["text_to_image_r1"] == pytest.approx(12 / 13)
    assert found["text_to_image_r5"] == 1
    assert found["image_to_text_r1"] == 1  # one of the two captions is enough
    captions[0] = pictures[3] + 0.1 * pictures[0]
    found = retrieval_recall(pictures, captions, [0, 0, *range(1, 12)], (1, 2))
    assert found["text_to_image_r1"] == pytest.approx(11 / 13)
    assert found["text_to_image_r2"] == pytest.approx(12 / 13)
    # Picture 0: both of its captions lie nearer than any other caption, though neither lies near.
    assert found["image_to_text_r1"] == 1


def test_a_caption_that_says_the_same_is_as_right() -> None:
    """Pictures 0 and 1 have one caption: which of them comes first is nobody's fault."""
    pictures, captions = torch.eye(12), torch.eye(12)
    captions[0] = captions[1] = pictures[0] + 0.5 * pictures[1]
    assert retrieval_recall(pictures, captions, ranks=(1,)) == pytest.approx(
        {"text_to_image_r1": 11 / 12, "image_to_text_r1": 10 / 12}
    )
    same = [0, 0, *range(2, 12)]
    assert set(retrieval_recall(pictures, captions, ranks=(1,), alike=same).values()) == {1.0}


def test_retrieval_of_features_that_are_all_alike_finds_nothing_and_of_random_ones_what_guesses_find() -> None:
    alike = torch.ones(30, 4)
    assert set(retrieval_recall(alike, alike).values()) == {0.0}
    found = retrieval_recall(normals(2000, 8), normals(2000, 8, seed=1), ranks=(10, 200))
    assert found["text_to_image_r200"] == pytest.approx(0.1, abs=0.03)
    assert found["image_to_text_r200"] == pytest.approx(0.1, abs=0.03)
    assert found["image_to_text_r10"] < found["image_to_text_r200"]


FLEISS = np.array(  # 14 raters, 10 items, 5 categories: the example by which kappa is commonly explained, 0.210
    [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
     [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]
)  # fmt: skip


def test_kappa_of_a_published_example_and_of_torchmetrics() -> None:
    assert fleiss_kappa(FLEISS) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa(np.array([[3, 0], [0, 3], [3, 0]])) == pytest.approx(1)
    assert fleiss_kappa(np.array([[1, 1], [1, 1]])) == pytest.approx(-1)
    guesses = np.stack([np.bincount(draws("raters", n).integers(3, size=5), minlength=3) for n in range(3000)])
    assert fleiss_kappa(guesses) == pytest.approx(0, abs=0.02)
    theirs = float(peer("functional.nominal").fleiss_kappa(torch.from_numpy(FLEISS), "counts"))
    assert fleiss_kappa(FLEISS) == pytest.approx(theirs, rel=1e-4)  # theirs has 1e-5 in the denominator


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        (np.array([[2, 1], [1, 1]]), r"counts: \[2, 3\] raters an item; .* leave items with missing ratings out"),
        (np.array([[1, 0], [0, 1]]), r"counts: \[1\] raters an item"),
        (np.array([[3, 0], [3, 0]]), "all ratings are of one category"),
        (np.array([[0.5, 0.5]]), r"whole numbers \[N,C\]"),
        (np.array([[3, -1]]), r"whole numbers \[N,C\]"),
    ],
)
def test_ratings_without_a_kappa_are_refused(counts: np.ndarray, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        fleiss_kappa(counts)


def test_impossible_scores_are_refused() -> None:
    with pytest.raises(UserError, match="give the softmax, not the logits"):
        inception_score(normals(50, 4))
    with pytest.raises(UserError, match="probabilities: 5 samples, and inception needs at least 10"):
        inception_score(torch.eye(5))
    with pytest.raises(UserError, match="pictures: 10 samples, and retrieval needs at least 11"):
        retrieval_recall(torch.eye(10), torch.eye(10))
    for owners in ([0] * 12, range(11), [*range(11), 12]):
        with pytest.raises(UserError, match="give each caption the number of its picture, 0 to 11"):
            retrieval_recall(torch.eye(12), torch.eye(12), list(owners))
    with pytest.raises(UserError, match="at least 1"):
        retrieval_recall(torch.eye(12), torch.eye(12), ranks=(0, 1))


def test_a_figure_from_too_few_samples_is_marked_with_its_reason() -> None:
    assert caution("frechet", 200, 2048) == (
        "biased: N <= D, so the covariance is singular; compare at equal N only (N = 200, fewer than 2049)"
    )
    assert caution("frechet", 2049, 2048) is None
    assert caution("kid", 1000, 2048) is None
    assert least_samples("kid", 2048, size=50).least == 50
    assert least_samples("precision_recall").least == 4
    assert "compare at equal N only" in str(caution("precision_recall", 100))
    assert "more classes than it has samples" in str(caution("inception", 5000, 1000))
    assert caution("inception", 10_000, 1000) is None
    assert caution("mean", 19) is not None
    assert caution("cmmd", 2) is None
    with pytest.raises(UserError, match="metric 'fid': not known; choose one of frechet, kid"):
        least_samples("fid")  # type: ignore[arg-type]


def test_draws_follow_from_their_key_alone() -> None:
    def first(*key: int | str) -> int:
        return int(draws(*key).integers(2**62))

    assert first(1, "a") == first(1, "a") == 2809668444816670163
    assert len({first(1, "2"), first(12), first("1", 2), first("12"), first("1", "2")}) == 5
    with pytest.raises(TypeError):
        draws(1.5)  # type: ignore[arg-type]


def test_features_keep_their_precision_and_pictures_their_type() -> None:
    assert matrix(np.ones((2, 3), np.float32), "x").dtype == torch.float32
    frozen = np.ones((2, 3))
    frozen.flags.writeable = False  # as a file that is mapped into memory
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert matrix(frozen, "x").dtype == torch.float64
    assert matrix(torch.ones(2, 3, dtype=torch.bfloat16), "x").dtype == torch.float32
    assert matrix(np.ones((2, 3), np.int64), "x").dtype == torch.float64
    for shape in ((0, 3), (2, 0), (2, 2, 2)):
        with pytest.raises(UserError, match=r"x: features are \[N,D\]"):
            matrix(torch.zeros(shape), "x")
    with pytest.raises(UserError, match="real numbers"):
        matrix(torch.zeros(2, 2, dtype=torch.complex64), "x")
    for wrong in (np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)):
        with pytest.raises(UserError, match=r"clip: pictures are uint8 \[N,H,W,3\]"):
            pictures_of(wrong, "clip")
    with pytest.raises(UserError, match="clip: 2 frames, and this figure needs at least 3; give longer clips"):
        pictures_of(np.zeros((2, 4, 4, 3), np.uint8), "clip", 3)
