"""The guard: what an update is judged by, what a run does when there is too much trouble, and that resuming changes
nothing of it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_recipes.config import GuardConfig
from llm_recipes.telemetry import metrics
from llm_recipes.training.guard import FINE, GRAD_NORM_SPIKE, LOSS_SPIKE, NAMES, NOT_FINITE, OVERFLOW, Guard

Workplace = Callable[[str], Path]
CPU = torch.device("cpu")


def judged(guard: Guard, loss: float, norm: float) -> int:
    return int(guard.judge(torch.tensor(loss), torch.tensor(norm)))


def by_hand(window: list[tuple[float, float]], loss: float, norm: float) -> list[float]:
    """The robust z-scores, from the formula in the guard's own words, by numpy."""
    scores = []
    columns = np.asarray([(a, math.log(b)) for a, b in window], np.float64).T
    for values, now, floor in zip(columns, (loss, math.log(norm)), (None, 0.05), strict=True):
        middle = (len(values) - 1) // 2
        median = np.sort(values)[middle]
        spread = 1.4826 * np.sort(np.abs(values - median))[middle]
        scores.append((now - median) / (spread + (floor if floor is not None else 0.01 * abs(median))))
    return scores


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0.5, 12), st.floats(0.01, 50)), min_size=10, max_size=60))
def test_a_verdict_is_the_robust_z_score_over_the_accepted_updates(steps: list[tuple[float, float]]) -> None:
    guard = Guard(GuardConfig(window=16, threshold=3.0), CPU)
    accepted: list[tuple[float, float]] = []
    for loss, norm in steps:
        verdict = judged(guard, loss, norm)
        if len(accepted) < 8:
            assert verdict == FINE, "too little is known to judge by"
        else:
            z = by_hand(accepted[-16:], loss, norm)
            if min(abs(each - 3.0) for each in z) < 1e-3:
                return  # too close to call in fp32
            assert verdict == (LOSS_SPIKE if z[0] > 3 else GRAD_NORM_SPIKE if z[1] > 3 else FINE)
        if verdict == FINE:
            accepted.append((loss, norm))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("threshold", [10.0, None])
def test_what_is_not_finite_is_left_out_and_never_becomes_usual(bad: float, threshold: float | None) -> None:
    guard = Guard(GuardConfig(window=16, threshold=threshold), CPU)
    for step in range(1, 41):
        loss, norm = (bad, 1.0) if step % 4 == 0 else (2.0, bad) if step % 4 == 2 else (2.0 + step % 3 / 100, 1.0)
        verdict = guard.judge(torch.tensor(loss), torch.tensor(norm))
        assert int(verdict) == (NOT_FINITE if step % 2 == 0 else FINE)
        guard.add(step, range(4 * step, 4 * step + 4), torch.tensor(loss), torch.tensor(norm), verdict)
    found = guard.read()
    assert [each.step for each in found] == list(range(2, 41, 2)) and guard.left_out["not_finite"] == 20
    assert found[0].positions == (8, 12)
    kept = guard.state()
    assert kept["accepted"] == 20 and np.isfinite(np.asarray(kept["usual"])).all()
    json.dumps(kept)


def test_a_gradient_of_zero_is_no_spike_and_breaks_nothing() -> None:
    guard = Guard(GuardConfig(window=16), CPU)
    for _ in range(40):
        assert judged(guard, 0.0, 0.0) == FINE
    assert judged(guard, 0.0, 1e-3) == FINE


