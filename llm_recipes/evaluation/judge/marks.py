"""What is seen of an answer without a judge: how much of it is Japanese, and whether it goes round in circles."""

import regex

LETTERS = regex.compile(r"\p{L}")
JAPANESE = regex.compile(r"[\p{Hiragana}\p{Katakana}\p{Han}ー々〆ヶ]")
SPACE = regex.compile(r"\s+")
GRAM = 10
"""Characters that are compared."""
TAILS = (100, 400, 1600)
"""Characters at an answer's end that are looked at."""
SHORTEST = 20
"""Characters that an answer must have before it can be said to repeat itself."""
REPEATED = 0.5
"""Above this an answer counts as one that repeats itself."""


def japanese_share(text: str) -> float | None:
    """Kana and kanji as a share of all letters; None where there are none. Digits, signs and spaces do not count; a
    kanji counts wherever it stands, in a Chinese sentence too."""
    letters = LETTERS.findall(text)
    return len([each for each in letters if JAPANESE.match(each)]) / len(letters) if letters else None


def repetition(text: str) -> float:
    """How far an answer's end repeats itself, from 0 to 1: the share of its runs of 10 characters that have stood in it
    before, in the last 100, 400 or 1,600 characters, wherever that is highest. White space counts as one space.

    A sentence that comes again and again has a share near 1 however long it is (up to 800 characters), prose in
    Japanese or English one below 0.2. An answer of fewer than 20 characters has 0.
    """
    plain = SPACE.sub(" ", text.strip())
    if len(plain) < SHORTEST:
        return 0.0
    return max(_share(plain[-length:]) for length in TAILS)


def _share(text: str) -> float:
    grams = [text[at : at + GRAM] for at in range(len(text) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams)
