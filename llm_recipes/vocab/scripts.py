"""The scripts that new pieces are wanted for: which characters are theirs, and the words of a text in them."""

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache

import regex

from llm_recipes.errors import UserError, did_you_mean

# Blocks, and not only what Unicode calls the script: the long vowel mark and the brackets belong to none.
NAMED = {
    "hiragana": r"\u3040-\u309F\U0001B000-\U0001B16F",
    "katakana": r"\u30A0-\u30FF\u31F0-\u31FF\uFF65-\uFF9F",
    "kanji": r"\p{Script=Han}",
    "fullwidth": r"\u3000-\u303F\uFF00-\uFFEF",
}
"""What the user may ask for by these names. Any other name is a script of Unicode's (`hangul`, `thai` ...)."""


class Scripts:
    """Some scripts together.

    Args:
        names: of `NAMED`, or names of Unicode's scripts.

    Raises:
        UserError: there is no such script.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if not names:
            raise UserError("scripts: name at least one, for example scripts=[hiragana,katakana,kanji]")
        self.names = tuple(names)
        self._members = "".join(_members(name) for name in names)

    @cached_property
    def _one(self) -> regex.Pattern[str]:
        return regex.compile(f"[{self._members}]", regex.V1)

    @cached_property
    def _runs(self) -> regex.Pattern[str]:
        # Letters, digits and the rest apart, as the splitting before every usual tokenizer does: a piece that joined
        # them could never be produced. White space is in no word.
        wanted = f"[{self._members}]"
        kinds = (r"[\p{L}\p{M}]", r"\p{N}", r"[^\p{L}\p{M}\p{N}\s]")
        return regex.compile("|".join(f"[{wanted}&&{kind}]+" for kind in kinds), regex.V1)

    def has(self, text: str) -> bool:
        """Whether a character of these scripts stands in a text."""
        return self._one.search(text) is not None

    def words(self, text: str) -> list[str]:
        """The longest runs of characters of these scripts that are all letters, all digits, or neither."""
        found: list[str] = self._runs.findall(text)
        return found

    def cut(self, text: str) -> Iterator[str]:
        """A text without these scripts' characters: what lies between them."""
        return (part for part in self._one.split(text) if part)

    @lru_cache(maxsize=4096)  # noqa: B019 (there is one of these a run)
    def owns(self, first: int, last: int) -> bool:
        """Whether every character from one code point to another is of these scripts, or does not exist."""
        return all(
            self._one.match(chr(point)) is not None or unicodedata.category(chr(point)) == "Cn"
            for point in range(first, last + 1)
        )


def _members(name: str) -> str:
    lowered = name.lower()
    if lowered in NAMED:
        return NAMED[lowered]
    try:
        regex.compile(rf"\p{{Script={name}}}")
    except regex.error:
        raise UserError(
            f"scripts: no script '{name}', {did_you_mean(lowered, NAMED)} (or one of Unicode's, such as Hangul)"
        ) from None
    return rf"\p{{Script={name}}}"
