"""Held-out sets, cut at document boundaries: the same windows each time, every token of a document counted once."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llm_recipes.config import DataConfig, ValidationSetConfig
from llm_recipes.data.documents import window
from llm_recipes.data.sources import TokenizerFacts, open_files, prefixes
from llm_recipes.data.token_file import TokenFile
from llm_recipes.errors import UserError


@dataclass(frozen=True)
class Piece:
    """Part of one document: targets `start` .. `end - 1` of its own tokens."""

    file: int
    document: int
    start: int
    end: int


class ValidationSet:
    """A held-out set.

    One token of context (BOS, or end-of-document) stands before each document, so that its first token is
    predicted too; the end-of-document token that closes it is not. Documents longer than a window go on in the next,
    with the token before as their context.

    Args:
        name: the set's name.
        files: its token files.
        seq_len: targets in a window.
        tokens: use the first whole documents up to this many tokens; at least one document.
        facts: the tokenizer's BOS and end-of-document token.
        pack: lay several documents into a window (where they can be kept apart), or one piece alone.
    """

    def __init__(
        self,
        name: str,
        files: list[TokenFile],
        seq_len: int,
        tokens: int | None,
        facts: TokenizerFacts,
        pack: bool,
    ) -> None:
        context = facts.bos_token if facts.bos_token is not None else facts.eod
        if context is None:
            raise UserError(f"data.validation.{name}: the tokenizer has neither BOS nor end-of-sequence token")
        self.name, self.files, self.seq_len, self.context = name, files, seq_len, context
        self._bos, self._eod = facts.bos_token, facts.eod
        self.bytes: int | None = 0
        """UTF-8 bytes of the raw text that is predicted, or None where not known."""
        self.targets = 0
        self.documents = 0
        self._pieces: list[list[Piece]] = []
        self._collect(tokens, pack, facts.vocab_size)

    def _tokens(self, file: int, document: int) -> np.ndarray:
        """The document's own tokens: without BOS, without its closing end-of-document token."""
        ids = self.files[file].document(document)
        if self._bos is not None and len(ids) and ids[0] == self._bos:
            ids = ids[1:]
        sidecar = self.files[file].sidecar
        eod = sidecar.eod_token_id if sidecar is not None else self._eod
        return ids[:-1] if len(ids) and ids[-1] == eod else ids

    def _collect(self, limit: int | None, pack: bool, vocab_size: int) -> None:
        row: list[Piece] = []
        room = self.seq_len
        for number, file in enumerate(self.files):
            document_bytes = file.document_bytes()
            for document in range(file.documents):
                length = len(self._tokens(number, document))
                if limit is not None and self.documents and self.targets + length > limit:
                    break
                largest = int(file.document(document).max())
                if largest >= vocab_size:
                    raise UserError(
                        f"data.validation.{self.name}: document {document} of {file.prefix} holds token {largest}, "
                        f"past the model's vocabulary of {vocab_size}; it was tokenized for another model"
                    )
                self.documents += 1
                self.targets += length
                if document_bytes is None:
                    self.bytes = None
                elif self.bytes is not None:
                    self.bytes += int(document_bytes[document])
                for start in range(0, length, self.seq_len):
                    piece = Piece(number, document, start, min(start + self.seq_len, length))
                    if row and (not pack or piece.end - piece.start > room):
                        self._pieces.append(row)
                        row, room = [], self.seq_len
                    row.append(piece)
                    room -= piece.end - piece.start
            else:
                continue
            break
        if row:
            self._pieces.append(row)
        if not self._pieces:
            raise UserError(f"data.validation.{self.name}: nothing to predict in {self.files[0].prefix}")

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """One window, as `documents.window` lays it out."""
        documents = []
        for piece in self._pieces[number]:
            ids = np.concatenate([[self.context], self._tokens(piece.file, piece.document)])
            documents.append(ids[piece.start : piece.end + 1])
        return window(documents, self.seq_len, separate=True)

    def empty(self) -> dict[str, np.ndarray]:
        """A window with no targets, for a rank that has none left while others have."""
        return window([], self.seq_len, separate=True)


def open_validation(
    configured: Mapping[str, ValidationSetConfig], config: DataConfig, facts: TokenizerFacts
) -> list[ValidationSet]:
    """Open every validation set of a configuration.

    Raises:
        UserError: a file is missing or damaged, or does not fit the model.
    """
    sets = []
    for name, entry in configured.items():
        where = f"data.validation.{name}.path"
        files = open_files(prefixes(entry.path, where), where, facts, config)
        sets.append(ValidationSet(name, files, config.seq_len, entry.tokens, facts, config.mask_documents))
    return sets
