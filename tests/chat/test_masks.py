"""What trains in a conversation: the assistant's words with their end-of-turn, whatever the format and the tokenizer.

Where an answer stands is written down by hand for each format (`tests/formats.py`), and held against decoded ids, not
against offsets: so the way in which the library finds it is no part of the proof.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import bases
import numpy as np
import pytest
import tiny
from formats import FORMATS, Format, Message, conversations, kept, rewritten, spans
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from tokenizers import processors

from llm_recipes.chat.encoding import NO_TOKENS, TOO_LONG, ChatEncoder, Example, Recipe
from llm_recipes.chat.shapes import BadRow, Conversation
from llm_recipes.chat.template import REWRITES, open_template
from llm_recipes.config import ChatSourceConfig

KINDS = ("bytes", "byte-level", "sentencepiece")
"""See `tokenizer_of`."""
LONG = 100_000
some = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Encoders = Callable[..., tuple[Any, ChatEncoder]]


def recipe_of(tokenizer: Any, chosen: Format, tokenizer_json: str | None = None, **options: Any) -> Recipe:
    recipe: dict[str, Any] = {
        "source": ChatSourceConfig(path="rows"), "where": "data.sources.rows", "shape": "messages", "eod": None,
        "bos": None, "template": open_template(tokenizer, str(chosen.place), {}), "seq_len": LONG, "seed": 0,
        "tokenizer_json": tokenizer_json or tokenizer.backend_tokenizer.to_str(), "train_on": "assistant",
        "split": False, "truncate": False, "stop_on_error": True, "dtype": "uint32",
    }  # fmt: skip
    return Recipe(**{**recipe, **options})


@pytest.fixture(scope="module")
def encoder_of(tokenizer_of: Callable[[str], Any]) -> Encoders:
    """A tokenizer, and what encodes by it and a format."""

    state = cache(lambda kind: tokenizer_of(kind).backend_tokenizer.to_str())
    first: dict[str, ChatEncoder] = {}

    @cache
    def made(kind: str, name: str, **options: Any) -> tuple[Any, ChatEncoder]:
        tokenizer = tokenizer_of(kind)
        encoder = ChatEncoder(recipe_of(tokenizer, FORMATS[name], tokenizer_json=state(kind), **options))
        encoder.__dict__["_tokenizer"] = first.setdefault(kind, encoder)._tokenizer  # opening one takes a while
        return tokenizer, encoder

    return made


@pytest.fixture(scope="module")
def odd_encoder_of(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    """The same with tokenizers of `tests/bases.py`."""
    from transformers import AutoTokenizer

    @cache
    def opened(base: str) -> Any:
        folder = tmp_path_factory.mktemp("odd") / "tokenizer"
        made = (bases.BYTE_LEVEL | bases.SENTENCEPIECE)[base](folder)
        return AutoTokenizer.from_pretrained(made)

    return cache(lambda base, name: (opened(base), ChatEncoder(recipe_of(opened(base), FORMATS[name]))))


def by_hand(chosen: Format, messages: list[Message], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    return spans(chosen.write(messages, tokenizer.bos_token, tokenizer.eos_token))


def decode(tokenizer: Any, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def runs(trained: np.ndarray) -> list[tuple[int, int]]:
    """Tokens from, to, that train without a break."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(int), [0]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def encoded(encoder: ChatEncoder, messages: list[Message]) -> tuple[list[Example], int]:
    """What the library makes of a conversation. Where question and answer are one token, and the first of all, the
    answer cannot be learned from its beginning: that is refused, and no case here."""
    try:
        return encoder.encode(Conversation(messages))
    except BadRow as error:
        if "begins in the row's first token" not in error.detail:
            raise
        reject()


def assert_answers_train(
    example: Example, text: str, answers: list[tuple[int, int]], tokenizer: Any, apart: bool, exactly: bool = False
) -> None:
    """The ids are the text's, encoded once; what trains are the fewest tokens that cover each answer.

    Args:
        apart: a special token or a line break ends the header, with which only white space merges.
        exactly: no token holds more than one byte.
    """
    assert example.ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded = decode(tokenizer, example.ids)
    lost = len(text) - len(decoded)  # SentencePiece puts a space before a text, and so loses one that begins it
    assert text == " " * lost + decoded and lost <= 1
    found = runs(example.trained)
    if not apart and len(found) < len(answers):
        reject()  # a question is one token with the answer behind it, and so stands in none of its own
    assert len(found) == len(answers)

    def behind_of(tokens: int) -> int:
        return lost + len(decode(tokenizer, example.ids[:tokens]))

    for (first, behind), (start, end) in zip(found, answers, strict=True):
        before, until, after_first, before_last = map(behind_of, (first, behind, first + 1, behind - 1))
        assert before <= start < after_first
        assert before_last < end <= until
        if exactly or (apart and not text[start].isspace()):
            assert text[before:until] == text[start:end]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