def test_an_overflow_of_fp16_is_no_trouble_until_every_step_has_one() -> None:
    from llm_recipes.errors import UserError

    guard = Guard(GuardConfig(window=16, patience=2), CPU, scales_loss=True)
    for step in range(1, 101):
        verdict = guard.judge(torch.tensor(2.0), torch.tensor(1.0 if step == 50 else math.inf))
        guard.add(step, range(step, step + 1), torch.tensor(2.0), torch.tensor(math.inf), verdict)
    assert {each.reason for each in guard.read()} == {NAMES[OVERFLOW]} and not guard.too_many
    for step in range(101, 152):
        verdict = guard.judge(torch.tensor(2.0), torch.tensor(math.inf))
        guard.add(step, range(step, step + 1), torch.tensor(2.0), torch.tensor(math.inf), verdict)
    with pytest.raises(UserError, match="overflowed fp16 in 101 steps one after another"):
        guard.read()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0.5, 12), st.floats(0.01, 50)), min_size=1, max_size=50), st.integers(0, 50))
def test_a_guard_that_is_saved_and_loaded_judges_as_it_would_have(steps: list[tuple[float, float]], cut: int) -> None:
    def feed(guard: Guard, part: list[tuple[float, float]], first: int) -> list[int]:
        verdicts = []
        for step, (loss, norm) in enumerate(part, first):
            verdict = guard.judge(torch.tensor(loss), torch.tensor(norm))
            guard.add(step, range(step, step + 1), torch.tensor(loss), torch.tensor(norm), verdict)
            verdicts.append(int(verdict))
        guard.read()
        return verdicts

    config = GuardConfig(window=16, threshold=3.0)
    whole, first, second = Guard(config, CPU), Guard(config, CPU), Guard(config, CPU)
    expected = feed(whole, steps, 1)
    found = feed(first, steps[:cut], 1)
    second.load(json.loads(json.dumps(first.state())))
    found += feed(second, steps[cut:], cut + 1)
    assert found == expected
    if steps[cut:]:
        assert second.recent == whole.recent and second.state() == whole.state()


def cycles(folder: Path) -> Path:
    """Corpora that a tiny model learns at once: counting, by one and by two."""
    for name, stride in (("ja", 1), ("en", 2)):
        documents = [[(start + stride * step) % 12 for step in range(64)] for start in range(100)]
        tiny.write_corpus(folder / name, documents)
    return folder


OPTIONS: dict[str, Any] = {
    "train__steps": 60, "train__micro_batch_size": 2, "checkpoint__every": 10, "checkpoint__keep": 4,
    "checkpoint__async_save": False, "guard__window": 16, "guard__patience": 3, "optim__lr": 1e-2,
    "schedule__name": "constant", "data__validation": {},
}  # fmt: skip


def poisoned(config: Any, positions: tuple[int, int], how: str, crash: str | None = None) -> tuple[str | None, Any]:
    """A run some of whose samples are poison: targets in another order, or a loss that overflows; what ended it, and
    the positions that it trained on, step by step."""
    from llm_recipes.data import stream
    from llm_recipes.errors import UserError
    from llm_recipes.training import loop, objective, rollback, trainer
    from llm_recipes.training.run import pretrain

    seen: list[tuple[int, list[int]]] = []
    sample, loss, judge, write = stream.Samples.sample, objective.NextToken.loss, loop.to_device, rollback.write

    def shuffled(self: Any, position: int) -> Any:
        arrays = sample(self, position)
        if how == "labels" and positions[0] <= position < positions[1]:
            arrays["targets"] = np.where(arrays["targets"] >= 0, (arrays["targets"] * 5 + 3) % 12, arrays["targets"])
        return arrays

    def overflowing(self: Any, models: Any, batch: Any) -> Any:
        total, per_window, sums = loss(self, models, batch)
        inside = (batch["position"] >= positions[0]) & (batch["position"] < positions[1])
        return (total * torch.where(inside.any(), math.inf, 1.0) if how == "overflow" else total), per_window, sums

    def noting(batch: Any, device: Any) -> Any:
        seen.append(batch["position"].tolist())
        return judge(batch, device)

    def dying(path: Path, account: Any) -> None:
        write(path, account)
        raise KeyboardInterrupt("died in the middle of a rollback")

    stream.Samples.sample, objective.NextToken.loss = shuffled, overflowing  # type: ignore[method-assign, assignment]
    loop.to_device = noting
    trainer.rollback.write = dying if crash else write
    try:
        pretrain(config)
    except (UserError, KeyboardInterrupt) as error:
        return str(error), seen
    finally:
        stream.Samples.sample, objective.NextToken.loss = sample, loss  # type: ignore[method-assign]
        loop.to_device, trainer.rollback.write = judge, write
    return None, seen


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = metrics.read(folder / "run" / "metrics.jsonl")
    return [row for row in found if (kind in row if kind == "loss" else row.get("event") == kind)]


