"""Questions of evaluation suites that occur in token files: who trains on them measures memory.

A question occurs where 13 of its tokens in a row do (Brown et al., 2020, appendix C, of words); a shorter one where the
whole of it does. What all questions of a task share is their form, and is not looked for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_recipes.data.token_file import TokenFile
from llm_recipes.evaluation.suites import Suite

LENGTH = 13
"""Tokens in a row."""
LEAST = 5
"""Tokens of a question that is looked for: a shorter one is anywhere."""
FORM = 0.5
"""Share of a task's questions in which a run of tokens is taken for the form of all of them."""
CHUNK = 1 << 22
"""Tokens that are looked through at once."""
BASE = np.uint64(0x9E3779B97F4A7C15)
"""Of the rolling hash: a polynomial, modulo 2**64."""
TABLE_BITS = np.uint64(22)


@dataclass(frozen=True)
class Question:
    """One item of a suite.

    Attributes:
        text: without what all questions of its task begin and end with.
        ids: its tokens.
    """

    suite: str
    task: str
    text: str
    ids: list[int]


@dataclass(frozen=True)
class Hit:
    """Where a question was found first.

    Attributes:
        position: in the file, of the first token.
        length: tokens that are the same.
    """

    position: int
    length: int


def questions(suite: Suite, tokenizer: Any) -> tuple[list[Question], dict[str, str]]:
    """The questions that a suite asks, and by task's name why others are not there.

    Raises:
        UserError: as of `tasks.open_tasks`.
    """
    from llm_recipes.evaluation import tasks  # which imports lm-eval: an extra

    opened, missing = tasks.open_tasks(suite)
    found: list[Question] = []
    for name in suite.config.tasks:
        if name not in opened:
            missing.setdefault(name, "no questions")
            continue
        each = opened[name]
        documents = list(each.task.eval_docs)
        asked = documents if each.samples is None else [documents[number] for number in each.samples]
        texts = without_form([_asked(each.task, document) for document in asked])
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        found += [Question(suite.name, name, text, own) for text, own in zip(texts, ids, strict=True)]
    return found, missing


def _asked(task: Any, document: Mapping[str, Any]) -> str:
    text = task.doc_to_text(document)
    if isinstance(text, int):  # the number of one of several contexts
        text = task.doc_to_choice(document)[text]
    return text if isinstance(text, str) else str(text)


def without_form(texts: Sequence[str]) -> list[str]:
    """Texts without what they all begin and end with."""
    if len(texts) < 2:
        return list(texts)
    start = _shared(texts)
    rest = [text[start:] for text in texts]
    end = _shared([text[::-1] for text in rest])
    return [text[: len(text) - end].strip() for text in rest]


