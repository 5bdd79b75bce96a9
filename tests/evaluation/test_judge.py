"""The suite that is judged: answers are the model's own, every judge's figures its own, nothing is asked twice, and an
endpoint that fails costs no judgement."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import tiny
from judge_server import Answer, answer_in, by_length, completion, rating_of, refused, serving
from ranks import Ranks

from llm_recipes.errors import UserError

TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 11, "category": "math", "turns": ["1+1は?", "それに3を足すと?"], "reference": ["2です", "5です"]},
    {"question_id": 12, "category": "math", "turns": ["2の10乗は?", "その半分は?"], "reference": ["1024", "512"]},
    {"question_id": 21, "category": "writing", "turns": ["秋の俳句を詠んで。", "冬に変えて。"]},
    {"question_id": 31, "category": "stem", "turns": ["水はなぜ透明なの?"]},
]
SUITE = "tasks: {judge: {kind: judge, group: judge, answers: ANSWERS, max_new_tokens: 16}}"
OUTPUT = Path("outputs/evaluations/model")


def evaluate_in(folder: Path, options: dict[str, Any], judges: dict[str, Any], secrets: dict[str, str]) -> Any:
    """The verb: how often a model was opened and the log's lines; or the mistake."""
    import logging

    from llm_recipes.checks import check
    from llm_recipes.config import EvaluateConfig, JudgeConfig
    from llm_recipes.evaluation import models
    from llm_recipes.evaluation.evaluate import evaluate

    os.chdir(folder)
    os.environ |= secrets
    opened: list[str] = []
    lines: list[str] = []
    open_model = models.open_model

    def counted(subject: Any, *rest: Any) -> Any:
        opened.append(subject.name)
        return open_model(subject, *rest)

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    models.open_model = counted  # type: ignore[assignment]
    handler = Lines()
    named = logging.getLogger("llm_recipes.evaluation")
    named.addHandler(handler)
    named.setLevel(logging.INFO)
    try:
        config = EvaluateConfig(**options, judges={name: JudgeConfig(**each) for name, each in judges.items()})
        check("evaluate", config)
        evaluate(config)
    except UserError as error:
        return str(error), lines
    finally:
        models.open_model = open_model
        named.removeHandler(handler)
        os.chdir("/")
        for key in secrets:
            del os.environ[key]
    return opened, lines


def judged(ranks: Ranks, folder: Path, judges: dict[str, Any] | None = None, number: int = 1, **options: Any) -> Any:
    """See `evaluate_in`, on the first rank; secrets are given as `secrets={NAME: key}`."""
    secrets = options.pop("secrets", {})
    asked = {"model": "model", "suite": "short", "data": {"judge": "questions.jsonl"}} | options
    return ranks(number, evaluate_in, folder, asked, judges or {}, secrets)[0]


def result_of(folder: Path, where: Path = OUTPUT) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / where / "short.json").read_text(encoding="utf-8"))
    return found