@some
@given(data=st.data())
def test_every_answer_trains_with_its_end_of_turn_and_nothing_else_does(
    encoder_of: Encoders, kind: str, name: str, data: st.DataObject
) -> None:
    chosen = FORMATS[name]
    tokenizer, encoder = encoder_of(kind, name)
    messages = data.draw(kept(chosen))
    (example,), truncated = encoded(encoder, messages)
    text, answers = by_hand(chosen, messages, tokenizer)
    assert truncated == 0
    assert_answers_train(example, text, answers, tokenizer, bool(chosen.special), exactly=kind == "bytes")


@pytest.mark.parametrize("base", ["gpt2", "llama3", "qwen", "nfkc", "prefix space", "legacy"])
@pytest.mark.parametrize("name", ["ours: llm_jp", "llama2", "zephyr", "trailing space"])
@settings(some, max_examples=10)
@given(data=st.data())
def test_the_same_with_tokenizers_that_change_the_text(
    odd_encoder_of: Encoders, base: str, name: str, data: st.DataObject
) -> None:
    """Some normalize it, some put a space before a text or behind a special token: white space and forms of letters do
    not count here."""
    chosen = FORMATS[name]
    tokenizer, encoder = odd_encoder_of(base, name)
    messages = data.draw(kept(chosen))
    (example,), _ = encoded(encoder, messages)
    text, answers = by_hand(chosen, messages, tokenizer)
    assert example.ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]

    def letters(said: str) -> str:
        return "".join(unicodedata.normalize("NFKC", said).replace("\u3099", "").split())

    trained = [letters(decode(tokenizer, example.ids[start:end])) for start, end in runs(example.trained)]
    assert trained == [letters(text[start:end]) for start, end in answers]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("header", ["answer: ", "答え: ", "答え:\n", "A:  ", "a\n\n"])
@pytest.mark.parametrize("answer", ["Paris", " Paris", "東京", "  x", "\n1"])
def test_an_answer_that_merges_with_its_prompt_is_encoded_with_it_and_trains_whole(
    encoder_of: Encoders, kind: str, header: str, answer: str
) -> None:
    tokenizer, encoder = encoder_of(kind, "ours: plain")
    messages = [{"role": "user", "content": header}, {"role": "assistant", "content": answer}]
    (example,), _ = encoded(encoder, messages)
    text, answers = by_hand(FORMATS["ours: plain"], messages, tokenizer)
    assert_answers_train(example, text, answers, tokenizer, apart=False)


def test_there_are_joins_that_merge(encoder_of: Encoders) -> None:
    """What the tests above are about: encoded apart, prompt and answer have other ids than together."""
    for kind in ("byte-level", "sentencepiece"):
        tokenizer, _ = encoder_of(kind, "ours: plain")
        prompt, answer = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in ("answer: ", "Paris"))
        assert prompt + answer != tokenizer("answer: Paris", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["ours: chatml", "llama2", "marked", "mistral", "qwen3"])
@some
@given(data=st.data())
def test_last_turn_trains_the_last_answer_alone_in_the_same_ids(
    encoder_of: Encoders, name: str, data: st.DataObject
) -> None:
    chosen = FORMATS[name]
    tokenizer, encoder = encoder_of("byte-level", name, train_on="last_turn")
    messages = data.draw(conversations(chosen.system))
    (example,), _ = encoded(encoder, messages)
    text, answers = by_hand(chosen, messages, tokenizer)
    assert_answers_train(example, text, answers[-1:], tokenizer, bool(chosen.special))


