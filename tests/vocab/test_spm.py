"""SentencePiece's model file and tokenizer.json say the same."""

import functools
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import bases
import numpy as np
import pytest
from bases import quiet
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_recipes.errors import UserError
from llm_recipes.vocab import spm

PARTS = bases.several(
    "ー ーー ーーーー 々 々々々 。 。。。。 は はは w wwww ｱ ﾊﾟ 学 学生 生 東京 食べ ます を を見る Ａ １２ 한"
    " 🎌 the 12 …"
)
PARTS += ["\u3000", "\u3000\u3000", " ", "  ", "▁", "\n", "\t", " a"]
MIXED = st.lists(
    st.one_of(st.sampled_from(PARTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=3)), max_size=20
).map(lambda parts: "".join(parts).replace("\x00", ""))
FEW = st.one_of(*(st.text(alphabet=few, max_size=24) for few in ["ー は", "々。w", "ー々は ", "　 ｱa", "学生を"]))


@pytest.mark.parametrize("name", ["a file", "own file"])
@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.one_of(MIXED, FEW))
@example(text="  先頭  ーーーー。。。。wwww々々々々ｱｶﾞ　　 ")
def test_both_forms_give_the_same_ids(name: str, text: str, extended: Callable[[str], Any]) -> None:
    one = extended(name)
    for token in ("<s>", "</s>", "<unk>"):  # in a text these are control tokens to one, letters to the other
        text = text.replace(token, "")
    assert one.plain.encode(text, add_special_tokens=False).ids == one.sentencepiece.encode(text)


@functools.cache
def old_model(path: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(path))


@pytest.mark.parametrize("name", ["mistral and more", "legacy"])
@settings(max_examples=50, deadline=None, derandomize=True)
@given(text=st.one_of(MIXED, FEW))
def test_a_folders_forms_agree_wherever_they_did(name: str, text: str, extended: Callable[[str], Any]) -> None:
    one = extended(name)
    text = text.lstrip(" ▁")  # transformers' newer reading puts no space before one
    old = old_model(one.base / "tokenizer.model")
    if one.before.backend_tokenizer.encode(text, add_special_tokens=False).ids == old.encode(text):
        ids = one.after.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == one.sentencepiece.encode(text)


def test_a_model_file_that_transformers_reads_in_another_way_is_no_base(corpus: str, tmp_path: Path) -> None:
    folder = bases.mistral(tmp_path / "base")
    assert not (folder / "tokenizer.json").exists()
    with pytest.raises(UserError, match=r"a SentencePiece model without a tokenizer.json"):
        bases.quiet(corpus=corpus, output=str(tmp_path / "new"), vocab_size=32_100, tokenizer=str(folder))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", list(bases.SENTENCEPIECE))
def test_new_scores_lie_below_every_old_one_and_all_else_is_as_it_was(
    name: str, extended: Callable[[str], Any]
) -> None:
    one = extended(name)
    old = spm.read(one.base if one.base.is_file() else one.base / "tokenizer.model")
    new = spm.read(one.folder / "tokenizer.model")
    size, first = len(old.pieces), max(one.before.get_vocab().values()) + 1
    assert [each.SerializeToString() for each in new.pieces[:size]] == [each.SerializeToString() for each in old.pieces]
    assert [each.type for each in new.pieces[size:first]] == [spm.CONTROL] * (first - size)
    scores = [np.float32(each.score) for each in new.pieces[first:]]
    assert max(scores) < min(np.float32(each.score) for each in old.pieces)
    assert all(before > after for before, after in pairwise(scores))
    assert {each.type for each in new.pieces[first:]} == {spm.NORMAL}
    assert len({each.piece for each in new.pieces}) == len(new.pieces) == len(one.after)
    assert new.trainer_spec.vocab_size == len(new.pieces)
    new.trainer_spec.vocab_size = old.trainer_spec.vocab_size
    del new.pieces[:], old.pieces[:]
    assert new == old


def test_no_new_piece_has_a_space_in_it(extended: Callable[[str], Any]) -> None:
    for name in bases.SENTENCEPIECE:
        one = extended(name)
        first = one.findings.tokens_before
        fresh = [token for token, number in one.after.get_vocab().items() if number >= first]
        assert not any(set(piece) & set("▁ \u3000") for piece in fresh)


def test_every_split_of_a_new_piece_is_a_merge(extended: Callable[[str], Any]) -> None:
    state = extended("own file").state["model"]
    merges = {tuple(pair) for pair in state["merges"]}
    for piece, number in state["vocab"].items():
        if number >= 460:
            cuts = {(piece[:at], piece[at:]) for at in range(1, len(piece))}
            known = {cut for cut in cuts if state["vocab"].keys() >= set(cut)}
            assert known <= merges


def test_an_extended_model_can_be_extended_again(extended: Callable[[str], Any], tmp_path: Path) -> None:
    one = extended("own file")
    corpus = bases.write_rows(tmp_path / "more.jsonl", bases.japanese(500, seed=4))
    quiet(corpus=corpus, output=str(tmp_path / "new"), vocab_size=700, tokenizer=str(one.folder))
    before = spm.read(one.folder / "tokenizer.model").pieces
    assert len(before) == 580 and spm.read(tmp_path / "new" / "tokenizer.model").pieces[:580] == before


def test_symbols_of_the_user_stay_whole(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

    model = bases.sentencepiece(tmp_path / "own.model", user_defined_symbols=["<mask>", "東京"])
    corpus = bases.write_rows(tmp_path / "corpus.jsonl", bases.japanese(300))
    quiet(corpus=corpus, output=str(tmp_path / "new"), vocab_size=520, tokenizer=str(model))
    new = SentencePieceProcessor(model_file=str(tmp_path / "new" / "tokenizer.model"))
    fast: Any = Tokenizer.from_file(str(tmp_path / "new" / "tokenizer.json"))
    for text in ("東京は<mask>", "大阪と東京から<mask>を見る"):
        for pieces in (new.encode(text, out_type=str), fast.encode(text, add_special_tokens=False).tokens):
            assert pieces.count("東京") == 1 and pieces.count("<mask>") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_type": "unigram"}, "a SentencePiece model of Unigram"),
        ({"model_type": "char"}, "a SentencePiece model of characters"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes texts before it cuts them"),
        ({"treat_whitespace_as_suffix": True}, "does not put a space"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_its_name(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = bases.sentencepiece(tmp_path / "own.model", hard_vocab_limit=False, **options)
    with pytest.raises(UserError, match=said):
        spm.as_json(spm.read(model))


@pytest.mark.parametrize("data", [b"", b"nothing of the kind", bytes(range(256)) * 9, "cut"])
def test_a_broken_model_file_is_one_line(data: Any, tmp_path: Path) -> None:
    data = bases.mistral_model().read_bytes()[:4001] if data == "cut" else data
    (tmp_path / "broken.model").write_bytes(data)
    with pytest.raises(UserError, match=r"broken\.model: (not a|a) SentencePiece model"):
        spm.read(tmp_path / "broken.model")
