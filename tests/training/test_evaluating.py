"""A run measured in suites on the way: when, on which model, once, and what becomes of the scores."""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from llm_recipes.config import EvaluationConfig
from llm_recipes.telemetry import metrics
from llm_recipes.training.evaluating import Inbox, due
from llm_recipes.training.lock import Lock

Workplace = Callable[[str], Path]
SUITE = """
tasks:
  mini_choice_ja: {group: japanese, metric: acc, items: 12, shots: 0}
  mini_cloze_en: {group: english, metric: acc, items: 10, shots: 0}
"""
WRITES = """
tasks:
  mini_generate_arithmetic_en: {group: mathematics, items: 4}
"""
SMALL = {"evaluation__suites": ["small"], "evaluation__at_steps": [2]}


@pytest.fixture
def place(workplace: Workplace) -> Path:
    folder = workplace("run")
    (folder / "conf" / "suite").mkdir(parents=True)
    (folder / "conf" / "suite" / "small.yaml").write_text(SUITE)
    (folder / "conf" / "suite" / "writes.yaml").write_text(WRITES)
    return folder


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Where a user's own conf/suite is found."""
    with contextlib.chdir(folder):
        yield


def run(folder: Path, config: Any, *before: str) -> str | None:
    """A whole run on this rank; the user's mistake that ended it, or None.

    Args:
        before: names of functions of this file to call first.
    """
    from llm_recipes.errors import UserError
    from llm_recipes.training.run import pretrain

    with inside(folder):
        try:
            pretrain(config)
        except UserError as error:
            return str(error)
    return None


def evaluate(folder: Path, keys: dict[str, Any]) -> str | None:
    """The verb on this rank."""
    from llm_recipes.config import EvaluateConfig
    from llm_recipes.errors import UserError
    from llm_recipes.evaluate import main

    with inside(folder):
        try:
            main(EvaluateConfig(**keys))
        except UserError as error:
            return str(error)
    return None


def rows(folder: Path, name: str = "run") -> dict[tuple[int, str], Any]:
    """What the metrics hold of evaluations, by step and suite."""
    found = [row for row in metrics.lines(folder / name / "metrics.jsonl") if "evaluation" in row]
    scores = {(row["step"], suite): each for row in found for suite, each in row["evaluation"].items()}
    assert len(scores) == len(found), "no row twice"
    return scores


def result(folder: Path, step: int, name: str = "run", suite: str = "small") -> dict[str, Any]:
    path = folder / name / "evaluations" / f"step-{step:08d}" / f"{suite}.json"
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@given(st.lists(st.integers(1, 50)), st.none() | st.integers(1, 20), st.integers(1, 50), st.integers(0, 50))
def test_steps_that_are_measured(at: list[int], every: int | None, horizon: int, step: int) -> None:
    wanted = {*at, *(range(every, 51, every) if every is not None else ())}
    assert due(EvaluationConfig(at_steps=at, every=every), step, horizon) == (step in wanted)
    config = EvaluationConfig(suites=["small"], at_steps=at, every=every)
    assert due(config, step, horizon) == (step in {*wanted, horizon}), "the end is one of them"


