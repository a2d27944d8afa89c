"""Positions where transformers 5 and the paper part, and which frames of a video are seen."""

import torch

from bestiary.inputs import Item, Span
from bestiary_qwen2_vl.processor import positions, two_a_second


def span(start: int, steps: int, rows: int, columns: int) -> Span:
    grid = torch.tensor([steps, rows * 2, columns * 2])
    vectors = steps * rows * columns
    return Span(Item.of("video", {"grid": grid}, vectors), start, (True,) * vectors)


def test_text_goes_on_beyond_the_largest_number_of_any_axis() -> None:
    """Three steps of a picture of one patch: time is the longest axis, which the paper counts and others forget."""
    axes, after = positions(2 + 3 + 2, [span(2, 3, 1, 1)], 2)
    assert axes.tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 2, 2, 5, 6], [0, 1, 2, 2, 2, 5, 6]]
    assert after == 7


def test_items_follow_each_other() -> None:
    axes, after = positions(6 + 1 + 2, [span(0, 1, 2, 3), span(7, 2, 1, 1)], 2)
    assert axes[0].tolist() == [0] * 6 + [3] + [4, 5]
    assert axes[1].tolist() == [0, 0, 0, 1, 1, 1, 3, 4, 4]
    assert axes[2].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 4]
    assert after == 6


def test_two_frames_of_each_second_and_an_even_number() -> None:
    assert two_a_second(100, 10.0) == [round(i * 99 / 19) for i in range(20)]
    assert len(two_a_second(31, 30.0)) == 4
    assert two_a_second(3, 30.0) == [0, 2]
    assert two_a_second(1, 30.0) == [0]
    assert len(two_a_second(10**6, 25.0)) == 768
    assert two_a_second(5, None) == [0, 1, 2, 3, 4]
