"""A source's documents, cut into windows that any process can read at random.

What is counted here is targets. With documents masked, a document of n tokens has n - 1 targets and no
target crosses a boundary; without, the whole source is one stream of `tokens - 1` targets. Window w holds
targets w * seq_len .. (w + 1) * seq_len - 1, so that each stands in exactly one window and only the
last window is padded.
"""

import bisect
import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from llm_recipes.data.token_file import TokenFile
from llm_recipes.errors import UserError


class Readable(Protocol):
    """A source's windows, read at random."""

    seq_len: int
    tokens: int
    targets: int
    documents: int

    def __len__(self) -> int: ...

    def read(self, number: int) -> list[np.ndarray]:
        """The documents in one window, or their pieces: n tokens for n - 1 targets each, int64."""
        ...

    def trained(self, number: int) -> list[np.ndarray] | None:
        """Which tokens of these documents are targets: bool, one per token. None: all of them."""
        ...


class Windows:
    """The windows of one source, over one or many token files taken as one.

    Args:
        files: the source's token files, in order.
        seq_len: targets in a window.
        mask_documents: whether a document is alone in its attention and its targets.
    """

    def __init__(self, files: Sequence[TokenFile], seq_len: int, mask_documents: bool) -> None:
        self.files = list(files)
        self.seq_len = seq_len
        self.mask_documents = mask_documents
        self.tokens = sum(file.tokens for file in self.files)
        self.documents = sum(file.documents for file in self.files)
        per_file = [file.tokens - (file.documents if mask_documents else 0) for file in self.files]
        self._starts = np.concatenate([[0], np.cumsum(per_file, dtype=np.int64)])
        self.targets = int(self._starts[-1]) - (0 if mask_documents else 1)

    def __len__(self) -> int:
        return -(-self.targets // self.seq_len)

    def read(self, number: int) -> list[np.ndarray]:
        """The documents in one window, or their pieces: n tokens for n - 1 targets each, int64."""
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} of {len(self)}")
        first = number * self.seq_len
        last = min(first + self.seq_len, self.targets)
        if not self.mask_documents:
            return [self._stream(first, last + 1)]
        pieces: list[np.ndarray] = []
        shard = bisect.bisect_right(self._starts, first) - 1
        while first < last:
            end = min(last, int(self._starts[shard + 1]))
            start = int(self._starts[shard])
            pieces += self._masked(self.files[shard], first - start, end - start)
            first, shard = end, shard + 1
        return pieces

    def trained(self, number: int) -> list[np.ndarray] | None:
        """Which tokens of a window's documents are targets: all of them."""
        return None

    def _masked(self, file: TokenFile, first: int, last: int) -> list[np.ndarray]:
        """Targets `first` .. `last - 1` of one file, a piece per document."""
        if first == last:
            return []

        def targets_before(document: int) -> int:
            # Each earlier document has one target fewer than it has tokens.
            return file.document_start(document) - document

        numbers = range(file.documents)
        document = bisect.bisect_right(numbers, first, key=targets_before) - 1
        end = bisect.bisect_left(numbers, last, lo=document + 1, key=targets_before)
        starts = file.document_starts(document, end + 1).tolist()
        pieces = []
        for here, (start, stop) in enumerate(itertools.pairwise(starts)):
            before = start - (document + here)
            begin = start + max(0, first - before)
            finish = min(stop, start + (last - before) + 1)
            if finish - begin > 1:
                pieces.append(file.read(begin, finish))
        in_order = all(start < stop for start, stop in itertools.pairwise(starts))
        if not in_order or sum(len(piece) - 1 for piece in pieces) != last - first:
            raise UserError(f"{file.file('idx')}: its documents do not lie end to end; it is damaged, tokenize again")
        return pieces

    def _stream(self, first: int, last: int) -> np.ndarray:
        """Tokens `first` .. `last - 1` of all files taken as one."""
        parts = []
        shard = bisect.bisect_right(self._starts, first) - 1
        while first < last:
            start = int(self._starts[shard])
            end = min(last, int(self._starts[shard + 1]))
            parts.append(self.files[shard].read(first - start, end - start))
            first, shard = end, shard + 1
        return np.concatenate(parts)
