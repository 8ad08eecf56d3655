"""The benchmark of what a model has learned runs every case, and its questions are what it says they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import model as bench
from data_pipeline.world import held_out, render, sample_scene
from videodiff.model import Model


@pytest.fixture(scope="module")
def subject(toy_model: Path) -> bench.Subject:
    return bench.Subject(Model.load(toy_model))


def test_swapped_pairs_differ_in_what_is_asked() -> None:
    for shown, told, text in bench.pairs(40):
        assert all(getattr(shown, name) != getattr(told, name) for name in ("colour", "shape", "motion"))
        assert not held_out(shown)
        assert not held_out(told)
        assert text


def test_a_perfect_model_is_told_as_one(subject: bench.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips that move as they are told and look as the image does."""
    count = 10
    asked = bench.pairs(count)

    def clips(keys, first, sampling=None) -> np.ndarray:  # type: ignore[no-untyped-def]
        made = []
        for key in keys:
            shown, told, _ = asked[key.index]
            mixed = replace(shown, motion=told.motion)
            made.append(render(sample_scene(mixed, "test", key.index), 64, 16, 8.0))
        return np.stack(made)

    monkeypatch.setattr(subject, "clips", clips)
    monkeypatch.setattr(
        subject.road, "decode", lambda latents: np.stack([np.zeros((1, 64, 64, 3), np.uint8)] * len(latents))
    )
    rows = bench.swap(subject, count)
    assert any(row.startswith("| colour | 100.0") for row in rows)
    assert any(row.startswith("| shape | 100.0") for row in rows)
    motion = next(row for row in rows if row.startswith("| motion"))
    assert motion.split("|")[2].split()[0] == "0.0"
    assert motion.split("|")[3].split()[0] == "100.0"


def test_every_case_gives_its_tables(toy_model: Path, tmp_path: Path) -> None:
    bench.main(str(toy_model), bench.CASES, 2, 3, [1, 2], "held_out", tmp_path / "model.md")
    text = (tmp_path / "model.md").read_text()
    for words in ("follows the text", "of the data's deviation", "DPM-Solver++", "2 steps", "held-out combinations"):
        assert words in text
    assert (tmp_path / "model-steps-video.png").stat().st_size > 1000
