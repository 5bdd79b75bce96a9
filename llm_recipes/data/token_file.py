"""Token files: Megatron's indexed dataset (`NAME.bin`, `NAME.idx`, version 1), with a sidecar of ours.

Layout of `.idx`, little-endian: magic `MMIDIDX\\0\\0`, version u64 = 1, dtype code u8, sequences u64,
documents + 1 u64; then the lengths of the sequences (int32), their byte offsets in `.bin` (int64),
and the first sequence of each document (int64, closed by the number of sequences).
Source: Megatron-LM, `megatron/core/datasets/indexed_dataset.py`.

`NAME.json` is the sidecar (`Sidecar`); `NAME.bytes` holds the UTF-8 bytes of each document's raw text
as uint32. Both may be missing: files that others wrote open too.
"""

import contextlib
import dataclasses
import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from llm_recipes.data.sidecar import Sidecar, from_json
from llm_recipes.errors import UserError
from llm_recipes.folders import make_folder, remove_folders

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[int, Any] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
CODE_OF_DTYPE = {np.dtype(dtype): code for code, dtype in DTYPE_CODES.items()}
CHUNK = 1 << 22
SCAN = 1 << 18
"""Documents looked at at once: some megabytes."""


def smallest_dtype(vocab_size: int) -> np.dtype:
    """Megatron's choice: two bytes a token where the vocabulary allows it."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def checksum(path: str | Path) -> str:
    """xxh3-128 of a whole file, as 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _map(path: Path, at_random: bool = False) -> mmap.mmap | bytes:
    """The file's bytes, read-only. An empty file cannot be mapped.

    Args:
        at_random: windows are read from all over: without this advice the kernel reads megabytes ahead of each.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return b""
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if at_random and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return mapped


class TokenFile:
    """A token file opened for reading. Opening reads the header and checks sizes, nothing more.

    A token file without a sidecar is somebody else's: its lengths are scanned once for empty documents.

    Raises:
        UserError: the file is missing, empty, damaged, or shorter than its index says.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        index_path, bin_path = self.file("idx"), self.file("bin")
        for path in (index_path, bin_path):
            if not path.is_file():
                raise UserError(f"{path}: no such token file (write one with python -m llm_recipes.tokenize)")
        index = _map(index_path)
        if len(index) < HEADER.size or index[: len(MAGIC)] != MAGIC:
            raise UserError(f"{index_path}: not a Megatron index (MMIDIDX); tokenize the corpus again")
        _, version, code, sequences, document_ends = HEADER.unpack(index[: HEADER.size])
        if version != 1 or code not in DTYPE_CODES:
            raise UserError(f"{index_path}: version {version} with dtype code {code} is not supported")
        expected = HEADER.size + sequences * 12 + document_ends * 8
        if len(index) != expected:
            raise UserError(f"{index_path}: {len(index)} bytes, its header says {expected}; tokenize the corpus again")
        if sequences == 0 or document_ends < 2:
            raise UserError(f"{self.prefix}: an empty token file; leave it out")

        self.dtype = np.dtype(DTYPE_CODES[code])
        self._index = index
        self._lengths = np.frombuffer(index, np.dtype("<i4"), sequences, HEADER.size)
        self._pointers = np.frombuffer(index, np.dtype("<i8"), sequences, HEADER.size + sequences * 4)
        self._first_sequence = np.frombuffer(index, np.dtype("<i8"), document_ends, HEADER.size + sequences * 12)
        self.documents = int(document_ends) - 1
        """Number of documents."""
        self.sidecar = self._read_sidecar()

        end = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize
        size = bin_path.stat().st_size
        if size != end:
            raise UserError(f"{bin_path}: {size} bytes, its index says {end}; the corpus is damaged, tokenize it again")
        if int(self._first_sequence[0]) != 0 or int(self._first_sequence[-1]) != sequences:
            raise UserError(f"{index_path}: its documents do not cover its sequences")
        self.tokens = end // self.dtype.itemsize
        """Number of tokens."""
        if self.sidecar is not None and self.sidecar.tokens != self.tokens:
            raise UserError(
                f"{self.file('json')}: speaks of {self.sidecar.tokens} tokens, the index of {self.tokens}; "
                "the sidecar belongs to another file"
            )
        if self.sidecar is None:
            self._refuse_gaps()
        if self.tokens < self.documents:
            raise UserError(f"{index_path}: {self.documents} documents of {self.tokens} tokens, some are empty")
        # A negative id is read as one far past every vocabulary, where it is refused.
        self._tokens = np.frombuffer(_map(bin_path, at_random=True), self.dtype.str.replace("i", "u"))

    def __reduce__(self) -> tuple[Any, ...]:
        """A loader's worker process opens the file for itself."""
        return TokenFile, (self.prefix,)

    def file(self, ending: str) -> Path:
        """The path of one of the files that make up this token file."""
        return Path(f"{self.prefix}.{ending}")

    def _read_sidecar(self) -> Sidecar | None:
        path = self.file("json")
        if not path.exists():
            return None
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            sidecar = from_json(raw)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: not a sidecar of ours ({error}); remove it to read the tokens alone") from error
        if sidecar.documents != self.documents:
            raise UserError(
                f"{path}: speaks of {sidecar.documents} documents, the index of {self.documents}; "
                "the sidecar belongs to another file"
            )
        return sidecar

    def _scan(self, entries: int) -> Iterator[int]:
        """Where each part of the index starts; what has been looked at does not stay in memory."""
        for first in range(0, entries, SCAN):
            yield first
            if isinstance(self._index, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                self._index.madvise(mmap.MADV_DONTNEED)

    def _refuse_gaps(self) -> None:
        """Documents must lie end to end and hold at least one token: all arithmetic rests on it."""
        where = self.file("idx")
        if int(self._pointers[0]) != 0:
            raise UserError(f"{where}: the first sequence does not start at 0")
        for first in self._scan(len(self._lengths)):
            part = slice(first, first + SCAN + 1)
            lengths = self._lengths[part].astype(np.int64)
            if (lengths < 0).any():
                raise UserError(f"{where}: sequence {first + int((lengths < 0).argmax())} has a negative length")
            steps = np.diff(self._pointers[part])
            wrong = steps != lengths[: len(steps)] * self.dtype.itemsize
            if wrong.any():
                raise UserError(f"{where}: sequence {first + int(wrong.argmax())} does not end where the next starts")
        for first in self._scan(self.documents):
            last = min(first + SCAN, self.documents)
            if (np.diff(self._first_sequence[first : last + 1]) < 0).any():
                raise UserError(f"{where}: its documents are not in order")
            empty = np.diff(self.document_starts(first, last + 1)) <= 0
            if empty.any():
                raise UserError(f"{where}: document {first + int(empty.argmax())} is empty; tokenize without it")

    def document_starts(self, first: int, last: int) -> np.ndarray:
        """Token offsets at which documents `first` .. `last - 1` start; `documents` itself is the end. int64."""
        sequence = self._first_sequence[first:last]
        if len(sequence) and not 0 <= int(sequence.min()) <= int(sequence.max()) <= len(self._pointers):
            raise self._damaged()
        inside = np.minimum(sequence, len(self._pointers) - 1)
        starts = self._pointers[inside] // self.dtype.itemsize
        return np.where(sequence == len(self._pointers), self.tokens, starts)

    def document_start(self, number: int) -> int:
        """Token offset at which a document starts; `documents` gives the end of the last one."""
        sequence = int(self._first_sequence[number])
        if sequence == len(self._pointers):
            return self.tokens
        if not 0 <= sequence < len(self._pointers):
            raise self._damaged()
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens `start` .. `end - 1` of the file, int64."""
        if not 0 <= start <= end <= self.tokens:
            raise self._damaged()
        tokens = self._tokens[start:end]
        if tokens.itemsize == 8:  # a negative id of eight bytes stays as far past every vocabulary as the others
            tokens = np.minimum(tokens, np.uint64(np.iinfo(np.int64).max))
        return tokens.astype(np.int64)

    def document(self, number: int) -> np.ndarray:
        """The tokens of one document, int64."""
        start, end = self.document_start(number), self.document_start(number + 1)
        if start == end:
            raise self._damaged()
        return self.read(start, end)

    def _damaged(self) -> UserError:
        """An index with a sidecar is believed when it is opened: where it lies, it is found out by reading."""
        return UserError(f"{self.file('idx')}: its documents do not lie end to end; it is damaged, tokenize again")

    def document_bytes(self) -> np.ndarray | None:
        """UTF-8 bytes of each document's raw text (uint32, one per document), or None where not known."""
        path = self.file("bytes")
        if not path.exists():
            return None
        if path.stat().st_size != 4 * self.documents:
            raise UserError(f"{path}: {path.stat().st_size} bytes for {self.documents} documents of 4 bytes each")
        return np.frombuffer(_map(path), np.dtype("<u4"))

    def verify(self) -> None:
        """Read everything, and compare it with the sidecar.

        Raises:
            UserError: a checksum differs, or a token lies past the vocabulary.
        """
        self._refuse_gaps()
        if self.sidecar is None:
            return
        for ending, expected in self.sidecar.checksums.items():
            if not self.file(ending).is_file():
                raise UserError(f"{self.file(ending)}: missing, the sidecar knows it; tokenize the corpus again")
            found = checksum(self.file(ending))
            if found != expected:
                raise UserError(f"{self.file(ending)}: its checksum is {found}, the sidecar says {expected}")
        tokens = np.frombuffer(_map(self.file("bin")), self._tokens.dtype)
        largest = max(int(tokens[i : i + CHUNK].max()) for i in range(0, self.tokens, CHUNK))
        if largest != self.sidecar.largest_token_id:
            raise UserError(
                f"{self.file('bin')}: largest id {largest}, the sidecar says {self.sidecar.largest_token_id}"
            )


class TokenFileWriter:
    """Writes a token file document by document in bounded memory; nothing has its final name until `close`.

    Args:
        prefix: the token file, without an ending.
        dtype: the tokens' type on disk (`smallest_dtype`).
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self.documents = 0
        self.tokens = 0
        self.bytes = 0
        self.largest_token_id = 0
        self._checksums = {ending: xxhash.xxh3_128() for ending in ("bin", "idx", "bytes")}
        self._files: dict[str, BinaryIO] = {}
        self._folders = make_folder(self.prefix.parent)
        try:
            for ending in ("bin", "bytes", "lengths"):
                self._files[ending] = self._open(ending)
        except OSError:
            self.abort()
            raise

    def _partial(self, ending: str) -> Path:
        return Path(f"{self.prefix}.{ending}.partial")

    def _open(self, ending: str) -> BinaryIO:
        return open(self._partial(ending), "wb")

    def _write(self, ending: str, data: bytes) -> None:
        self._files[ending].write(data)
        if ending in self._checksums:
            self._checksums[ending].update(data)

    def append(self, tokens: np.ndarray, lengths: np.ndarray, text_bytes: np.ndarray) -> None:
        """Add documents that lie end to end in `tokens`.

        Args:
            tokens: ids of all the documents, one after another.
            lengths: tokens of each document, each at least 1.
            text_bytes: UTF-8 bytes of each document's raw text.
        """
        lengths = np.asarray(lengths)
        if len(lengths) == 0:
            return
        if int(lengths.min()) < 1 or int(lengths.max()) > np.iinfo(np.int32).max:
            raise ValueError("a document holds from 1 to 2**31 - 1 tokens")
        if int(lengths.sum()) != len(tokens):
            raise ValueError("the lengths do not add up to the tokens")
        largest = int(np.max(tokens))
        if largest > np.iinfo(self.dtype).max or int(np.min(tokens)) < 0:
            raise ValueError(f"token id {largest} does not fit into {self.dtype}")
        self._write("bin", np.asarray(tokens).astype(self.dtype).tobytes())
        self._write("lengths", lengths.astype("<i4").tobytes())
        self._write("bytes", np.asarray(text_bytes).astype("<u4").tobytes())
        self.documents += len(lengths)
        self.tokens += len(tokens)
        self.bytes += int(np.sum(text_bytes, dtype=np.int64))
        self.largest_token_id = max(self.largest_token_id, largest)

    def _index(self) -> Iterable[bytes]:
        yield HEADER.pack(MAGIC, 1, CODE_OF_DTYPE[self.dtype], self.documents, self.documents + 1)
        lengths = np.memmap(self._partial("lengths"), np.dtype("<i4"), "r")
        for first in range(0, len(lengths), CHUNK):
            yield lengths[first : first + CHUNK].tobytes()
        offset = 0
        for first in range(0, len(lengths), CHUNK):
            sizes = lengths[first : first + CHUNK].astype("<i8") * self.dtype.itemsize
            ends = offset + np.cumsum(sizes)
            yield (ends - sizes).astype("<i8").tobytes()
            offset = int(ends[-1])
        for first in range(0, self.documents + 1, CHUNK):
            yield np.arange(first, min(first + CHUNK, self.documents + 1), dtype="<i8").tobytes()

    def close(self, sidecar: Sidecar) -> None:
        """Write index and sidecar, then give all files their final names; the index comes last."""
        if self.documents == 0:
            raise ValueError("no documents were written")
        for file in self._files.values():
            file.flush()
        self._files["idx"] = self._open("idx")
        for data in self._index():
            self._write("idx", data)
        checksums = {ending: digest.hexdigest() for ending, digest in self._checksums.items()}
        sidecar = dataclasses.replace(sidecar, checksums=checksums)
        self._files["json"] = self._open("json")
        text = json.dumps(dataclasses.asdict(sidecar), ensure_ascii=False, indent=2)
        self._files["json"].write(text.encode() + b"\n")
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._partial("lengths").unlink()
        # Without its index a token file does not open: an older one goes first, the new one comes last.
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        for ending in ("bin", "bytes", "json", "idx"):
            os.replace(self._partial(ending), f"{self.prefix}.{ending}")

    def abort(self) -> None:
        """Remove everything that was written so far."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # on a full disk, what is still buffered fails once more
                file.close()
        for ending in ("bin", "bytes", "lengths", "idx", "json"):
            if self._partial(ending).is_file():
                self._partial(ending).unlink()
        remove_folders(self._folders)