def final(folder: Path) -> float:
    return float(np.mean([row["loss"] for row in rows(folder, "loss")[-5:]]))


@pytest.fixture(scope="module")
def clean(ranks: Any, tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> float:
    """The final loss of the run without poison."""
    folder = cycles(tmp_path_factory.mktemp("clean"))
    config = tiny.pretrain_config(folder, tiny_models["mistral"], **OPTIONS)
    assert ranks(2, poisoned, config, (0, 0), "labels")[0][0] is None
    assert rows(folder, "left_out") == [] and final(folder) < 1.0
    return final(folder)


@pytest.mark.parametrize("how", ["labels", "overflow"])
def test_one_poisoned_batch_is_left_out_named_and_forgotten(
    ranks: Any, tiny_models: Any, tmp_path: Path, clean: float, how: str
) -> None:
    folder = cycles(tmp_path)
    config = tiny.pretrain_config(folder, tiny_models["mistral"], **OPTIONS | {"logging__every": 4})
    assert ranks(2, poisoned, config, (160, 164), how)[0][0] is None
    [event] = rows(folder, "left_out")
    assert event["step"] == 41 and event["samples"] == [160, 164] and sum(event["sources"].values()) == 4
    assert event["reason"] == {"labels": "loss_spike", "overflow": "not_finite"}[how]
    assert rows(folder, "rollback") == [] and final(folder) == pytest.approx(clean, abs=0.25)
    assert rows(folder, "loss")[-1]["skipped_updates"][event["reason"]] == 1
    # The update was left out: weights and moments after it are those before it.
    assert [row["step"] for row in rows(folder, "loss")] == list(range(4, 61, 4))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["labels", "overflow"])
def test_too_much_trouble_goes_back_and_past_the_samples_that_made_it(
    ranks: Any, tiny_models: Any, tmp_path: Path, clean: float, how: str
) -> None:
    folder = cycles(tmp_path)
    config = tiny.pretrain_config(folder, tiny_models["mistral"], **OPTIONS | {"guard__lr_factor": 0.5})
    found = ranks(2, poisoned, config, (168, 184), how)
    assert [problem for problem, _ in found] == [None, None]
    [event] = rows(folder, "rollback")
    assert (event["at_step"], event["to_step"], event["skipped"]) == (45, 40, [168, 180])
    # All four poisoned batches come by: three make the run go back, the fourth is left out alone.
    samples = sorted(row["samples"] for row in rows(folder, "left_out"))
    assert samples == [[168, 172], [172, 176], [176, 180], [180, 184]]
    state = json.loads((folder / "run" / "checkpoints" / "step-00000060" / "state.json").read_text())
    assert state["skipped_spans"] == [[168, 180]] and state["position"] == 60 * 4 + 12
    trained = [row for row in rows(folder, "loss")]
    assert [row["step"] for row in trained] == list(range(1, 61))
    assert {row["lr"] for row in trained[2:40]} == {1e-2} and {row["lr"] for row in trained[40:]} == {5e-3}
    assert final(folder) == pytest.approx(clean, abs=0.25)
    again = [position for _, seen in found for batch in seen[-20:] for position in batch]
    assert not set(again) & set(range(168, 180))


