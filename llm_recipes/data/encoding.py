"""Blocks of rows to token ids: the half of tokenizing that runs in every worker. Imports no torch.

`fastokens` does the work where it can; `tokenizers`, which transformers uses, is the referee: an `Encoder`
keeps comparing a small share of what it encodes, and raises `Disagreement` rather than return other ids.

What a document's ids are:

- Plain text is encoded as ordinary text: a special token's string inside it ("</s>" on a web page) gives no
  control token. A BOS string at its very start, and an end-of-document string at its end (and white space
  after that), are taken as meant: they are left out, so that the document gets exactly one of each.
- A conversation is rendered by the chat template, whose special tokens do count. An end-of-document string at
  its end (and white space after that) becomes the document's one; a BOS string at its start likewise, where
  documents get a BOS at all. Where they do not, the template's own start stays as it is.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from llm_recipes.data.backends import METASPACE, Backend, Disagreement, FastokensBackend, TokenizersBackend
from llm_recipes.data.rows import NOT_UTF8, Block, Problem, rows
from llm_recipes.errors import UserError

EMPTY = "empty text"
BROKEN_CONVERSATION = "conversation the template refuses"
CONTROL_TOKEN = "control token out of plain text"
COMPARED_CHARACTERS = 2048
PROBES = (
    "The capital of France is Paris, isn't it?  Two spaces, 12345.678 and\ttabs.",
    " leading space",
    "  two leading spaces",
    f"{METASPACE}leading metaspace",
    "\nleading newline\r\n\r\n",
    "日本語の文章です。「鉤括弧」、全角ＡＢＣ１２３、〜と～、半角ｶﾅとﾊﾟ、全角　空白。\n\n",
    "がぎぐ か\u3099 é e\u0301 \u200d \ufeff \x00\x07\x7f\x85\u2028",
    "🎌👨‍👩‍👧🏽 €𠮷野家",
    "def f(x):\n        return {'a': [1, 2]}\n",
)


@dataclass(frozen=True)
class Recipe:
    """What makes ids out of rows. Everything a worker needs; it travels by pickle."""

    tokenizer_json: str
    eod: int
    bos: int | None
    eod_text: str
    bos_text: str | None
    control_tokens: dict[int, str]
    """Tokens that plain text must not give, with their strings."""
    dtype: str
    """Of the ids on disk."""
    backend: str
    """`fastokens` or `tokenizers`."""
    text_key: str
    messages_key: str
    stop_on_error: bool
    chat_template: str | None = None
    special_tokens: dict[str, Any] = field(default_factory=dict)
    """Names of special tokens, for the chat template."""


@dataclass
class Encoded:
    """The documents of one block, end to end."""

    tokens: np.ndarray
    """Ids with BOS and end-of-document, in the recipe's dtype."""
    lengths: np.ndarray
    """Tokens of each document, int32."""
    text_bytes: np.ndarray
    """UTF-8 bytes of each document's raw text, uint32."""
    skipped: Counter[str]
    """Rows left out, by reason."""
    referred: Counter[str]
    """Texts that fastokens refused and tokenizers encoded, by reason."""


