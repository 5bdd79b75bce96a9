"""Blocks of raw rows, and what is in them: texts, conversations, and rows that are broken.

Lines and rows are numbered from 1.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from llm_recipes.errors import did_you_mean

BROKEN_JSON = "broken JSON"
NOT_UTF8 = "not UTF-8"
NO_TEXT = "no text"
NOT_A_STRING = "text is not a string"


class Block(NamedTuple):
    """Some rows of one input, as they lie there."""

    where: str
    """The file or dataset."""
    first: int
    """Number of the first row."""
    data: bytes
    """Whole lines, or an Arrow stream."""
    arrow: bool
    done: int
    """Bytes of this input that are read by the end of this block, for progress."""

    def place(self, number: int) -> str:
        """Where a row is, for a message."""
        return f"{self.where}: {'row' if self.arrow else 'line'} {number}"


class Problem(NamedTuple):
    """What is wrong with a row."""

    reason: str
    """One of a few kinds, by which rows that were left out are counted."""
    detail: str


def rows(block: Block, text_key: str, messages_key: str) -> Iterator[tuple[int, str | list[Any] | Problem]]:
    """Every row of a block with its number: a text, a conversation (a list of messages), or what is wrong.

    A row that has `messages_key` is a conversation; blank lines are no rows.
    """
    for number, row in parsed(block):
        if isinstance(row, Problem):
            yield number, row
        elif not isinstance(row, dict):
            yield number, Problem(BROKEN_JSON, f"{_kind(row)}, not a JSON object")
        elif row.get(messages_key) is not None:
            messages = row[messages_key]
            if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
                yield number, messages
            else:
                yield number, Problem(NO_TEXT, f"'{messages_key}' is not a list of messages")
        elif text_key not in row:
            hint = did_you_mean(text_key, row) if row else "the row is empty"
            yield number, Problem(NO_TEXT, f"no '{text_key}' (text_key), {hint}")
        elif not isinstance(row[text_key], str):
            yield number, Problem(NOT_A_STRING, f"'{text_key}' is {_kind(row[text_key])}, not a string")
        else:
            yield number, row[text_key]


def parsed(block: Block) -> Iterator[tuple[int, Any]]:
    """Every row of a block with its number, as JSON or Arrow gives it; a `Problem` where it is broken."""
    return _parse_arrow(block) if block.arrow else _parse_lines(block)


def _kind(value: Any) -> str:
    names = {"NoneType": "null", "dict": "an object", "list": "a list", "str": "a string", "bytes": "binary"}
    name = type(value).__name__
    return names.get(name, "a number" if isinstance(value, int | float) and not isinstance(value, bool) else name)


def _parse_lines(block: Block) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(block.data.split(b"\n"), block.first):
        if not line or line.isspace():
            continue
        try:
            yield number, json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield number, Problem(NOT_UTF8, f"not UTF-8 (byte {error.start + 1} of the line)")
        except json.JSONDecodeError as error:
            yield number, Problem(BROKEN_JSON, f"broken JSON ({error.msg} at character {error.colno})")
        except (ValueError, RecursionError) as error:
            yield number, Problem(BROKEN_JSON, f"broken JSON ({error})")


def _parse_arrow(block: Block) -> Iterator[tuple[int, Any]]:
    import pyarrow

    with pyarrow.ipc.open_stream(block.data) as stream:
        table: pyarrow.Table = stream.read_all()
    try:
        yield from enumerate(table.to_pylist(), block.first)
        return
    except UnicodeDecodeError:
        pass  # found before the first row was given out: now row by row
    for index in range(table.num_rows):
        try:
            yield block.first + index, table.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield block.first + index, Problem(NOT_UTF8, "not UTF-8")
