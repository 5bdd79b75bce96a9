"""Documents to what a model is fed. The one place in the library where tokens become next-token targets."""

from collections.abc import Sequence

import numpy as np

IGNORE = -100
"""A target that is not counted."""


def next_token_targets(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and their targets: position i is asked for token i + 1. n tokens give n - 1 targets.

    Nothing else in the library shifts labels, and no model is ever handed them.
    """
    return tokens[:-1], tokens[1:]


def window(
    documents: Sequence[np.ndarray], seq_len: int, separate: bool, trained: Sequence[np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Lay documents end to end into one window.

    Args:
        documents: token ids of each document or piece of one, n tokens each for n - 1 targets.
        seq_len: targets that the window has room for; what is left over is padding.
        separate: number positions from 0 in each document (and in the padding); else run on.
        trained: of each document, whether its tokens are targets (bool, one per token). None: all are.

    Returns:
        `input_ids`, `position_ids`, `targets` (IGNORE in padding, and for tokens that are no targets) and
        `document_ids` (from 0; padding is a document of its own), each int64 of shape (seq_len,). Padding is known by
        its place, never by its token id: an end-of-document token keeps its target.
    """
    targets_in_all = sum(len(tokens) - 1 for tokens in documents)
    if targets_in_all > seq_len:
        raise ValueError(f"{targets_in_all} targets in a window of {seq_len}")
    input_ids = np.zeros(seq_len, np.int64)
    targets = np.full(seq_len, IGNORE, np.int64)
    document_ids = np.full(seq_len, len(documents), np.int64)
    position_ids = np.arange(seq_len, dtype=np.int64)
    at = 0
    for number, tokens in enumerate(documents):
        inputs, labels = next_token_targets(tokens)
        here = slice(at, at + len(inputs))
        input_ids[here] = inputs
        targets[here] = labels if trained is None else np.where(trained[number][1:], labels, IGNORE)
        document_ids[here] = number
        if separate:
            position_ids[here] = np.arange(len(inputs))
        at += len(inputs)
    if separate:
        position_ids[at:] = np.arange(seq_len - at)
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "targets": targets,
        "document_ids": document_ids,
    }
