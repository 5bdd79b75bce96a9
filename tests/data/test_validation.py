"""A held-out set is the same windows each time, and counts every token of every document once, with its bytes."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_recipes.config import DataConfig, ValidationSetConfig
from llm_recipes.data.documents import IGNORE
from llm_recipes.data.sources import TokenizerFacts
from llm_recipes.data.token_file import TokenFile
from llm_recipes.data.validation import ValidationSet, open_validation
from llm_recipes.errors import UserError

Facts = Callable[..., TokenizerFacts]
Write = Callable[..., Path]
EOD, BOS = 0, 1
TEXTS = ["日本語。", "€", "🎌👨\u200d👩", "plain", "é\n\u3000"]


def ids_of(text: str) -> list[int]:
    """A token for every byte, none of them special."""
    return [2 + byte for byte in text.encode()]


def open_set(
    prefixes: list[Path] | Path, facts: TokenizerFacts, seq_len: int = 8, tokens: int | None = None, pack: bool = True
) -> ValidationSet:
    files = [TokenFile(prefix) for prefix in (prefixes if isinstance(prefixes, list) else [prefixes])]
    return ValidationSet("held_out", files, seq_len, tokens, facts, pack)


def asked(held_out: ValidationSet) -> list[tuple[tuple[int, ...], int]]:
    """All that the set asks for: what is seen of the document at each target, and the target."""
    found = []
    for number in range(len(held_out)):
        row = held_out[number]
        assert {value.shape for value in row.values()} == {(held_out.seq_len,)}
        for place in range(held_out.seq_len):
            if row["targets"][place] != IGNORE:
                start = place - int(row["position_ids"][place])
                assert len(set(row["document_ids"][start : place + 1].tolist())) == 1
                found.append((tuple(row["input_ids"][start : place + 1].tolist()), int(row["targets"][place])))
    return found


def by_hand(documents: list[list[int]], context: int, seq_len: int) -> list[tuple[tuple[int, ...], int]]:
    """Each token of each document, behind what stands before it in its window."""
    found = []
    for document in documents:
        before = [context, *document]
        for place, target in enumerate(document):
            found.append((tuple(before[place // seq_len * seq_len : place + 1]), target))
    return found


OWN_TOKENS = st.lists(st.integers(2, 5), max_size=30)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.lists(OWN_TOKENS, min_size=1, max_size=6), min_size=1, max_size=3),
    seq_len=st.integers(1, 12),
    has_bos=st.booleans(),
    stored_bos=st.booleans(),
)
def test_every_token_is_asked_for_once_behind_its_document_packed_or_not(
    write_megatron: Write,
    facts: Facts,
    files: list[list[list[int]]],
    seq_len: int,
    has_bos: bool,
    stored_bos: bool,
) -> None:
    documents = list(itertools.chain(*files))
    start = [BOS] if has_bos and stored_bos else []
    prefixes = [
        write_megatron(f"set{number}", [[[*start, *document, EOD]] for document in each])
        for number, each in enumerate(files)
    ]
    opened = facts(bos_token=BOS if has_bos else None)
    if not any(documents):
        with pytest.raises(UserError, match="nothing to predict"):
            open_set(prefixes, opened, seq_len)
        return
    packed, alone = (open_set(prefixes, opened, seq_len, pack=pack) for pack in (True, False))
    expected = by_hand(documents, BOS if has_bos else EOD, seq_len)
    assert asked(packed) == asked(alone) == expected
    for held_out in (packed, alone):
        assert held_out.targets == len(expected)
        assert held_out.documents == len(documents)
    assert len(alone) == sum(-(-len(document) // seq_len) for document in documents)
    assert len(packed) <= len(alone)
    assert all(set(alone[number]["document_ids"].tolist()) <= {0, 1} for number in range(len(alone)))


def test_packing_fills_a_window_with_whole_pieces(write_corpus: Write, facts: Facts) -> None:
    prefix = write_corpus("ja", [[5, 5, 5, EOD], [6, 6, EOD], [7, 7, 7, 7, EOD]])
    packed = open_set(prefix, facts(), seq_len=5)
    assert [packed[number]["targets"].tolist() for number in range(len(packed))] == [
        [5, 5, 5, 6, 6],
        [7, 7, 7, 7, IGNORE],
    ]
    assert packed[0]["position_ids"].tolist() == [0, 1, 2, 0, 1]
    assert packed[0]["document_ids"].tolist() == [0, 0, 0, 1, 1]


def test_the_first_token_counts_and_the_loss_of_end_of_document_does_not(write_corpus: Write, facts: Facts) -> None:
    plain = open_set(write_corpus("plain", [[5, 6, EOD], [7, EOD]]), facts())
    assert asked(plain) == [((EOD,), 5), ((EOD, 5), 6), ((EOD,), 7)]
    bos = write_corpus("bos", [[BOS, 5, 6, EOD], [BOS, 7, EOD]], bos_token_id=BOS)
    with_bos = open_set(bos, facts(bos=BOS, bos_token=BOS))
    assert asked(with_bos) == [((BOS,), 5), ((BOS, 5), 6), ((BOS,), 7)]
    # One token that is both, as in GPT-2: each end of a document loses one, and no more.
    both = open_set(write_corpus("both", [[0, 5, 0, 0], [7, 0]]), facts(bos=0, bos_token=0))
    assert asked(both) == [((0,), 5), ((0, 5), 0), ((0,), 7)]


def test_a_document_that_does_not_close_loses_no_token(write_corpus: Write, facts: Facts) -> None:
    assert asked(open_set(write_corpus("open", [[5, 6], [EOD, 7]]), facts())) == [
        ((EOD,), 5), ((EOD, 5), 6), ((EOD,), EOD), ((EOD, EOD), 7),
    ]  # fmt: skip


def test_a_file_with_an_end_of_document_of_its_own_loses_that_one(write_corpus: Write, facts: Facts) -> None:
    held_out = open_set(write_corpus("own", [[5, 9], [6, EOD]], eod_token_id=9), facts())
    assert asked(held_out) == [((EOD,), 5), ((EOD,), 6), ((EOD, 6), EOD)]


def test_a_long_document_goes_on_in_the_next_window_behind_the_token_before(write_corpus: Write, facts: Facts) -> None:
    held_out = open_set(write_corpus("long", [[*range(10, 17), EOD], [20, EOD]]), facts(), seq_len=3)
    assert [held_out[number]["input_ids"].tolist() for number in range(3)] == [[0, 10, 11], [12, 13, 14], [15, 0, 0]]
    assert [held_out[number]["targets"].tolist() for number in range(3)] == [
        [10, 11, 12],
        [13, 14, 15],
        [16, 20, IGNORE],
    ]
    assert [held_out[number]["position_ids"].tolist() for number in range(3)] == [[0, 1, 2], [0, 1, 2], [0, 0, 0]]


def test_the_bytes_are_those_of_the_raw_text(write_corpus: Write, facts: Facts) -> None:
    documents = [[*ids_of(text), EOD] for text in TEXTS]
    prefix = write_corpus("texts", documents, text_bytes=[len(text.encode()) for text in TEXTS])
    held_out = open_set(prefix, facts())
    # 4 x 3, 3, 4 + 4 + 3 + 4, 5, 2 + 1 + 3
    assert held_out.bytes == 12 + 3 + 15 + 5 + 6 == len("".join(TEXTS).encode())
    # With a token a byte, the targets are the text.
    assert held_out.targets == held_out.bytes
    assert bytes(target - 2 for _, target in asked(held_out)).decode() == "".join(TEXTS)


def test_bytes_are_counted_in_sets_of_several_files_of_unequal_size(write_corpus: Write, facts: Facts) -> None:
    files = [
        write_corpus("a", [[5, 6, EOD]], text_bytes=[100]),
        write_corpus("b", [[7, EOD], [8, 9, 9, EOD], [EOD]], text_bytes=[20, 3, 0]),
    ]
    held_out = open_set(files, facts())
    assert (held_out.bytes, held_out.targets, held_out.documents) == (123, 6, 4)


def test_bytes_that_one_file_does_not_know_are_not_known(
    write_corpus: Write, write_megatron: Write, facts: Facts
) -> None:
    ours, theirs = write_corpus("ours", [[5, 6, EOD]]), write_megatron("theirs", [[[7, EOD]], [[8, EOD]]])
    for files in ([theirs], [ours, theirs], [theirs, ours]):
        assert open_set(files, facts()).bytes is None
    assert open_set([theirs, ours], facts()).targets == 4
    # A file that the limit leaves out is not missed.
    assert open_set([ours, theirs], facts(), tokens=2).bytes == 3


@pytest.mark.parametrize(
    ("limit", "documents"), [(None, 4), (100, 4), (10, 4), (9, 3), (7, 3), (6, 2), (5, 2), (4, 1), (3, 1), (1, 1)]
)
@pytest.mark.parametrize("shards", [False, True])
def test_a_limit_keeps_the_first_whole_documents_and_at_least_one(
    write_corpus: Write, facts: Facts, limit: int | None, documents: int, shards: bool
) -> None:
    # Running totals of 3, 5, 7 and 10 tokens.
    every = [[5, 5, 5, EOD], [6, 6, EOD], [7, 7, EOD], [8, 8, 8, EOD]]
    parts = [[document] for document in every] if shards else [every]
    files = [write_corpus(f"part{n}", part, [10 * len(each) for each in part]) for n, part in enumerate(parts)]
    held_out = open_set(files, facts(), tokens=limit)
    kept = [document[:-1] for document in every[:documents]]
    assert [target for _, target in asked(held_out)] == list(itertools.chain(*kept))
    assert held_out.documents == documents
    assert held_out.targets == sum(map(len, kept))
    assert held_out.bytes == sum(10 * (len(each) + 1) for each in kept)


@pytest.mark.parametrize("shards", [False, True])
def test_a_short_document_does_not_slip_in_past_the_limit(write_corpus: Write, facts: Facts, shards: bool) -> None:
    every = [[5, 5, 5, EOD], [6, 6, 6, 6, 6, EOD], [7, EOD]]
    parts = [[document] for document in every] if shards else [every]
    files = [write_corpus(f"part{number}", part) for number, part in enumerate(parts)]
    assert open_set(files, facts(), tokens=4).targets == 3


def test_the_windows_are_the_same_each_time(write_corpus: Write, facts: Facts) -> None:
    prefix = write_corpus("ja", [[*ids_of(text), EOD] for text in TEXTS])
    first, again = open_set(prefix, facts()), open_set(prefix, facts())
    assert len(first) == len(again)
    for number in reversed(range(len(first))):
        for one in (again[number], first[number]):
            assert all(np.array_equal(first[number][key], one[key]) for key in one)


def test_an_empty_window_asks_for_nothing(write_corpus: Write, facts: Facts) -> None:
    held_out = open_set(write_corpus("ja", [[5, EOD]]), facts())
    empty = held_out.empty()
    assert empty["targets"].tolist() == [IGNORE] * 8
    assert {key: value.shape for key, value in empty.items()} == {key: (8,) for key in held_out[0]}


def test_every_set_of_a_configuration_is_opened_with_its_own_limit(
    write_corpus: Write, write_megatron: Write, facts: Facts
) -> None:
    ja = [write_corpus(f"ja{n}", [[5, 5, EOD], [6, EOD]], text_bytes=[6, 3]) for n in range(2)]
    en = write_megatron("en", [[[7, 7, 7, EOD]] for _ in range(9)])
    configured: dict[str, Any] = {
        "ja": ValidationSetConfig(path=f"{ja[0].parent}/ja*"),
        "en": ValidationSetConfig(path=str(en), tokens=6),
    }
    sets = open_validation(configured, DataConfig(seq_len=4), facts())
    assert [(each.name, each.targets, each.bytes, len(each)) for each in sets] == [("ja", 6, 18, 2), ("en", 6, None, 2)]
    # Documents that the model cannot keep apart have a window each.
    loose = open_validation(configured, DataConfig(seq_len=4, mask_documents=False), facts())
    assert [len(each) for each in loose] == [4, 2]
    for one, other in zip(sets, loose, strict=True):
        assert Counter(asked(one)) == Counter(asked(other))


def test_a_held_out_set_that_does_not_fit_is_refused(write_corpus: Write, facts: Facts) -> None:
    def refuse(message: str, facts: TokenizerFacts, path: str) -> None:
        with pytest.raises(UserError, match=message):
            open_validation({"ja": ValidationSetConfig(path=path)}, DataConfig(seq_len=4), facts)

    other = str(write_corpus("other", [[5, EOD]], tokenizer="fedcba9876543210"))
    empty = str(write_corpus("empty", [[EOD], [EOD]]))
    ours = str(write_corpus("ours", [[5, EOD]]))
    refuse(r"data\.validation\.ja\.path: .* another tokenizer", facts(), other)
    refuse(r"data\.validation\.ja: nothing to predict", facts(), empty)
    refuse(r"data\.validation\.ja\.path=.*: no token files match", facts(), f"{ours}/*")
    refuse(r"data\.validation\.ja: .* neither BOS nor end-of-sequence", facts(eod=None), ours)


@pytest.mark.parametrize("token", [1000, -1])
def test_a_held_out_token_outside_the_vocabulary_is_refused(write_megatron: Write, facts: Facts, token: int) -> None:
    # Here too a foreign file says nothing of its largest token, and a GPU would stop without naming it.
    theirs = write_megatron("theirs", [[[5, 6, EOD]], [[token, 7, EOD]]], np.int32)
    with pytest.raises(UserError, match=r"data\.validation\.ja"):
        open_validation({"ja": ValidationSetConfig(path=str(theirs))}, DataConfig(seq_len=4), facts(vocab_size=1000))
