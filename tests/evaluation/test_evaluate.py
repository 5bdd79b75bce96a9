"""The verb: its scores are lm-eval's own to the digit, its results lie where they should, and mistakes are one line."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from ranks import Ranks

from llm_recipes.checkpoints import manifest
from llm_recipes.errors import UserError
from llm_recipes.evaluation import results

DEFINITIONS = {
    "choose": """task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/choose.jsonl}}
output_type: multiple_choice
test_split: test
fewshot_split: test
num_fewshot: 2
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
""",
    "write": """task: write
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/write.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: target
generation_kwargs: {until: ["a"], max_gen_toks: 8, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
metadata: {version: 2.0}
""",
}
SUITE = """description: Two tasks of the tests.
tasks:
  choose: {group: english}
  write: {group: mathematics}
"""


def written(folder: Path, questions: list[str]) -> list[str]:
    """What lm-eval's own model writes."""
    import logging

    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    asked = {"until": ["a"], "max_gen_toks": 8, "do_sample": False}
    made: Any = Instance
    requests = [made("generate_until", {}, (each, dict(asked)), number) for number, each in enumerate(questions)]
    return model.generate_until(requests, disable_tqdm=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """A user's folder: a model, two tasks of one's own with their data, and a suite of them."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(tiny_models["tied"], folder / "model")
    generator = random.Random(0)

    def text(length: int) -> str:
        return "".join(generator.choice("abcdefgh あいう") for _ in range(length))

    choose = [
        {"question": text(generator.randint(5, 30)), "choices": [text(generator.randint(1, 9)) for _ in range(4)],
         "answer": generator.randrange(4)}
        for _ in range(23)
    ]  # fmt: skip
    questions = [text(generator.randint(5, 30)) for _ in range(9)]
    answers = written(folder / "model", questions)
    write = [
        {"question": question, "target": answer if number % 3 else "no", "number": number}
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]
    for name, rows in (("choose", choose), ("write", write)):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tasks").mkdir()
    for name, definition in DEFINITIONS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(definition.replace("DATA", str(folder)))
    (folder / "conf" / "suite").mkdir(parents=True)
    (folder / "conf" / "suite" / "mine.yaml").write_text(SUITE)
    return folder


@pytest.fixture(scope="module")
def theirs(place: Path) -> dict[str, dict[str, Any]]:
    """What lm-eval's own command line says."""
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu",
        "--model_args", f"pretrained={place / 'model'},dtype=float32",
        "--tasks", "choose,write", "--include_path", str(place / "tasks"), "--output_path", str(place / "theirs"),
    ]  # fmt: skip
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    subprocess.run(
        command, check=True, capture_output=True, env=clean | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    )
    (file,) = (place / "theirs").rglob("results*.json")
    found: dict[str, dict[str, Any]] = json.loads(file.read_text())["results"]
    return found


def evaluate_in(folder: Path, options: dict[str, Any]) -> list[Any]:
    """The verb, where the tasks of the tests are among ours; what the loader was asked for, by rank."""
    from llm_recipes.checks import check
    from llm_recipes.config import EvaluateConfig
    from llm_recipes.evaluation import definitions, models
    from llm_recipes.evaluation.evaluate import evaluate

    os.chdir(folder)
    ours = definitions.path_of

    def path_of(name: str) -> Path | None:
        mine = folder / "tasks" / f"{name}.yaml"
        return mine if mine.is_file() else ours(name)

    definitions.path_of = path_of
    opened: list[Any] = []
    open_model = models.open_model

    def counted(subject: Any, *rest: Any) -> Any:
        opened.append(subject.name)
        return open_model(subject, *rest)

    models.open_model = counted  # type: ignore[assignment]
    try:
        config = EvaluateConfig(**options)
        check("evaluate", config)
        evaluate(config)
    except UserError as error:
        return [str(error)]
    finally:
        models.open_model, definitions.path_of = open_model, ours
        os.chdir("/")
    return opened


@pytest.mark.slow
@pytest.mark.parametrize(("number", "sharding"), [(1, "no_shard"), (2, "full_shard")])
def test_scores_are_lm_evals_own_to_the_digit(
    number: int, sharding: str, place: Path, theirs: dict[str, dict[str, Any]], ranks: Ranks
) -> None:
    output = f"out-{number}"
    ranks(number, evaluate_in, place, {"model": "model", "suite": "mine", "output": output, "sharding": sharding})
    result = results.read(place / output / "mine.json")
    for task in ("choose", "write"):
        figures = result["tasks"][task]["figures"]
        expected = {key: value for key, value in theirs[task].items() if "," in key and "stderr" not in key}
        assert {key: figures[key] for key in expected} == expected
    assert result["tasks"]["choose"]["standard_error"] == theirs["choose"]["acc_stderr,none"]
    assert 0 < result["tasks"]["choose"]["score"] < 1
    assert result["tasks"]["write"]["score"] == pytest.approx(2 / 3)
    assert result["groups"] == {"english": result["tasks"]["choose"]["score"], "mathematics": pytest.approx(2 / 3)}
    assert (result["devices"], result["dtype"], result["missing"]) == (number, "float32", {})


def test_a_result_says_what_it_depends_on(place: Path, ranks: Ranks) -> None:
    ranks(1, evaluate_in, place, {"model": "model", "suite": "mine", "output": "said", "items": 5, "shots": 1})
    result = results.read(place / "said" / "mine.json")
    task = result["tasks"]["choose"]
    assert (task["items"], task["items_of"], task["shots"], task["metric"], task["version"]) == (5, 23, 1, "acc", "1.0")
    assert result["tasks"]["write"]["parsed"] is not None
    assert result["harness"].startswith("lm-eval ") and len(result["suite_digest"]) == 64
    assert result["configuration"]["tasks"]["choose"]["items"] == 5


def test_what_is_measured_is_left_alone_until_something_changes(place: Path, tmp_path: Path, ranks: Ranks) -> None:
    folder = Path(shutil.copytree(place, tmp_path / "again"))
    options = {"model": "model", "suite": "mine", "items": 3}
    path = folder / "outputs" / "evaluations" / "model" / "mine.json"
    assert ranks(2, evaluate_in, folder, options) == [["model"]] * 2
    first = results.read(path)
    assert ranks(2, evaluate_in, folder, options) == [[]] * 2
    assert results.read(path) == first
    assert ranks(1, evaluate_in, folder, options | {"overwrite": True}) == [["model"]]
    assert ranks(1, evaluate_in, folder, options | {"items": 4}) == [["model"]]
    tiny.save_model(folder / "model", "qwen3_tied", seed=5)
    assert ranks(1, evaluate_in, folder, options | {"items": 4}) == [["model"]]
    assert results.read(path)["model_fingerprint"] != first["model_fingerprint"]


def test_a_task_that_fails_does_not_lose_the_others(place: Path, tmp_path: Path, ranks: Ranks) -> None:
    folder = Path(shutil.copytree(place, tmp_path / "fails"))
    broken = DEFINITIONS["write"].replace("target: target", "target: '{{ 1 / (number - 4) }}'")
    (folder / "tasks" / "write.yaml").write_text(broken.replace("DATA", str(folder)))
    ranks(2, evaluate_in, folder, {"model": "model", "suite": "mine"})
    result = results.read(folder / "outputs" / "evaluations" / "model" / "mine.json")
    assert list(result["tasks"]) == ["choose"] and "ZeroDivisionError" in result["missing"]["write"]
    assert result["groups"]["mathematics"] is None and result["groups"]["english"] is not None


def test_bits_per_byte_equals_the_runs_own_validation(place: Path, corpora: Path, tmp_path: Path, ranks: Ranks) -> None:
    text = tmp_path / "held_out.jsonl"
    lines = ["短い文書です。", "A longer document. " * 30, "x"]
    text.write_text("".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    data = {"tokens": str(corpora / "held_out"), "text": str(text)}
    for number, sharding in ((1, "no_shard"), (2, "full_shard")):
        output = tmp_path / f"bytes-{number}"
        options = {
            "model": "model",
            "suite": "bits_per_byte",
            "output": str(output),
            "data": data,
            "sharding": sharding,
        }
        ranks(number, evaluate_in, place, options)
        tasks = results.read(output / "bits_per_byte.json")["tasks"]
        (expected,) = ranks(1, validated, place / "model", corpora / "held_out", str(text), tmp_path / f"own-{number}")
        for name, figures in expected.items():
            assert tasks[name]["score"] == pytest.approx(figures["bits_per_byte"], rel=1e-6)
            assert {key: tasks[name]["figures"][key] for key in ("targets", "bytes", "documents")} == {
                key: figures[key] for key in ("targets", "bytes", "documents")
            }


def validated(folder: Path, tokens: Path, text: str, place: Path) -> dict[str, Any]:
    """The same texts as validation in a run scores them."""
    from rich.console import Console

    from llm_recipes.config import DataConfig, ModelConfig, ParallelConfig, TokenizeConfig, ValidationSetConfig
    from llm_recipes.data import sources, tokenizing
    from llm_recipes.data import tokenizer as tokenizers
    from llm_recipes.data.validation import open_validation
    from llm_recipes.evaluation.bits_per_byte import score_all
    from llm_recipes.models import causal, topology

    place.mkdir()
    tokenizing.tokenize(TokenizeConfig(text, str(place / "text"), str(folder), workers=1), Console(quiet=True))
    parallel = ParallelConfig(sharding="no_shard", precision="fp32")
    lm = causal.build(ModelConfig(path=str(folder)), parallel, topology.start(parallel), str(folder), False, 0)
    own = tokenizers.open_tokenizer(str(folder))
    facts = sources.TokenizerFacts(
        tokenizers.fingerprint(own), lm.vocabulary, own.eos_token_id, None, "auto", own.bos_token_id
    )
    sets = {"tokens": ValidationSetConfig(str(tokens)), "text": ValidationSetConfig(str(place / "text"))}
    return score_all(lm, open_validation(sets, DataConfig(seq_len=128, mask_documents=False), facts), 2)


def test_prompts_stand_side_by_side(place: Path, tmp_path: Path, ranks: Ranks) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("むかし\nOnce upon\n", encoding="utf-8")
    tiny.save_model(tmp_path / "other", "gpt2")
    options = {"model": ["model", str(tmp_path / "other")], "suite": "prompts", "output": str(tmp_path / "out")}
    ranks(1, evaluate_in, place, options | {"data": {"prompts": str(prompts)}})
    for name in ("model", "other"):
        (said,) = results.read(tmp_path / "out" / name / "prompts.json")["prompts"].values()
        assert [each["prompt"] for each in said] == ["むかし", "Once upon"]
        assert all(each["bits_per_byte"] > 0 and isinstance(each["completion"], str) for each in said)


def checkpoint_of(folder: Path, model: Path, step: int) -> Path:
    """A run's checkpoint, as far as its model goes."""
    checkpoint = folder / "run" / "checkpoints" / manifest.folder_name(step)
    shutil.copytree(model, checkpoint / "model")
    (checkpoint / "state.json").write_text(json.dumps({"step": step, "consumed_tokens": 640}))
    (checkpoint / "config.json").write_text(json.dumps({"parallel": {"precision": "fp32"}}))
    files = manifest.describe(checkpoint, manifest.files_in(checkpoint))
    manifest.write(checkpoint, {"step": step, "files": files})
    return checkpoint


def test_a_checkpoints_results_lie_in_its_run(place: Path, tmp_path: Path, ranks: Ranks) -> None:
    checkpoint = checkpoint_of(tmp_path, place / "model", 20)
    ranks(1, evaluate_in, place, {"model": str(checkpoint), "suite": "mine"})
    result = results.read(tmp_path / "run" / "evaluations" / "step-00000020" / "mine.json")
    assert (result["step"], result["consumed_tokens"], result["dtype"]) == (20, 640, "float32")
    row = results.metrics_row(result, 20, 640)
    assert row["evaluation"]["mine"]["tasks"] == {name: each["score"] for name, each in result["tasks"].items()}
    # A look at a few items is no score of the run's.
    ranks(1, evaluate_in, place, {"model": str(checkpoint), "suite": "mine", "items": 2})
    assert results.read(tmp_path / "run" / "evaluations" / "step-00000020" / "mine.json") == result
    look = results.read(place / "outputs" / "evaluations" / "run-step-00000020" / "mine.json")
    assert {each["items"] for each in look["tasks"].values()} == {2}


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown suite": ({"suite": "mini_ful"}, "did you mean 'mini_full'?"),
    "no data": ({"suite": "bits_per_byte", "data": {"ja": "nowhere.jsonl"}}, "data.ja=nowhere.jsonl"),
    "no model": ({"model": "nowhere/model"}, "no such"),
    "no weights": ({"model": "conf"}, "no config.json in it"),
    "a run": ({"model": "run"}, "name one of run/checkpoints"),
    "damaged": ({"model": "run/checkpoints/step-00000010"}, "damaged, "),
    "nothing named": ({"model": None}, "give either model"),
    "both named": ({"watch": "run"}, "give either model"),
    "empty list": ({"model": []}, "not empty"),
    "not writable": ({"output": "choose.jsonl/out"}, "cannot be written there"),
    "one place": ({"model": ["model", "model/../copy/model"]}, "would both lie in"),
    "no vllm": ({"engine": "vllm"}, "llm_recipes[vllm]"),
    "no template": ({"chat_template": True}, "has no chat template"),
    "batch": ({"batch_tokens": 0}, "must be at least 1"),
}


@pytest.fixture(scope="module")
def mistaken(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(
        shutil.copytree(place, tmp_path_factory.mktemp("mistaken") / "place", ignore=shutil.ignore_patterns("outputs"))
    )
    shutil.copytree(folder / "model", folder / "copy" / "model")
    checkpoint = checkpoint_of(folder, folder / "model", 10)
    weights = checkpoint / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return folder


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case: str, mistaken: Path, ranks: Ranks) -> None:
    options, line = MISTAKES[case]
    ((said, *others),) = ranks(1, evaluate_in, mistaken, {"model": "model", "suite": "mine"} | options)
    assert line in said and "\n" not in said and not others
    assert not (mistaken / "outputs").exists() or not list((mistaken / "outputs").rglob("*.json"))


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from llm_recipes.evaluation import evaluate

    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(UserError, match=r"lm_eval is not installed; pip install 'llm_recipes\[eval\]'"):
        evaluate.need_lm_eval()