def answers_of(folder: Path, where: Path = OUTPUT) -> list[dict[str, Any]]:
    lines = (folder / where / "short" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_questions(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """A user's folder with a chat model whose answers are written already, two to a question that is drawn."""
    folder = tmp_path_factory.mktemp("judged")
    tiny.save_model(folder / "model", max_position_embeddings=1024)
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    write_questions(folder, QUESTIONS)
    (folder / "conf" / "suite").mkdir(parents=True)
    (folder / "conf" / "suite" / "short.yaml").write_text(SUITE.replace("ANSWERS", "2"))
    opened, lines = judged(ranks, folder)
    assert opened == ["model"] and any("not judged yet" in line for line in lines)
    assert any("answers=2, and one answer in math" in line for line in lines)
    return folder


@pytest.fixture
def folder(answered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(answered, tmp_path / "mine"))


def test_answers_are_the_models_own_and_turn_two_sees_turn_one(answered: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(answered / "model", dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(answered / "model")
    kept = {(row["question_id"], row["trial"], row["turn"]): row for row in answers_of(answered)}
    assert len(kept) == len(answers_of(answered)) == 2 + 2 + 2 * 2 + 2
    for question in QUESTIONS[:2]:
        messages: list[dict[str, str]] = []
        for turn, said in enumerate(question["turns"], 1):
            messages.append({"role": "user", "content": said})
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
            ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
            row = kept[str(question["question_id"]), 0, turn]
            assert row["answer"] == tokenizer.decode(ids, skip_special_tokens=True).strip()
            assert row["cut"] == (257 not in ids.tolist()) and row["temperature"] == 0 and row["seed"] is None
            messages.append({"role": "assistant", "content": row["answer"]})
    drawn = [kept["21", trial, 1]["answer"] for trial in (0, 1)] + [kept["31", trial, 1]["answer"] for trial in (0, 1)]
    assert len(set(drawn)) == 4, "each trial is drawn with a seed of its own"
    assert kept["31", 0, 1]["temperature"] == 0.1 and kept["21", 0, 1]["temperature"] == 0.7


def test_a_drawn_answer_depends_on_its_seed_alone(answered: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Not on what else is asked, nor on how many processes share it, nor on how the model is spread over them."""
    expected = {row["key"]: (row["answer"], row["cut"]) for row in answers_of(answered)}
    for name, number, options, questions in (
        ("alone", 1, {"batch_tokens": 1}, QUESTIONS[2:]),
        ("spread", 2, {"sharding": "full_shard"}, QUESTIONS),
    ):
        place = Path(shutil.copytree(answered, tmp_path / name))
        shutil.rmtree(place / "outputs")
        write_questions(place, questions)
        judged(ranks, place, number=number, **options)
        found = {row["key"]: (row["answer"], row["cut"]) for row in answers_of(place)}
        assert len(found) >= 6 and found == {key: expected[key] for key in found}


def test_an_answer_ends_where_the_template_ends_a_turn_or_says_that_it_was_cut(folder: Path, ranks: Ranks) -> None:
    """A template may close a turn with a token that neither the tokenizer nor the model calls the end."""
    first = next(row["answer"] for row in answers_of(folder) if row["question_id"] == "11")
    letter = first[3]
    tokenizer = json.loads((folder / "model" / "tokenizer.json").read_text())
    added = dict(tokenizer["added_tokens"][0], id=tokenizer["model"]["vocab"][letter], content=letter, special=True)
    tokenizer["added_tokens"].append(added)
    (folder / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "model" / "chat_template.jinja").write_text(
        TEMPLATE.replace("</s>", "{{ 'END' if message['role'] == 'assistant' else '</s>' }}").replace("END", letter)
    )
    judged(ranks, folder)
    row = next(row for row in answers_of(folder)[10:] if row["question_id"] == "11" and row["turn"] == 1)
    assert row["answer"] == first.partition(letter)[0].strip() and not row["cut"]
    assert row["tokens"] < 16 and result_of(folder)["judged"]["cut"] < 10


def test_each_judge_has_figures_of_its_own(folder: Path, ranks: Ranks) -> None:
    other = lambda request, number: completion("よい答えです。[[9]]", model="other-1")  # noqa: E731
    with serving() as one, serving(other) as two:
        judges = {
            "one": {"url": one.url, "model": "m1", "key": "FIRST_KEY", "input_price": 2.0, "output_price": 10.0},
            "two": {"url": two.url, "model": "m2", "temperature": None},
        }
        opened, lines = judged(ranks, folder, judges, secrets={"FIRST_KEY": "sk-secret"})
    assert opened == [], "the answers are kept: no model is opened for them"
    answers = answers_of(folder)
    result = result_of(folder)
    first, second = (result["judged"]["judges"][name] for name in ("one", "two"))
    assert set(one.keys) == {"Bearer sk-secret"} and set(two.keys) == {"Bearer none"}
    assert {request["model"] for request in one.asked} == {"m1"} and one.asked[0]["temperature"] == 0
    assert "temperature" not in two.asked[0] and set(one.paths) == {"/v1/chat/completions"}
    by_question: dict[str, dict[int, list[int]]] = {}
    for row in answers:
        by_question.setdefault(row["question_id"], {}).setdefault(row["turn"], []).append(rating_of(row["answer"]))
    cells = {question: [fmean(each) for each in turns.values()] for question, turns in by_question.items()}
    assert first["mean"] == pytest.approx(fmean(each for found in cells.values() for each in found))
    assert first["standard_error"] == pytest.approx(stdev(map(fmean, cells.values())) / 4**0.5)
    assert first["categories"]["math"]["mean"] == pytest.approx(fmean(cells["11"] + cells["12"]))
    assert first["categories"]["math"]["turns"]["2"]["mean"] == pytest.approx(fmean([cells["11"][1], cells["12"][1]]))
    assert first["turns"]["1"]["mean"] == pytest.approx(fmean(found[0] for found in cells.values()))
    assert (first["ratings"], first["of"], first["open"], second["mean"]) == (10, 10, 0, 9)
    assert (first["answered_as"], second["answered_as"]) == (["judge-2026"], ["other-1"])
    asked = len({json.dumps(request, sort_keys=True) for request in one.asked})
    assert len(one.asked) == asked
    assert (first["input_tokens"], first["output_tokens"]) == (100 * asked, 7 * asked) and second["cost"] is None
    assert first["cost"] == pytest.approx(asked * (100 * 2 + 7 * 10) / 1e6)
    assert result["groups"] == {"one": first["mean"], "two": 9}, "never one figure of both"
    assert result["tasks"]["one.math"]["score"] == first["categories"]["math"]["mean"]
    assert {entry["group"] for entry in result["tasks"].values()} == {"one", "two"}
    (told,) = [line for line in lines if line.startswith("judges.one (m1 at")]
    assert f"{asked} answers to judge" in told and "tokens in" in told and "by its prices" in told
    everything = json.dumps(result) + "".join(lines) + (folder / OUTPUT / "short" / "judgements.jsonl").read_text()
    assert "sk-secret" not in everything


def test_a_judge_sees_the_conversation_and_the_reference(folder: Path, ranks: Ranks) -> None:
    with serving() as server:
        judged(ranks, folder, {"one": {"url": server.url, "model": "m"}})
    answers = {(row["question_id"], row["trial"], row["turn"]): row["answer"] for row in answers_of(folder)}
    asked = [request["messages"][1]["content"] for request in server.asked]
    (second,) = [each for each in asked if "それに3を足すと?" in each]
    assert all(part in second for part in ("1+1は?", answers["11", 0, 1], answers["11", 0, 2], "2です", "5です"))
    assert second.index("1+1は?") < second.index(answers["11", 0, 1]) < second.index("それに3を足すと?")
    (first,) = [each for each in asked if "1+1は?" in each and "それに3を足すと?" not in each]
    assert "2です" in first and "5です" not in first
    assert all("模範解答" not in each for each in asked if "俳句" in each or "透明" in each)


def test_nothing_is_asked_twice_also_of_another_model_that_answers_the_same(folder: Path, ranks: Ranks) -> None:
    with serving() as server:
        judges = {"one": {"url": server.url, "model": "m"}}
        judged(ranks, folder, judges)
        asked, before = len(server.asked), result_of(folder)
        assert judged(ranks, folder, judges)[0] == [] and len(server.asked) == asked
        assert result_of(folder)["judged"] == before["judged"]
        assert judged(ranks, folder)[0] == [] and result_of(folder)["groups"] == before["groups"], "none is lost"
        shutil.copytree(folder / "model", folder / "twin")
        config = json.loads((folder / "twin" / "config.json").read_text())
        (folder / "twin" / "config.json").write_text(json.dumps(config | {"note": "another fingerprint"}))
        opened, lines = judged(ranks, folder, judges, model="twin")
        assert opened == ["twin"] and len(server.asked) == asked
        assert any("judgements of the same answers are there already" in line for line in lines)
        twin = result_of(folder, Path("outputs/evaluations/twin"))
        assert twin["groups"] == before["groups"] and twin["judged"]["judges"]["one"]["input_tokens"] == 0
        judged(ranks, folder, {"one": {"url": server.url, "model": "m", "temperature": 0.5}})
        assert len(server.asked) == 2 * asked, "another temperature is another question"
        assert judged(ranks, folder, judges, overwrite=True)[0] == ["model"]
        assert len(server.asked) == 3 * asked
        judged(ranks, folder, {"renamed": judges["one"]})
        assert len(server.asked) == 3 * asked and list(result_of(folder)["groups"]) == ["renamed"]


def test_answers_go_on_where_they_were_cut_off(answered: Path, folder: Path, ranks: Ranks) -> None:
    file = folder / OUTPUT / "short" / "answers.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]) + lines[4][:40])
    (folder / OUTPUT / "short.json").unlink()
    assert judged(ranks, folder)[0] == ["model"]
    want = {row["key"]: row["answer"] for row in answers_of(answered)}
    there = file.read_bytes().splitlines(keepends=True)
    assert there[:4] == lines[:4] and len(there) == len(lines) + 1
    rows = [json.loads(line) for line in there[:4] + there[5:]]
    assert {row["key"]: row["answer"] for row in rows} == want


def test_a_reply_without_a_rating_is_asked_for_once_more_and_never_counts_as_zero(folder: Path, ranks: Ranks) -> None:
    def reply(request: dict[str, Any], number: int) -> Answer:
        again = len(request["messages"]) > 2
        if "俳句" in request["messages"][1]["content"]:
            return completion(None if again else "わかりません")
        if "透明" in request["messages"][1]["content"]:
            return completion("[[8]]" if again else "十分です。[[11]]")
        return by_length(request, number)

    with serving(reply) as server:
        _, lines = judged(ranks, folder, {"one": {"url": server.url, "model": "m"}})
        asked = len(server.asked)
        judged(ranks, folder, {"one": {"url": server.url, "model": "m"}})
        assert len(server.asked) == asked
    again = [request["messages"] for request in server.asked if len(request["messages"]) > 2]
    assert {len(each) for each in again} == {4} and again[0][2]["role"] == "assistant"
    result = result_of(folder)
    figures = result["judged"]["judges"]["one"]
    assert {row["question_id"] for row in figures["no_rating"]} == {"21"} and len(figures["no_rating"]) == 4
    assert figures["categories"]["stem"]["mean"] == 8
    assert figures["categories"]["writing"]["mean"] is None and figures["open"] == 0
    assert result["missing"] == {"one.writing": "no judgement has a rating"}
    assert "one.writing" not in result["tasks"] and result["groups"]["one"] == figures["mean"]
    assert figures["input_tokens"] == 100 * asked
    assert any("no rating: 21 (turn 1)" in line for line in lines)


def test_an_endpoint_that_fails_costs_nothing_and_the_same_command_goes_on(folder: Path, ranks: Ranks) -> None:
    failing = threading.Event()
    failing.set()

    def reply(request: dict[str, Any], number: int) -> Answer:
        return refused(401, "bad key sk-secret") if failing.is_set() and number >= 4 else by_length(request, number)

    with serving(reply) as bad, serving() as good:
        judges = {
            "bad": {"url": bad.url, "model": "m", "key": "A_KEY", "max_concurrent": 1},
            "good": {"url": good.url, "model": "m"},
        }
        error, lines = judged(ranks, folder, judges, secrets={"A_KEY": "sk-secret"})
        assert f"judges.bad ({bad.url}): 401, the key in A_KEY: bad key ***; 6 of 10 judgements are open" in error
        assert "the same command goes on" in error and "judges.good" not in error
        assert "sk-secret" not in error + "".join(lines) and "\n" not in error
        result = result_of(folder)
        assert result["groups"]["bad"] is None and result["groups"]["good"] is not None
        assert result["judged"]["judges"]["bad"]["ratings"] == 4 and len(bad.asked) == 5
        assert result["missing"]["bad.stem"] == "0 of 2 answers judged" and "bad.math" in result["tasks"]
        kept = bad.asked[:4]
        failing.clear()
        bad.asked.clear()
        opened, _ = judged(ranks, folder, judges, secrets={"A_KEY": "sk-secret"})
        assert opened == [] and len(bad.asked) == 6 and not [request for request in bad.asked if request in kept]
        result = result_of(folder)
        assert result["groups"]["bad"] == result["groups"]["good"] and result["missing"] == {}


def test_the_first_of_several_processes_asks(folder: Path, ranks: Ranks) -> None:
    with serving() as server:
        opened, _ = judged(ranks, folder, {"one": {"url": server.url, "model": "m"}}, number=2)
    assert opened == [] and len(server.asked) == len({json.dumps(each) for each in server.asked})
    assert result_of(folder)["devices"] == 2 and result_of(folder)["missing"] == {}


def test_mistakes_are_one_line_before_a_model_is_opened(folder: Path, ranks: Ranks) -> None:
    nobody = {"one": {"url": "http://127.0.0.1:9/v1", "model": "m"}}
    said = judged(ranks, folder, nobody, suite="mini", data={})
    assert said[0] == "judges: nothing in suite=mini is judged; give suite=judge"
    said = judged(ranks, folder, data={"judge": "nowhere.jsonl"})
    assert said[0] == "data.judge=nowhere.jsonl: no such file or folder"
    (folder / "model" / "chat_template.jinja").unlink()
    said = judged(ranks, folder, nobody)
    assert said[0].startswith("suite=short: the tokenizer of model has no chat template") and ".jinja" in said[0]
    (folder / "model" / "chat_template.jinja").write_text("{{ raise_exception('users must not speak') }}")
    said = judged(ranks, folder, nobody)
    assert "the chat template refuses a conversation" in said[0] and "users must not speak" in said[0]


def test_items_are_of_all_categories(folder: Path, ranks: Ranks) -> None:
    with serving() as server:
        judged(ranks, folder, {"one": {"url": server.url, "model": "m"}}, items=3)
    assert set(result_of(folder)["judged"]["judges"]["one"]["categories"]) == {"math", "writing", "stem"}
    assert {each["question_id"] for each in result_of(folder)["judged"]["conversations"]} == {"11", "21", "31"}


@pytest.mark.slow
def test_ctrl_c_loses_no_judgement_and_the_command_goes_on(folder: Path) -> None:
    command = [
        sys.executable, "-m", "llm_recipes.evaluate", "model=model", "suite=short", "data.judge=questions.jsonl",
        "judges.one.model=m", "judges.one.max_concurrent=1",
    ]  # fmt: skip
    process: subprocess.Popen[str]
    ready = threading.Event()

    def reply(request: dict[str, Any], number: int) -> Answer:
        if number == 4:
            ready.wait(60)
            process.send_signal(signal.SIGINT)
            process.wait(60)
        return by_length(request, number)

    root = str(Path(__file__).parents[2])
    place = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    with serving(reply) as server:
        process = subprocess.Popen(
            [*command, f"judges.one.url={server.url}"], cwd=folder, env=place, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            # Where the tests themselves run in the background, SIGINT is ignored, and so it would be here.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        ready.set()
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 130 and "Traceback" not in said, said
        kept = (folder / OUTPUT / "short" / "judgements.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(kept) == 4
        done = subprocess.run(
            [*command, f"judges.one.url={server.url}"], cwd=folder, env=place, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert not [request for request in server.asked[5:] if request in server.asked[:4]]
    assert result_of(folder)["missing"] == {}
    assert {answer_in(request) for request in server.asked} == {row["answer"] for row in answers_of(folder)}
