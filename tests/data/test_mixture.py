"""What stands at global sample i: exact shares, every window once per epoch, and no memory of what came before."""

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llm_recipes.data.mixture import BLOCK, UNIT, Mixture, Place, Shares, floor_sum, largest_remainder

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)
ROUNDING = 1e-5
"""Shares are kept as whole numbers of 2**-32."""


def exact(weights: Sequence[float]) -> list[float]:
    return [weight / math.fsum(weights) for weight in weights]


def one_stage(sizes: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0) -> Mixture:
    return Mixture([f"source {i}" for i in range(len(sizes))], sizes, [(0, weights or [1.0] * len(sizes))], seed)


def orders(mixture: Mixture, samples: int) -> list[dict[int, list[int]]]:
    """For each source the windows of each epoch, in the order in which the run meets them."""
    met: list[dict[int, list[int]]] = [{} for _ in mixture.names]
    for sample in range(samples):
        place = mixture.place(sample)
        met[place.source].setdefault(place.epoch, []).append(place.window)
    return met


@settings(max_examples=200, deadline=None)
@given(n=st.integers(0, 60), m=st.integers(1, 100), a=st.integers(0, 300), b=st.integers(0, 300))
def test_the_sum_of_floors_is_what_adding_them_gives(n: int, m: int, a: int, b: int) -> None:
    assert floor_sum(n, m, a, b) == sum((a * j + b) // m for j in range(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 10**12), more=st.integers(1, 20), b=st.integers(0, BLOCK * UNIT))
def test_the_sum_of_floors_is_exact_far_out(n: int, more: int, b: int) -> None:
    here = sum((2654435769 * j + b) // UNIT for j in range(n, n + more))
    assert floor_sum(n + more, UNIT, 2654435769, b) - floor_sum(n, UNIT, 2654435769, b) == here


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.integers(0, 1000), min_size=1, max_size=10), total=st.integers(0, 5000))
def test_the_largest_remainders_get_what_is_left_over(weights: list[int], total: int) -> None:
    assume(sum(weights) > 0)
    counts = largest_remainder(weights, total)
    assert sum(counts) == total
    floors = [weight * total // sum(weights) for weight in weights]
    extra = [count - floor for count, floor in zip(counts, floors, strict=True)]
    assert set(extra) <= {0, 1}
    remainders = [weight * total % sum(weights) for weight in weights]
    given_to = [each for each, more in zip(remainders, extra, strict=True) if more]
    passed_over = [each for each, more in zip(remainders, extra, strict=True) if not more]
    assert not given_to or not passed_over or min(given_to) >= max(passed_over)


@settings(max_examples=30, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 1000), block=st.one_of(st.integers(0, 50), st.integers(0, 10**9)))
def test_every_block_holds_every_source_within_one_sample_of_its_share(
    weights: list[float], seed: int, block: int
) -> None:
    shares = Shares(weights, (seed, 0))
    found = Counter(shares.at(block * BLOCK + place)[0] for place in range(BLOCK))
    for source, share in enumerate(exact(weights)):
        assert abs(found[source] - share * BLOCK) < 1 + ROUNDING


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 1000), blocks=st.sampled_from([1, 2, 3, 10, 100, 999, 10**4, 10**7]))
def test_the_running_total_of_a_source_never_drifts_from_its_share(
    weights: list[float], seed: int, blocks: int
) -> None:
    counts = Shares(weights, (seed, 0)).counts(blocks * BLOCK)
    assert sum(counts) == blocks * BLOCK
    # A golden-ratio sequence strays no further than the logarithm of its length.
    allowed = 2 * (1 + 0.3 * math.log(blocks)) + blocks * BLOCK / UNIT
    for count, share in zip(counts, exact(weights), strict=True):
        assert abs(count - share * blocks * BLOCK) < allowed


def test_what_a_block_cannot_share_out_goes_to_every_source_in_its_turn() -> None:
    shares = Shares([1, 1, 1], (0, 0))
    totals = [shares.counts(block * BLOCK) for block in range(301)]
    given = [[now - before for before, now in zip(*pair, strict=True)] for pair in pairwise(totals)]
    whole, over = divmod(BLOCK, 3)
    assert over == 1
    assert {tuple(sorted(each)) for each in given} == {(whole, whole, whole + 1)}
    for source in range(3):
        assert abs(sum(each[source] > whole for each in given) - 100) <= 5


def test_a_tiny_source_comes_when_its_share_is_due() -> None:
    shares = Shares([1, 10 * BLOCK - 1], (5, 0))
    for blocks in range(0, 200, 10):
        assert abs(shares.counts(blocks * BLOCK)[0] - blocks / 10) <= 2


def test_the_sources_of_a_block_are_shuffled_and_each_block_in_its_own_way() -> None:
    shares = Shares([1, 1], (0, 0))
    blocks = [[shares.at(block * BLOCK + place)[0] for place in range(BLOCK)] for block in range(3)]
    assert len({tuple(block) for block in blocks}) == 3
    for block in blocks:
        changes = sum(before != after for before, after in pairwise(block))
        assert BLOCK / 2 - 100 < changes < BLOCK / 2 + 100


STAGES = st.lists(
    st.tuples(st.integers(0, 2500), st.lists(st.sampled_from([0.0, 0.1, 1.0, 3.7]), min_size=3, max_size=3)),
    min_size=1,
    max_size=3,
)


