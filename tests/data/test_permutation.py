"""An order that needs no memory visits every index once, and is another one for every name."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_recipes.data.permutation import keys, permutation, permute

NAMES = st.tuples(st.integers(0, 2**63), st.text(max_size=8), st.integers(0, 1000))


@settings(max_examples=100, deadline=None)
@given(size=st.one_of(st.integers(1, 70), st.integers(1, 5000)), names=NAMES)
def test_every_index_has_a_place_of_its_own(size: int, names: tuple[int, str, int]) -> None:
    assert sorted(permutation(size, keys(*names)).tolist()) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 400), names=NAMES)
def test_one_index_alone_goes_where_the_whole_permutation_sends_it(size: int, names: tuple[int, str, int]) -> None:
    round_keys = keys(*names)
    whole = permutation(size, round_keys)
    assert whole.dtype == np.int64
    assert [permute(index, size, round_keys) for index in range(size)] == whole.tolist()


@pytest.mark.parametrize("power", [1, 2, 3, 4, 5, 6, 7, 8])
def test_sizes_at_the_edge_of_the_domain_are_whole_too(power: int) -> None:
    for size in (2**power - 1, 2**power, 2**power + 1):
        assert sorted(permutation(size, keys("edge")).tolist()) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(2, 2**62), names=NAMES, data=st.data())
def test_indices_of_a_trillion_samples_stay_inside_and_apart(
    size: int, names: tuple[int, str, int], data: st.DataObject
) -> None:
    indices = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=20)) | {0, size - 1}
    images = [permute(index, size, keys(*names)) for index in indices]
    assert all(0 <= image < size for image in images)
    assert len(set(images)) == len(indices)


@pytest.mark.parametrize(("index", "size"), [(-1, 5), (5, 5), (6, 5), (0, 0)])
def test_an_index_outside_is_refused(index: int, size: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        permute(index, size, keys("any"))


def test_another_epoch_source_or_seed_is_another_order() -> None:
    names = [(seed, source, epoch) for seed in range(3) for source in ("ja", "en") for epoch in range(5)]
    orders = {tuple(permutation(50, keys(*each)).tolist()) for each in names}
    assert len(orders) == len(names)


def test_names_do_not_run_together() -> None:
    assert len({keys("a", "bc"), keys("ab", "c"), keys("abc"), keys(1, 23), keys(12, 3)}) == 5


def test_every_order_of_two_indices_is_about_equally_likely() -> None:
    size, draws = 12, 3960
    seen = Counter(tuple(permutation(size, keys("draw", number))[:2].tolist()) for number in range(draws))
    # 132 pairs, 30 of each expected with a deviation of 5.5.
    assert len(seen) == size * (size - 1)
    assert 30 - 5 * 5.5 < min(seen.values()) <= max(seen.values()) < 30 + 5 * 5.5


def test_the_order_of_a_run_is_the_same_in_every_process_machine_and_release() -> None:
    # Written down once: a run that is resumed years later must find its samples where they were.
    assert permutation(10, keys(0, "ja", 0)).tolist() == [9, 5, 8, 1, 4, 0, 3, 7, 2, 6]
    assert permute(123_456_789, 10**12, keys(0, "ja", 1)) == 100_251_365_978