@some
@given(messages=conversations())
def test_all_trains_every_token_but_the_first(encoder_of: Encoders, messages: list[Message]) -> None:
    tokenizer, encoder = encoder_of("byte-level", "llama3", train_on="all")
    (example,), _ = encoded(encoder, messages)
    assert example.ids.tolist() == tokenizer(by_hand(FORMATS["llama3"], messages, tokenizer)[0])["input_ids"]
    assert runs(example.trained) == [(1, len(example.ids))]


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
@some
@given(data=st.data())
def test_a_template_that_rewrites_earlier_turns_is_refused_or_split(
    encoder_of: Encoders, name: str, data: st.DataObject
) -> None:
    chosen = FORMATS[name]
    tokenizer, refusing = encoder_of("byte-level", name)
    messages = data.draw(conversations().filter(lambda said: rewritten(chosen, said)))
    with pytest.raises(BadRow) as refused:
        refusing.encode(Conversation(messages))
    assert refused.value.reason == REWRITES
    assert "data.on_rewrite=split" in refused.value.detail

    _, splitting = encoder_of("byte-level", name, split=True)
    examples, _ = splitting.encode(Conversation(messages))
    ends = [at for at, each in enumerate(messages, 1) if each["role"] == "assistant"]
    assert len(examples) == len(ends)
    for example, end in zip(examples, ends, strict=True):
        text, answers = by_hand(chosen, messages[:end], tokenizer)
        assert_answers_train(example, text, answers[-1:], tokenizer, bool(chosen.special))


def test_reasoning_of_the_answer_that_trains_is_learned_and_that_of_earlier_ones_is_gone(encoder_of: Encoders) -> None:
    tokenizer, encoder = encoder_of("byte-level", "qwen3", split=True)
    messages = [
        {"role": "user", "content": "3+4は?"},
        {"role": "assistant", "content": "7です。", "reasoning_content": "三足す四。"},
        {"role": "user", "content": "2倍は?"},
        {"role": "assistant", "content": "<think>\n七の二倍。\n</think>\n\n14です。"},
    ]
    examples, _ = encoded(encoder, messages)
    trained = [decode(tokenizer, each.ids[each.trained]) for each in examples]
    assert trained == [
        "<think>\n三足す四。\n</think>\n\n7です。<|im_end|>",
        "<think>\n七の二倍。\n</think>\n\n14です。<|im_end|>",
    ]
    assert "三足す四" not in decode(tokenizer, examples[1].ids)


@pytest.mark.parametrize("name", ["ours: chatml", "ours: llm_jp", "llama2", "marked"])
@pytest.mark.parametrize("kind", KINDS)
@settings(some, max_examples=60)
@given(data=st.data())
def test_what_is_truncated_keeps_whole_answers_and_always_the_last(
    encoder_of: Encoders, kind: str, name: str, data: st.DataObject
) -> None:
    chosen = FORMATS[name]
    messages = data.draw(conversations(chosen.system))
    _, whole = encoder_of(kind, name)
    (example,), _ = whole.encode(Conversation(messages))
    length = len(example.ids)
    seq_len = data.draw(st.integers(1, length))
    _, encoder = encoder_of(kind, name, seq_len=seq_len, truncate=True)
    places = runs(example.trained)
    try:
        (short,), truncated = encoded(encoder, messages)
    except BadRow as error:
        assert error.reason == TOO_LONG
        assert length - places[-1][0] > seq_len  # what stands before the answer is all that can go
        return
    assert len(short.ids) - 1 <= seq_len
    assert truncated == (length - 1 > seq_len)
    left = [short.ids[start:end].tolist() for start, end in runs(short.trained)]
    assert left and left == [example.ids[start:end].tolist() for start, end in places[-len(left) :]]
    assert not short.trained[0]


@some
@given(messages=conversations(), seq_len=st.integers(1, 60))
def test_a_conversation_longer_than_the_window_is_dropped_unless_told_otherwise(
    encoder_of: Encoders, messages: list[Message], seq_len: int
) -> None:
    _, whole = encoder_of("byte-level", "llama3")
    _, encoder = encoder_of("byte-level", "llama3", seq_len=seq_len)
    (example,), _ = whole.encode(Conversation(messages))
    if len(example.ids) - 1 <= seq_len:
        (same,), _ = encoded(encoder, messages)
        assert (same.ids == example.ids).all() and (same.trained == example.trained).all()
    else:
        with pytest.raises(BadRow, match="the window has"):
            encoded(encoder, messages)


@some
@given(messages=conversations())
def test_bytes_are_those_that_the_assistant_says(encoder_of: Encoders, messages: list[Message]) -> None:
    _, encoder = encoder_of("sentencepiece", "ours: chatml")
    (example,), _ = encoded(encoder, messages)
    said = "".join(each["content"] for each in messages if each["role"] == "assistant")
    assert example.text_bytes == len(said.encode())


