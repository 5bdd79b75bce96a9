"""Before training: what the base model thinks of the answers, by plain transformers; and questions of suites in it."""

import html
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

from llm_recipes.evaluation import overlap
from llm_recipes.evaluation.overlap import Hit, Question, Search, merged, without_form
from llm_recipes.telemetry import metrics
from llm_recipes.training.preview import Judged, far

Place = Callable[[str], Path]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A folder of its own, by name, with conversations in it."""
    return lambda name: tiny.write_chats(tmp_path / name)


def run(config: Any, seen: str | None = None) -> Any:
    """A whole run on this rank; the user's mistake that ended it, or what the base model was found to think."""
    from llm_recipes.errors import UserError
    from llm_recipes.training import preview
    from llm_recipes.training.run import instruct

    judged: list[Any] = []
    original = preview.judge

    def judge(*arguments: Any) -> Any:
        judged.extend(original(*arguments))
        return judged

    preview.judge = judge
    try:
        instruct(config)
    except UserError as error:
        return str(error)
    finally:
        preview.judge = original
    return judged


def nats(plain: Any, text: str, answers: list[str]) -> float:
    """The negative log-likelihood of the last places of these answers in a text, by plain transformers."""
    tokenizer = tiny.tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = plain(torch.tensor([ids])).logits[0, :-1].double()
    each = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    total, at = 0.0, 0
    for answer in answers:
        at = text.index(f"<|assistant|>{answer}</s>", at) + len("<|assistant|>")
        start = len(tokenizer(text[:at], add_special_tokens=False)["input_ids"])
        stop = len(tokenizer(text[: at + len(answer) + len("</s>")], add_special_tokens=False)["input_ids"])
        total += float(each[start - 1 : stop - 1].sum())
    return total


def written(messages: list[dict[str, str]]) -> str:
    return "".join(f"<|{each['role']}|>{each['content']}</s>\n" for each in messages)


