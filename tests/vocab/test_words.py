"""The words of a corpus: counted right, in bounded memory, and nothing of what is held out."""

import io
import random
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import bases
import pytest
from rich.console import Console

from llm_recipes.config import ExtendVocabConfig
from llm_recipes.errors import UserError
from llm_recipes.vocab import words
from llm_recipes.vocab.scripts import Scripts
from llm_recipes.vocab.words import thin

SCRIPTS = Scripts(["hiragana", "katakana", "kanji", "fullwidth"])


def count(corpus: Any, hold_out: bool = False, **options: Any) -> words.Words:
    config = ExtendVocabConfig(corpus=corpus, output="", vocab_size=1, **{"workers": 1, **options})
    inputs = words.open_texts(corpus, config, "corpus")
    return words.count(inputs, SCRIPTS, config, hold_out, Console(file=io.StringIO()))


def plain(texts: list[str]) -> Counter[str]:
    return Counter(word for text in texts for word in SCRIPTS.words(text))


def test_counts_are_those_of_a_plain_counter(tmp_path: Path) -> None:
    texts = bases.japanese(300) + bases.english(20)
    found = count(bases.write_rows(tmp_path / "a.jsonl", texts))
    assert found.counts == plain(texts) and found.documents == 320 and not found.held_out
    assert found.bytes == sum(len(text.encode()) for text in texts)


def test_any_number_of_processes_counts_the_same(tmp_path: Path) -> None:
    files = [bases.write_rows(tmp_path / f"{seed}.jsonl", bases.japanese(120, seed)) for seed in range(3)]
    one, two = (count(files, True, workers=workers) for workers in (1, 2))
    assert one == two and list(one.counts.items()) == list(two.counts.items())
    assert one.held_out == [text for seed in range(3) for text in bases.japanese(120, seed) if words.is_held_out(text)]


def test_what_is_held_out_is_not_counted(tmp_path: Path) -> None:
    texts = bases.japanese(200)
    found = count(bases.write_rows(tmp_path / "a.jsonl", texts), hold_out=True)
    assert found.held_out == [text for text in texts if words.is_held_out(text)] != []
    assert found.counts == plain([text for text in texts if not words.is_held_out(text)])
    assert found.documents == 200


def test_no_more_is_held_out_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "HELD_OUT_CHARACTERS", 30)
    texts = bases.japanese(400)
    found = count(bases.write_rows(tmp_path / "a.jsonl", texts), hold_out=True)
    held = found.held_out
    every = [text for text in texts if words.is_held_out(text)]
    assert held and held == every[: len(held)] and sum(map(len, held[:-1])) < 30
    assert Counter(found.counts) + plain(held) == plain(texts)


def test_a_full_table_stays_bounded_and_tells_the_truth_on_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "MOST_WORDS", 60)
    dice = random.Random(5)
    texts = [dice.choice(bases.NOUNS) + "、" + "".join(dice.choices("あいうえおかきくけこ", k=3)) for _ in range(3000)]
    path = bases.write_rows(tmp_path / "a.jsonl", texts)
    totals = []
    for seed in range(20):
        found = count(path, seed=seed)
        assert len(found.counts) <= 60
        totals.append(sum(found.counts.values()))
    right = plain(texts).total()
    assert abs(sum(totals) / len(totals) - right) < 0.05 * right
    assert found.counts["、"] == 3000


def test_thinning_expects_every_count_to_be_what_it_was() -> None:
    counts = {f"w{number}": number for number in range(1, 41)}
    rounds, found = 4000, Counter[str]()
    dice = random.Random(0)
    for _ in range(rounds):
        kept = thin(counts, 16, dice)
        assert all(kept[word] == max(counts[word], 16) for word in kept)
        found.update(kept)
    for word, number in counts.items():
        # Five standard errors of a mean of so many rounds.
        error = 5 * (max(number * (16 - number), 0) / rounds) ** 0.5
        assert abs(found[word] / rounds - number) <= error


@pytest.mark.parametrize("broken", ['{"text": 5}', '{"txt": "雨"}', "[1]", "{", '{"text": "雨\\ud800"}'])
def test_a_broken_row_stops_the_work_or_is_counted_and_left_out(broken: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "猫"}}\n{broken}\n{{"text": "犬"}}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl: line 2: .*on_error=skip"):
        count(str(path))
    found = count(str(path), on_error="skip")
    assert found.counts == {"猫": 1, "犬": 1} and found.skipped.total() == 1 and found.documents == 2


def test_of_a_conversation_what_is_said_counts(tmp_path: Path) -> None:
    said = [{"role": "利用者", "content": "猫は"}, {"role": "a", "content": None}, {"role": "a", "content": "犬"}]
    assert count(bases.write_rows(tmp_path / "a.jsonl", [{"messages": said}])).counts == {"猫は": 1, "犬": 1}


def test_a_corpus_without_the_scripts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no character of the scripts hiragana, katakana, kanji, fullwidth"):
        count(bases.write_rows(tmp_path / "a.jsonl", bases.english(5)))


def test_nfkc_is_for_what_is_learned_from(tmp_path: Path) -> None:
    texts = ["ﾃﾚﾋﾞと㍻のＡＢＣ１２", *bases.japanese(20)]
    found = count(bases.write_rows(tmp_path / "a.jsonl", texts), nfkc=True)
    assert found.counts == plain([unicodedata.normalize("NFKC", text) for text in texts])
    assert "テレビと平成の" in found.counts


def test_with_an_analyser_no_word_reaches_over_a_words_end(tmp_path: Path) -> None:
    pytest.importorskip("unidic_lite")
    texts = bases.japanese(60)
    tagger = words.open_analyser()
    counted = count(bases.write_rows(tmp_path / "a.jsonl", texts), words="fugashi").counts
    expected: Counter[str] = Counter()
    for text in texts:
        for run in SCRIPTS.words(text):
            expected.update(tagger.parse(run).split())
    assert counted == expected
    assert "".join(sorted("".join(word * number for word, number in counted.items()))) == "".join(
        sorted("".join(part for text in texts for part in SCRIPTS.words(text)))
    )
