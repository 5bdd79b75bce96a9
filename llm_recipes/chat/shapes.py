"""Rows to conversations: the shapes in which people keep them.

A conversation is a list of messages, each with `role` (system, user, assistant, tool) and `content`; what else a
message has (`reasoning_content`, `tool_calls` ...) goes to the chat template as it is.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llm_recipes.config import ChatSourceConfig

Message = dict[str, Any]

KNOWN_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip

NOT_THE_SHAPE = "not of the source's shape"
EMPTY = "empty turn"
NO_ANSWER = "no answer"
OUT_OF_ORDER = "roles out of order"


class BadRow(Exception):
    """A row that cannot be used.

    Args:
        reason: one of a few kinds, by which such rows are counted.
        detail: what is wrong with this one.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Conversation:
    """What a row says."""

    messages: list[Message]
    tools: list[Any] | None = None
    """Descriptions of functions, for a template that has a place for them."""


SHAPES: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "alpaca": (("instruction", "output"), ("input",)),
    "prompt_completion": (("prompt", "completion"),),
    "text": (("text",),),
}
"""The columns that each shape must have, and those that it may have besides `system`."""


def column(source: ChatSourceConfig, ours: str) -> str:
    """What a column of ours is called in this source."""
    return source.columns.get(ours, ours)


def recognise(source: ChatSourceConfig, columns: Iterable[str]) -> str:
    """The shape of rows with these columns.

    Raises:
        BadRow: a mapped column is not there, or the columns are of no shape known here.
    """
    found = list(columns)
    for ours, theirs in source.columns.items():
        if ours not in ("role", "content", "from", "value") and theirs not in found:
            raise BadRow(
                NOT_THE_SHAPE, f"columns.{ours}={theirs}: no such column; there are {', '.join(map(str, found))}"
            )
    fitting = [shape for shape, (needed, *_) in SHAPES.items() if all(column(source, each) in found for each in needed)]
    wanted = source.shape
    if wanted in fitting:
        return wanted
    if wanted == "auto" and fitting:
        return fitting[0]
    if wanted != "auto":
        needed = " and ".join(column(source, each) for each in SHAPES[wanted][0])
        raise BadRow(NOT_THE_SHAPE, f"shape={wanted} needs {needed}; there are {', '.join(map(str, found))}")
    raise BadRow(
        NOT_THE_SHAPE,
        f"a shape that is not known, with the columns {', '.join(map(str, found)) or '(none)'}; say what they are with "
        "columns, for example {instruction: 指示, output: 応答}",
    )


def read(source: ChatSourceConfig, shape: str, row: Mapping[str, Any]) -> Conversation | str:
    """What a row says; a string for plain text.

    Raises:
        BadRow: a column is missing, a turn is empty, the roles are out of order.
    """
    for needed in SHAPES[shape][0]:
        theirs = column(source, needed)
        if row.get(theirs) is None:
            missing = f"'{theirs}' is null" if theirs in row else f"no '{theirs}'; there are {', '.join(map(str, row))}"
            raise BadRow(NOT_THE_SHAPE, missing)
    said = READERS[shape](source, row)
    if isinstance(said, str):
        if not said.strip():
            raise BadRow(EMPTY, f"'{column(source, 'text')}' is empty")
        return said
    own = row.get(column(source, "system"))
    system = own if isinstance(own, str) and own.strip() else source.system
    if system and (not said or said[0]["role"] != "system"):
        said = [{"role": "system", "content": system}, *said]
    return Conversation(checked(said), _tools(row.get("tools")))


