"""The state of training in parts: what many ranks wrote, any number reads."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from videodiff.errors import UserError
from videodiff.training.fragments import Fragments, Part, reshape, write

SIZE = 23
VALUES = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))


def written(folder: Path, cuts: list[int], ranks: int) -> Fragments:
    """VALUES as the weight `w`, cut at `cuts` and dealt to the ranks in turn."""
    parts = [Part("master", "w", a, VALUES[a:b]) for a, b in pairwise([0, *cuts, SIZE])]
    for rank in range(ranks):
        write(folder, rank, parts[rank::ranks], {"steps": 7})
    return Fragments(folder)


@given(st.data())
def test_every_range_comes_back_however_it_was_cut(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, SIZE - 1), max_size=8)))
    state = written(tmp_path_factory.mktemp("state"), cuts, data.draw(st.integers(1, 4)))
    start = data.draw(st.integers(0, SIZE))
    length = data.draw(st.integers(0, SIZE - start))
    assert torch.equal(state.read("master", "w", start, length), VALUES[start : start + length])
    assert state.size("master", "w") == SIZE
    assert state.counters == {"steps": 7}


@pytest.mark.parametrize("num_files", [1, 3, 30])
def test_reshaped_it_is_the_same_state(tmp_path: Path, num_files: int) -> None:
    before = written(tmp_path / "two", [5, 11], 2)
    reshape(tmp_path / "two", tmp_path / "other", num_files)
    after = Fragments(tmp_path / "other")
    assert len(after) == num_files
    assert after.contents == before.contents
    assert after.counters == before.counters
    assert torch.equal(after.read("master", "w", 0, SIZE), VALUES)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no state of training \(rank-\*.safetensors\) lies here"):
        Fragments(tmp_path)
    written(tmp_path / "whole", [5, 11], 2)
    (tmp_path / "whole/rank-00001.safetensors").unlink()
    with pytest.raises(UserError, match="6 values of master w are missing"):
        Fragments(tmp_path / "whole").read("master", "w", 0, SIZE)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"w": (SIZE,), "b": (2,)}, "b is not in it"),
        ({}, "w is of a network with more parameters"),
        ({"w": (4, 4)}, "w has 23 values there, 16 here"),
    ],
)
def test_the_state_of_another_network_is_refused(tmp_path: Path, shapes: dict, words: str) -> None:
    state = written(tmp_path / "state", [], 1)
    with pytest.raises(UserError, match=words):
        state.check("master", {name: torch.Size(shape) for name, shape in shapes.items()})
