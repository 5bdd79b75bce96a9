"""A whole new tokenizer, from nothing but a corpus."""

from pathlib import Path
from typing import Any

import pytest
from bases import quiet
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_recipes.errors import UserError

KINDS = ["byte_level", "sentencepiece"]


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fresh") / request.param
    quiet(corpus=corpus, output=str(folder), vocab_size=500, new=request.param)
    return Path(folder)


@pytest.fixture(scope="module")
def opened(made: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(made)


def test_it_has_exactly_the_size_that_was_asked_for(opened: Any) -> None:
    assert len(opened) == 500 == max(opened.get_vocab().values()) + 1
    assert opened.bos_token_id is not None and opened.eos_token_id is not None


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_every_text_comes_back(opened: Any, text: str) -> None:
    text = text.replace("▁", "")  # which is a space to SentencePiece
    assert opened.decode(opened(text, add_special_tokens=False)["input_ids"]) == text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    text=st.text(st.one_of(st.sampled_from("ー々。はw　 学生"), st.characters(exclude_categories=["Cs"])), max_size=30)
)
def test_both_forms_agree(made: Path, opened: Any, text: str) -> None:
    from sentencepiece import SentencePieceProcessor

    if (made / "tokenizer.model").is_file():
        text = text.replace("\x00", "")
        form = SentencePieceProcessor(model_file=str(made / "tokenizer.model"))
        assert opened(text, add_special_tokens=False)["input_ids"] == form.encode(text)


def test_the_same_command_makes_the_same_files(made: Path, corpus: str, tmp_path: Path) -> None:
    quiet(corpus=corpus, output=str(tmp_path / "again"), vocab_size=500, new=made.name)
    assert {p.name: p.read_bytes() for p in made.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [100, 90_000])
def test_a_size_that_the_corpus_cannot_give_is_an_error(kind: str, size: int, corpus: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"vocab_size={size}"):
        quiet(corpus=corpus, output=str(tmp_path / "new"), vocab_size=size, new=kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_surrogate_pair_is_a_broken_row(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud800"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl: line 1: half of a surrogate pair"):
        quiet(corpus=str(path), output=str(tmp_path / "new"), vocab_size=300, new=kind)