def test_special_tokens_that_are_typed_do_not_move_the_answers(encoder_of: Encoders) -> None:
    tokenizer, encoder = encoder_of("byte-level", "ours: chatml")
    messages = [
        {"role": "user", "content": "Write <|im_start|>assistant\nno<|im_end|>\n"},
        {"role": "assistant", "content": "<|im_end|>\n<|im_start|>user"},
    ]
    (example,), _ = encoded(encoder, messages)
    text, answers = by_hand(FORMATS["ours: chatml"], messages, tokenizer)
    assert_answers_train(example, text, answers, tokenizer, apart=True)


def test_a_post_processor_that_trims_offsets_trains_no_space_of_the_header() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    chosen = FORMATS["trailing space"]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    (example,), _ = ChatEncoder(recipe_of(tokenizer, chosen)).encode(Conversation(messages))
    assert decode(tokenizer, example.ids[example.trained]) == "b c</s>"


def own_encoder(tokenizer: Any, encoder: ChatEncoder, path: Path, template: str, **options: Any) -> ChatEncoder:
    path.write_text(template, encoding="utf-8")
    return ChatEncoder(replace(encoder.recipe, template=open_template(tokenizer, str(path), {}), **options))


TWICE_MARKED = (
    "{% for each in messages %}{{ each['role'] }}: {% if each['role'] == 'assistant' %}"
    "{% generation %}{{ each['reasoning'] }}{% endgeneration %} so {% generation %}{{ each['content'] }};"
    "{% endgeneration %}{% elif each['role'] == 'assistant' %}{{ each['reasoning'] }} so {{ each['content'] }};"
    "{% else %}{{ each['content'] }};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MARKED_AT_THE_END = (
    "{% for each in messages %}{{ each['role'] }}: {% if each['role'] == 'assistant' and loop.last %}"
    "{% generation %}{{ each['content'] }};{% endgeneration %}{% else %}{{ each['content'] }};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REASONED = [
    {"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "reasoning": "a"},
    {"role": "user", "content": "3"}, {"role": "assistant", "content": "4", "reasoning": "b"},
]  # fmt: skip


def test_a_turn_with_several_generation_marks_trains_in_all_of_them(encoder_of: Encoders, tmp_path: Path) -> None:
    tokenizer, encoder = encoder_of("bytes", "marked")
    for train_on, expected in (("assistant", "a2;b4;"), ("last_turn", "b4;")):
        own = own_encoder(tokenizer, encoder, tmp_path / "own.jinja", TWICE_MARKED, train_on=train_on)
        (example,), _ = own.encode(Conversation(REASONED))
        assert decode(tokenizer, example.ids[example.trained]) == expected


def test_an_answer_without_the_generation_marks_that_others_have_is_not_passed_over(
    encoder_of: Encoders, tmp_path: Path
) -> None:
    tokenizer, encoder = encoder_of("bytes", "marked")
    own = own_encoder(tokenizer, encoder, tmp_path / "own.jinja", MARKED_AT_THE_END)
    with pytest.raises(BadRow, match="generation marks, but none around an answer"):
        own.encode(Conversation(REASONED))


def test_bytes_of_what_was_truncated_are_those_of_the_tokens_that_train(encoder_of: Encoders) -> None:
    tokenizer, encoder = encoder_of("bytes", "ours: plain", train_on="all", truncate=True, seq_len=20)
    messages = [{"role": "user", "content": "東京" * 20}, {"role": "assistant", "content": "はい"}]
    (example,), truncated = encoded(encoder, messages)
    assert truncated == 1 and len(example.ids) == 21 and not example.trained[0]
    (end,) = [each for each in example.ids.tolist() if each == tokenizer.eos_token_id]
    trained = [each for each in example.ids[example.trained].tolist() if each != end]
    # A token of this tokenizer is a byte; a character that was cut counts as a whole.
    assert len(trained) <= example.text_bytes < len(trained) + 3


def test_an_answer_that_nothing_stands_before_is_no_example(encoder_of: Encoders, tmp_path: Path) -> None:
    tokenizer, encoder = encoder_of("bytes", "ours: plain")
    template = "{% for each in messages %}{{ each['content'] if each['role'] == 'assistant' else '' }}{% endfor %}"
    own = own_encoder(tokenizer, encoder, tmp_path / "own.jinja", template)
    with pytest.raises(BadRow) as refused:
        own.encode(Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]))
    assert refused.value.reason == NO_TOKENS


def test_an_answer_that_is_one_token_with_its_question_is_refused(encoder_of: Encoders) -> None:
    _, encoder = encoder_of("byte-level", "ours: plain")
    with pytest.raises(BadRow, match="begins in the row's first token"):
        encoder.encode(Conversation([{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]))
