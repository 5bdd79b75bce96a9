"""`profile.steps`: a trace of some steps, where their time went, and a run that learns the same."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from llm_recipes.errors import UserError
from llm_recipes.training.phases import REST, Phases

Workplace = Callable[[str], Path]


def run(config: Any) -> str | None:
    from llm_recipes.training.run import pretrain

    try:
        return pretrain(config)
    except UserError as error:
        return str(error)


def settings(**changes: Any) -> dict[str, Any]:
    return {"train__steps": 5, "train__global_batch_size": 4, "schedule__warmup_steps": 0, **changes}


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_the_steps_asked_for_are_traced_on_the_ranks_asked_for_and_the_run_learns_the_same(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    """Two micro-batches a step on each of two ranks: each phase comes as often as it should, in the steps wanted."""
    traced, plain = workplace("traced"), workplace("plain")
    model = tiny_models["mistral"]
    config = tiny.pretrain_config(traced, model, **settings(profile__steps=[2, 3], profile__ranks=[1]))
    assert ranks(2, run, config) == [None, None]
    ranks(2, run, tiny.pretrain_config(plain, model, **settings()))
    assert losses(traced) == losses(plain)

    folder = traced / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"steps-2-3-rank-1.{ending}" for ending in ("json.gz", "phases.json", "txt")
    ]
    events = json.loads(gzip.decompress((folder / "steps-2-3-rank-1.json.gz").read_bytes()))["traceEvents"]
    names = [each["name"] for each in events if each.get("cat") == "user_annotation"]
    expected = {"data": 2, "forward": 4, "backward": 4, "optimizer": 2}
    assert {name: names.count(name) for name in expected} == expected
    told = json.loads((folder / "steps-2-3-rank-1.phases.json").read_text())
    assert told["steps"] == 2 and list(told["seconds"]) == [*expected, REST]
    assert all(seconds > 0 for seconds in told["seconds"].values())
    forward = sum(each["dur"] for each in events if each.get("cat") == "user_annotation" and each["name"] == "forward")
    assert told["seconds"]["forward"] == pytest.approx(forward / 1e6, rel=0.2, abs=1e-3)
    assert "aten::" in (folder / "steps-2-3-rank-1.txt").read_text()


def test_a_run_that_stops_before_the_last_step_keeps_the_trace_of_those_it_took(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder = workplace("run")
    changes = settings(profile__steps=[2, 5], train__stop_at=3)
    assert ranks(1, run, tiny.pretrain_config(folder, tiny_models["mistral"], **changes)) == [None]
    assert (folder / "run" / "profile" / "steps-2-3-rank-0.json.gz").is_file()
    # The second launch begins past the first step wanted: no trace, and the same run.
    assert ranks(1, run, tiny.pretrain_config(folder, tiny_models["mistral"], **settings())) == [None]
    assert len(losses(folder)) == 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"profile__steps": [3]}, "profile.steps=[3]: the first and the last step of a trace, from 1, as [10,12]"),
        ({"profile__steps": [0, 2]}, "from 1"),
        ({"profile__steps": [3, 2]}, "the first and the last step"),
        ({"profile__steps": [3, 6]}, "profile.steps=[3, 6] lies past train.steps=5"),
        ({"profile__steps": [1, 2], "profile__ranks": [1]}, "profile.ranks=[1]: the processes are 0 to 0"),
        ({"profile__steps": [1, 2], "profile__ranks": [-1]}, "profile.ranks=[-1]: must not be negative"),
    ],
)
def test_a_mistake_is_one_line(
    ranks: Any, tiny_models: Any, workplace: Workplace, changes: dict[str, Any], said: str
) -> None:
    folder = workplace("run")
    try:
        found = ranks(1, run, tiny.pretrain_config(folder, tiny_models["mistral"], **settings(**changes)))[0]
    except UserError as error:
        found = str(error)
    assert found is not None and said in found and "\n" not in found
    assert not (folder / "run").exists()


def test_phases_are_measured_while_they_are_on_and_the_rest_is_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("llm_recipes.training.phases.time.perf_counter", lambda: now)
    phases = Phases()

    def take(name: str, seconds: float) -> None:
        nonlocal now
        with phases(name):
            now += seconds

    take("forward", 8.0)
    phases.start()
    take("forward", 1.0)
    take("backward", 2.0)
    now += 4.0
    take("forward", 0.5)
    assert phases.stop() == {"forward": 1.5, "backward": 2.0, REST: 4.0}
    take("optimizer", 8.0)
    phases.start()
    assert phases.stop() == {REST: 0.0}