def staged(stages: list[tuple[int, list[float]]], sizes: Sequence[int], seed: int) -> Mixture:
    """A curriculum from (samples, weights) of each stage."""
    starts = [sum(length for length, _ in stages[:number]) for number in range(len(stages))]
    weights = [weights for _, weights in stages]
    return Mixture(["a", "b", "c"], sizes, list(zip(starts, weights, strict=True)), seed)


@settings(max_examples=20, deadline=None)
@given(stages=STAGES, seed=st.integers(0, 99), data=st.data())
def test_counts_are_what_counting_the_places_gives(
    stages: list[tuple[int, list[float]]], seed: int, data: st.DataObject
) -> None:
    assume(all(any(weights) for _, weights in stages))
    mixture = staged(stages, [7, 100, 3000], seed)
    samples = data.draw(st.integers(0, sum(length for length, _ in stages) + 1500))
    found = Counter(mixture.place(sample).source for sample in range(samples))
    assert mixture.counts(samples) == [found[source] for source in range(3)]


@settings(max_examples=20, deadline=None)
@given(stages=STAGES, seed=st.integers(0, 99))
def test_every_window_comes_once_per_epoch_also_across_the_stages_of_a_curriculum(
    stages: list[tuple[int, list[float]]], seed: int
) -> None:
    assume(all(any(weights) for _, weights in stages))
    sizes = [1, 37, 400]
    mixture = staged(stages, sizes, seed)
    for size, epochs in zip(sizes, orders(mixture, sum(length for length, _ in stages) + 1000), strict=True):
        assert list(epochs) == list(range(len(epochs)))
        for number, windows in epochs.items():
            assert len(set(windows)) == len(windows)
            if number < len(epochs) - 1:
                assert sorted(windows) == list(range(size))


def test_a_stage_takes_its_own_shares_and_only_its_sources() -> None:
    mixture = staged([(BLOCK, [1.0, 0.0, 0.0]), (3 * BLOCK, [1.0, 1.0, 2.0])], [10**6] * 3, 0)
    assert mixture.counts(BLOCK) == [BLOCK, 0, 0]
    assert mixture.counts(3 * BLOCK) == [BLOCK + BLOCK // 2, BLOCK // 2, BLOCK]
    assert {mixture.place(sample).source for sample in range(BLOCK)} == {0}


def test_a_new_epoch_source_or_seed_has_a_new_order() -> None:
    seen = []
    for seed in (0, 1):
        for epochs in orders(one_stage([40, 40], seed=seed), 400):
            seen += [tuple(epochs[number]) for number in range(4)]
    assert len(set(seen)) == len(seen) == 16
    assert tuple(range(40)) not in seen


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_a_place_depends_on_nothing_that_was_asked_before(data: st.DataObject) -> None:
    sizes, stages = [5, 300, 80], [(1500, [1.0, 2.0, 0.5]), (900, [0.0, 1.0, 1.0])]
    forward = [staged(stages, sizes, 3).place(sample) for sample in range(0, 20_000, 397)]
    samples = data.draw(st.permutations(range(0, 20_000, 397)))
    mixture = staged(stages, sizes, 3)
    found = {sample: mixture.place(sample) for sample in samples}
    assert [found[sample] for sample in sorted(found)] == forward


def test_a_source_keeps_its_order_when_others_come_go_or_weigh_more() -> None:
    alone = Mixture(["ja"], [60], [(0, [1.0])], 7)
    among = Mixture(["en", "ja", "code"], [500, 60, 9], [(0, [0.7, 0.2, 0.1])], 7)
    later = Mixture(["ja", "maths"], [60, 33], [(0, [0.9, 0.1]), (2000, [0.1, 0.9])], 7)

    def order(mixture: Mixture) -> list[Place]:
        source = mixture.names.index("ja")
        places = [place for place in map(mixture.place, range(4000)) if place.source == source]
        return [Place(0, place.epoch, place.window) for place in places][:500]

    assert order(alone) == order(among) == order(later)
    assert len(order(alone)) == 500


def test_the_scale_of_the_weights_does_not_matter() -> None:
    shares, tokens = one_stage([50, 70], [0.3, 0.7]), one_stage([50, 70], [3e11, 7e11])
    assert [shares.place(i) for i in range(3000)] == [tokens.place(i) for i in range(3000)]


@pytest.fixture
def operations() -> Callable[[Callable[[], Any]], int]:
    """How many lines of Python a call runs: a count, where a clock would depend on the machine."""

    def count(call: Callable[[], Any]) -> int:
        lines = 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal lines
            lines += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            call()
        finally:
            sys.settrace(before)
        return lines

    return count


def test_opening_and_seeking_at_a_trillion_samples_costs_hardly_more_than_at_the_start(
    operations: Callable[[Callable[[], Any]], int],
) -> None:
    def visit(sample: int) -> int:
        sizes, weights = [10**11 + i for i in range(20)], [1.0 + i for i in range(20)]
        stages = [(0, weights), (sample // 2 + 1, weights[::-1])]
        return operations(lambda: Mixture([str(i) for i in range(20)], sizes, stages, 0).place(sample))

    # Euclid's algorithm adds a few dozen divisions, where counting would add a trillion.
    assert visit(10**12) < 10 * visit(5 * BLOCK) < 100_000
