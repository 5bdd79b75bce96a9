"""Prepared conversations, opened: windows that any process can read at random.

A folder holds a token file under its own name (a document each), a mark per token (`trained`), the conversations' order
window by window (`order.npy`) and where each window starts in it (`starts.npy`); `prepared.json` says what they are
and is written last. All of it is memory-mapped; opening checks sizes, and of what a run is about to read checksums too.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from llm_recipes.data.documents import window
from llm_recipes.data.token_file import TokenFile, checksum
from llm_recipes.errors import UserError, first_line
from llm_recipes.folders import read_json

TRAINED, ORDER, STARTS, REPORT = "trained", "order.npy", "starts.npy", "prepared.json"


class Packs:
    """The windows of one source.

    Args:
        folder: what `prepare.prepare` wrote.
        verify: read the marks and the order whole, and compare checksums.

    Raises:
        UserError: it is damaged.
    """

    def __init__(self, folder: Path, verify: bool = False) -> None:
        self.folder = folder
        self.report: dict[str, Any] = read_json(folder / REPORT)
        """How many rows became what (`prepare.Report`)."""
        damaged = f"{folder}: prepared conversations that are not whole"
        again = "remove it, and they are made again"
        try:
            self.file = TokenFile(folder / folder.name)
        except UserError as error:
            reason = re.split(r"; | \(", str(error))[0]  # its advice is for a corpus
            raise UserError(f"{damaged} ({reason}); {again}") from error
        try:
            self.seq_len, self.tokens, self.documents, windows = (
                int(self.report[name]) for name in ("seq_len", "tokens", "conversations", "windows")
            )
            self._trained = np.memmap(folder / TRAINED, np.bool_, "r")
            self._order = np.load(folder / ORDER, mmap_mode="r")
            self._starts = np.load(folder / STARTS, mmap_mode="r")
            ends = int(self._starts[-1])
        except (OSError, ValueError, EOFError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{damaged} ({first_line(error)}); {again}") from error
        self.targets = self.tokens - self.documents
        """Places in the windows that are not padding."""
        sizes = len(self._trained) == self.file.tokens and len(self._order) == ends and len(self) == windows
        known = self.report.get("checksums", {})
        if verify:
            sizes = sizes and all(known.get(name) == checksum(folder / name) for name in (TRAINED, ORDER, STARTS))
        if not sizes or self.file.sidecar is None:
            raise UserError(f"{damaged}; {again}")

    def __reduce__(self) -> tuple[Any, ...]:
        """A loader's worker process opens them for itself."""
        return Packs, (self.folder,)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _numbers(self, number: int) -> list[int]:
        """The conversations in a window."""
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} of {len(self)}")
        return [int(each) for each in self._order[self._starts[number] : self._starts[number + 1]]]

    def read(self, number: int) -> list[np.ndarray]:
        """The conversations in one window: int64, n tokens for n - 1 places each."""
        return [self.file.document(each) for each in self._numbers(number)]

    def trained(self, number: int) -> list[np.ndarray]:
        """Which of their tokens are targets: bool, one per token."""
        bounds = [
            (self.file.document_start(each), self.file.document_start(each + 1)) for each in self._numbers(number)
        ]
        return [np.array(self._trained[start:end]) for start, end in bounds]


class HeldOut:
    """Prepared conversations to validate on: as a `data.validation.ValidationSet`, of what trains in them."""

    def __init__(self, name: str, packs: Packs, language: str | None = None) -> None:
        self.name, self.packs, self.language = name, packs, language
        self.documents = packs.documents
        self.bytes: int | None = int(packs.report["trained_bytes"])

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        if number >= len(self):
            raise IndexError(number)
        return window(self.packs.read(number), self.packs.seq_len, True, self.packs.trained(number))

    def empty(self) -> dict[str, np.ndarray]:
        """A window of padding, for a rank that has none left."""
        return window([], self.packs.seq_len, True)
