"""Learning rate and batch size are pure functions of the step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_recipes.config import BatchWarmupConfig, OptimConfig, ScheduleConfig
from llm_recipes.training.schedule import BatchSpans, learning_rate

NAMES = ("cosine", "wsd", "linear", "constant")


def curve(name: str, steps: int = 100, **schedule: int) -> list[float]:
    rate = learning_rate(OptimConfig(lr=1.0, min_lr_ratio=0.1), ScheduleConfig(name=name, **schedule), steps)
    return [rate(step) for step in range(steps)]


@pytest.mark.parametrize("name", NAMES)
def test_warmup_rises_in_equal_parts_to_the_peak(name: str) -> None:
    assert curve(name, warmup_steps=10)[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert curve(name)[0] == pytest.approx(1.0, abs=0.02), "without a warmup the first step is at the peak"


def test_corners_of_each_curve() -> None:
    cosine = curve("cosine", warmup_steps=10)
    assert cosine[9] == 1.0 and cosine[99] == pytest.approx(0.1)
    assert cosine[54] == pytest.approx(0.55), "half-way between the end of the warmup and the end"
    linear = curve("linear", warmup_steps=10)
    assert linear[99] == pytest.approx(0.1) and linear[54] == pytest.approx(0.55)
    wsd = curve("wsd", warmup_steps=10, decay_steps=20)
    assert wsd[10:80] == [1.0] * 70 and wsd[80] < 1.0 and wsd[99] == pytest.approx(0.1)
    assert wsd[89] == pytest.approx(0.55)
    assert curve("wsd")[:90] == [1.0] * 90, "by default it decays in the last tenth"
    assert curve("constant", warmup_steps=10)[10:] == [1.0] * 90


def test_decay_steps_shorten_every_decay() -> None:
    late = curve("cosine", decay_steps=20)
    assert late[:80] == [1.0] * 80 and late[99] == pytest.approx(0.1)


def test_min_lr_overrides_its_ratio() -> None:
    rate = learning_rate(OptimConfig(lr=2e-5, min_lr_ratio=0.5, min_lr=6.6e-7), ScheduleConfig(name="cosine"), 100)
    assert rate(99) == pytest.approx(6.6e-7)


@given(
    name=st.sampled_from(NAMES),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 300),
    decay=st.none() | st.integers(1, 300),
)
def test_no_rate_is_past_the_peak_below_the_minimum_or_not_a_number(
    name: str, steps: int, warmup: int, decay: int | None
) -> None:
    rate = learning_rate(
        OptimConfig(lr=1.0), ScheduleConfig(name=name, warmup_steps=min(warmup, steps), decay_steps=decay), steps
    )
    values = [rate(step) for step in range(min(warmup, steps), steps + 3)]
    assert all(math.isfinite(value) and 0.1 - 1e-9 <= value <= 1.0 for value in values)
    assert values == sorted(values, reverse=True), "after the warmup it never rises"


def spans(size: int, start: int, steps: int) -> BatchSpans:
    return BatchSpans(size, BatchWarmupConfig(start=start, steps=steps))


def test_batch_warmup_adds_the_first_size_in_equal_stages() -> None:
    sizes = [spans(8, 2, 6).size_of(step) for step in range(10)]
    assert sizes == [2, 2, 4, 4, 6, 6, 8, 8, 8, 8]
    assert spans(8, 2, 6).sizes() == [2, 4, 6, 8]
    assert [BatchSpans(8, BatchWarmupConfig()).positions(step) for step in range(2)] == [range(8), range(8, 16)]


@given(start=st.integers(1, 5), factor=st.integers(1, 6), extra=st.integers(0, 20), total=st.integers(1, 60))
def test_batches_lie_end_to_end_whatever_the_warmup(start: int, factor: int, extra: int, total: int) -> None:
    made = spans(start * factor, start, factor - 1 + extra)
    position = 0
    for step in range(total):
        size = made.size_of(step)
        assert made.position(step) == position and size in made.sizes()
        assert made.positions(step) == range(position, position + size)
        position += size
    half = total // 2
    assert list(made.from_step(half, total)) == [made.positions(step) for step in range(half, total)]


Spans = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 30)), max_size=4)


@given(size=st.integers(1, 8), first=Spans, second=Spans, at=st.integers(0, 20))
def test_skipped_spans_are_passed_over_and_nothing_else_is(
    size: int, first: list[tuple[int, int]], second: list[tuple[int, int]], at: int
) -> None:
    """Also when more is skipped in the middle of a run, which then goes on where its data had come to."""
    made = BatchSpans(size, BatchWarmupConfig())
    made.skip((start, start + length) for start, length in first)
    seen = [position for step in range(at) for position in made.positions(step)]
    position = made.position(at)
    made.skip((start, start + length) for start, length in second)
    made.go_on(at, position)
    seen += [each for step in range(at, at + 40) for each in made.positions(step)]
    gone = {each for start, length in first for each in range(start, start + length)}
    later = {each for start, length in second for each in range(start, start + length)}
    expected = [each for each in range(1000) if each not in gone and (each < position or each not in later)]
    assert seen == expected[: len(seen)]
    resumed = BatchSpans(size, BatchWarmupConfig())
    resumed.skip(made.skipped)
    resumed.go_on(at + 7, made.position(at + 7))
    assert [resumed.positions(step) for step in range(at + 7, at + 20)] == [
        made.positions(step) for step in range(at + 7, at + 20)
    ]
