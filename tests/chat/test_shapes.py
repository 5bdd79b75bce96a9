"""The shapes in which people keep conversations: each gives the same messages; what is none is refused by name."""

from typing import Any

import pytest

from llm_recipes.chat import shapes
from llm_recipes.chat.shapes import BadRow, Conversation, read, recognise
from llm_recipes.config import ChatSourceConfig

QUESTION, ANSWER = "日本の首都は?", "東京です。"
SAID = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
JA = {"instruction": "指示", "input": "文脈", "output": "応答"}


def source(**changes: Any) -> ChatSourceConfig:
    return ChatSourceConfig(path="rows.jsonl", **changes)


@pytest.mark.parametrize(
    ("shape", "row", "changes"),
    [
        ("messages", {"messages": SAID}, {}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}, SAID[1]]}, {}),
        ("messages", {"chat": SAID, "id": 3}, {"columns": {"messages": "chat"}}),
        ("sharegpt", {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]}, {}),
        ("sharegpt", {"conversations": SAID}, {}),
        (
            "sharegpt",
            {"conversations": [{"from": "質問者", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
            {"roles": {"質問者": "user"}},
        ),
        ("alpaca", {"instruction": QUESTION, "input": "", "output": ANSWER}, {}),
        ("alpaca", {"instruction": QUESTION, "output": ANSWER, "input": None}, {}),
        ("alpaca", {"指示": QUESTION, "文脈": "", "応答": ANSWER}, {"columns": JA}),
        ("prompt_completion", {"prompt": QUESTION, "completion": ANSWER}, {}),
        ("prompt_completion", {"prompt": SAID[:1], "completion": SAID[1:]}, {}),
    ],
)
def test_every_shape_gives_the_same_conversation(shape: str, row: dict[str, Any], changes: dict[str, Any]) -> None:
    asked = source(**changes)
    assert recognise(asked, row) == shape
    assert read(asked, shape, row) == Conversation(SAID)


def test_plain_text_is_text() -> None:
    assert recognise(source(), {"text": "本文"}) == "text"
    assert read(source(), "text", {"text": "本文"}) == "本文"


def test_an_input_stands_below_its_instruction() -> None:
    said = read(source(), "alpaca", {"instruction": "要約して", "input": "長い文", "output": "短い文"})
    assert isinstance(said, Conversation) and said.messages[0]["content"] == "要約して\n\n長い文"


def test_a_system_prompt_of_the_row_s_own_goes_before_the_source_s() -> None:
    asked = source(system="簡潔に。")
    given = read(asked, "messages", {"messages": SAID})
    own = read(asked, "messages", {"messages": [{"role": "system", "content": "丁寧に。"}, *SAID]})
    column = read(asked, "alpaca", {"instruction": QUESTION, "output": ANSWER, "system": "英語で。"})
    first = [each.messages[0] for each in (given, own, column) if isinstance(each, Conversation)]
    assert [each["content"] for each in first] == ["簡潔に。", "丁寧に。", "英語で。"]


def test_what_else_a_message_has_reaches_the_template() -> None:
    said = [SAID[0], {**SAID[1], "reasoning_content": "考える", "weight": None}]
    given = read(source(), "messages", {"messages": said, "tools": [{"type": "function"}]})
    expected = Conversation([SAID[0], {**SAID[1], "reasoning_content": "考える"}], [{"type": "function"}])
    assert given == expected
    assert read(source(), "messages", {"messages": said, "tools": '[{"type": "function"}]'}) == expected


def test_what_follows_the_last_answer_is_left_out() -> None:
    given = read(source(), "messages", {"messages": [*SAID, {"role": "user", "content": "ありがとう"}]})
    assert given == Conversation(SAID)


@pytest.mark.parametrize(
    ("shape", "row", "changes", "said"),
    [
        ("messages", {"messages": []}, {}, "no message of the assistant"),
        ("messages", {"messages": SAID[:1]}, {}, "no message of the assistant"),
        ("messages", {"messages": [SAID[1]]}, {}, "'assistant' at the beginning"),
        ("messages", {"messages": [SAID[0], SAID[0], SAID[1]]}, {}, "message 2 is of 'user' after 'user'"),
        ("messages", {"messages": [*SAID, SAID[1]]}, {}, "message 3 is of 'assistant' after 'assistant'"),
        ("messages", {"messages": [{"role": "user", "content": "　"}, SAID[1]]}, {}, "message 1 ('user') is empty"),
        ("messages", {"messages": [SAID[0], {"role": "assistant", "content": ""}]}, {}, "message 2 ('assistant') is"),
        (
            "messages",
            {"messages": [SAID[0], {"role": "narrator", "content": "x"}]},
            {},
            "'narrator', which is not known",
        ),
        ("messages", {"messages": [{"content": "x"}]}, {}, "message 1 has no role"),
        ("messages", {"messages": [{"role": "user", "content": 3}]}, {}, "message 1 is not of text"),
        ("messages", {"messages": "x"}, {}, "'messages' is not a list"),
        ("alpaca", {"instruction": QUESTION, "output": None}, {}, "'output' is null"),
        ("alpaca", {"instruction": QUESTION}, {}, "no 'output'"),
        ("alpaca", {"instruction": 3, "output": ANSWER}, {}, "'instruction' is int"),
        ("messages", {"messages": SAID, "tools": "[{"}, {}, "'tools' is a string, and no JSON"),
        ("text", {"text": " \n"}, {}, "'text' is empty"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(
    shape: str, row: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadRow) as refused:
        read(source(**changes), shape, row)
    assert said in refused.value.detail


@pytest.mark.parametrize(
    ("row", "changes", "said"),
    [
        ({"質問": "x", "回答": "y"}, {}, "with the columns 質問, 回答"),
        (
            {"質問": "x", "回答": "y"},
            {"columns": {"instruction": "質問", "output": "答え"}},
            "columns.output=答え: no such",
        ),
        ({"text": "x"}, {"shape": "messages"}, "shape=messages needs messages; there are text"),
    ],
)
def test_unknown_columns_are_named(row: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRow) as refused:
        recognise(source(**changes), row)
    assert said in refused.value.detail


def test_turns_are_counted_from_the_beginning() -> None:
    system = {"role": "system", "content": "s"}
    tool = [{"role": "tool", "content": "t"}, SAID[1]]
    whole = [system, *SAID, *tool, *SAID, *SAID]
    assert shapes.first_exchanges(whole, "all") == whole
    assert shapes.first_exchanges(whole, "first") == [system, *SAID, *tool]
    assert shapes.first_exchanges(whole, 2) == [system, *SAID, *tool, *SAID]
    assert shapes.first_exchanges(whole, 9) == whole
    assert shapes.without_oldest(whole) == [system, *SAID, *SAID]
    assert shapes.without_oldest([system, *SAID]) is None
