"""Figures of answers equal what is worked out by hand, or by another library."""

from typing import Any

import pytest

from llm_recipes.evaluation import metrics


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("東京都", "東京都", 1.0),
        ("東京", "東京都", 0.80),  # 2 of 2 and 2 of 3: 4 / 5
        ("京都", "東京", 0.50),  # one in common, in order: 2 / 4
        ("abcde", "xyz", 0.0),
        ("", "東京", 0.0),
        ("！？", "。", 1.0),  # nothing is left of either
        ("Tokyo Bay", "bay tokyo", 1.0),  # words sorted, capitals lowered
        ("a,b", "b a", 1.0),  # a sign is a space
        ("café", "caf", 1.0),  # Latin-1's upper half goes
        ("1868年", "1867年", 0.80),  # 4 in common of 5 and 5
        ("abcabba", "cbabac", 0.62),  # LCS 4 of 7 and 6: 8 / 13 = 0.615
    ],
)
def test_character_f1_is_twice_the_common_subsequence_over_both_lengths(
    answer: str, reference: str, score: float
) -> None:
    assert metrics.character_f1(answer, reference) == metrics.character_f1(reference, answer) == score


def test_the_common_subsequence_is_the_longest() -> None:
    import random

    def slow(first: str, second: str) -> int:
        rows = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                rows[i + 1][j + 1] = rows[i][j] + 1 if a == b else max(rows[i][j + 1], rows[i + 1][j])
        return rows[-1][-1]

    generator = random.Random(0)
    for _ in range(300):
        first, second = ("".join(generator.choices("あいうab ", k=generator.randrange(1, 90))) for _ in range(2))
        assert metrics._common(first, second) == slow(first, second)


def test_a_short_answer_ends_at_an_empty_line_and_full_width_signs_are_half_width() -> None:
    figures = metrics.short_answer({"output": "ABC 12"}, ["　ＡＢＣ　１２\n\n### 入力:\nABC"])
    assert figures == {"char_f1": 1.0, "exact_match": 1.0, "parsed": 1.0}
    assert metrics.short_answer({"output": "東京"}, ["\n\n東京"]) == {"char_f1": 0, "exact_match": 0, "parsed": 0}


@pytest.mark.parametrize(
    ("answer", "right", "parsed"),
    [("3", 1, 1), (" ３ ", 1, 1), ("4", 0, 1), ("5", 0, 0), ("答えは3", 0, 0), ("", 0, 0)],
)
def test_a_choice_is_its_bare_number(answer: str, right: float, parsed: float) -> None:
    assert metrics.choice({"output": "3"}, [answer]) == {"exact_match": right, "parsed": parsed}


@pytest.mark.parametrize(
    ("answer", "right", "parsed"),
    [
        ("5+6=11です。答えは11です。", 1, 1),
        ("答えは11.", 1, 1),
        ("11.0", 1, 1),
        ("1,011", 0, 1),
        ("答えは11.5です", 0, 0),
        ("11から2を引くと9", 0, 1),
        ("わかりません", 0, 0),
        ("...", 0, 0),
    ],
)
def test_the_last_number_is_the_answer(answer: str, right: float, parsed: float) -> None:
    assert metrics.final_number({"answer_number": 11}, [answer]) == {"acc": right, "parsed": parsed}


def test_rouge_counts_pairs_of_mecab_words() -> None:
    words = metrics.mecab_words("猫が魚を食べた")
    assert words == ["猫", "が", "魚", "を", "食べ", "た"]
    # pairs: 猫が が魚 魚を を食べ 食べた, against 犬が が魚 魚を を食べ 食べた: 4 of 5 and 5
    assert metrics.rouge2("犬が魚を食べた", "猫が魚を食べた") == pytest.approx(0.8)
    # against 猫が が魚 魚を を見 見た: 3 of 5 and 5; and a shorter one, 猫が が魚: 2 of 2 and 5
    assert metrics.rouge2("猫が魚を見た", "猫が魚を食べた") == pytest.approx(0.6)
    assert metrics.rouge2("猫が魚", "猫が魚を食べた") == pytest.approx(2 * 2 / 7)
    assert metrics.rouge2("", "猫が魚を食べた") == 0 and metrics.rouge2("猫", "猫") == 0