def _tools(tools: Any) -> list[Any] | None:
    """Descriptions of functions; many write them as JSON in a string."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRow(NOT_THE_SHAPE, f"'tools' is a string, and no JSON ({error})") from error
    if tools and not isinstance(tools, list):
        raise BadRow(NOT_THE_SHAPE, f"'tools' is {type(tools).__name__}, not a list")
    return tools or None


def _text(source: ChatSourceConfig, row: Mapping[str, Any]) -> str:
    return _string(row[column(source, "text")], column(source, "text"))


def _messages(source: ChatSourceConfig, row: Mapping[str, Any]) -> list[Message]:
    return _turns(source, row[column(source, "messages")], column(source, "messages"))


def _sharegpt(source: ChatSourceConfig, row: Mapping[str, Any]) -> list[Message]:
    return _turns(source, row[column(source, "conversations")], column(source, "conversations"))


def _alpaca(source: ChatSourceConfig, row: Mapping[str, Any]) -> list[Message]:
    instruction = _string(row[column(source, "instruction")], column(source, "instruction"))
    more = row.get(column(source, "input"))
    if more is not None and _string(more, column(source, "input")).strip():
        instruction = f"{instruction}\n\n{more}"
    answer = _string(row[column(source, "output")], column(source, "output"))
    return [{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}]


def _prompt_completion(source: ChatSourceConfig, row: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[column(source, name)]
        if isinstance(value, str):
            messages.append({"role": role, "content": value})
        else:
            messages += _turns(source, value, column(source, name))
    return messages


READERS: dict[str, Callable[[ChatSourceConfig, Mapping[str, Any]], list[Message] | str]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
}


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(NOT_THE_SHAPE, f"'{where}' is {type(value).__name__}, not a string")
    return value


def _turns(source: ChatSourceConfig, turns: Any, where: str) -> list[Message]:
    """Messages of a list, whichever of the two pairs of keys it has."""
    if not isinstance(turns, list) or not all(isinstance(each, dict) for each in turns):
        raise BadRow(NOT_THE_SHAPE, f"'{where}' is not a list of messages")
    result = []
    for number, turn in enumerate(turns, 1):
        there = {key: value for key, value in turn.items() if value is not None}  # Parquet fills up what rows lack
        pairs = [("role", "content"), ("from", "value")]
        named = [(column(source, role), column(source, content)) for role, content in pairs]
        role_key, content_key = next((each for each in named if each[0] in there), (None, ""))
        if role_key is None:
            raise BadRow(
                NOT_THE_SHAPE, f"message {number} has no role: no '{named[0][0]}' or '{named[1][0]}' among its keys "
                f"({', '.join(there) or 'none'})"
            )  # fmt: skip
        theirs = str(there.pop(role_key))
        role = source.roles.get(theirs) or KNOWN_ROLES.get(theirs.lower())
        if role is None:
            raise BadRow(
                NOT_THE_SHAPE, f"message {number} has the role '{theirs}', which is not known; say whose it is with "
                f"roles, for example {{{theirs}: user}}"
            )  # fmt: skip
        content = _content(there.pop(content_key, ""), number)
        result.append({**there, "role": role, "content": content})
    return result


def _content(content: Any, number: int) -> str:
    """A message's text; OpenAI's lists of parts are joined."""
    if isinstance(content, list):
        parts = [each.get("text") if isinstance(each, dict) else each for each in content]
        texts = [each for each in parts if isinstance(each, str)]
        if len(texts) == len(parts):
            return "".join(texts)
    if not isinstance(content, str):
        raise BadRow(NOT_THE_SHAPE, f"message {number} is not of text")
    return content


FOLLOWS = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""Whose turn it may be after whose."""


def checked(messages: list[Message]) -> list[Message]:
    """Messages in an order in which a conversation goes, none of them empty; what follows the last answer is left out.

    Raises:
        BadRow: they are not.
    """
    before = "start"
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in FOLLOWS[before]:
            after = "at the beginning" if before == "start" else f"after '{before}'"
            raise BadRow(OUT_OF_ORDER, f"message {number} is of '{role}' {after}")
        said = message["content"].strip() or message.get("tool_calls") or role == "tool"
        if not said and role != "system":
            raise BadRow(EMPTY, f"message {number} ('{role}') is empty")
        before = role
    last = max((at for at, each in enumerate(messages) if each["role"] == "assistant"), default=-1)
    if last < 0:
        raise BadRow(NO_ANSWER, f"no message of the assistant among its {len(messages)}")
    return messages[: last + 1]


def first_exchanges(messages: list[Message], turns: Any) -> list[Message]:
    """A conversation's beginning: `all`, `first`, or so many exchanges (a user's turn and what answers it)."""
    if turns == "all":
        return messages
    wanted = 1 if turns == "first" else int(turns)
    starts = [at for at, each in enumerate(messages) if each["role"] == "user"]
    return messages[: starts[wanted]] if len(starts) > wanted else messages


def without_oldest(messages: list[Message]) -> list[Message] | None:
    """A conversation without its oldest exchange; its system prompt stays. None where there is but one."""
    starts = [at for at, each in enumerate(messages) if each["role"] == "user"]
    if len(starts) < 2:
        return None
    return messages[: starts[0]] + messages[starts[1] :]
