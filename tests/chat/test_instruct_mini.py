"""The conversations of recipes/instruct_mini: whole, of the shapes that their page says, none twice."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llm_recipes.chat.shapes import Conversation, read, recognise
from llm_recipes.config import ChatSourceConfig

RECIPE = Path(__file__).parents[2] / "recipes" / "instruct_mini"
DOLLY = {"instruction": "指示", "input": "文脈", "output": "応答"}
FILES = {
    "messages": "messages",
    "sharegpt": "sharegpt",
    "alpaca": "alpaca",
    "dolly_ja": "alpaca",
    "prompt_completion": "prompt_completion",
    "text": "text",
    "held_out": "messages",
}
"""Names of files, and the shape of their rows."""


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RECIPE / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def said(name: str) -> list[Conversation | str]:
    source = ChatSourceConfig(path="rows", columns=DOLLY if name == "dolly_ja" else {})
    return [read(source, FILES[name], row) for row in rows(name)]


def exchanges(one: Conversation | str) -> int:
    return 0 if isinstance(one, str) else sum(each["role"] == "user" for each in one.messages)


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_of_the_shape_that_is_recognised(name: str) -> None:
    source = ChatSourceConfig(path="rows", columns=DOLLY if name == "dolly_ja" else {})
    assert {recognise(source, row) for row in rows(name)} == {FILES[name]}
    for one in said(name):
        text = one if isinstance(one, str) else "".join(each["content"] for each in one.messages)
        assert text == text.strip("\n") and "\r" not in text and "\ufffd" not in text


def test_the_page_counts_right() -> None:
    page = (RECIPE / "README.md").read_text(encoding="utf-8")
    for name in FILES:
        found = re.search(rf"\[{name}\.jsonl\].*?\| (\d+) \|(.*)", page)
        assert found is not None and int(found[1]) == len(rows(name))
        several = re.search(r"(\d+) have several exchanges", found[2])
        if several:
            assert int(several[1]) == sum(exchanges(each) > 1 for each in said(name))
    every = [json.dumps(row, ensure_ascii=False) for name in FILES for row in rows(name)]
    japanese = sum(bool(re.search("[ぁ-ヿ]", row)) for row in every)
    assert (
        f"{len(every)} conversations and texts, {japanese} in Japanese and {len(every) - japanese} in English" in page
    )


def test_nothing_is_said_twice_and_nothing_held_out_is_trained_on() -> None:
    prompts = [
        "".join(each["content"] for each in one.messages[:-1] if each["role"] == "user")
        for name in FILES
        for one in said(name)
        if isinstance(one, Conversation)
    ]
    assert len(set(prompts)) == len(prompts)
    answers = [one.messages[-1]["content"] for name in FILES for one in said(name) if isinstance(one, Conversation)]
    long = [answer for answer in answers if len(answer) > 30]
    assert len(set(long)) == len(long)
