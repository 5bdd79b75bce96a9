"""Packing: nothing is lost or cut, windows are full, and the same again every time."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_recipes.chat.packing import best_fit, pack


@given(st.lists(st.integers(1, 50), max_size=200))
def test_every_item_lies_in_one_window_that_has_room_for_it(lengths: list[int]) -> None:
    windows = best_fit(lengths, 50)
    assert sorted(item for window in windows for item in window) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in window) <= 50 for window in windows)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_windows_are_as_few_as_best_fit_decreasing_promises(lengths: list[int]) -> None:
    least = -(-sum(lengths) // 50)
    assert len(best_fit(lengths, 50)) <= 11 / 9 * max(least, sum(2 * length > 50 for length in lengths)) * 1.5 + 4
    # Two windows that could be one are never left: that is what best fit is.
    rooms = [50 - sum(lengths[item] for item in window) for window in best_fit(lengths, 50)]
    assert sum(room >= 25 for room in rooms) <= 1


def test_an_item_goes_where_it_fits_best() -> None:
    """6 and 7 open windows with room for 4 and 3: an item of 3 goes into the fuller one, and then 4 has its place."""
    assert best_fit([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]


def test_what_is_longer_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="51"):
        best_fit([51], 50)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=300), st.integers(8, 64), st.integers(0, 5))
def test_blocks_lose_nothing_and_take_only_what_is_asked_for(lengths: list[int], block: int, left_out: int) -> None:
    order = np.random.default_rng(0).permutation(len(lengths))[left_out:].astype(np.int64)
    items, starts = pack(np.array(lengths), order, 30, block)
    assert sorted(items.tolist()) == sorted(order.tolist())
    sums = [sum(lengths[item] for item in items[a:b]) for a, b in itertools.pairwise(starts)]
    assert starts[0] == 0 and starts[-1] == len(order) and all(0 < each <= 30 for each in sums)
    again = pack(np.array(lengths), order, 30, block)
    assert np.array_equal(items, again[0]) and np.array_equal(starts, again[1])


def test_less_than_a_hundredth_is_padding_also_over_many_blocks() -> None:
    """Lengths as of chat data (log-normal), a window as long as ten of them, forty blocks."""
    generator = np.random.default_rng(1)
    lengths = np.clip(np.exp(generator.normal(5.0, 0.9, 20_000)), 8, 2048).astype(np.int64)
    items, starts = pack(lengths, generator.permutation(len(lengths)), 2048, block=500)
    assert len(items) == len(lengths)
    assert 1 - lengths.sum() / ((len(starts) - 1) * 2048) < 0.01
