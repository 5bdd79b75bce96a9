"""An epoch of windows is the corpus, to the token: nothing twice, nothing lost, nothing across a boundary."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_recipes.data.documents import IGNORE, window
from llm_recipes.data.token_file import TokenFile
from llm_recipes.data.windows import Windows

DOCUMENT = st.lists(st.integers(0, 3), min_size=1, max_size=40)
FILES = st.lists(st.lists(DOCUMENT, min_size=1, max_size=8), min_size=1, max_size=4)
Pair = tuple[int, int]
on_disk = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
numbers = itertools.count()


def open_windows(
    write: Callable[..., Path], files: list[list[list[int]]], seq_len: int, mask_documents: bool
) -> Windows:
    prefixes = [write(f"corpus{next(numbers)}", [[document] for document in documents]) for documents in files]
    return Windows([TokenFile(prefix) for prefix in prefixes], seq_len, mask_documents)


def pairs(windows: Windows, number: int) -> list[Pair]:
    """What the model is asked in one window."""
    laid_out = window(windows.read(number), windows.seq_len, windows.mask_documents)
    counted = laid_out["targets"] != IGNORE
    return list(zip(laid_out["input_ids"][counted].tolist(), laid_out["targets"][counted].tolist(), strict=True))


@on_disk
@given(files=FILES, seq_len=st.integers(1, 50))
def test_every_target_within_a_document_comes_once_per_epoch_and_none_across(
    write_megatron: Callable[..., Path], files: list[list[list[int]]], seq_len: int
) -> None:
    windows = open_windows(write_megatron, files, seq_len, mask_documents=True)
    expected = [pair for document in itertools.chain(*files) for pair in itertools.pairwise(document)]
    found = [pairs(windows, number) for number in range(len(windows))]
    assert Counter(itertools.chain(*found)) == Counter(expected)
    assert list(itertools.chain(*found)) == expected
    assert windows.targets == len(expected)
    assert windows.tokens == sum(map(len, itertools.chain(*files)))
    assert windows.documents == sum(map(len, files))


@on_disk
@given(files=FILES, seq_len=st.integers(1, 50))
def test_every_target_of_the_unmasked_stream_comes_once_per_epoch(
    write_megatron: Callable[..., Path], files: list[list[list[int]]], seq_len: int
) -> None:
    windows = open_windows(write_megatron, files, seq_len, mask_documents=False)
    stream = [token for document in itertools.chain(*files) for token in document]
    found = [pairs(windows, number) for number in range(len(windows))]
    assert windows.targets == len(stream) - 1
    assert list(itertools.chain(*found)) == list(itertools.pairwise(stream))
    # One piece: nothing in the window says where a document ends.
    assert all(len(windows.read(number)) == 1 for number in range(len(windows)))


@on_disk
@given(files=FILES, seq_len=st.integers(1, 50), mask_documents=st.booleans())
def test_only_the_last_window_is_padded(
    write_megatron: Callable[..., Path], files: list[list[list[int]]], seq_len: int, mask_documents: bool
) -> None:
    windows = open_windows(write_megatron, files, seq_len, mask_documents)
    sizes = [len(pairs(windows, number)) for number in range(len(windows))]
    assert all(size == seq_len for size in sizes[:-1])
    assert all(0 < size <= seq_len for size in sizes[-1:])


@on_disk
@given(files=FILES, seq_len=st.integers(1, 50))
def test_a_piece_of_a_window_is_of_one_document_alone(
    write_megatron: Callable[..., Path], files: list[list[list[int]]], seq_len: int
) -> None:
    # With ids that occur once, a piece says where it was taken from.
    total = itertools.count()
    named = [[[next(total) for _ in document] for document in documents] for documents in files]
    windows = open_windows(write_megatron, named, seq_len, mask_documents=True)
    document_of = {token: number for number, each in enumerate(itertools.chain(*named)) for token in each}
    for number in range(len(windows)):
        pieces = [piece.tolist() for piece in windows.read(number)]
        for piece in pieces:
            assert len(piece) > 1
            assert len({document_of[token] for token in piece}) == 1
            assert piece == list(range(piece[0], piece[0] + len(piece)))
        owners = [document_of[piece[0]] for piece in pieces]
        assert owners == sorted(set(owners))


def test_a_document_longer_than_a_window_goes_on_with_one_token_of_context(
    write_megatron: Callable[..., Path],
) -> None:
    document = list(range(10, 20))
    windows = open_windows(write_megatron, [[document, [30, 31]]], 4, mask_documents=True)
    found = [[piece.tolist() for piece in windows.read(number)] for number in range(len(windows))]
    assert found == [[[10, 11, 12, 13, 14]], [[14, 15, 16, 17, 18]], [[18, 19], [30, 31]]]


def test_documents_of_one_token_have_nothing_to_predict(write_megatron: Callable[..., Path]) -> None:
    windows = open_windows(write_megatron, [[[5]], [[6], [7, 8], [9]], [[1]]], 2, mask_documents=True)
    assert [[piece.tolist() for piece in windows.read(number)] for number in range(len(windows))] == [[[7, 8]]]
    assert len(open_windows(write_megatron, [[[5], [6]], [[7]]], 2, mask_documents=True)) == 0
    assert len(open_windows(write_megatron, [[[5]]], 2, mask_documents=False)) == 0


def test_the_stream_runs_on_from_one_file_into_the_next(write_megatron: Callable[..., Path]) -> None:
    windows = open_windows(write_megatron, [[[1, 2], [3]], [[4]], [[5, 6]]], 2, mask_documents=False)
    assert [windows.read(number)[0].tolist() for number in range(len(windows))] == [[1, 2, 3], [3, 4, 5], [5, 6]]


@pytest.mark.parametrize("mask_documents", [True, False])
def test_targets_that_fill_the_windows_leave_no_empty_one(
    write_megatron: Callable[..., Path], mask_documents: bool
) -> None:
    # Nine targets, either way.
    windows = open_windows(write_megatron, [[list(range(10))]], 3, mask_documents)
    assert len(windows) == 3
    assert [len(pairs(windows, number)) for number in range(3)] == [3, 3, 3]


@pytest.mark.parametrize("number", [-1, 3, 100])
def test_a_window_that_is_not_there_is_an_error(write_megatron: Callable[..., Path], number: int) -> None:
    windows = open_windows(write_megatron, [[list(range(8))]], 3, mask_documents=True)
    with pytest.raises(IndexError, match=f"window {number} of 3"):
        windows.read(number)


def test_windows_can_be_read_in_any_order_and_again(write_megatron: Callable[..., Path]) -> None:
    documents = [np.arange(length).tolist() for length in (7, 1, 12, 3, 3)]
    windows = open_windows(write_megatron, [documents, documents[::-1]], 5, mask_documents=True)
    forward = [pairs(windows, number) for number in range(len(windows))]
    assert [pairs(windows, number) for number in reversed(range(len(windows)))] == forward[::-1]