class Encoder:
    """Encodes blocks by a recipe.

    Raises:
        Disagreement: the recipe's backend is `fastokens`, and it does not open the tokenizer.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.referee = TokenizersBackend(recipe.tokenizer_json)
        self.fast: FastokensBackend | None = None
        if recipe.backend == "fastokens":
            self.fast = FastokensBackend(recipe.tokenizer_json, self.referee)
        self.backend: Backend = self.fast or self.referee
        self._is_control = np.zeros(max((*recipe.control_tokens, 0)) + 1, dtype=bool)
        self._is_control[list(recipe.control_tokens)] = True
        strings = sorted(recipe.control_tokens.values(), key=len, reverse=True)
        self._control_string = re.compile("|".join(map(re.escape, strings)) or r"(?!)")
        self._chat: Any = None

    def compare(self, texts: Sequence[str], plain: bool) -> None:
        """Encode these texts by both libraries.

        Raises:
            Disagreement: the ids differ, or fastokens refuses all of several texts.
        """
        texts = [text for text in texts if text]
        if self.fast is None or not texts:
            return
        before, self.fast.referred = self.fast.referred, Counter()
        ids, lengths = self.fast.encode(texts, plain)
        refused, self.fast.referred = self.fast.referred, before
        if refused.total() == len(texts) > 1:
            raise Disagreement(f"fastokens refuses every text ({next(iter(refused))})")
        self._judge(texts, plain, ids, lengths)

    def _judge(self, texts: Sequence[str], plain: bool, ids: np.ndarray, lengths: np.ndarray) -> None:
        right_ids, right_lengths = self.referee.encode(texts, plain)
        if np.array_equal(lengths, right_lengths) and np.array_equal(ids, right_ids):
            return
        ends, right_ends = np.cumsum(lengths), np.cumsum(right_lengths)
        for text, end, length, right_end, right_length in zip(
            texts, ends, lengths, right_ends, right_lengths, strict=True
        ):
            if not np.array_equal(ids[end - length : end], right_ids[right_end - right_length : right_end]):
                raise Disagreement(f"fastokens and tokenizers give different ids for {text[:40]!r}")

    def probes(self) -> list[str]:
        """Short texts with what tokenizers are known to differ in, each control token's string among them."""
        strings = list(self.recipe.control_tokens.values())[:32]
        return [*PROBES, *(f"a {string}b\n{string}" for string in strings)]

    def documents(self, block: Block) -> tuple[list[tuple[str, bool, int, int]], Counter[str]]:
        """The block's documents, ready to be encoded, and the rows left out.

        Returns:
            (text, whether it is plain, UTF-8 bytes of the raw text, row number) of each; no text is empty.

        Raises:
            UserError: a row is broken, and the recipe stops on errors.
        """
        found: list[tuple[str, bool, int, int]] = []
        skipped: Counter[str] = Counter()
        for number, value in rows(block, self.recipe.text_key, self.recipe.messages_key):
            plain = isinstance(value, str)
            if isinstance(value, list):
                value = self._render(value, block.place(number))
            if not isinstance(value, Problem):
                try:
                    size = len(value.encode())
                except UnicodeEncodeError:
                    value = Problem(NOT_UTF8, "half of a surrogate pair, which is no character")
            if isinstance(value, Problem):
                self._leave_out(block, number, value, skipped)
                continue
            text = self._without_ends(value, plain)
            if text:
                found.append((text, plain, size, number))
            else:
                skipped[EMPTY] += 1
        return found, skipped

    def _leave_out(self, block: Block, number: int, problem: Problem, skipped: Counter[str]) -> None:
        if self.recipe.stop_on_error:
            raise UserError(f"{block.place(number)}: {problem.detail}; on_error=skip leaves such rows out")
        skipped[problem.reason] += 1

    def _render(self, messages: list[Any], place: str) -> str | Problem:
        if self._chat is None:
            if self.recipe.chat_template is None:
                raise UserError(
                    f"{place}: a conversation ('{self.recipe.messages_key}'), but the tokenizer has no chat template"
                )
            import tokenizers
            from transformers import PreTrainedTokenizerFast

            tokenizer_class: Any = PreTrainedTokenizerFast
            self._chat = tokenizer_class(
                tokenizer_object=tokenizers.Tokenizer.from_str(self.recipe.tokenizer_json),
                chat_template=self.recipe.chat_template,
                **self.recipe.special_tokens,
            )
        try:
            return str(self._chat.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template raises whatever its author liked
            return Problem(BROKEN_CONVERSATION, f"the chat template refuses this conversation ({error})")

    def _without_ends(self, text: str, plain: bool) -> str:
        """The text without a BOS string before it and an end-of-document string after it."""
        bos_text, eod_text = self.recipe.bos_text, self.recipe.eod_text
        while (bare := text.rstrip()).endswith(eod_text):
            text = bare[: -len(eod_text)]
        if bos_text and (plain or self.recipe.bos is not None):
            while text.startswith(bos_text):
                text = text[len(bos_text) :]
        return text

    def encode_block(self, block: Block) -> Encoded:
        """Ids of all the documents of a block.

        Raises:
            UserError: a row is broken, and the recipe stops on errors.
            Disagreement: `fastokens` is caught giving other ids than `tokenizers`.
        """
        documents, skipped = self.documents(block)
        if self.fast is not None:
            self.fast.referred.clear()
        parts: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        text_bytes: list[int] = []
        for plain, group in groupby(documents, key=lambda document: document[1]):
            members = list(group)
            texts = [document[0] for document in members]
            ids, counts = self.backend.encode(texts, plain)
            self._compare_one(texts, plain, ids, counts, pick=block.first)
            if plain:
                ids, counts = self._without_control(block, members, ids, counts, skipped)
            kept = counts > 0
            skipped[EMPTY] += int(np.sum(counts == 0))
            text_bytes.extend(document[2] for document, keep in zip(members, kept, strict=True) if keep)
            tokens, counts = self._with_ends(ids, counts[kept])
            parts.append(tokens)
            lengths.append(counts)
        return Encoded(
            np.concatenate(parts) if parts else np.empty(0, self.recipe.dtype),
            np.concatenate(lengths).astype(np.int32) if lengths else np.empty(0, np.int32),
            np.array(text_bytes, dtype=np.uint32),
            +skipped,
            Counter(self.fast.referred) if self.fast is not None else Counter(),
        )

    def _with_ends(self, ids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Put BOS before and end-of-document after each document."""
        before = 0 if self.recipe.bos is None else 1
        lengths = counts + before + 1
        ends = np.cumsum(lengths)
        tokens = np.empty(int(lengths.sum()), dtype=self.recipe.dtype)
        inside = np.ones(len(tokens), dtype=bool)
        inside[ends - 1] = False
        tokens[ends - 1] = self.recipe.eod
        if before:
            inside[ends - lengths] = False
            tokens[ends - lengths] = self.recipe.bos
        tokens[inside] = ids
        return tokens, lengths

    def _compare_one(self, texts: Sequence[str], plain: bool, ids: np.ndarray, counts: np.ndarray, pick: int) -> None:
        """The referee's share: one short document of each block, or a piece of a long one."""
        if self.fast is None:
            return
        index = pick * 2654435761 % len(texts)  # Knuth's multiplier: another place in every block
        text = texts[index]
        if len(text) <= COMPARED_CHARACTERS:
            end = int(counts[: index + 1].sum())
            self._judge([text], plain, ids[end - counts[index] : end], counts[index : index + 1])
        else:
            start = pick * 2654435761 % (len(text) - COMPARED_CHARACTERS)
            self.compare([text[start : start + COMPARED_CHARACTERS]], plain)

    def _without_control(
        self,
        block: Block,
        members: list[tuple[str, bool, int, int]],
        ids: np.ndarray,
        counts: np.ndarray,
        skipped: Counter[str],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode again, in pieces, the rare plain texts that gave a control token.

        Some models (unigram, whole words) have their special tokens among the ordinary pieces, and find them
        in a text although they were told not to.
        """
        wrong = self._controls(ids)
        if not wrong.any():
            return ids, counts
        ends = np.cumsum(counts)
        parts = np.split(ids, ends[:-1])
        for index in np.unique(np.searchsorted(ends, np.flatnonzero(wrong), side="right")):
            text, _, _, number = members[index]
            cuts = [0, *(match.start() + 1 for match in self._control_string.finditer(text)), len(text)]
            pieces = [text[start:end] for start, end in pairwise(cuts) if end > start]
            parts[index], _ = self.backend.encode(pieces, True)
            if self._controls(parts[index]).any():
                problem = Problem(CONTROL_TOKEN, "the tokenizer makes a control token of its text")
                self._leave_out(block, number, problem, skipped)
                parts[index] = parts[index][:0]
                skipped[EMPTY] -= 1  # counted already, by its own reason
        return np.concatenate(parts), np.array([len(part) for part in parts], dtype=np.int64)

    def _controls(self, ids: np.ndarray) -> np.ndarray:
        """Which ids are control tokens."""
        last = len(self._is_control) - 1
        found: np.ndarray = self._is_control[np.minimum(ids, last)] & (ids <= last)
        return found
