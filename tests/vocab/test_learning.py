"""What is learned is byte pair encoding, continued from where the old tokenizer stopped."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import bases
import pytest
from tokenizers import Tokenizer

from llm_recipes.vocab import learning
from llm_recipes.vocab.base import open_base
from llm_recipes.vocab.learning import candidates, characters_to_add, old_ids
from llm_recipes.vocab.pieces import SENTENCEPIECE, Pieces
from llm_recipes.vocab.scripts import Scripts

SCRIPTS = Scripts(["hiragana", "katakana", "kanji", "fullwidth"])


def continued(words: Sequence[tuple[list[str], int]], wanted: int) -> list[str]:
    """Byte pair encoding in plain Python. Of pairs that stand equally often the one of the lowest numbers is joined;
    pieces are numbered as they come."""
    number: dict[str, int] = {}
    for pieces, _ in words:
        for piece in pieces:
            number.setdefault(piece, len(number))
    found: list[str] = []
    for _ in range(wanted):
        pairs: Counter[tuple[str, str]] = Counter()
        for pieces, count in words:
            for pair in pairwise(pieces):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], number[pair[0]], number[pair[1]]), default=None)
        if best is None or pairs[best] < 2:
            break
        found.append("".join(best))
        number.setdefault(found[-1], len(number))
        for pieces, _ in words:
            at = 0
            while at < len(pieces) - 1:
                if (pieces[at], pieces[at + 1]) == best:
                    pieces[at : at + 2] = [found[-1]]
                at += 1
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama3", "own file"])
def test_learning_is_byte_pair_encoding_continued(name: str, tmp_path: Path) -> None:
    base = open_base(str((bases.BYTE_LEVEL | bases.SENTENCEPIECE)[name](tmp_path / "base")), "tokenizer", False)
    words = Counter(word for text in bases.japanese(150) for word in SCRIPTS.words(text))
    pieces = Pieces(base.state, base.kind, SCRIPTS)
    for character in characters_to_add(words, pieces, 1.0):
        pieces.add(character)
    tokenizer: Any = learning.bare(base.state, {each for word in words for each in word} if base.proto else ())
    cut: list[tuple[list[str], int]] = []
    for word, count in words.items():
        encoding = tokenizer.encode(word)
        for number in sorted(set(encoding.word_ids)):
            of_it = [t for t, n in zip(encoding.tokens, encoding.word_ids, strict=True) if n == number]
            if len(of_it) > 1:
                cut.append((of_it, count))
    reference = continued(cut, 80)
    assert len(reference) == 80
    assert candidates(words, base.state, pieces, 80)[:80] == reference


def test_a_word_counts_in_proportion_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "MOST_COPIES", 10_000)
    words = [("a", 900_000), ("b", 90_000), *((f"c{number}", 10) for number in range(1000))]
    fed = Counter(word for line in learning._feed(words, 1_000_000) for word in line.split())
    assert fed["a"] in (9000, 9001) and fed["b"] in (900, 901)
    assert 50 <= fed.total() - fed["a"] - fed["b"] <= 160
    assert all(len(line.split()) <= learning.WORDS_IN_A_LINE for line in learning._feed(words, 1_000_000))


def test_every_word_is_fed_as_often_as_it_counts() -> None:
    words = {"a": 1, "b": 1000, "c": 7}
    assert Counter(word for line in learning._feed(words.items(), 1008) for word in line.split()) == words


def test_characters_are_added_by_frequency_up_to_the_coverage(tmp_path: Path) -> None:
    base = open_base(str(bases.sentencepiece(tmp_path / "own.model")), "tokenizer", False)
    pieces = Pieces(base.state, SENTENCEPIECE, SCRIPTS)
    words = {"鬱": 90, "麟": 6, "齟": 3, "齬": 1}
    assert characters_to_add(words, pieces, 0.95) == ["鬱", "麟"]
    assert characters_to_add(words, pieces, 1.0) == ["鬱", "麟", "齟", "齬"]


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen", "own file"])
def test_the_old_tokens_of_a_piece_are_those_of_its_text(name: str, extended: Callable[[str], Any]) -> None:
    one = extended(name)
    base = open_base(str(one.base), "tokenizer", False)
    fresh = [token for token, number in one.after.get_vocab().items() if number >= base.first]
    tokenizer: Any = learning.bare(base.state)
    shown = Pieces(base.state, base.kind, SCRIPTS).shown
    for piece, numbers in zip(fresh, old_ids(base.state, SCRIPTS, base.kind, fresh), strict=True):
        if "\\x" not in shown(piece):
            assert numbers == tokenizer.encode(shown(piece), add_special_tokens=False).ids


@pytest.mark.slow
def test_the_tokenizer_for_words_puts_no_space_before_them(extended: Callable[[str], Any]) -> None:
    for name in ("prefix space", "mistral and more", "legacy", "own file"):
        base = open_base(str(extended(name).base), "tokenizer", False)
        tokens = learning.bare(base.state).encode("は").tokens
        assert not any(token.startswith(("▁", "Ġ")) for token in tokens), name


def test_more_is_learned_until_enough_is_short_enough(tmp_path: Path) -> None:
    from bases import quiet

    base = bases.byte_level(tmp_path / "base")
    corpus = bases.write_rows(tmp_path / "corpus.jsonl", bases.japanese(400))
    quiet(corpus=corpus, output=str(tmp_path / "new"), vocab_size=505, tokenizer=str(base), max_piece_length=2)
    fresh = json.loads((tmp_path / "new" / "vocabulary.json").read_text(encoding="utf-8"))["pieces"]
    assert len(fresh) == 205 and max(len(piece.partition("\\x")[0]) for piece in fresh) <= 2
    assert Tokenizer.from_file(str(tmp_path / "new" / "tokenizer.json")).get_vocab_size() == 505
