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


def spans(size: int, start: int, steps: int, total: int) -> BatchSpans:
    return BatchSpans(size, BatchWarmupConfig(start=start, steps=steps), total)


def test_batch_warmup_adds_the_first_size_in_equal_stages() -> None:
    sizes = [spans(8, 2, 6, 10).at(step)[1] for step in range(10)]
    assert sizes == [2, 2, 4, 4, 6, 6, 8, 8, 8, 8]
    assert spans(8, 2, 6, 10).sizes() == [2, 4, 6, 8]
    assert [BatchSpans(8, BatchWarmupConfig(), 3).at(step) for step in range(3)] == [(0, 8), (8, 8), (16, 8)]


@given(start=st.integers(1, 5), factor=st.integers(1, 6), extra=st.integers(0, 20), total=st.integers(1, 60))
def test_batches_lie_end_to_end_whatever_the_warmup(start: int, factor: int, extra: int, total: int) -> None:
    made = spans(start * factor, start, factor - 1 + extra, total)
    position = 0
    for step in range(total):
        first, size = made.at(step)
        assert first == position and size in made.sizes()
        position += size
    assert list(made.from_step(total // 2, total)) == [made[step] for step in range(total // 2, total)]
