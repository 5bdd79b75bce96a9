"""What a merged tokenizer gives: old ids for old texts, every new piece for some text, the text back."""

import json
import unicodedata
from collections.abc import Callable
from typing import Any

import bases
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_recipes.config import TokenizeConfig
from llm_recipes.data import tokenizing
from llm_recipes.data.backends import Disagreement
from llm_recipes.data.encoding import Encoder
from llm_recipes.vocab.pieces import as_bytes, byte_alphabet, completions, unfinished
from llm_recipes.vocab.scripts import Scripts

ALL = [*bases.BYTE_LEVEL, *bases.SENTENCEPIECE]
SCRIPTS = Scripts(["hiragana", "katakana", "kanji", "fullwidth"])
OTHER = bases.several("한국어 안녕 🎌 ไทย Привет · … “ ” € ¥ × ─ Ω ▁ <s> </s> 12 é")
OTHER += ["👨\u200d👩\u200d👧", "e\u0301", "\x00", "\x07", "\x85", "\ufeff", "  ", "\n", "\t", "\r\n", " a", "the "]
JAPANESE = bases.several(
    "ーーーー 。。。。 wwww 々々々々 はは ーー は ー 々 。 学生 東京 そして ｱｶﾞﾊﾟ ＡＢＣ １２３ ！ 「 」"
)
JAPANESE += ["～", "〜", "゛", "か\u3099", "𠮷", "葛\U000e0100", "\u3000", "食べます", "を見る", *bases.NOUNS]
CHARACTERS = st.characters(exclude_categories=["Cs"])
WITHOUT = st.lists(st.one_of(st.sampled_from(OTHER), st.text(CHARACTERS, max_size=5)), max_size=8).map(
    lambda parts: "".join(each for each in "".join(parts) if not SCRIPTS.has(unicodedata.normalize("NFKC", each)))
)
MIXED = st.lists(
    st.one_of(st.sampled_from(JAPANESE), st.sampled_from([*OTHER, " ", "  "]), st.text(CHARACTERS, max_size=4)),
    max_size=12,
).map("".join)
TRAPS = bases.several(
    "全角ＡＢＣ１２３！？（括弧）［］ 〜と～、ー−–―‐ 半角ｶﾅﾊﾟﾋﾞ｡｢｣ ①②㈱㍻㌔ 々〆〇ゝゞヽヾ ゔヴ"
    " 𠮷野家で𩸽 ▁下線▁ <s>東京</s>"
)
TRAPS += [
    "　全角　空白　",
    " 先頭  二つ   三つ ",
    "か\u3099は\u309a",
    "「改行」\r\n\r\n\t、\n　段落",
    "\u200b\ufeff\u2028",
]
TRAPS += ["葛\U000e0100城", "🎌👨\u200d👩\u200d👧🏽", "\n", "", "\u3000", "あ\x00い\x07う\x7f"]