@pytest.mark.slow
def test_a_resume_in_the_middle_of_trouble_is_the_uninterrupted_run_bit_for_bit(
    ranks: Any, tiny_models: Any, tmp_path: Path
) -> None:
    model, found = tiny_models["mistral"], []
    for name in ("straight", "stopped"):
        folder = cycles(tmp_path / name)
        if name == "stopped":
            # Inside the trouble, and again on the way back to where it was.
            for stop in (44, 43, 46):
                config = tiny.pretrain_config(folder, model, **OPTIONS | {"train__stop_at": stop})
                assert ranks(2, poisoned, config, (168, 180), "labels")[0][0] is None
        # A checkpoint at 44 is there in one of them alone: both go back to the one from before the trouble.
        config = tiny.pretrain_config(folder, model, **OPTIONS)
        assert ranks(2, poisoned, config, (168, 180), "labels")[0][0] is None
        [event] = rows(folder, "rollback")
        found.append((event["to_step"], event["skipped"], [row["loss"] for row in rows(folder, "loss")]))
    assert found[0] == found[1]


def test_a_crash_in_the_middle_of_a_rollback_is_a_rollback(ranks: Any, tiny_models: Any, tmp_path: Path) -> None:
    folder, model = cycles(tmp_path), tiny_models["mistral"]
    config = tiny.pretrain_config(folder, model, **OPTIONS)
    [(problem, _)] = ranks(1, poisoned, config, (160, 172), "labels", "crash")
    assert problem is not None and "died" in problem
    # The newest checkpoint may be of the course that was given up: it is not gone on from.
    [(problem, seen)] = ranks(1, poisoned, config, (160, 172), "labels")
    assert problem is None and len(rows(folder, "left_out")) == 3
    assert not {position for batch in seen for position in batch} & set(range(160, 172))
    state = json.loads((folder / "run" / "checkpoints" / "step-00000060" / "state.json").read_text())
    assert state["skipped_spans"] == [[160, 172]] and len(state["rollbacks"]) == 1


def test_a_run_that_went_back_often_enough_stops_with_an_account(ranks: Any, tiny_models: Any, tmp_path: Path) -> None:
    folder, model = cycles(tmp_path), tiny_models["mistral"]
    config = tiny.pretrain_config(folder, model, **OPTIONS | {"guard__max_rollbacks": 1})
    found = ranks(2, poisoned, config, (160, 10_000), "labels")
    for problem, _ in found:
        assert problem is not None and "3 of the last 16 updates were left out (3 loss_spike), samples" in problem
        assert "rolled back 1 times (guard.max_rollbacks)" in problem and "--samples shows the text" in problem
    assert rows(folder, "error") and (folder / "run" / "checkpoints" / "step-00000040").is_dir()


def test_with_nowhere_to_go_back_to_the_run_stops(ranks: Any, tiny_models: Any, tmp_path: Path) -> None:
    config = tiny.pretrain_config(cycles(tmp_path), tiny_models["mistral"], **OPTIONS | {"checkpoint__every": 50})
    [(problem, _)] = ranks(1, poisoned, config, (120, 10_000), "overflow")
    assert problem is not None and "there is no checkpoint to roll back to (checkpoint.every)" in problem


def test_a_stage_s_change_of_level_is_no_trouble(ranks: Any, tiny_models: Any, tmp_path: Path) -> None:
    folder = cycles(tmp_path)
    tiny.write_corpus(folder / "en", tiny.random_documents(100, seed=5))
    stages = [{"share": 0.7, "weights": {"ja": 1.0}}, {"share": 0.3, "weights": {"en": 1.0}}]
    sources = {name: {"path": str(folder / name), "weight": 0.5} for name in ("ja", "en")}
    config = tiny.pretrain_config(
        folder, tiny_models["mistral"], **OPTIONS | {"data__stages": stages, "data__sources": sources}
    )
    assert ranks(2, poisoned, config, (0, 0), "labels")[0][0] is None
    losses = [row["loss"] for row in rows(folder, "loss")]
    assert losses[-1] > losses[41] + 2, "the level changes, and by a lot"
    assert rows(folder, "left_out") == [] and rows(folder, "rollback") == []
