"""Rows to token ids with a mark on every token that trains: what runs in every worker. Imports no torch.

A conversation is rendered once and encoded once, as a whole. A token trains if any of its characters is the
assistant's, so that an answer is learned from its first character on, whatever it merges with.
"""

import heapq
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from llm_recipes.chat import shapes
from llm_recipes.chat.shapes import BadRow, Conversation, Message
from llm_recipes.chat.template import REWRITES, Rendered, Template
from llm_recipes.config import ChatSourceConfig
from llm_recipes.data.rows import NOT_UTF8, Block, Problem, parsed
from llm_recipes.errors import UserError

TOO_LONG = "longer than the window"
TRUNCATED = "truncated from the left"
NO_TOKENS = "an answer of no tokens"
SHOWN = 3
"""Rows of each block that a preview may show."""
JUDGED = 64
"""Conversations of each block that a preview may judge."""


@dataclass(frozen=True)
class Recipe:
    """What makes ids out of rows. Everything a worker needs; it travels by pickle."""

    source: ChatSourceConfig
    where: str
    """The source's key in the configuration, for messages."""
    shape: str
    template: Template | None
    """None: the source is plain text."""
    tokenizer_json: str
    eod: int | None
    bos: int | None
    """Before plain text, or None."""
    seq_len: int
    train_on: str
    split: bool
    truncate: bool
    stop_on_error: bool
    dtype: str
    """Of the ids on disk."""
    seed: int

    def __post_init__(self) -> None:
        if self.shape != "text" and self.template is None:
            raise ValueError("conversations need a template")


@dataclass
class Example:
    """One conversation, or text, as it is trained on.

    Attributes:
        ids: int64 (tokens,).
        trained: bool (tokens,): whether the token is a target.
        text_bytes: UTF-8 bytes of what trains, without control tokens.
        text, answers: as of `template.Rendered`, for a preview.
    """

    ids: np.ndarray
    trained: np.ndarray
    text_bytes: int
    text: str
    answers: list[tuple[int, int]]


