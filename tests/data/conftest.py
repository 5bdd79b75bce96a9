"""Small corpora on disk: as our writer leaves them, and as Megatron leaves them, laid out by hand."""

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_recipes.data.sources import TokenizerFacts
from llm_recipes.data.token_file import DTYPE_CODES, Sidecar, TokenFileWriter, smallest_dtype

FINGERPRINT = "0123456789abcdef"
VOCABULARY = 1000


@pytest.fixture
def facts() -> Callable[..., TokenizerFacts]:
    """The model's tokenizer: no BOS, end-of-document 0. Anything can be changed by name."""

    def make(**changes: Any) -> TokenizerFacts:
        plain: dict[str, Any] = {
            "fingerprint": FINGERPRINT,
            "vocab_size": VOCABULARY,
            "eod": 0,
            "bos": None,
            "bos_policy": "auto",
            "bos_token": None,
        }
        return TokenizerFacts(**(plain | changes))

    return make


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., Path]:
    """Write documents (lists of ids) as a token file with its sidecar, and say where."""

    def write(name: str, documents: Sequence[Sequence[int]], text_bytes: Any = None, **changes: Any) -> Path:
        prefix = tmp_path / name
        lengths = np.array([len(document) for document in documents])
        tokens = np.concatenate([np.asarray(document, np.int64) for document in documents])
        writer = TokenFileWriter(prefix, smallest_dtype(changes.get("vocab_size", VOCABULARY)))
        writer.append(tokens, lengths, np.asarray(text_bytes if text_bytes is not None else lengths))
        described: dict[str, Any] = {
            "tokenizer": FINGERPRINT,
            "tokenizer_name": "a tokenizer",
            "vocab_size": VOCABULARY,
            "largest_token_id": writer.largest_token_id,
            "eod_token_id": 0,
            "bos_token_id": None,
            "documents": writer.documents,
            "tokens": writer.tokens,
            "bytes": writer.bytes,
        }
        writer.close(Sidecar(**(described | changes)))
        return prefix

    return write


@pytest.fixture
def write_megatron(tmp_path: Path) -> Callable[..., Path]:
    """Write documents, each a list of sequences, byte by byte as Megatron does, with no sidecar."""

    def write(name: str, documents: Sequence[Sequence[Sequence[int]]], dtype: Any = np.uint16) -> Path:
        prefix = tmp_path / name
        prefix.parent.mkdir(parents=True, exist_ok=True)
        sequences = [sequence for document in documents for sequence in document]
        tokens = [token for sequence in sequences for token in sequence]
        Path(f"{prefix}.bin").write_bytes(np.asarray(tokens, dtype).tobytes())
        (code,) = [code for code, each in DTYPE_CODES.items() if each is dtype]
        index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
        index += struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(documents) + 1)
        index += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
        offset = 0
        for sequence in sequences:
            index += struct.pack("<q", offset)
            offset += len(sequence) * np.dtype(dtype).itemsize
        first = 0
        for document in documents:
            index += struct.pack("<q", first)
            first += len(document)
        Path(f"{prefix}.idx").write_bytes(index + struct.pack("<q", first))
        return prefix

    return write