def test_rouge_equals_the_rouge_library_on_the_same_words() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    class Words:
        def tokenize(self, text: str) -> list[str]:
            return metrics.mecab_words(text)

    scorer = RougeScorer(["rouge2"], tokenizer=Words())
    texts = [
        "新しい橋が川に架かり、橋を渡る人が増えた。",
        "橋が川に架かった。橋を渡る人が多い。",
        "人が橋を渡る、橋を渡る。",
    ]
    for first in texts:
        for second in texts:
            expected = scorer.score(first, second)["rouge2"].fmeasure
            assert metrics.rouge2(second, first) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("ＡＢＣ１２３！", "ABC123!"),
        ("ﾊﾝｶｸｶﾞﾅ", "ハンカクガナ"),
        ("スーーーパー──", "スーパー"),
        ("1‐2−3", "1-2-3"),
        ("わ〜い～", "わい"),
        ("検索 エンジン", "検索エンジン"),
        ("Python  入門 1", "Python入門1"),
        ("two words　here", "two words here"),
        ("よい😀天気☀です", "よい天気です"),
    ],
)
def test_japanese_is_normalized_by_the_dictionary_s_rules(text: str, normal: str) -> None:
    assert metrics.normalize(text) == normal


ANSWERS: list[tuple[list[str], str, float, float]] = [
    (["the Eiffel Tower"], " Eiffel tower.", 1, 1),
    (["Paris", "in Paris"], "in Paris", 1, 1),
    (["a red car"], "red car today", 0, 0.8),  # 2 of 3 and 2
    ([], "", 1, 1),
    ([], " unanswerable", 0, 0),
    (["the"], "", 1, 1),  # nothing is left of the reference
]


@pytest.mark.parametrize(("references", "answer", "exact", "f1"), ANSWERS)
def test_reading_is_scored_as_squad_2(references: list[str], answer: str, exact: float, f1: float) -> None:
    figures = metrics.reading({"answers": {"text": references}}, [answer])
    assert figures["exact"] == exact and figures["f1"] == pytest.approx(f1)


def test_bleu_is_sacrebleu_s_over_the_whole_set() -> None:
    import sacrebleu

    pairs = [
        ("The cat sat on the mat, today.", "The cat sat on the mat today."),
        ("It is raining in the old town.", "It rains in the old town."),
        ("He reads a book.", "He reads the long book about cats."),
    ]
    rows = [metrics.into_english({"reference": reference}, [f" {answer}\n"]) for reference, answer in pairs]
    scorer = sacrebleu.metrics.BLEU()
    expected = scorer.corpus_score([answer for _, answer in pairs], [[reference for reference, _ in pairs]]).score
    assert metrics.bleu([row["bleu"] for row in rows]) == pytest.approx(expected / 100)
    # Not the mean of the sentences' scores.
    single = [metrics.bleu([row["bleu"]]) for row in rows]
    assert abs(sum(single) / 3 - expected / 100) > 0.01
    assert metrics.bleu([("a b c d e", "a b c d e")]) == pytest.approx(1)


def test_bleu_s_standard_error_is_that_of_drawn_sets() -> None:
    import random

    import numpy as np

    generator = random.Random(0)
    pairs = []
    for _ in range(60):
        reference = generator.choices(["the", "a", "cat", "dog", "sees", "eats", "red", "old", "house", "tree"], k=9)
        answer = [word if generator.random() < 0.8 else "so" for word in reference]
        pairs.append((" ".join(reference), " ".join(answer)))
    drawn = [metrics.bleu(generator.choices(pairs, k=60)) for _ in range(300)]
    error = metrics.bleu_standard_error(pairs)
    assert error == pytest.approx(float(np.std(drawn)), rel=0.2) and error == metrics.bleu_standard_error(pairs)


def test_bleu_into_japanese_is_over_words(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    def tagging(text: str) -> Any:
        return SimpleNamespace(words=metrics.mecab_words(text))

    monkeypatch.setitem(sys.modules, "nagisa", SimpleNamespace(tagging=tagging))
    row = metrics.into_japanese({"reference": "猫が魚を食べた"}, [" 猫が魚を見た\n"])
    assert row["bleu"] == ("猫 が 魚 を 食べ た", "猫 が 魚 を 見 た") and row["parsed"] == 1
    # Words 1 to 4 in a row: 5/6, 3/5, 2/4, 1/3, the same length; BLEU is their geometric mean.
    assert metrics.bleu([row["bleu"]]) == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
