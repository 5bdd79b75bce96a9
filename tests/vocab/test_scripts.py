"""Which characters new pieces are made of."""

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from llm_recipes.errors import UserError
from llm_recipes.vocab.scripts import Scripts

JAPANESE = Scripts(["hiragana", "katakana", "kanji", "fullwidth"])


COUNT = [
    *"あんゝゞゟアンヽヾーヿㇰｱｶﾞﾟ漢々〆〇𠮷𩸽葛㐀",
    *"「」『』、。〜～！？ＡａＺ０９￥＝（）゛゜・ｰ\u3000\u3099\uff61",
]
DO_NOT = [*"aZ09 \n\t¥…·×─Ω–—“”‘’€―−‐▁①㈱㍻한ไЖé🎌\x00\u200b\ufeff\u200d\ufffd"]


@pytest.mark.parametrize("character", COUNT)
def test_a_character_of_japanese_text_counts(character: str) -> None:
    assert JAPANESE.has(character) and JAPANESE.has(f"a{character}b")


@pytest.mark.parametrize("character", DO_NOT)
def test_another_scripts_character_does_not(character: str) -> None:
    assert not JAPANESE.has(character) and JAPANESE.words(character) == []


def test_words_are_runs_of_letters_or_digits_or_signs() -> None:
    assert JAPANESE.words("東京ab都、「雪」を１２３個。。　 次 か\u3099Ω") == [
        "東京", "都", "、「", "雪", "」", "を", "１２３", "個", "。。", "次", "か\u3099"
    ]  # fmt: skip


@given(text=st.text(max_size=30))
def test_words_and_what_lies_between_hold_every_character_once(text: str) -> None:
    words, between = JAPANESE.words(text), list(JAPANESE.cut(text))
    assert not any(regex.search(r"\s", word) for word in words)
    assert all(all(JAPANESE.has(each) for each in word) for word in words)
    assert not any(JAPANESE.has(part) for part in between)
    assert len(text) == sum(map(len, [*words, *between])) + text.count("\u3000")


def test_only_the_scripts_that_were_named_count() -> None:
    katakana = Scripts(["katakana"])
    assert katakana.has("ア") and katakana.has("ー") and not katakana.has("あ") and not katakana.has("漢")
    assert Scripts(["hangul"]).words("한국어와 日本語") == ["한국어와"]
    assert Scripts(["Thai", "kanji"]).words("ไทย漢字") == ["ไทย漢字"]


def test_a_range_is_owned_only_where_each_of_its_characters_is() -> None:
    assert JAPANESE.owns(0x3040, 0x307F) and not Scripts(["katakana"]).owns(0x3080, 0x30BF)
    assert Scripts(["katakana"]).owns(0x30C0, 0x30FF) and not JAPANESE.owns(0xFFC0, 0xFFFF)


@pytest.mark.parametrize(("name", "said"), [("kanjii", "did you mean 'kanji'"), ("klingon", "no script 'klingon'")])
def test_an_unknown_script_is_an_error_that_names_the_nearest(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Scripts(["hiragana", name])


def test_no_script_at_all_is_an_error() -> None:
    with pytest.raises(UserError, match="name at least one"):
        Scripts([])
