"""New pieces out of counted words, by the trainer of `tokenizers`, from where the old tokenizer stopped.

The trainer counts pairs of symbols and joins the most frequent, again and again. Here its symbols are the *old pieces*
of the words, each written as one private character, so what it joins are the pairs that the old tokenizer leaves
behind, and each new piece is learned where it will be used.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import tokenizers

from llm_recipes.vocab.pieces import SENTENCEPIECE, Pieces, steps
from llm_recipes.vocab.scripts import Scripts

FIRST_PRIVATE = 0x10000
"""From here on there are code points for a million pieces, no white space, and no surrogates."""
WORDS_AT_ONCE = 20_000
WORDS_IN_A_LINE = 256
"""The trainer takes a few hundred lines at once, each in much memory."""
MOST_COPIES = 5_000_000
"""The trainer takes no counts: each word is given to it as often as it counts, or as its share of so many."""
FEWEST = 2
"""A pair that stands there only once teaches nothing."""


def as_read(words: Mapping[str, int], state: dict[str, Any], scripts: Scripts) -> Mapping[str, int]:
    """The words as the tokenizer's own normalizer, where it has one, hands them on."""
    normalizer: Any = bare(state).normalizer if state.get("normalizer") else None
    if normalizer is None:
        return words
    found: Counter[str] = Counter()
    for word, count in words.items():
        for part in scripts.words(normalizer.normalize_str(word)):
            found[part] += count
    return found


def characters_to_add(words: Mapping[str, int], pieces: Pieces, coverage: float) -> list[str]:
    """The most frequent characters of the words, up to this share of all their characters, that are no pieces yet.

    Only SentencePiece needs them: what is not among its pieces it writes byte by byte, and joins no more.
    """
    if pieces.kind != SENTENCEPIECE:
        return []
    counted: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counted[character] += count
    enough = coverage * counted.total()
    seen, found = 0, []
    for character, count in counted.most_common():
        if seen >= enough:
            break
        seen += count
        if character not in pieces.known:
            found.append(character)
    return found


def candidates(words: Mapping[str, int], state: dict[str, Any], pieces: Pieces, wanted: int) -> list[str]:
    """Pieces worth adding, the best first, in the model's letters; up to `wanted` of them.

    Args:
        words: with how often each stands in the corpus.
        state: the old tokenizer.json.
    """
    units = _Units()
    lines = list(_feed(_private_words(words, state, pieces, units), sum(words.values())))
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trainer: Any = tokenizers.trainers.BpeTrainer(
        vocab_size=len(units) + wanted, min_frequency=FEWEST, show_progress=False, special_tokens=[]
    )
    learner.train_from_iterator(lines, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [units.text(left + right) for left, right in merges]


class _Units:
    """Old pieces, each as one private character."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self._pieces: list[str] = []

    def __len__(self) -> int:
        return len(self._pieces)

    def private(self, pieces: Iterable[str]) -> str:
        numbers = self._number
        result = []
        for piece in pieces:
            number = numbers.setdefault(piece, len(numbers))
            if number == len(self._pieces):
                self._pieces.append(piece)
            result.append(chr(FIRST_PRIVATE + number))
        return "".join(result)

    def text(self, private: str) -> str:
        return "".join(self._pieces[ord(each) - FIRST_PRIVATE] for each in private)


def bare(state: dict[str, Any], characters: Iterable[str] = ()) -> tokenizers.Tokenizer:
    """The tokenizer for words from the middle of a text: no space put before, no special tokens, nothing unknown.

    Args:
        characters: to be pieces of their own, where they are none.
    """
    own = json.loads(json.dumps(state))
    model = own["model"]
    own |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    for key in ("normalizers", "pretokenizers"):
        for holder in (own.get("normalizer"), own.get("pre_tokenizer")):
            for step in steps(holder):
                if key in step:
                    step[key] = [each for each in step[key] if each["type"] not in ("Prepend", "Metaspace")]
    for holder in ("normalizer", "pre_tokenizer"):
        if own.get(holder) and own[holder]["type"] in ("Prepend", "Metaspace"):
            own[holder] = None
        for step in steps(own.get(holder)):
            if "add_prefix_space" in step:
                step["add_prefix_space"] = False
    model["dropout"] = None
    for character in characters:
        model["vocab"].setdefault(character, len(model["vocab"]) + (1 << 24))
    return tokenizers.Tokenizer.from_str(json.dumps(own))


def _private_words(
    words: Mapping[str, int], state: dict[str, Any], pieces: Pieces, units: _Units
) -> Iterator[tuple[str, int]]:
    alphabet = {character for word in words for character in word} if pieces.kind == SENTENCEPIECE else ()
    tokenizer: Any = bare(state, alphabet)
    for some in _groups(words):
        encodings = tokenizer.encode_batch([word for word, _ in some], add_special_tokens=False)
        for (_, count), encoding in zip(some, encodings, strict=True):
            # The tokenizer's own splitting may cut a word: no piece reaches over such a cut.
            start = 0
            tokens, numbers = encoding.tokens, encoding.word_ids
            for at in range(1, len(tokens) + 1):
                if at == len(tokens) or numbers[at] != numbers[start]:
                    if at - start > 1:
                        yield units.private(tokens[start:at]), count
                    start = at


def _groups(words: Mapping[str, int]) -> Iterator[list[tuple[str, int]]]:
    supply = iter(words.items())
    while some := list(islice(supply, WORDS_AT_ONCE)):
        yield some


def _feed(words: Iterable[tuple[str, int]], total: int) -> Iterator[str]:
    """Each word as often as it counts, or in the same proportion, many to a line."""
    share = min(1.0, MOST_COPIES / max(total, 1))
    dice = random.Random(0)
    line: list[str] = []
    for word, count in words:
        # Rounded at random: on the whole a rare word stands there as often as it should.
        copies = count if share == 1 else int(count * share + dice.random())
        while copies > 0:
            now = min(copies, WORDS_IN_A_LINE - len(line))
            line.extend([word] * now)
            copies -= now
            if len(line) == WORDS_IN_A_LINE:
                yield " ".join(line)
                line = []
    yield " ".join(line)


def frequencies(words: Mapping[str, int], state: dict[str, Any]) -> Counter[int]:
    """How often the old tokenizer's tokens stand in the corpus's words."""
    tokenizer: Any = bare(state)
    found: Counter[int] = Counter()
    for some in _groups(words):
        for (_, count), encoding in zip(some, tokenizer.encode_batch([word for word, _ in some]), strict=True):
            for number in encoding.ids:
                found[number] += count
    return found


def old_ids(state: dict[str, Any], scripts: Scripts, kind: str, pieces: Iterable[str]) -> list[list[int]]:
    """The old tokens of each piece's text: its old pieces, and bytes for a character that is none."""
    model = state["model"]
    old = Pieces(state, kind, scripts)
    result = []
    for piece in pieces:
        numbers = []
        for part in old.cut(piece):
            own = model["vocab"].get(part)
            if own is not None:
                numbers.append(own)
            elif model.get("byte_fallback"):
                numbers.extend(model["vocab"][f"<0x{byte:02X}>"] for byte in part.encode())
            else:
                numbers.append(model["vocab"][model["unk_token"]])
        result.append(numbers)
    return result
