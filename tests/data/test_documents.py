"""Tokens become targets in one place, once, and padding is known by where it stands."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_recipes.data.documents import IGNORE, next_token_targets, window

TOKENS = st.lists(st.integers(0, 4), min_size=1, max_size=9).map(lambda ids: np.array(ids, np.int64))
DOCUMENTS = st.lists(TOKENS, max_size=6)


def test_targets_are_the_tokens_shifted_once() -> None:
    inputs, targets = next_token_targets(np.array([10, 11, 12, 13]))
    assert inputs.tolist() == [10, 11, 12]
    assert targets.tolist() == [11, 12, 13]


@settings(max_examples=200, deadline=None)
@given(documents=DOCUMENTS, room=st.integers(0, 5), separate=st.booleans())
def test_a_window_is_what_laying_it_out_by_hand_gives(documents: list[np.ndarray], room: int, separate: bool) -> None:
    inputs, targets, numbers, restarted = [], [], [], []
    for number, tokens in enumerate(documents):
        for position in range(len(tokens) - 1):
            inputs.append(tokens[position])
            targets.append(tokens[position + 1])
            numbers.append(number)
            restarted.append(position)
    seq_len = len(inputs) + room
    found = window(documents, seq_len, separate)
    assert {key: (value.dtype, value.shape) for key, value in found.items()} == dict.fromkeys(
        ["input_ids", "position_ids", "targets", "document_ids"], (np.dtype(np.int64), (seq_len,))
    )
    filled = seq_len - room
    assert found["input_ids"][:filled].tolist() == inputs
    assert found["targets"].tolist() == targets + [IGNORE] * room
    assert found["document_ids"].tolist() == numbers + [len(documents)] * room
    expected = restarted + list(range(room)) if separate else list(range(seq_len))
    assert found["position_ids"].tolist() == expected


def test_positions_restart_in_each_document_and_in_the_padding() -> None:
    found = window([np.array([5, 6, 7, 0]), np.array([8, 9, 0])], 8, separate=True)
    assert found["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert found["document_ids"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert found["targets"].tolist() == [6, 7, 0, 9, 0, IGNORE, IGNORE, IGNORE]


def test_a_token_that_looks_like_padding_keeps_its_target() -> None:
    # End of document, padding and id 0 are one token in many a tokenizer.
    found = window([np.array([0, 0, 3, 0]), np.array([0, 0])], 6, separate=True)
    assert found["targets"].tolist() == [0, 3, 0, 0, IGNORE, IGNORE]


def test_no_target_crosses_from_one_document_into_the_next() -> None:
    found = window([np.array([1, 2]), np.array([3, 4])], 2, separate=True)
    assert list(zip(found["input_ids"], found["targets"], strict=True)) == [(1, 2), (3, 4)]


def test_a_window_without_documents_has_no_targets() -> None:
    found = window([], 3, separate=True)
    assert found["targets"].tolist() == [IGNORE] * 3
    assert found["position_ids"].tolist() == [0, 1, 2]


@settings(max_examples=100, deadline=None)
@given(
    documents=DOCUMENTS.filter(lambda documents: sum(len(each) - 1 for each in documents) > 0),
    separate=st.booleans(),
    data=st.data(),
)
def test_more_targets_than_a_window_has_room_for_is_an_error(
    documents: list[np.ndarray], separate: bool, data: st.DataObject
) -> None:
    targets = sum(len(each) - 1 for each in documents)
    with pytest.raises(ValueError):
        window(documents, data.draw(st.integers(0, targets - 1)), separate)


def test_one_target_too_many_is_an_error() -> None:
    # numpy alone would let an array of one element vanish into an empty slice.
    with pytest.raises(ValueError, match="5 targets in a window of 4"):
        window([np.arange(5), np.arange(2)], 4, separate=False)