def _shared(texts: Sequence[str]) -> int:
    """Characters with which all of them begin, up to the end of a word."""
    first, last = min(texts), max(texts)
    same = (at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    end = next(same, min(len(first), len(last)))
    while end and first[end - 1].isalnum():
        end -= 1
    return end


def hashes(ids: np.ndarray, most: int) -> Iterator[tuple[int, np.ndarray]]:
    """For every length up to `most`, the hash of the run of so many tokens that begins at each place: uint64."""
    tokens = ids.astype(np.uint64) + np.uint64(1)
    found = np.zeros(len(tokens), np.uint64)
    for length in range(1, min(most, len(tokens)) + 1):
        found = found[: len(tokens) - length + 1] * BASE + tokens[length - 1 :]
        yield length, found


class _Needles:
    """Runs of tokens of one length that are looked for.

    Args:
        found: their hashes, uint64.
        places: where each begins in all the questions' tokens.
        owners: whose it is.
    """

    def __init__(self, found: np.ndarray, places: np.ndarray, owners: np.ndarray) -> None:
        order = np.argsort(found, kind="stable")
        self._owners = owners[order]
        self._hashes, self._first = np.unique(found[order], return_index=True)
        self._places = places[order][self._first]
        self._table = np.zeros(1 << int(TABLE_BITS), bool)
        self._table[self._hashes >> (np.uint64(64) - TABLE_BITS)] = True

    def hits(self, seen: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Which of them may stand where: its place in the questions, whose it is, and the places in order."""
        maybe = np.flatnonzero(self._table[seen >> (np.uint64(64) - TABLE_BITS)])
        at = np.searchsorted(self._hashes, seen[maybe]).clip(max=len(self._hashes) - 1)
        same = self._hashes[at] == seen[maybe]
        order = np.argsort(at[same], kind="stable")
        numbers, first = np.unique(at[same][order], return_index=True)
        bounds = [*self._first.tolist(), len(self._owners)]
        for number, places in zip(numbers.tolist(), np.split(maybe[same][order], first)[1:], strict=True):
            yield int(self._places[number]), self._owners[bounds[number] : bounds[number + 1]], places


class Search:
    """Looks for questions in token files.

    Args:
        asked: the questions; one of fewer than `LEAST` tokens is not looked for.
    """

    def __init__(self, asked: Sequence[Question]) -> None:
        lengths = np.array([len(each.ids) for each in asked], np.int64)
        self._ids = np.array([token for each in asked for token in each.ids], np.int64)
        names = {(each.suite, each.task): number for number, each in enumerate(asked)}
        tasks = np.array([names[each.suite, each.task] for each in asked], np.int64)
        sizes = np.bincount(tasks[lengths >= LEAST], minlength=len(asked))
        owner = np.repeat(np.arange(len(asked)), lengths)
        start = np.repeat(np.cumsum(lengths) - lengths, lengths)
        own = lengths[owner]
        place = np.arange(len(self._ids))
        self._needles: dict[int, _Needles] = {}
        for length, found in hashes(self._ids, LENGTH):
            # All runs of a long question that end in it; a short one from its beginning.
            wanted = (own >= length) & (place - start <= own - length) if length == LENGTH else own == length
            wanted &= (length == LENGTH) | (place == start)
            at = place[: len(found)][wanted[: len(found)]]
            at = at[~_is_form(found[at], owner[at], tasks[owner[at]], sizes)]
            if length >= LEAST and len(at):
                self._needles[length] = _Needles(found[at], at, owner[at])

    def look(
        self, file: TokenFile, part: int = 0, parts: int = 1, show: Callable[[int], None] = lambda done: None
    ) -> dict[int, Hit]:
        """The first place of each question that occurs, by its number.

        Args:
            part, parts: which share of the file is this process's; `merged` puts them together.
            show: told how many tokens are done.
        """
        result: dict[int, Hit] = {}
        for chunk in range(part, -(-file.tokens // CHUNK), parts):
            start = chunk * CHUNK
            tokens = file.read(start, min(start + CHUNK + LENGTH - 1, file.tokens))
            for length, seen in hashes(tokens, max(self._needles, default=0)):
                if length not in self._needles:
                    continue
                for at, owners, places in self._needles[length].hits(seen):
                    # The hash says where to look; the tokens themselves say whether.
                    wanted = self._ids[at : at + length]
                    same = (each for each in places.tolist() if np.array_equal(tokens[each : each + length], wanted))
                    if (place := next(same, None)) is not None:
                        _keep_first(result, dict.fromkeys(owners.tolist(), Hit(start + place, length)))
            show(min(start + CHUNK, file.tokens))
        return result


def merged(parts: Sequence[Mapping[int, Hit]]) -> dict[int, Hit]:
    """What several processes have found, as one would have."""
    found: dict[int, Hit] = {}
    for part in parts:
        _keep_first(found, part)
    return found


def _keep_first(found: dict[int, Hit], more: Mapping[int, Hit]) -> None:
    for number, hit in more.items():
        if number not in found or hit.position < found[number].position:
            found[number] = hit


def _is_form(found: np.ndarray, owners: np.ndarray, tasks: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which runs of tokens stand in most questions of their task: bool, one each.

    Args:
        found: their hashes.
        sizes: questions of each task.
    """
    if not len(found):
        return np.zeros(0, bool)
    keys = found ^ (tasks.astype(np.uint64) * BASE)
    _, of_task = np.unique(keys, return_inverse=True)
    many = int(owners.max()) + 1
    once = np.unique(of_task * many + owners) // many  # a question that says it twice counts once
    return np.bincount(once)[of_task] > np.maximum(1, FORM * sizes[tasks])
