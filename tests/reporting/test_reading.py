"""What is read equals what was written; what was not is absent."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import run_folders
from hypothesis import given
from hypothesis import strategies as st

from llm_recipes.errors import UserError
from llm_recipes.reporting.reading import number, read_run
from llm_recipes.reporting.scores import Score, full_name, scores_in
from llm_recipes.reporting.thinning import thin
from llm_recipes.telemetry import metrics

VALUES = st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=400)


@given(VALUES, st.integers(1, 20))
def test_thinning_keeps_every_stretch_s_extremes(ys: list[float | None], buckets: int) -> None:
    xs = [float(at) for at in range(len(ys))]
    thin_xs, thin_ys = thin(xs, ys, buckets)
    assert len(thin_xs) == len(thin_ys) <= max(5 * buckets, 4 * buckets)
    assert thin_xs == sorted(set(thin_xs)) and (thin_xs[0], thin_xs[-1]) == (xs[0], xs[-1])
    assert all(ys[int(x)] == y for x, y in zip(thin_xs, thin_ys, strict=True))
    assert (None in thin_ys) == (None in ys)
    if len(ys) > 4 * buckets:
        bounds = [number * len(ys) // buckets for number in range(buckets + 1)]
        for start, stop in pairwise(bounds):
            known = [y for y in ys[start:stop] if y is not None]
            kept = [y for x, y in zip(thin_xs, thin_ys, strict=True) if start <= x < stop and y is not None]
            assert not known or (min(kept), max(kept)) == (min(known), max(known))


def test_one_spike_in_a_long_run_is_never_lost() -> None:
    ys: list[float | None] = [1.0] * 100_000
    ys[54_321] = 94.0
    xs, thinned = thin(range(100_000), ys, 400)
    assert len(xs) <= 2000 and thinned[xs.index(54_321)] == 94.0


TORN = [
    '{"step": 1, "loss": 1.5}', '{"step": 2, "samples": [1, 2', '{"step": 3, "event": "start", "x": "a,', "", "[1]",
    '{"step": "4"}', '{"step": 5, "loss": "nan"}', '2]}', "null",
]  # fmt: skip


@given(st.lists(st.sampled_from(TORN), max_size=8))
def test_lines_read_at_once_are_those_read_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, torn: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "torn.jsonl"
    path.write_text("\n".join(torn), encoding="utf-8")
    expected = []
    for line in torn:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            expected.append(row)
    assert metrics.lines(path) == expected


def test_evaluation_rows_do_not_hide_training_rows(tmp_path: Path) -> None:
    rows = [
        {"step": 5, "loss": 1.0}, {"step": 5, "evaluation": {"mini": {"groups": {"japanese": 0.1}}}},
        {"step": 5, "evaluation": {"other": {"groups": {}}}}, {"step": 5, "evaluation": {"mini": {"groups": {}}}},
        {"step": 5, "validation": {}},
    ]  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert metrics.read(path) == [rows[3], rows[2], rows[0], rows[4]]


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "event": "start", "time": 1000.0, "ranks": 4, "seconds": 10.0},
        {"step": 1, "loss": 3.0, "seconds": 5.0, "tokens_per_second_per_device": 10.0},
        {"step": 2, "loss": 2.0, "seconds": 5.0, "tokens_per_second_per_device": 30.0},
        {"step": 0, "event": "start", "time": 2000.0, "ranks": 2, "seconds": 0.0},
        {"step": 2, "loss": 2.5, "seconds": 100.0, "tokens_per_second_per_device": 20.0},
        {"step": 2, "event": "error", "time": 2030.0, "message": "no space\nleft"},
        {"step": 0, "evaluation": {"mini": {"groups": {"japanese": 0.3, "english": None}}}},
        {"step": 2, "evaluation": {"mini": {"groups": {"japanese": 0.4}}}},
        {"step": 2, "validation": {"ja": {"bits_per_byte": None, "nats_per_token": 2.5}}},
    ]
    run = read_run(run_folders.write_run(tmp_path / "r", lines, run_folders.settings()), "r")
    assert [row["loss"] for row in run.steps] == [3.0, 2.5]
    assert (run.status, run.error) == ("failed", "no space left")
    # 4 devices from 990 to 1000, or 10 s in steps; 2 devices from 2000 to 2030, but 100 s in steps.
    assert run.device_hours == pytest.approx((4 * 10 + 2 * 100) / 3600)
    assert run.tokens_per_second == 20.0 and run.settings["optim.lr"] == 1e-5
    assert run.scores(0) == {"mini.japanese": Score(0.3, "mini", "japanese")}
    ja = Score(2.5, None, "bits_per_byte", "ja", None, False, "nats_per_token")
    assert run.scores(2) == {"mini.japanese": Score(0.4, "mini", "japanese"), "bits_per_byte.ja": ja}
    assert run.stop == 40 and run.last_step == 2


@pytest.mark.parametrize("value", [True, None, "nan", math.nan, math.inf, "1.0", [1]])
def test_what_is_no_finite_number_is_no_figure(value: object) -> None:
    assert number(value) is None and number(2) == 2.0


def test_a_mean_s_standard_error_is_that_of_independent_tasks() -> None:
    result = run_folders.result({"japanese": 0.4})
    for name in ("a", "b"):
        result["tasks"][name] = {"group": "japanese", "score": 0.4, "standard_error": 0.03}
    found = scores_in({}, {"mini": result}, {}, {})["mini.japanese"]
    assert found.standard_error == pytest.approx(math.sqrt(0.012**2 + 2 * 0.03**2) / 3)
    result["tasks"]["c"] = {"group": "japanese", "score": 0.1, "standard_error": None}
    assert scores_in({}, {"mini": result}, {}, {})["mini.japanese"].standard_error is None


def test_a_score_is_named_as_short_as_it_is_clear() -> None:
    result = {"mini": run_folders.result({"japanese": 0.4, "english": 0.5})}
    known = scores_in({}, result, {"ja": {"bits_per_byte": 1.5}}, {})
    assert full_name("japanese", known, "best=japanese") == "mini.japanese"
    assert full_name("japanese_task", known, "") == "mini.japanese.japanese_task"
    assert full_name("bits_per_byte.ja", known, "") == "bits_per_byte.ja"
    twice = known | scores_in({}, {"other": run_folders.result({"japanese": 0.1}, suite="other")}, {}, {})
    with pytest.raises(UserError, match=r"best=japanese: several have that name; give one of mini.japanese, other.jap"):
        full_name("japanese", twice, "best=japanese")
    with pytest.raises(UserError, match=r"best=japanes: no such score, did you mean 'japanese'\? There are mini.jap"):
        full_name("japanes", known, "best=japanes")
    with pytest.raises(UserError, match=r"keep.zzz: no such score, there are mini.japanese, mini.english, mini.jap"):
        full_name("zzz", known, "keep.zzz")