def test_a_run_measures_itself_and_its_base_and_keeps_those_checkpoints(
    ranks: Any, tiny_models: Any, place: Path
) -> None:
    changes = {**SMALL, "checkpoint__every": 1, "checkpoint__keep": 1}
    config = tiny.pretrain_config(place, tiny_models["mistral"], **changes)
    assert ranks(2, run, place, config) == [None, None]
    names = sorted(path.name for path in (place / "run" / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000008"]
    scores = rows(place)
    assert set(scores) == {(0, "small"), (2, "small"), (8, "small")}
    for step in (2, 8):
        found = result(place, step)
        assert found["step"] == step and found["missing"] == {} and found["devices"] == 2
        assert found["tasks"]["mini_choice_ja"]["items"] == 12
        assert scores[step, "small"]["groups"] == found["groups"]
        assert scores[step, "small"]["tasks"] == {name: each["score"] for name, each in found["tasks"].items()}
    (base,) = (place / "base").glob("*/small.json")
    assert json.loads(base.read_text())["groups"] == scores[0, "small"]["groups"]
    # The verb on the checkpoint, in one process: the same scores to the digit.
    checkpoint = place / "run" / "checkpoints" / "step-00000008"
    assert ranks(1, evaluate, place, dict_of(model=str(checkpoint), suite="small", output=str(place / "own"))) == [None]
    again = json.loads((place / "own" / "small.json").read_text())
    assert {name: each["score"] for name, each in again["tasks"].items()} == scores[8, "small"]["tasks"]
    assert again["model_fingerprint"] == result(place, 8)["model_fingerprint"]


def dict_of(**keys: Any) -> dict[str, Any]:
    return keys


def test_the_base_is_measured_once_for_all_runs_of_a_folder(ranks: Any, tiny_models: Any, place: Path) -> None:
    changes = {**SMALL, "evaluation__at_steps": [1], "train__stop_at": 1}
    ranks(1, run, place, tiny.pretrain_config(place, tiny_models["mistral"], **changes))
    (base,) = (place / "base").glob("*/small.json")
    wrong = json.loads(base.read_text()) | {"groups": {"japanese": 0.125, "english": 0.5}}
    base.write_text(json.dumps(wrong))
    ranks(1, run, place, tiny.pretrain_config(place, tiny_models["mistral"], run__name="other", **changes))
    assert rows(place, "other")[0, "small"]["groups"] == wrong["groups"], "read, not measured"
    ranks(1, run, place, tiny.pretrain_config(place, tiny_models["tied"], run__name="tied", **changes))
    assert len(list((place / "base").iterdir())) == 2, "another model has a place of its own"


def test_what_comes_between_a_runs_last_look_and_its_end_is_handed_over(
    ranks: Any, tiny_models: Any, place: Path
) -> None:
    config = tiny.pretrain_config(place, tiny_models["mistral"], **SMALL, evaluation__where="elsewhere")
    assert ranks(1, run, place, config) == [None]
    lock = Lock(place / "run")
    lock.take()  # the run has said that it has ended, and still holds its folder

    def leave() -> None:
        while not (place / "run" / "evaluations" / "step-00000008" / "small.json").exists():
            time.sleep(0.1)
        time.sleep(0.3)
        lock.release()

    leaving = threading.Thread(target=leave)
    leaving.start()
    assert ranks(1, evaluate, place, {"watch": str(place / "run"), "suite": ["small"]}) == [None]
    leaving.join()
    assert set(rows(place)) == {(2, "small"), (8, "small")}


def retire_after_the_first(folder: Path, keys: dict[str, Any]) -> str | None:
    """The verb, beside a run whose retention takes a checkpoint that was to come next."""
    from llm_recipes.training import evaluating

    real = evaluating._measured

    def measured(config: Any, wanted: Any, subject: Any, place: Any) -> None:
        real(config, wanted, subject, place)
        shutil.rmtree(folder / "run" / "checkpoints" / "step-00000004", ignore_errors=True)

    evaluating._measured = measured
    try:
        return evaluate(folder, keys)
    finally:
        evaluating._measured = real


def test_a_checkpoint_that_goes_before_it_is_measured_is_no_end(ranks: Any, tiny_models: Any, place: Path) -> None:
    # Saved while training waits: on a busy machine one that is still being written leaves the next one out.
    changes = {"checkpoint__every": 2, "checkpoint__keep": None, "checkpoint__async_save": False}
    config = tiny.pretrain_config(place, tiny_models["mistral"], **changes)
    assert ranks(1, run, place, config) == [None]
    assert ranks(1, retire_after_the_first, place, {"watch": str(place / "run"), "suite": ["small"]}) == [None]
    assert {step for step, _ in rows(place)} == {2, 6, 8}


def test_a_model_asked_in_another_way_is_measured_again(ranks: Any, tiny_models: Any, place: Path) -> None:
    keys = dict_of(model=str(tiny_models["mistral"]), suite="small", output=str(place / "own"))
    for dtype in ("float32", "bfloat16"):
        assert ranks(1, evaluate, place, {**keys, "dtype": dtype}) == [None]
        assert json.loads((place / "own" / "small.json").read_text())["dtype"] == dtype


def test_what_was_not_measured_before_a_crash_is_measured_by_the_same_command(
    ranks: Any, tiny_models: Any, place: Path
) -> None:
    changes = {**SMALL, "evaluation__at_steps": [2], "train__stop_at": 2, "evaluation__base": False}
    config = tiny.pretrain_config(place, tiny_models["mistral"], **changes)
    ranks(2, run, place, config)
    whole = rows(place)
    assert set(whole) == {(2, "small")}
    shutil.rmtree(place / "run" / "evaluations")
    path = place / "run" / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"evaluation"' not in line))
    ranks(2, run, place, config)
    assert rows(place) == whole
    before = path.read_text()
    ranks(2, run, place, config)
    assert path.read_text() == before, "nothing left to do"


def test_a_suite_in_which_the_model_writes_is_for_another_process(ranks: Any, tiny_models: Any, place: Path) -> None:
    changes = {"evaluation__suites": ["writes"], "evaluation__at_steps": [2], "checkpoint__keep": 1}
    model = tiny_models["mistral"]
    (said,) = ranks(1, run, place, tiny.pretrain_config(place, model, **changes))
    assert said is not None and "in writes the model has to write (mini_generate_arithmetic_en)" in said
    assert not (place / "run").exists()
    (said,) = ranks(1, run, place, tiny.pretrain_config(place, model, **{**changes, "evaluation__suites": ["smal"]}))
    assert said is not None and "did you mean 'small'?" in said

    config = tiny.pretrain_config(place, model, **changes, evaluation__where="elsewhere", checkpoint__every=2)
    assert ranks(1, run, place, config) == [None]
    assert rows(place) == {} and not (place / "run" / "evaluations").exists()
    assert ranks(2, evaluate, place, {"watch": str(place / "run"), "suite": ["small", "writes"]}) == [None, None]
    assert set(rows(place)) == {(step, suite) for step in (2, 8) for suite in ("small", "writes")}
    assert "mathematics" in result(place, 8, suite="writes")["groups"]
    assert sorted(path.name for path in (place / "base").glob("*/*")) == ["small.json", "writes.json"]
    assert not (place / "run" / "lock.json").exists()


def test_results_that_another_process_wrote_become_rows_once(tmp_path: Path) -> None:
    written: list[dict[str, Any]] = []
    inbox = Inbox(tmp_path, written.append)
    content = {
        "suite": "small", "suite_digest": "d", "model_fingerprint": "f", "groups": {"japanese": 0.5}, "missing": {},
        "tasks": {"a": {"score": 0.5, "standard_error": 0.1}}, "consumed_tokens": 7,
    }  # fmt: skip
    folder = tmp_path / "evaluations" / "step-00000004"
    folder.mkdir(parents=True)
    (folder / "small.json").write_text("{")  # as seen through a network file system, half there
    inbox.look()
    assert written == []
    (folder / "small.json").write_text(json.dumps(content))
    inbox.look()
    inbox.look()
    scores = {"groups": {"japanese": 0.5}, "tasks": {"a": 0.5}, "standard_errors": {"a": 0.1}}
    assert written == [{"step": 4, "consumed_tokens": 7, "evaluation": {"small": scores}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    Inbox(tmp_path, written.append).look()
    assert len(written) == 1, "a launch that comes later finds them among the rows"


def test_watch_needs_a_run(place: Path) -> None:
    said = evaluate(place, {"watch": str(place / "nowhere"), "suite": "small"})
    assert said is not None and "no run there" in said


def test_training_is_the_same_whether_it_is_measured_or_not(ranks: Any, tiny_models: Any, place: Path) -> None:
    """Dropout, gradients, the optimizer's state and the order of the data: nothing of it notices."""
    model = tiny_models["gpt2"]  # which has dropout
    ranks(2, run, place, tiny.pretrain_config(place, model, run__name="plain", parallel__precision="bf16-mixed"))
    changes = {"evaluation__suites": ["small"], "evaluation__every": 1, "parallel__precision": "bf16-mixed"}
    ranks(2, run, place, tiny.pretrain_config(place, model, run__name="measured", **changes))
    found = {}
    for name in ("plain", "measured"):
        logged = [row for row in metrics.read(place / name / "metrics.jsonl") if "lr" in row]
        found[name] = [(row["step"], row["loss"], row["grad_norm"]) for row in logged]
    assert len(found["plain"]) == 8 and found["plain"] == found["measured"]
    kinds = ["evaluation" if "evaluation" in row else "lr" if "lr" in row else "" for row in metrics.lines(
        place / "measured" / "metrics.jsonl")]  # fmt: skip
    assert kinds.index("evaluation") < kinds.index("lr"), "the base is measured before anything is done to it"
    last = [place / name / "checkpoints" / "step-00000008" for name in found]
    one, other = map(tiny.state_of, last)
    assert one.keys() == other.keys() and all(bool((one[key] == other[key]).all()) for key in one)


def test_a_checkpoint_that_goes_while_it_is_looked_at_is_not_there(tmp_path: Path) -> None:
    from llm_recipes.config import PretrainConfig
    from llm_recipes.training.evaluating import _there

    (tmp_path / "checkpoints" / "step-00000002" / "model").mkdir(parents=True)  # its weights have gone
    assert _there(tmp_path, PretrainConfig()) == ([], False)
