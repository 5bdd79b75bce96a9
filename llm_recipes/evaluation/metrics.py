"""How answers are scored where lm-eval has no such metric: what the definitions of ours name as `process_results`.

Each such function takes a row and the model's answer to it, and gives the row's figures, all between 0 and 1.
`parsed` is 1 where there was an answer that could be judged.
"""

import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from llm_recipes.evaluation.rows import Row

RESAMPLED = 200
NUMBER = re.compile(r"(-?[0-9.,]+)")


def _short_answer(text: str) -> str:
    """An answer up to the first empty line, NFKC: what llm-jp-eval 1.3.0 compares."""
    return unicodedata.normalize("NFKC", text.split("\n\n")[0].strip())


def choice(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """Exact match of the number of one of five choices (llm-jp-eval's JCommonsenseQA)."""
    answer = _short_answer(results[0])
    return {"exact_match": float(answer == _short_answer(doc["output"])), "parsed": float(answer in list("01234"))}


def short_answer(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """Character F1 and exact match of an answer of a few words (llm-jp-eval's JEMHopQA, NIILC and JSQuAD)."""
    answer, reference = _short_answer(results[0]), _short_answer(doc["output"])
    return {
        "char_f1": character_f1(answer, reference),
        "exact_match": float(answer == reference),
        "parsed": float(bool(answer)),
    }


def character_f1(answer: str, reference: str) -> float:
    """llm-jp-eval's `char_f1`: F1 over characters, two decimals, of texts whose words are sorted.

    Precision and recall are the longest common subsequence over each length, so F1 = 2 LCS / (m + n). It is
    fuzzywuzzy's `token_sort_ratio` with python-Levenshtein, both of which llm-jp-eval 1.3.0 installs: before, what is
    no letter or digit becomes a space, Latin-1's upper half (128 to 255) is dropped, the rest is lowered, and words at
    spaces are sorted. Two texts that are both empty then are equal.
    """
    first, second = (_sorted_words(text) for text in (answer, reference))
    if first == second:
        return 1.0
    if not first or not second:
        return 0.0
    letters = len(first) + len(second)
    return round(100 * (1 - (letters - 2 * _common(first, second)) / letters)) / 100  # as its floats round


def _sorted_words(text: str) -> str:
    kept = "".join(letter for letter in text if not 128 <= ord(letter) < 256)
    return " ".join(sorted(re.sub(r"\W", " ", kept).lower().split()))


def _common(first: str, second: str) -> int:
    """Length of the longest common subsequence, a bit for each character of `first` (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for at, letter in enumerate(first):
        places[letter] = places.get(letter, 0) | 1 << at
    mask = (1 << len(first)) - 1
    row = mask
    for letter in second:
        met = row & places.get(letter, 0)
        row = ((row + met) | (row - met)) & mask
    return len(first) - row.bit_count()


def summary(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """ROUGE-2 over MeCab words of a Japanese summary."""
    return {"rouge2": rouge2(results[0], doc["summary"]), "parsed": float(bool(results[0].strip()))}


def rouge2(answer: str, reference: str) -> float:
    """ROUGE-2, F1: word pairs in common, each as often as both have it, over the mean number of pairs (Lin 2004)."""
    first, second = (Counter(pairwise(words)) for words in map(mecab_words, (answer, reference)))
    pairs = first.total() + second.total()
    return 2 * (first & second).total() / pairs if pairs else 0.0


@functools.cache
def _tagger() -> Any:
    import fugashi

    return fugashi.Tagger("-Owakati")


def mecab_words(text: str) -> list[str]:
    """The words of a Japanese text: fugashi with unidic-lite, once it is normalized."""
    words: list[str] = _tagger().parse(normalize(text)).split()
    return words


HYPHENS = "˗֊‐‑‒–⁃⁻₋−"
LONG_MARKS = "﹣－ｰ—―─━ー"
TILDES = "~∼∾〜〰～"
QUOTES = str.maketrans("‘’“”", "''\"\"")
CJK = r"\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef"
HALF_WIDTH_KANA = r"\uff61-\uff9f"
CJK_SPACE = re.compile(rf"(?<=[{CJK}]) +(?=[!-~{CJK}])|(?<=[!-~]) +(?=[{CJK}])")


def normalize(text: str) -> str:
    """Japanese text without the differences of writing that mean nothing, by the rules that the dictionary
    mecab-ipadic-NEologd publishes for its users, and without emoji.

    Full-width Latin letters, digits and signs become half-width, half-width kana full-width; hyphens one, long-vowel
    marks one and single; tildes go; spaces become one, and none beside Japanese.
    """
    text = "".join(letter for letter in text if not _is_emoji(letter))
    text = re.sub(f"[{HYPHENS}]+", "-", text)
    text = re.sub(f"[{LONG_MARKS}]+", "ー", text)
    text = re.sub(f"[{TILDES}]", "", text).translate(QUOTES)
    text = "".join(_one_width(letter) for letter in re.split(f"([{HALF_WIDTH_KANA}]+)", text))
    lines = (CJK_SPACE.sub("", " ".join(line.split())) for line in text.splitlines())
    return " ".join(line for line in lines if line)


def _one_width(part: str) -> str:
    """Half-width kana (a part of its own, so that voicing marks combine) full-width, full-width ASCII half-width."""
    if re.match(f"[{HALF_WIDTH_KANA}]", part):
        return unicodedata.normalize("NFKC", part)
    return "".join(chr(ord(each) - 0xFEE0) if "！" <= each <= "｝" else " " if each == "　" else each for each in part)


def _is_emoji(letter: str) -> bool:
    code = ord(letter)
    return (
        0x1F1E6 <= code <= 0x1F1FF or 0x1F300 <= code <= 0x1FAFF or 0x2702 <= code <= 0x27B0 or 0x2600 <= code <= 0x26FF
    )


def final_number(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """Whether the last number of an answer is the right one, as a whole number (the Japanese harness' MGSM)."""
    found = [match.strip(".").replace(",", "") for match in NUMBER.findall(results[0])]
    value = _whole(found[-1]) if found else None
    return {"acc": float(value is not None and value == doc["answer_number"]), "parsed": float(value is not None)}


def _whole(text: str) -> int | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def reading(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """SQuAD 2.0's `exact` and `f1` (Rajpurkar 2018): the best over the references, and for a question without an
    answer whether nothing was said. What lm-eval gives as `exact`, over 100."""
    answer = _squad_words(results[0])
    references = [words for text in doc["answers"]["text"] if (words := _squad_words(text))] or [[]]
    return {
        "exact": float(answer in references),
        "f1": max(_word_f1(answer, words) for words in references),
        "parsed": float(bool(results[0].strip())),
    }


def _squad_words(text: str) -> list[str]:
    """Lower case, without punctuation and articles, at spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _word_f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    return 2 * (Counter(answer) & Counter(reference)).total() / (len(answer) + len(reference))


def into_english(doc: Row, results: Sequence[str]) -> dict[str, Any]:
    """A translation beside its reference, for `bleu` over the whole set."""
    return _translation(doc["reference"], results[0].strip())


def into_japanese(doc: Row, results: Sequence[str]) -> dict[str, Any]:
    """As `into_english`, both cut into words by nagisa, with a space between: BLEU is of words."""
    import nagisa

    reference, answer = (" ".join(nagisa.tagging(text.strip()).words) for text in (doc["reference"], results[0]))
    return _translation(reference, answer)


def _translation(reference: str, answer: str) -> dict[str, Any]:
    pair = (reference, answer)
    return {"bleu": pair, "bleu_stderr": pair, "parsed": float(bool(answer))}


def bleu(pairs: Sequence[tuple[str, str]]) -> float:
    """BLEU of a whole set, between 0 and 1: sacrebleu's, with its own cutting of signs (13a)."""
    import sacrebleu

    references, answers = zip(*pairs, strict=True)
    return float(sacrebleu.corpus_bleu(list(answers), [list(references)]).score) / 100


def bleu_standard_error(pairs: Sequence[tuple[str, str]]) -> float:
    """The standard error of `bleu`: the deviation of the figure over sets that are drawn from these pairs with
    replacement, always the same ones (Koehn 2004)."""
    from sacrebleu.metrics import BLEU

    scores = [BLEU(effective_order=True).sentence_score(answer, [reference]) for reference, answer in pairs]
    counted = np.array([[*each.counts, *each.totals, each.sys_len, each.ref_len] for each in scores])
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLED):
        sums = counted[generator.integers(len(pairs), size=len(pairs))].sum(axis=0).tolist()
        drawn.append(BLEU.compute_bleu(sums[:4], sums[4:8], sums[8], sums[9], smooth_method="exp").score / 100)
    return float(np.std(drawn, ddof=1))