@pytest.mark.parametrize("name", ALL)
def test_every_new_piece_is_produced_for_some_text(name: str, extended: Callable[[str], Any]) -> None:
    one = extended(name)
    old, new = one.before.get_vocab(), one.after.get_vocab()
    fresh = {number: piece for piece, number in new.items() if piece not in old}
    first = max(old.values()) + 1
    assert sorted(fresh) == list(range(first, max(new.values()) + 1))
    assert len(fresh) == one.findings.tokens_after - one.findings.tokens_before > 100
    for number, piece in fresh.items():
        if name in bases.SENTENCEPIECE:
            candidates = [piece]
        else:
            data = as_bytes(piece)
            tail = unfinished(data)
            whole = data[: len(data) - len(tail)].decode()
            span = completions(tail) if tail else (0, -1)
            candidates = [whole + chr(each) for each in range(span[0], span[1] + 1)] if tail else [whole]
        assert any(
            number in one.plain.encode(start + each, add_special_tokens=False).ids
            for each in candidates
            for start in ("", "a")
        ), piece


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(text=WITHOUT)
@example(text="".join(OTHER))
@example(text="  It's · 한국어 … “€” 👨\u200d👩\u200d👧\x00 ")
def test_a_text_without_the_scripts_keeps_its_ids(name: str, text: str, extended: Callable[[str], Any]) -> None:
    one = extended(name)
    assert one.after(text)["input_ids"] == one.before(text)["input_ids"]


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(text=MIXED)
def test_what_is_read_back_is_what_was_read_back_before(name: str, text: str, extended: Callable[[str], Any]) -> None:
    one = extended(name)
    old, new = one.before.backend_tokenizer, one.after.backend_tokenizer
    was = old.decode(old.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
    assert new.decode(new.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == was


def test_japanese_text_comes_back_unchanged(extended: Callable[[str], Any]) -> None:
    for name in ("gpt2", "llama3", "own file", "a file"):
        new = extended(name).plain
        for text in TRAPS:
            if name in bases.SENTENCEPIECE and set(text) & set("▁<"):
                continue  # there a ▁ is a space, and one is put behind a control token
            ids = new.encode(text, add_special_tokens=False).ids
            assert new.decode(ids, skip_special_tokens=False) == text, name


@pytest.mark.parametrize("name", ALL)
def test_old_tokens_keep_their_numbers_and_the_tokenizer_its_character(
    name: str, extended: Callable[[str], Any]
) -> None:
    one = extended(name)
    new = one.after.get_vocab()
    assert all(new[token] == number for token, number in one.before.get_vocab().items())
    assert type(one.after) is type(one.before)
    assert one.after.special_tokens_map == one.before.special_tokens_map
    assert one.after.all_special_ids == one.before.all_special_ids
    assert one.after.chat_template == one.before.chat_template
    for texts in (("a",), ("",), ("a", "b"), (" the cat</s>",)):
        assert one.after(*texts)["input_ids"] == one.before(*texts)["input_ids"]
    if one.before.chat_template:
        said = [{"role": "user", "content": "the cat"}]
        assert one.after.apply_chat_template(said) == one.before.apply_chat_template(said)


@pytest.mark.parametrize("name", ["llama3", "qwen", "mistral and more", "legacy"])
def test_tokens_behind_the_models_own_pieces_stay_there(name: str, extended: Callable[[str], Any]) -> None:
    one = extended(name)
    behind = [token for token in one.before.get_added_vocab() if token.startswith("<|")]
    assert behind
    for token in behind:
        assert one.after(f"a{token}b")["input_ids"] == one.before(f"a{token}b")["input_ids"]
        assert one.plain.token_to_id(token) == one.before.convert_tokens_to_ids(token)


@pytest.mark.parametrize("name", ALL)
def test_all_but_vocabulary_and_merges_of_tokenizer_json_is_as_it_was(
    name: str, extended: Callable[[str], Any]
) -> None:
    one = extended(name)
    if not (one.base / "tokenizer.json").is_file():
        pytest.skip("the base has no tokenizer.json")
    old, new = json.loads((one.base / "tokenizer.json").read_text(encoding="utf-8")), one.state
    merges = old["model"].pop("merges")
    assert new["model"]["merges"][: len(merges)] == merges or name == "untyped"
    vocab = old["model"].pop("vocab")
    assert vocab.items() <= new["model"]["vocab"].items()
    for key in ("merges", "vocab", "type"):
        new["model"].pop(key, None)
        old["model"].pop(key, None)
    assert name == "untyped" or new == old


@pytest.mark.parametrize("name", ALL)
def test_the_fast_path_gives_the_same_ids(name: str, extended: Callable[[str], Any]) -> None:
    one = extended(name)

    def encoder(tokenizer: Any) -> Encoder:
        config = TokenizeConfig(input="", output="", tokenizer="", backend="fastokens")
        return Encoder(tokenizing.make_recipe(tokenizer, config))

    whole = [text for text in TRAPS if "<" not in text]  # a control token in a text is tokenized apart, before this
    samples = bases.japanese(20, seed=3) + bases.english(5) + whole + ["".join(JAPANESE)]
    try:
        encoder(one.before).compare(samples, True)
    except Disagreement as error:
        pytest.skip(f"nor does it for the base: {error}")
    encoder(one.after).compare(samples, True)


def test_the_byte_alphabet_is_that_of_the_tokenizers() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_alphabet().values()) == set(ByteLevel.alphabet())


@given(character=CHARACTERS)
def test_completions_are_the_characters_that_begin_with_these_bytes(character: str) -> None:
    data = character.encode()
    assert unfinished(data) == b""
    for size in range(1, len(data)):
        assert unfinished(b"a" + data[:size]) == data[:size]
        first, last = completions(data[:size])
        assert first <= ord(character) <= last
        ends = [point for point in (first, last) if not 0xD800 <= point < 0xE000]
        assert all(chr(point).encode()[:size] == data[:size] for point in ends)
        assert first == 0 or 0xD7FF <= first - 1 < 0xE000 or chr(first - 1).encode()[:size] != data[:size]