@dataclass
class Encoded:
    """The conversations of one block, end to end."""

    tokens: np.ndarray
    trained: np.ndarray
    """bool, one per token."""
    lengths: np.ndarray
    """Tokens of each, int32."""
    text_bytes: np.ndarray
    """UTF-8 bytes of what trains of each, uint32."""
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows that give nothing, by reason."""
    changed: Counter[str] = field(default_factory=Counter)
    """Rows of which something is left out, by reason."""
    ends: Counter[int] = field(default_factory=Counter)
    """The last token of the last answers, of some."""
    shown: list[dict[str, Any]] = field(default_factory=list)
    """`text` and `answers` (characters from, to) of some."""
    judged: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """Some as messages, each with the number by which they are drawn."""


class ChatEncoder:
    """Encodes rows by a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @cached_property
    def _tokenizer(self) -> Any:
        import tokenizers

        # What a post-processor does to offsets (it trims white space off them) is not wanted; of special tokens it
        # adds none here anyhow.
        state = json.loads(self.recipe.tokenizer_json)
        state["truncation"] = state["padding"] = state["post_processor"] = None
        return tokenizers.Tokenizer.from_str(json.dumps(state, ensure_ascii=False))

    @cached_property
    def _control_strings(self) -> re.Pattern[str]:
        template = self.recipe.template
        strings = sorted(template.controls, key=len, reverse=True) if template else []
        return re.compile("|".join(map(re.escape, strings)) or r"(?!)")

    def encode_block(self, block: Block) -> Encoded:
        """Ids and marks of all the conversations of a block.

        Raises:
            UserError: a row cannot be used, and the recipe stops at it.
        """
        recipe = self.recipe
        found = Encoded(np.empty(0, recipe.dtype), np.empty(0, bool), np.empty(0, np.int32), np.empty(0, np.uint32))
        examples: list[Example] = []
        for number, row in parsed(block):
            found.rows += 1
            try:
                if isinstance(row, Problem):
                    raise BadRow(row.reason, row.detail)
                if not isinstance(row, dict):
                    raise BadRow("broken JSON", "not a JSON object")
                said = shapes.read(recipe.source, recipe.shape, row)
                examples += self._used(said, found)
            except BadRow as error:
                if error.reason == TOO_LONG or not recipe.stop_on_error:
                    found.left_out[error.reason] += 1
                    continue
                raise UserError(
                    f"{recipe.where}: {block.place(number)}: {error.detail} (data.on_error=skip leaves such rows out)"
                ) from error
        if examples:
            found.tokens = np.concatenate([each.ids for each in examples]).astype(recipe.dtype)
            found.trained = np.concatenate([each.trained for each in examples])
        found.lengths = np.array([len(each.ids) for each in examples], np.int32)
        found.text_bytes = np.array([each.text_bytes for each in examples], np.uint32)
        some = heapq.nsmallest(JUDGED, found.judged, key=lambda each: each[0])
        found.ends.update(self._end(Conversation(each["messages"], each["tools"])) for _, each in some)
        found.judged = [(number, _as_json(each)) for number, each in some]
        found.shown = [{"text": each.text, "answers": each.answers} for each in examples[:SHOWN]]
        return found

    def _used(self, said: Conversation | str, found: Encoded) -> list[Example]:
        """The examples that a row gives, counted; with what a preview wants of it."""
        if isinstance(said, str):
            return self.encode_text(said)
        examples, truncated = self.encode(said)
        found.changed[TRUNCATED] += truncated
        whole = {"messages": said.messages, "tools": said.tools}
        name = f"{self.recipe.seed} {json.dumps(whole, default=str)}"  # what it says, wherever it stands
        found.judged.append((xxhash.xxh3_64_intdigest(name.encode()), whole))
        return examples

    def _end(self, said: Conversation) -> int:
        """The token that ends the last answer, also where more than answers trains."""
        assert self.recipe.template is not None
        ids, marks = self._marked(self.recipe.template.rendered(said, last_only=True))
        return int(ids[marks][-1])

    def encode_text(self, text: str) -> list[Example]:
        """Plain text, every token of which trains; special tokens' strings in it are text. What is longer than a window
        is cut into pieces, of which each goes on where the one before ends.

        Raises:
            BadRow: it has no tokens.
        """
        ids = self._tokens(text, special=False).ids
        begin = [] if self.recipe.bos is None else [self.recipe.bos]
        end = [] if self.recipe.eod is None else [self.recipe.eod]
        whole = np.array([*begin, *ids, *end], np.int64)
        if not ids or len(whole) < 2:
            raise BadRow(NO_TOKENS, "a text with nothing to predict")
        size = self.recipe.seq_len
        pieces = [whole[start : start + size + 1] for start in range(0, len(whole) - 1, size)]
        counts = [len(text.encode())] + [0] * (len(pieces) - 1)
        return [
            Example(piece, np.ones(len(piece), bool), count, text, [(0, len(text))])
            for piece, count in zip(pieces, counts, strict=True)
        ]

    def encode(self, said: Conversation) -> tuple[list[Example], int]:
        """A conversation as one example, or as one per turn where that is asked for.

        Returns:
            The examples, and how many of them were truncated.

        Raises:
            BadRow: it cannot be used.
        """
        recipe = self.recipe
        messages = shapes.first_exchanges(said.messages, recipe.source.turns)
        messages = shapes.checked(messages)
        try:
            return self._fitted(messages, said.tools, recipe.train_on == "last_turn")
        except BadRow as error:
            if error.reason != REWRITES or not recipe.split:
                raise
        examples: list[Example] = []
        truncated = 0
        for at, each in enumerate(messages):
            if each["role"] == "assistant":
                more, cut = self._fitted(messages[: at + 1], said.tools, last_only=True)
                examples += more
                truncated += cut
        return examples, truncated

    def _fitted(self, messages: list[Message], tools: list[Any] | None, last_only: bool) -> tuple[list[Example], int]:
        """One example no longer than the window; how many were truncated for it."""
        example = self._example(Conversation(messages, tools), last_only)
        whole = len(example.ids)
        if whole - 1 <= self.recipe.seq_len:
            return [example], 0
        problem = BadRow(TOO_LONG, f"{whole} tokens, the window has {self.recipe.seq_len} (data.seq_len)")
        if not self.recipe.truncate:
            raise problem
        while (shorter := shapes.without_oldest(messages)) is not None:
            messages = shorter
            example = self._example(Conversation(messages, tools), last_only)
            if len(example.ids) - 1 <= self.recipe.seq_len:
                return [example], 1
        # One exchange is left: its prompt loses its beginning. Its answer stays whole, with a token before it.
        cut = len(example.ids) - 1 - self.recipe.seq_len
        first = int(example.trained.argmax()) if self.recipe.train_on != "all" else self._answer_token(messages, tools)
        if cut > first - 1:
            raise problem
        kept = example.trained[cut:].copy()
        kept[:1] = False
        text_bytes = example.text_bytes
        if self.recipe.train_on == "all":
            text_bytes = self._bytes(example.text[self._tokens(example.text).offsets[cut + 1][0] :])
        return [Example(example.ids[cut:], kept, text_bytes, example.text, example.answers)], 1

    def _answer_token(self, messages: list[Message], tools: list[Any] | None) -> int:
        """Where the last answer's first token stands."""
        assert self.recipe.template is not None
        rendered = self.recipe.template.rendered(Conversation(messages, tools), last_only=True)
        return int(self._marked(rendered)[1].argmax())

    def _example(self, said: Conversation, last_only: bool) -> Example:
        template = self.recipe.template
        assert template is not None
        if self.recipe.train_on == "all":
            text = template.render(said.messages, said.tools)
            rendered = Rendered(text, [(0, len(text))])
        else:
            rendered = template.rendered(said, last_only)
        ids, trained = self._marked(rendered)
        # Nothing stands before the first token, from which it could be predicted.
        if self.recipe.train_on != "all" and trained[0]:
            raise BadRow(NO_TOKENS, "an answer of it begins in the row's first token, which nothing stands before")
        trained[0] = False
        said_by = "".join(rendered.text[start:end] for start, end in rendered.answers)
        return Example(ids, trained, self._bytes(said_by), rendered.text, rendered.answers)

    def _bytes(self, text: str) -> int:
        """UTF-8 bytes of a text, without control tokens."""
        return len(self._control_strings.sub("", text).encode())

    def _tokens(self, text: str, special: bool = True) -> Any:
        """A text's encoding.

        Args:
            special: whether special tokens' strings in it are those tokens, or text.

        Raises:
            BadRow: it holds what is no character.
        """
        self._tokenizer.encode_special_tokens = not special
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError as error:
            raise BadRow(NOT_UTF8, "half of a surrogate pair, which is no character") from error

    def _marked(self, rendered: Rendered) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text, and which of them have a character of an answer.

        Raises:
            BadRow: an answer has no token.
        """
        encoding = self._tokens(rendered.text)
        ids = np.array(encoding.ids, np.int64)
        starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        trained = np.zeros(len(ids), bool)
        for start, end in rendered.answers:
            # A token without characters (a part of one, in some tokenizers) stands where it begins.
            inside = (starts < end) & (np.maximum(ends, starts + 1) > start)
            if not inside.any():
                raise BadRow(NO_TOKENS, "an answer of it has no tokens")
            trained |= inside
        return ids, trained


def _as_json(value: Any) -> Any:
    """What JSON can say of a row for a preview: Parquet has dates and bytes too, and numbers that are none."""
    if isinstance(value, dict):
        return {str(key): _as_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_as_json(each) for each in value]
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value).encode(errors="replace").decode()
