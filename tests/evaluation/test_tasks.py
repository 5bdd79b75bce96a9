"""Tasks are asked as their authors ask them, scored right, read local data, and say what is missing."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_recipes.config import SuiteConfig, TaskConfig
from llm_recipes.errors import UserError
from llm_recipes.evaluation import definitions, suites, tasks
from llm_recipes.evaluation.suites import Suite

Measured = Callable[..., dict[str, dict[str, Any]]]


def suite(**entries: dict[str, Any]) -> Suite:
    made = {name: TaskConfig(**{"group": "g", **entry}) for name, entry in entries.items()}
    return Suite("mine", SuiteConfig(tasks=made))


def rows(folder: Path, **splits: list[Any]) -> str:
    folder.mkdir(exist_ok=True)
    for split, content in splits.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return str(folder)


def commonsense(number: int) -> dict[str, Any]:
    return {"question": f"{number}番は?", **{f"choice{each}": f"語{each}" for each in range(5)}, "label": number % 5}


def test_llm_jp_eval_s_prompt_is_instruction_examples_and_question(tmp_path: Path, measured: Measured) -> None:
    import random

    train = [commonsense(number) for number in range(20)]
    path = rows(tmp_path, train=train, test=[commonsense(31), commonsense(33)])
    entry = {"task": "swallow_jcommonsenseqa", "shots": 4, "path": path}
    figures = measured(suite(jcommonsenseqa=entry), lambda doc: {"1": "１\n\n### 入力", "3": "語3"}[doc["output"]])
    found = figures["jcommonsenseqa"]
    assert found["score"] == 0.5 and found["parsed"] == 0.5 and found["exact_match_stderr,none"] > 0
    # Its examples: the first four of the training rows once these are shuffled with seed 42.
    shuffled = list(train)
    random.Random(42).shuffle(shuffled)
    choices = "選択肢：0.語0,1.語1,2.語2,3.語3,4.語4"
    blocks = [f"### 入力:\n質問：{row['question']}\n{choices}\n\n### 応答:\n{row['label']}" for row in shuffled[:4]]
    head, *given = found["prompts"][0].split("\n\n### 入力:")
    assert head.startswith("以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。")
    assert head.split("\n\n### 指示:\n")[1].startswith("質問と回答の選択肢を入力として受け取り、")
    assert ["### 入力:" + block for block in given[:4]] == blocks
    assert given[4] == f"\n質問：31番は?\n{choices}\n\n### 応答:\n"


QUESTIONS = [{"question": f"問{number}", "answer": f"答え{number}"} for number in range(6)]
PASSAGES = [
    {"context": f"文{number}", "question": f"問{number}", "answers": {"text": [f"答え{number}", "別の"]}}
    for number in range(6)
]
LISTED = [{"text": f"問{number}", "answers": [f"答え{number}", "二つ目"]} for number in range(6)]
LLM_JP_EVAL = {
    "jemhopqa": (QUESTIONS, "質問：問{}", "答え{}"),
    "jsquad": (PASSAGES, "文章：文{0}\n質問：問{0}", "答え{}"),
    "niilc": (LISTED, "質問：問{}", "答え{},二つ目"),
}


@pytest.mark.parametrize("name", LLM_JP_EVAL)
def test_questions_with_short_answers_are_scored_by_character_f1(tmp_path: Path, measured: Measured, name: str) -> None:
    content, asked, reference = LLM_JP_EVAL[name]
    path = rows(tmp_path, train=content[:4], test=content[4:])
    entry = {"task": f"swallow_{name}", "shots": 2, "metric": "char_f1", "path": path}
    assert measured(suite(task=entry), lambda doc: doc["output"])["task"]["score"] == 1
    found = measured(suite(task=entry), lambda doc: "" if "4" in doc["input"] else "答え5")["task"]
    expected = 2 * 3 / (3 + len(reference.format(5).replace(",", " ")))
    assert found["score"] == pytest.approx(round(expected, 2) / 2) and found["parsed"] == 0.5
    assert found["prompts"][0].endswith(f"### 入力:\n{asked.format(4)}\n\n### 応答:\n")
    assert found["prompts"][0].count("### 応答:") == 3


def test_a_niilc_question_without_an_answer_is_left_out_and_its_xml_opens(tmp_path: Path, measured: Measured) -> None:
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<questions><question id="1"><text>山は?</text><answers>'
        "<answer>富士山</answer><answer>ふじさん</answer></answers></question><question><text>無い?</text><answers>"
        "<answer>-</answer></answers></question></questions>"
    )
    (tmp_path / "test.xml").write_text(xml, encoding="utf-8")
    entry = {"task": "swallow_niilc", "shots": 0, "path": str(tmp_path)}
    found = measured(suite(niilc=entry), lambda doc: "富士山,ふじさん")["niilc"]
    assert found["score"] == 1 and len(found["prompts"]) == 1


def test_mgsm_is_answered_in_steps_with_worked_examples(tmp_path: Path, measured: Measured) -> None:
    train = [
        {
            "question": f"問題：{n}足す1は?",
            "answer": f"ステップごとの答え：{n}+1={n + 1}。答えは{n + 1}です。",
            "answer_number": n + 1,
        }
        for n in range(1, 9)
    ]
    test = [{"question": f"{n}足す2は?", "answer": None, "answer_number": n + 2} for n in (10, 20)]
    entry = {"task": "swallow_mgsm_ja", "shots": 4, "path": rows(tmp_path, train=train, test=test)}
    found = measured(suite(mgsm=entry), lambda doc: "答えは12です。" if doc["answer_number"] == 12 else "さあ")["mgsm"]
    assert found["score"] == 0.5 and found["parsed"] == 0.5
    *examples, asked = found["prompts"][0].split("\n\n")
    assert asked == "問題：10足す2は?\nステップごとの答え：" and len(set(examples)) == 4
    known = {f"問題：{n}足す1は?\nステップごとの答え：{n}+1={n + 1}。答えは{n + 1}です。" for n in range(1, 9)}
    assert set(examples) <= known
    again = measured(suite(mgsm=entry), lambda doc: "0")["mgsm"]
    assert again["prompts"] == found["prompts"] and again["prompts"][1].split("\n\n")[:4] != examples


def test_an_article_is_summed_up_after_one_example(tmp_path: Path, measured: Measured) -> None:
    content = [{"text": f"記事{n}の文。次の文。", "summary": f"要約{n}は猫の話だ"} for n in range(3)]
    path = rows(tmp_path, train=content[:1], test=content[1:])
    entry = {"task": "swallow_xlsum_ja", "shots": 1, "path": path}
    found = measured(suite(xlsum=entry), lambda doc: doc["summary"] if "1" in doc["summary"] else "")["xlsum"]
    assert found["score"] == 0.5 and found["parsed"] == 0.5
    assert found["prompts"][0] == (
        "与えられたニュース記事を要約してください。\n\nニュース記事:記事0の文。次の文。\n要約:要約0は猫の話だ\n\n"
        "ニュース記事:記事1の文。次の文。\n要約:"
    )


def test_long_articles_lose_sentences_and_nothing_else(tmp_path: Path, measured: Measured) -> None:
    class Letters:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            assert not add_special_tokens
            return list(map(ord, text))

    long = "".join(f"これは{n}番目の文。" for n in range(60))
    content = [{"text": long, "summary": "例の要約"}, {"text": long, "summary": "要約"}]
    entry = {"task": "swallow_xlsum_ja", "shots": 1, "path": rows(tmp_path, train=content[:1], test=content[1:])}
    found = measured(suite(xlsum=entry), lambda doc: "要約", tokenizer=Letters(), max_length=256 + 300)["xlsum"]
    prompt = found["prompts"][0]
    head, example, asked = prompt.split("ニュース記事:")
    assert head == "与えられたニュース記事を要約してください。\n\n" and len(prompt) <= 300
    for part, end in ((example, "要約:例の要約\n\n"), (asked, "要約:")):
        article, _, rest = part.partition("\n")
        assert rest == end and long.startswith(article) and article.endswith("。") and len(article) > 60


@pytest.mark.parametrize(
    ("name", "languages"), [("ja_en", ("Japanese", "English")), ("en_ja", ("English", "Japanese"))]
)
def test_a_translation_is_scored_over_the_whole_set(
    tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch, name: str, languages: tuple[str, str]
) -> None:
    import importlib.util
    import sys
    from types import SimpleNamespace

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package == "nagisa" or there(package))
    monkeypatch.setitem(sys.modules, "nagisa", SimpleNamespace(tagging=lambda text: SimpleNamespace(words=list(text))))
    content = [{"source": f"s {n}", "reference": f"one two three four {n}"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    entry = {"task": f"swallow_wmt20_{name}", "shots": 4, "metric": "bleu", "path": str(tmp_path / "rows.jsonl")}
    found = measured(suite(wmt=entry), lambda doc: doc["reference"])["wmt"]
    assert found["score"] == pytest.approx(1) and found["parsed"] == 1 and found["bleu_stderr,none"] < 1e-9
    assert measured(suite(wmt=entry), lambda doc: "nothing alike")["wmt"]["score"] < 0.1
    for number, prompt in enumerate(found["prompts"]):
        *examples, asked = prompt.split("\n\n")
        assert asked == f"{languages[0]} phrase: s {number}\n{languages[1]} phrase:" and len(examples) == 4
        assert all(f"s {number}\n" not in each and " phrase: one two three four " in each for each in examples)


def test_english_reading_is_asked_as_lm_eval_asks_it(tmp_path: Path, measured: Measured) -> None:
    content = [
        {"id": str(n), "title": f"T{n}", "context": f"C{n}", "question": f"Q{n}", "answers": {"text": texts}}
        for n, texts in enumerate([["the red cat"], [], ["a dog"], []])
    ]
    path = rows(tmp_path, train=content[:2], validation=content[2:])
    entry = {"task": "swallow_squad2", "shots": 2, "metric": "exact", "path": path}
    found = measured(suite(squad2=entry), lambda doc: " Dog." if doc["answers"]["text"] else " unanswerable")["squad2"]
    assert found["score"] == 0.5 and found["f1,none"] == 0.5 and found["parsed"] == 1
    assert found["prompts"][0].endswith("Title: T2\n\nBackground: C2\n\nQuestion: Q2\n\nAnswer:")
    assert "Answer:  the red cat\n\n" in found["prompts"][0] and "Answer:  unanswerable\n\n" in found["prompts"][0]


def test_tasks_of_lm_eval_s_own_read_local_rows(tmp_path: Path, measured: Measured) -> None:
    solved = [{"question": f"{n}+1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(8)]
    winograd = [
        {
            "sentence": f"The cup fell as _ was {word}.",
            "option1": "it",
            "option2": "the table",
            "answer": str(n % 2 + 1),
        }
        for n, word in enumerate(["thin", "loose", "wet", "old"])
    ]
    (tmp_path / "wino.json").write_text(json.dumps(winograd))
    trivia = [{"question": "Where", "answer": {"aliases": ["Paris", "The City"], "value": "Paris"}}] * 2
    path = rows(tmp_path / "g", train=solved[:6], test=solved[6:])
    entries = {
        "gsm8k": {"shots": 4, "metric": "exact_match,strict-match", "path": path},
        "xwino": {"task": "xwinograd_en", "shots": 1, "path": str(tmp_path / "wino.json")},
        "triviaqa": {"shots": 0, "path": rows(tmp_path / "t", validation=trivia)},
    }  # fmt: skip

    def answer(doc: Any) -> Any:
        if "sentence" in doc:
            return 0
        return "paris!" if "Where" in doc["question"] else doc["answer"] if "6" in doc["question"] else "It is 8."

    found = measured(suite(**entries), answer)
    assert found["gsm8k"]["score"] == 0.5 and found["gsm8k"]["parsed"] == 0.5
    assert found["gsm8k"]["exact_match,flexible-extract"] == 1 and found["gsm8k"]["parsed,flexible-extract"] == 1
    assert found["xwino"]["score"] == 0.5 and found["xwino"]["parsed"] is None
    assert found["triviaqa"]["score"] == 1 and found["triviaqa"]["parsed"] == 1
    assert found["gsm8k"]["prompts"][0].count("Question:") == 5


MINI = ("choice", "cloze", "arithmetic")


@pytest.mark.parametrize("language", ["ja", "en"])
@pytest.mark.parametrize("kind", MINI)
def test_items_of_ours_are_many_different_and_fair(kind: str, language: str) -> None:
    path = definitions.path_of(f"mini_{kind}_{language}")
    assert path is not None
    lines = path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    assert len(items) >= 200 and len({item["question"] for item in items}) == len(items)
    for item in items:
        assert set(item) == {"question", "choices", "answer"} and 0 <= item["answer"] < 4
        assert len(set(item["choices"])) == 4 and all(each.strip() == each != "" for each in item["choices"])
        assert item["question"].strip() == item["question"]
    places = Counter(item["answer"] for item in items)
    assert max(places.values()) - min(places.values()) <= 1
    # Who always takes the longest or the shortest answer is not much better than chance.
    for longest in (max, min):
        right = 0.0
        for item in items:
            sizes = [len(each) for each in item["choices"]]
            best = [number for number, size in enumerate(sizes) if size == longest(sizes)]
            right += (item["answer"] in best) / len(best)
        assert right / len(items) < 0.40


def test_word_problems_have_one_right_answer_of_numbers(measured: Measured) -> None:
    for language in ("ja", "en"):
        path = definitions.path_of(f"mini_arithmetic_{language}")
        assert path is not None
        for line in path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines():
            assert all(each.isdigit() and int(each) > 0 for each in json.loads(line)["choices"])


def test_mini_is_judged_and_mini_generate_is_written(measured: Measured) -> None:
    mini = suites.load_all("mini", items=8)[0]
    assert tasks.needs_generation(mini) == []
    right = measured(mini, lambda doc: doc["answer"])
    assert {found["score"] for found in right.values()} == {1} and len(right) == 6
    assert {found["score"] for found in measured(mini, lambda doc: (doc["answer"] + 1) % 4).values()} == {0}
    assert right["choice_en"]["prompts"][0].startswith("Question: ")
    assert right["choice_ja"]["prompts"][0].endswith("\n答え:")
    written = suites.load_all("mini_generate", items=8)[0]
    assert tasks.needs_generation(written) == ["arithmetic_ja", "arithmetic_en"]
    found = measured(written, lambda doc: f" #### {doc['choices'][doc['answer']]}")["arithmetic_en"]
    assert found["score"] == 1 and found["parsed"] == 1 and found["prompts"][0].count("\nAnswer: #### ") == 4
    assert found["prompts"][0].endswith("\nAnswer:")
    bare = measured(written, lambda doc: doc["choices"][doc["answer"]])["arithmetic_ja"]
    assert bare["score"] == 0 and bare["parsed"] == 0


def test_what_generates_is_known_without_data() -> None:
    generating = tasks.needs_generation(suites.load("swallow_en6"))
    assert generating == ["triviaqa", "squad2", "gsm8k"]
    assert len(tasks.needs_generation(suites.load("swallow_ja8"))) == 8
    assert tasks.needs_generation(suites.load("prompts")) == ["prompts"]


def test_a_subset_is_the_same_each_time_of_the_right_size_and_of_every_kind() -> None:
    opened, _ = tasks.open_tasks(suites.load_all("mini_full", items=40)[0])
    again, _ = tasks.open_tasks(suites.load_all("mini_full", items=40)[0])
    for name, each in opened.items():
        assert each.samples == again[name].samples and each.samples is not None
        assert each.samples == sorted(set(each.samples)) and len(each.samples) == 40
        assert each.samples[0] >= 0 and each.samples[-1] < each.items_of >= 200
        docs = [each.task.eval_docs[number] for number in each.samples]
        assert set(Counter(doc["answer"] for doc in docs).values()) <= set(range(8, 13))
        sizes = sorted(len(doc["question"]) for doc in each.task.eval_docs)
        short = sum(len(doc["question"]) < sizes[len(sizes) // 2] for doc in docs)
        half = sum(size < sizes[len(sizes) // 2] for size in sizes) * 40 / len(sizes)
        assert abs(short - half) <= 4
    other, _ = tasks.open_tasks(Suite("x", SuiteConfig(tasks=suites.load("mini").config.tasks, seed=1)))
    assert other["choice_ja"].samples != tasks.open_tasks(suites.load("mini"))[0]["choice_ja"].samples
    whole, _ = tasks.open_tasks(suites.load_all("mini_full", items=100_000)[0])
    assert whole["choice_ja"].samples is None


def test_missing_data_is_one_line_with_what_to_put_where() -> None:
    opened, missing = tasks.open_tasks(suites.load("swallow_ja8"))
    assert opened == {} and len(missing) == 8
    for name, reason in missing.items():
        assert "\n" not in reason and len(reason) < 300
        assert f"data.{name}=PATH, " in reason or reason == "nagisa is not installed: pip install nagisa"
    assert missing["jemhopqa"].startswith("no data: data.jemhopqa=PATH, a folder with train and test rows of JEMHopQA")
    _, english = tasks.open_tasks(suites.load("swallow_en6"))
    assert "data.gsm8k=PATH, rows as of 'openai/gsm8k' on the hub (answer, question)" in english["gsm8k"]
    _, texts = tasks.open_tasks(suite(ja={"kind": "bits_per_byte"}))
    assert texts == {"ja": "no data: data.ja=PATH, JSONL or Parquet with a column 'text', or a token file"}


@pytest.mark.parametrize("there", [True, False])
def test_a_node_without_network_does_not_wait_for_the_hub(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    import socket

    import datasets.config
    import huggingface_hub.constants

    def look_up(host: str, port: None) -> list[Any]:
        assert host == "huggingface.co"
        if not there:
            raise socket.gaierror(-2, "Name or service not known")
        return [host]

    places = (datasets.config, huggingface_hub.constants)
    for place in places:
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    tasks._hub_is_there.cache_clear()
    with tasks._hub_or_cache():
        assert [place.HF_HUB_OFFLINE for place in places] == [not there] * 2
    assert [place.HF_HUB_OFFLINE for place in places] == [False] * 2
    tasks._hub_is_there.cache_clear()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"task": "gsm8kk"}, "suite mine: tasks.it: no task 'gsm8kk', did you mean 'gsm8k'?"),
    ({"task": "mini_choice_jp"}, "did you mean 'mini_choice_ja'?"),
    ({"task": "qqqqqq"}, "neither ours nor lm-eval's"),
    ({"task": "mmlu"}, "'mmlu' is a group of lm-eval's; name its tasks instead"),
    ({"task": "mini_choice_ja", "metric": "accc"}, "tasks.it.metric=accc: no such figure, did you mean 'acc'?"),
    ({"task": "mini_choice_ja", "shots": 999}, "tasks.it.shots=999: there are only 261 examples"),
    ({"task": "swallow_jsquad", "path": "nowhere"}, "data.it=nowhere: no such file or folder"),
    ({"task": "swallow_jsquad", "path": "empty"}, "a folder without train, validation or test"),
    ({"task": "swallow_jsquad", "path": "test.jsonl", "shots": 2}, "no train rows, which its 2 shots come from"),
    ({"task": "swallow_jsquad", "path": "test.jsonl", "shots": 0}, "test.jsonl: row 1 has no 'context'; needed: a"),
    ({"task": "gsm8k", "path": "test.jsonl", "shots": 0}, "not rows as of 'openai/gsm8k' on the hub (answer"),
    ({"task": "gsm8k", "path": "broken.jsonl"}, "broken.jsonl: line 2: broken JSON"),
    ({"task": "gsm8k", "path": {"tests": "test.jsonl"}}, "data.it.tests: no such split, did you mean 'test'?"),
    ({"task": "gsm8k", "path": {"train": "test.jsonl"}}, "no test rows, only train"),
    ({"task": "gsm8k", "path": "none.jsonl"}, "none.jsonl: no rows in it"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "said"), WRONG)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "test.jsonl").write_text('{"question": "q"}\n')
    (tmp_path / "broken.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n{"question": \n')
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(UserError) as caught:
        tasks.open_tasks(suite(it=entry))
    assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_rows_come_from_squad_s_json_parquet_and_compressed_lines(tmp_path: Path, measured: Measured) -> None:
    import gzip

    import pyarrow
    import pyarrow.parquet

    nested = {
        "version": "1.1",
        "data": [
            {"title": "t", "paragraphs": [{"context": f"文{n}", "qas": [{"id": n, "question": f"問{n}", "answers": [
                {"text": f"答え{n}", "answer_start": 0}, {"text": "別の"}]}]} for n in range(2)]}
        ],
    }  # fmt: skip
    (tmp_path / "valid-v1.1.json").write_text(json.dumps(nested))
    (tmp_path / "train.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in PASSAGES).encode())
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PASSAGES), tmp_path / "rows.parquet")
    for test in ("valid-v1.1.json", "rows.parquet"):
        path = {"train": str(tmp_path / "train.jsonl.gz"), "test": str(tmp_path / test)}
        entry = {"task": "swallow_jsquad", "shots": 2, "metric": "char_f1", "path": path}
        found = measured(suite(jsquad=entry), lambda doc: doc["output"])["jsquad"]
        assert found["score"] == 1 and found["prompts"][0].endswith("文章：文0\n質問：問0\n\n### 応答:\n")


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for function in (tasks.open_tasks, tasks.needs_generation):
        with pytest.raises(UserError, match=r"lm_eval is not installed; pip install 'llm_recipes\[eval\]'"):
            function(suites.load("mini"))


def test_lm_eval_s_command_line_finds_tasks_of_ours() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(definitions.FOLDER), include_defaults=False)
    assert set(manager.all_subtasks) == {path.stem for path in definitions.FOLDER.rglob("*.yaml")} - {"common"}
    task = manager.load(["mini_choice_ja"])["tasks"]["mini_choice_ja"]
    assert len(task.eval_docs) >= 200
