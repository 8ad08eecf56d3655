from dataclasses import fields

import pytest
import torch
from torch import Tensor

from videodiff.batch import Condition, VideoBatch

B, C, T, H, W = 3, 4, 5, 2, 2


@pytest.fixture
def condition() -> Condition:
    known_mask = torch.zeros(B, 1, T, H, W)
    known_mask[:, :, 0] = 1
    return Condition(
        text=(torch.randn(B, 7, 6), torch.randn(B, 4, 9)),
        text_mask=(torch.arange(7).expand(B, 7) < 5, torch.arange(4).expand(B, 4) < 3),
        pooled=torch.randn(B, 8),
        known=torch.randn(B, C, T, H, W) * known_mask,
        known_mask=known_mask,
        fps=torch.tensor([8.0, 16.0, 7.5]),
        hint=torch.rand(B, 1, 8 * H, 8 * W),
    )


def tensors(condition: Condition) -> list[Tensor]:
    values = [getattr(condition, field.name) for field in fields(condition)]
    return [x for value in values for x in (value if isinstance(value, tuple) else [value]) if x is not None]


def same(one: Condition, other: Condition) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(one), tensors(other), strict=True))


def test_without_text(condition: Condition) -> None:
    null = condition.without("text")
    assert all(not tokens.any() for tokens in null.text)
    assert [mask.tolist() for mask in null.text_mask] == [[[True] + [False] * 6] * B, [[True] + [False] * 3] * B]
    assert null.pooled is not None
    assert not null.pooled.any()
    for name in ("known", "known_mask", "fps", "hint"):
        assert torch.equal(getattr(null, name), getattr(condition, name))


def test_without_image(condition: Condition) -> None:
    null = condition.without("image")
    assert condition.has_image
    assert not null.has_image
    assert not any(getattr(null, name).any() for name in ("known", "known_mask"))
    assert torch.equal(null.text[1], condition.text[1])
    assert torch.equal(null.text_mask[0], condition.text_mask[0])
    assert null.fps is not None
    assert condition.fps is not None
    assert torch.equal(null.fps, condition.fps)
    assert null.hint is condition.hint


def test_the_null_text_says_nothing_about_the_text(condition: Condition) -> None:
    broken = Condition(text=(torch.full((B, 7, 6), torch.nan),), text_mask=(torch.zeros(B, 7, dtype=torch.bool),))
    null = Condition(text=(condition.text[0],), text_mask=(condition.text_mask[0],)).without("text")
    assert same(broken.without("text"), null)


def test_drop_is_without_for_single_samples(condition: Condition) -> None:
    text, image = torch.tensor([True, False, True]), torch.tensor([False, False, True])
    dropped = condition.drop(text, image)
    parts: list[tuple[str, ...]] = [("text",), (), ("text", "image")]
    for i, names in enumerate(parts):
        expected = condition.without(*names).select(slice(i, i + 1))  # type: ignore[arg-type]
        assert same(dropped.select(slice(i, i + 1)), expected)


def test_without_both_is_one_after_the_other(condition: Condition) -> None:
    assert same(condition.without("text", "image"), condition.without("image").without("text"))
    assert same(condition.without(), condition)


def test_unknown_part_is_refused(condition: Condition) -> None:
    with pytest.raises(ValueError, match="fps"):
        condition.without("fps")  # type: ignore[arg-type]


def test_stack_and_select_are_inverse(condition: Condition) -> None:
    other = condition.without("text")
    stacked = Condition.stack([condition, other])
    assert stacked.text[0].shape == (2 * B, 7, 6)
    assert same(stacked.select(slice(0, B)), condition)
    assert same(stacked.select(slice(B, 2 * B)), other)
    assert same(condition.select([2, 0]), condition.select(torch.tensor([2, 0])))
    assert same(Condition.stack([condition.select(slice(i, i + 1)) for i in range(B)]), condition)


def test_unlike_conditions_are_not_stacked(condition: Condition) -> None:
    with pytest.raises(ValueError, match="pooled"):
        Condition.stack([condition, Condition(text=condition.text, text_mask=condition.text_mask)])


def test_a_cast_keeps_masks_and_times(condition: Condition) -> None:
    cast = condition.to(dtype=torch.bfloat16)
    for x in (*cast.text, cast.pooled, cast.known, cast.known_mask, cast.hint):
        assert x is not None
        assert x.dtype == torch.bfloat16
    assert {mask.dtype for mask in cast.text_mask} == {torch.bool}
    assert cast.fps is not None
    assert cast.fps.tolist() == [8.0, 16.0, 7.5]
    assert same(condition.to("cpu"), condition)


def test_an_empty_condition_stays_empty() -> None:
    empty = Condition()
    assert not empty.has_text
    assert not empty.has_image
    nothing = torch.zeros(2, dtype=torch.bool)
    null, dropped = empty.without("text", "image"), empty.drop(nothing, nothing)
    for made in (null, dropped, empty.to("cpu"), Condition.stack([empty])):
        assert tensors(made) == []


def test_the_length_of_a_batch_is_its_number_of_clips() -> None:
    frames = torch.zeros(2, 3, 4, 4, 3, dtype=torch.uint8)
    batch = VideoBatch(frames, ("a", "b"), torch.ones(2), torch.arange(2), ("k0", "k1"), torch.ones(2))
    assert len(batch) == 2