@pytest.mark.parametrize("packing", [True, False])
def test_the_base_model_s_view_is_that_of_plain_transformers_on_any_number_of_ranks(
    ranks: Any, tiny_models: Any, place: Place, packing: bool
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_models["mistral"]
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    folder = place("judged")
    for number in (1, 2, 3):
        config = tiny.instruct_config(folder, model, data__preview=True, data__packing=packing)
        config.train.global_batch_size = 6
        views = ranks(number, run, config)
        assert all(view == views[0] for view in views)
        found.append(views[0])
    assert found[0] == found[1] == found[2], "to the last bit"
    english, japanese = found[0]
    assert (english.source, english.conversations, english.multi) == ("en", 24, [])
    assert (japanese.source, japanese.conversations, len(japanese.multi)) == ("ja", 40, 14)
    rows = [json.loads(line)["messages"] for line in (folder / "ja.jsonl").read_text().splitlines()]
    answers = [[each["content"] for each in row if each["role"] == "assistant"] for row in rows]
    total = math.fsum(nats(plain, written(row), said) for row, said in zip(rows, answers, strict=True))
    size = sum(len(answer.encode()) for said in answers for answer in said)
    assert japanese.bits_per_byte == pytest.approx(total / math.log(2) / size, rel=1e-5)
    several = {row[-1]["content"]: row for row in rows if len(row) > 2}
    for multi in japanese.multi:
        row = several.pop(multi.alone[-1]["content"])
        assert multi.alone == row[2:] and multi.turns == 2
        whole = nats(plain, written(row), [row[1]["content"], row[3]["content"]])
        whole -= nats(plain, written(row), [row[1]["content"]])
        assert multi.given == pytest.approx(whole, rel=1e-4)
        assert multi.without == pytest.approx(nats(plain, written(row[2:]), [row[3]["content"]]), rel=1e-4)
    assert several == {}
    assert japanese.unhelped == [each for each in japanese.multi if each.given >= each.without]


def test_a_source_far_from_the_others_is_named() -> None:
    near = [Judged("a", 1, 0.9), Judged("b", 1, 1.1), Judged("text", 0, None)]
    assert far(near) == [] and far([*near, Judged("c", 1, 1.7)]) == ["c"] and far([Judged("c", 1, 9.0)]) == []


def test_with_preview_it_stops_and_leaves_nothing_but_the_page_and_what_is_prepared(
    ranks: Any, tiny_models: Any, place: Place
) -> None:
    folder = place("looked")
    before = {path.name for path in folder.iterdir()} | {"chat.jinja"}
    ranks(2, run, tiny.instruct_config(folder, tiny_models["mistral"], data__preview=True))
    assert {path.name for path in folder.iterdir()} == before | {"prepared", "run"}
    assert [path.name for path in (folder / "run").iterdir()] == ["preview.html"]
    page = (folder / "run" / "preview.html").read_text(encoding="utf-8")
    assert "by the base model" in page and "none is named (evaluation.suites)" in page
    # The run is a new one all the same, and once it goes nothing is judged again.
    config = tiny.instruct_config(folder, tiny_models["mistral"], train__stop_at=2, checkpoint__resume="never")
    assert len(ranks(1, run, config)[0]) == 2
    (folder / "run" / "preview.html").write_text("as it was")
    config = tiny.instruct_config(folder, tiny_models["mistral"], train__stop_at=4)
    assert ranks(1, run, config) == [[]]
    assert (folder / "run" / "preview.html").read_text() == "as it was"
    steps = [row["step"] for row in metrics.read(folder / "run" / "metrics.jsonl") if "loss" in row]
    assert steps == [1, 2, 3, 4]


def test_training_is_the_same_bit_for_bit_whatever_is_shown_before(ranks: Any, tiny_models: Any, place: Place) -> None:
    courses = []
    for rows in (0, 64):
        folder = place(f"shown-{rows}")
        config = tiny.instruct_config(folder, tiny_models["gpt2"], data__preview_rows=rows, train__steps=4)
        assert [len(each) for each in ranks(2, run, config)] == [2 if rows else 0] * 2
        courses.append(
            [(row["loss"], row["grad_norm"]) for row in metrics.read(folder / "run" / "metrics.jsonl") if "loss" in row]
        )
    assert courses[0] == courses[1] and len(courses[0]) == 4


class Tokens:
    """A token file in memory."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens, self.tokens = np.array(tokens, np.int64), len(tokens)

    def read(self, start: int, end: int) -> np.ndarray:
        return self._tokens[start:end]


TEXT = st.lists(st.integers(0, 2), max_size=120)


@settings(max_examples=200)
@given(TEXT, st.lists(st.lists(st.integers(0, 2), max_size=24), max_size=6), st.integers(13, 60), st.integers(1, 3))
def test_questions_are_found_where_they_occur_first_and_nowhere_else(
    text: list[int], asked: list[list[int]], chunk: int, parts: int
) -> None:
    # Each of a task of its own: what questions share is looked for as well.
    search = Search([Question("suite", str(number), "", ids) for number, ids in enumerate(asked)])
    file: Any = Tokens(text)
    original, overlap.CHUNK = overlap.CHUNK, chunk
    try:
        found = merged([search.look(file, part, parts) for part in range(parts)])
    finally:
        overlap.CHUNK = original
    expected = {}
    for number, ids in enumerate(asked):
        length = min(len(ids), overlap.LENGTH)
        runs = [ids[at : at + length] for at in range(len(ids) - length + 1)]
        places = [at for at in range(len(text) - length + 1) if text[at : at + length] in runs]
        if places and length >= overlap.LEAST:
            expected[number] = Hit(places[0], length)
    assert found == expected


def test_the_form_of_a_task_s_questions_is_not_what_is_looked_for() -> None:
    assert without_form(["Q: what is it?\nA:", "Q: who?\nA:"]) == ["what is it", "who"]
    assert without_form(["質問: 何時ですか。\n答え:", "質問: 何年ですか。\n答え:"]) == ["何時ですか", "何年ですか"]
    assert without_form(["alone?"]) == ["alone?"] and without_form([]) == [] and without_form(["a", "a"]) == ["a", "a"]
    form = list(range(100, 120))
    asked = [Question("suite", "task", "", [number, *form, 50 + number, *range(200, 214)]) for number in range(4)]
    file: Any = Tokens([7, *form, 8, 9])
    assert Search(asked).look(file) == {}
    file = Tokens([*form[-12:], 52, *range(200, 214)])
    assert Search(asked).look(file) == {2: Hit(0, 13)}, "the question that goes on like this, and no other"


def test_a_suite_s_question_in_the_data_is_named(ranks: Any, tiny_models: Any, place: Place) -> None:
    folder = place("seen")
    items = Path(overlap.__file__).parent / "definitions" / "mini" / "mini_choice_en.jsonl"
    asked = [json.loads(line) for line in items.read_text(encoding="utf-8").splitlines()]
    # Short enough for the window, and with no 13 bytes that another question has too.
    others = lambda run: sum(run in each["question"] for each in asked)  # noqa: E731
    runs = {each["question"]: [each["question"][at : at + 13] for at in range(20)] for each in asked}
    wanted = next(each for each in runs if 33 < len(each) < 60 and all(others(run) == 1 for run in runs[each]))
    rows = [{"instruction": wanted, "output": "Yes."}]
    with open(folder / "en.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    pages = []
    for number in (1, 2):
        config = tiny.instruct_config(
            folder, tiny_models["mistral"], data__preview=True, data__preview_rows=0, evaluation__suites=["mini_full"],
            run__name=f"on-{number}",
        )  # fmt: skip
        ranks(number, run, config)
        pages.append((folder / f"on-{number}" / "preview.html").read_text(encoding="utf-8"))
    assert pages[0] == pages[1]
    row = next(line for line in pages[0].splitlines() if line.startswith("│ en ") and "choice_en" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "en",
        "mini_full",
        "choice_en",
        "1",
        str(len(asked)),
        f"{1 / len(asked):.1%}",
    ]
    asks, _, has = pages[0].partition("mini_full: choice_en asks: ")[2].partition("en has: … ")
    assert asks.split()[0] in wanted and wanted[:20] in html.unescape(has)
    assert "not judged: data.preview_rows=0" in pages[0]
