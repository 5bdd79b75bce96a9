"""A result: no mean over what is missing, whole files or none, and what it says in a run's metrics."""

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest

from llm_recipes.config import SuiteConfig, TaskConfig
from llm_recipes.errors import UserError
from llm_recipes.evaluation import results

TASKS = {
    "one": TaskConfig(group="japanese"),
    "two": TaskConfig(group="japanese"),
    "three": TaskConfig(group="english"),
    "text": TaskConfig(kind="bits_per_byte", group="bits_per_byte"),
    "said": TaskConfig(kind="prompts", group="english"),
}


def task(score: float, error: float | None = None) -> dict[str, Any]:
    return {"score": score, "standard_error": error}


DTYPE = "float32"


def result(**changes: Any) -> dict[str, Any]:
    own = {"suite": "mine", "suite_digest": "d", "model_fingerprint": "f", "groups": {"japanese": None}, "missing": {}}
    own |= {"dtype": DTYPE, "chat_template": False}
    return own | {"tasks": {"one": task(0.25, 0.0), "text": task(1.5)}} | changes


def test_a_group_with_a_missing_task_has_no_mean() -> None:
    config = SuiteConfig(tasks=TASKS)
    scores = {"one": task(0.25), "two": task(0.75), "three": task(0.5), "text": task(1.5)}
    assert results.group_means(config, scores) == {"japanese": 0.5, "english": 0.5}
    del scores["two"]
    assert results.group_means(config, scores) == {"japanese": None, "english": 0.5}


def test_a_result_comes_back_for_its_own_suite_and_model_only(tmp_path: Path) -> None:
    path = results.write(tmp_path / "new" / "folder", result())
    assert results.read(path) == result()
    assert [each.name for each in path.parent.iterdir()] == ["mine.json"]
    assert results.known(path.parent, "mine", "d", "f", DTYPE) == result()
    assert results.known(path.parent, "mine", "d", "f", "another") is None
    assert results.known(path.parent, "mine", "d", "f", DTYPE, chat_template=True) is None
    assert results.known(path.parent, "mine", "other", "f", DTYPE) is None
    assert results.known(path.parent, "mine", "d", "other", DTYPE) is None
    assert results.known(path.parent, "another", "d", "f", DTYPE) is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"suite": "mine"}', '{"tasks": null'])
def test_what_is_no_result_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(UserError, match=r"mine\.json: not a result"):
        results.read(tmp_path / "mine.json")


def test_a_number_that_json_does_not_know_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        results.write(tmp_path, result(tasks={"one": task(float("nan"))}))
    assert not (tmp_path / "mine.json").exists()


def test_a_row_of_the_runs_metrics_holds_what_there_is(tmp_path: Path) -> None:
    row = results.metrics_row(result(), 20, 640)
    assert row == {
        "step": 20,
        "consumed_tokens": 640,
        "evaluation": {
            "mine": {
                "groups": {"japanese": None},
                "tasks": {"one": 0.25, "text": 1.5},
                "standard_errors": {"one": 0.0},
            }
        },
    }
    json.dumps(row, allow_nan=False)


def test_a_models_fingerprint_is_of_its_contents(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_models["mistral"], tmp_path / "copy"))
    same = results.fingerprint(folder)
    assert same == results.fingerprint(tiny_models["mistral"]) != results.fingerprint(tiny_models["tied"])
    (folder / "README.md").write_text("about it")
    assert results.fingerprint(folder) == same
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert results.fingerprint(folder) != same


def write_often(folder: Path) -> None:
    for _ in range(200):
        results.write(folder, {"suite": "small", "filling": "x" * 20_000})


def test_two_jobs_that_measure_one_base_do_not_meet_in_a_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(tmp_path,)) for _ in range(2)]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    assert [each.exitcode for each in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["small.json"]
