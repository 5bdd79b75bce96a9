"""A token file is Megatron's, byte for byte; a whole one opens, and a damaged one is named in one line."""

import dataclasses
import json
import os
import re
import struct
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_recipes.data import token_file
from llm_recipes.data.token_file import Sidecar, TokenFile, TokenFileWriter, checksum, smallest_dtype
from llm_recipes.errors import UserError

DOCUMENTS = [[5, 6, 7, 0], [0], [8, 999, 0]]


def refusal(prefix: Path, verify: bool = False) -> str:
    """The line with which a token file is refused; it names the file."""
    with pytest.raises(UserError) as refused:
        file = TokenFile(prefix)
        if verify:
            file.verify()
    message = str(refused.value)
    assert "\n" not in message
    assert str(prefix) in message
    return message


def change_sidecar(prefix: Path, **changes: Any) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(0, 60_000), min_size=1, max_size=20), min_size=1, max_size=12),
    parts=st.integers(1, 4),
    chunk=st.integers(1, 5),
    vocab_size=st.sampled_from([60_001, 128_000]),
)
def test_what_is_written_is_what_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    documents: list[list[int]],
    parts: int,
    chunk: int,
    vocab_size: int,
) -> None:
    monkeypatch.setattr(token_file, "CHUNK", chunk)
    writer = TokenFileWriter(tmp_path / "folder" / "ja", smallest_dtype(vocab_size))
    for part in (documents[first::parts] for first in range(parts)):
        lengths = [len(document) for document in part]
        writer.append(np.array([*chain(*part)], np.int64), np.array(lengths, np.int64), np.array(lengths) * 3)
    written = [document for first in range(parts) for document in documents[first::parts]]
    tokens = sum(map(len, written))
    counted = (writer.documents, writer.tokens, writer.bytes, writer.largest_token_id)
    assert counted == (len(written), tokens, 3 * tokens, max(map(max, written)))
    sidecar = Sidecar("f", "name", vocab_size, writer.largest_token_id, 0, None, len(written), tokens, 3 * tokens)
    writer.close(sidecar)

    file = TokenFile(tmp_path / "folder" / "ja")
    file.verify()
    assert [file.document(number).tolist() for number in range(file.documents)] == written
    assert (file.documents, file.tokens) == (len(written), tokens)
    assert file.document(0).dtype == np.int64
    starts = np.cumsum([0, *map(len, written)]).tolist()
    assert file.document_starts(0, len(written) + 1).tolist() == starts
    assert [file.document_start(number) for number in range(len(written) + 1)] == starts
    sizes = file.document_bytes()
    assert sizes is not None and sizes.tolist() == [3 * len(document) for document in written]
    assert file.sidecar is not None
    assert dataclasses.replace(file.sidecar, checksums={}) == sidecar
    assert sorted(path.name for path in file.prefix.parent.iterdir()) == ["ja.bin", "ja.bytes", "ja.idx", "ja.json"]
    assert file.sidecar.checksums == {ending: checksum(file.file(ending)) for ending in ("bin", "idx", "bytes")}


def test_the_files_are_megatrons_byte_for_byte(write_corpus: Callable[..., Path]) -> None:
    prefix = write_corpus("ja", [[5, 6, 7, 0], [8, 999, 0]])
    assert Path(f"{prefix}.bin").read_bytes() == struct.pack("<7H", 5, 6, 7, 0, 8, 999, 0)
    assert Path(f"{prefix}.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)  # version
        + struct.pack("<B", 8)  # uint16
        + struct.pack("<Q", 2)  # sequences
        + struct.pack("<Q", 3)  # documents and one
        + struct.pack("<2i", 4, 3)  # lengths
        + struct.pack("<2q", 0, 8)  # pointers
        + struct.pack("<3q", 0, 1, 2)  # documents
    )
    large = write_corpus("large", [[70_000, 1]], vocab_size=128_000)
    assert Path(f"{large}.bin").read_bytes() == struct.pack("<2i", 70_000, 1)
    assert Path(f"{large}.idx").read_bytes()[17] == 4


def test_two_bytes_a_token_where_megatron_takes_two() -> None:
    assert [smallest_dtype(size) for size in (100, 65_499, 65_500, 300_000)] == [
        np.uint16, np.uint16, np.int32, np.int32,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_a_file_of_megatrons_opens_without_a_sidecar(write_megatron: Callable[..., Path], dtype: Any) -> None:
    documents = [[[1, 2, 3], [4]], [[5, 6]], [[7], [8, 9], [10]]]
    file = TokenFile(write_megatron("their/corpus_text_document", documents, dtype))
    assert (file.documents, file.tokens, file.sidecar, file.document_bytes()) == (3, 10, None, None)
    assert [file.document(number).tolist() for number in range(3)] == [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10]]
    assert file.document_starts(0, 4).tolist() == [0, 4, 6, 10]
    assert file.read(3, 7).tolist() == [4, 5, 6, 7]
    file.verify()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=4), min_size=1, max_size=10).filter(
        any
    ),
    chunk=st.integers(1, 4),
)
def test_empty_sequences_are_read_over_and_empty_documents_refused(
    write_megatron: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    documents: list[list[list[int]]],
    chunk: int,
) -> None:
    monkeypatch.setattr(token_file, "CHUNK", chunk)
    whole = [[*chain(*document)] for document in documents]
    prefix = write_megatron("foreign", documents)
    if [] in whole:
        # Of a corpus that is nothing but empty, only that is said.
        expected = f"document {whole.index([])} is empty" if any(whole) else "empty"
        assert expected in refusal(prefix)
    else:
        file = TokenFile(prefix)
        assert [file.document(number).tolist() for number in range(file.documents)] == whole


def damage_index(at: int, value: bytes) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}.idx")
        data = bytearray(path.read_bytes())
        data[at : at + len(value)] = value
        path.write_bytes(bytes(data))

    return damage


def cut(ending: str, size: int) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}.{ending}")
        path.write_bytes(path.read_bytes()[:size])

    return damage


def grow(ending: str) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}.{ending}")
        path.write_bytes(path.read_bytes() + b"\0\0")

    return damage


# The index of DOCUMENTS in one sequence each: header 34 bytes, 3 lengths, 3 pointers, 4 document marks.
LENGTHS, POINTERS, MARKS = 34, 34 + 12, 34 + 12 + 24
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda prefix: Path(f"{prefix}.idx").unlink(), r"\.idx: no such token file"),
    "no tokens": (lambda prefix: Path(f"{prefix}.bin").unlink(), r"\.bin: no such token file"),
    "tokens cut": (cut("bin", -2), r"\.bin: 14 bytes, its index says 16"),
    "tokens cut inside a token": (cut("bin", -1), r"\.bin: 15 bytes, its index says 16"),
    "no byte of tokens": (cut("bin", 0), r"\.bin: 0 bytes, its index says 16"),
    "more tokens": (grow("bin"), r"\.bin: 18 bytes, its index says 16"),
    "index cut": (cut("idx", -8), r"\.idx: 94 bytes, its header says 102"),
    "index cut in the header": (cut("idx", 30), r"\.idx: not a Megatron index"),
    "no byte of index": (cut("idx", 0), r"\.idx: not a Megatron index"),
    "longer index": (grow("idx"), r"\.idx: 104 bytes, its header says 102"),
    "wrong magic": (damage_index(0, b"TNTIDX\0\0\0"), r"\.idx: not a Megatron index"),
    "wrong version": (damage_index(9, struct.pack("<Q", 2)), r"\.idx: version 2 "),
    "unknown type": (damage_index(17, b"\x07"), r"\.idx: .*dtype code 7 "),
    "documents that stop short": (damage_index(MARKS + 24, struct.pack("<q", 2)), r"\.idx: its documents do not cover"),
    "documents that start late": (damage_index(MARKS, struct.pack("<q", 1)), r"\.idx: its documents do not cover"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "theirs"])
def test_a_damaged_token_file_is_named_in_one_line(
    write_corpus: Callable[..., Path],
    write_megatron: Callable[..., Path],
    ours: bool,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    if ours:
        prefix = write_corpus("corpus", DOCUMENTS)
    else:
        prefix = write_megatron("corpus", [[document] for document in DOCUMENTS])
    damage(prefix)
    assert re.search(message, refusal(prefix))


def backwards(prefix: Path) -> None:
    damage_index(MARKS + 8, struct.pack("<2q", 2, 1))(prefix)


def negative(prefix: Path) -> None:
    # The pointers follow the lengths and the end stays where it was, so that only the sign is wrong.
    damage_index(LENGTHS, struct.pack("<3i", 4, -1, 5))(prefix)
    damage_index(POINTERS, struct.pack("<3q", 0, 8, 6))(prefix)


GAPS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a late start": (damage_index(POINTERS, struct.pack("<q", 2)), "the first sequence does not start at 0"),
    "a gap": (damage_index(POINTERS + 8, struct.pack("<q", 10)), "sequence 0 does not end where the next starts"),
    "an overlap": (damage_index(LENGTHS + 4, struct.pack("<i", 2)), "sequence 1 does not end where the next starts"),
    "a negative length": (negative, "sequence 1 has a negative length"),
    "documents backwards": (backwards, "its documents are not in order"),
}


@pytest.mark.parametrize(("damage", "message"), GAPS.values(), ids=GAPS.keys())
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_sequences_that_do_not_lie_end_to_end_are_refused(
    write_corpus: Callable[..., Path],
    write_megatron: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    message: str,
    chunk: int,
) -> None:
    monkeypatch.setattr(token_file, "CHUNK", chunk)
    theirs = write_megatron("theirs", [[document] for document in DOCUMENTS])
    damage(theirs)
    assert message in refusal(theirs)
    # Our own index is read only when told to.
    ours = write_corpus("ours", DOCUMENTS)
    damage(ours)
    assert message in refusal(ours, verify=True)


def test_a_file_of_no_documents_is_refused(write_megatron: Callable[..., Path]) -> None:
    assert "an empty token file" in refusal(write_megatron("none", []))
    assert "an empty token file" in refusal(write_megatron("no sequences", [[], []]))


def test_a_sidecar_of_another_file_is_refused(write_corpus: Callable[..., Path]) -> None:
    prefix, other = write_corpus("corpus", DOCUMENTS), write_corpus("other", DOCUMENTS[:2])
    Path(f"{other}.json").replace(f"{prefix}.json")
    assert "speaks of 2 documents, the index of 3" in refusal(prefix)


def test_a_sidecar_of_another_file_with_as_many_documents_is_refused(write_corpus: Callable[..., Path]) -> None:
    prefix, other = write_corpus("corpus", DOCUMENTS), write_corpus("other", [[1, 0]] * len(DOCUMENTS))
    Path(f"{other}.json").replace(f"{prefix}.json")
    assert str(prefix) in refusal(prefix)


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", "3", '"text"', '{"documents": 3}', "\udcff"], ids=lambda text: ascii(text)
)
def test_a_json_file_that_is_no_sidecar_is_refused(write_corpus: Callable[..., Path], text: str) -> None:
    prefix = write_corpus("corpus", DOCUMENTS)
    Path(f"{prefix}.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "not a sidecar of ours" in refusal(prefix)


def test_a_sidecar_may_say_more_than_we_know(write_corpus: Callable[..., Path]) -> None:
    prefix = write_corpus("corpus", DOCUMENTS, licence="CC-BY-4.0")
    change_sidecar(prefix, added_by_a_later_release=[1, 2])
    sidecar = TokenFile(prefix).sidecar
    assert sidecar is not None and sidecar.licence == "CC-BY-4.0"


@pytest.mark.parametrize("ending", ["bin", "idx", "bytes"])
def test_verify_finds_one_changed_bit(write_corpus: Callable[..., Path], ending: str) -> None:
    prefix = write_corpus("corpus", DOCUMENTS)
    TokenFile(prefix).verify()
    path = Path(f"{prefix}.{ending}")
    data = bytearray(path.read_bytes())
    # The lowest bit of the first token, of the first length, of the first document's bytes.
    data[LENGTHS if ending == "idx" else 0] ^= 1
    path.write_bytes(bytes(data))
    TokenFile(prefix)
    message = refusal(prefix, verify=True)
    assert f"{path}: its checksum is {checksum(path)}" in message or ending == "idx"


def test_verify_names_a_file_that_is_gone(write_corpus: Callable[..., Path]) -> None:
    prefix = write_corpus("corpus", DOCUMENTS)
    Path(f"{prefix}.bytes").unlink()
    assert TokenFile(prefix).document_bytes() is None
    assert f"{prefix}.bytes" in refusal(prefix, verify=True)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_verify_reads_every_token(
    write_corpus: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(token_file, "CHUNK", chunk)
    prefix = write_corpus("corpus", DOCUMENTS, largest_token_id=998)
    assert "largest id 999, the sidecar says 998" in refusal(prefix, verify=True)


def test_bytes_that_do_not_fit_the_documents_are_refused(write_corpus: Callable[..., Path]) -> None:
    prefix = write_corpus("corpus", DOCUMENTS, text_bytes=[9, 0, 2**32 - 1])
    sizes = TokenFile(prefix).document_bytes()
    assert sizes is not None and sizes.tolist() == [9, 0, 2**32 - 1]
    cut("bytes", 8)(prefix)
    with pytest.raises(UserError, match=r"corpus\.bytes: 8 bytes for 3 documents"):
        TokenFile(prefix).document_bytes()


def writing(prefix: Path) -> TokenFileWriter:
    """A writer with two documents in it."""
    writer = TokenFileWriter(prefix, np.dtype(np.uint16))
    writer.append(np.array([1, 2, 3]), np.array([2, 1]), np.array([4, 2]))
    return writer


def sidecar_of(writer: TokenFileWriter) -> Sidecar:
    counted = (writer.documents, writer.tokens, writer.bytes)
    return Sidecar("f", "name", 100, writer.largest_token_id, 0, None, *counted)


def test_a_writer_that_gives_up_leaves_nothing(tmp_path: Path) -> None:
    writing(tmp_path / "ja").abort()
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_was_interrupted_is_never_opened(tmp_path: Path, write_corpus: Callable[..., Path]) -> None:
    writer = writing(tmp_path / "ja")
    for file in writer._files.values():
        file.flush()
    assert "no such token file" in refusal(tmp_path / "ja")
    # Nor is a finished one touched before its successor is whole.
    before = write_corpus("en", DOCUMENTS)
    writing(before)
    assert TokenFile(before).document(2).tolist() == DOCUMENTS[2]
    TokenFile(before).verify()


@pytest.mark.parametrize("done", range(4))
def test_a_kill_while_files_get_their_names_leaves_no_mixture_of_old_and_new(
    monkeypatch: pytest.MonkeyPatch, write_corpus: Callable[..., Path], done: int
) -> None:
    prefix = write_corpus("ja", DOCUMENTS)
    writer = writing(prefix)
    replaced, rename = [], os.replace

    def replace(source: Any, target: Any) -> None:
        if len(replaced) == done:
            raise KeyboardInterrupt
        replaced.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        writer.close(sidecar_of(writer))
    assert len(replaced) == done
    assert "no such token file" in refusal(prefix)


def test_a_corpus_that_was_tokenized_again_is_read_anew(write_corpus: Callable[..., Path]) -> None:
    prefix = write_corpus("ja", DOCUMENTS)
    before = TokenFile(prefix)
    # As many bytes as before: nothing but the content tells them apart.
    again = [[9, 9, 9, 9], [9], [9, 9, 9]]
    write_corpus("ja", again, text_bytes=[1, 2, 3])
    after = TokenFile(prefix)
    after.verify()
    assert [after.document(number).tolist() for number in range(3)] == again
    sizes = after.document_bytes()
    assert sizes is not None and sizes.tolist() == [1, 2, 3]
    # A run that still has the old one open reads the old one to its end.
    assert [before.document(number).tolist() for number in range(3)] == DOCUMENTS


@pytest.mark.parametrize(("tokens", "lengths"), [([1, 2], [2, 0]), ([1, 2], [1]), ([1, 65_536], [2]), ([1, -1], [2])])
def test_what_does_not_fit_into_a_token_file_is_not_written(
    tmp_path: Path, tokens: list[int], lengths: list[int]
) -> None:
    writer = TokenFileWriter(tmp_path / "ja", np.dtype(np.uint16))
    with pytest.raises(ValueError):
        writer.append(np.array(tokens), np.array(lengths), np.array(lengths))
    assert (writer.documents, writer.tokens) == (0, 0)
    writer.append(np.array([], np.int64), np.array([], np.int64), np.array([], np.int64))
    with pytest.raises(ValueError, match="no documents"):
        writer.close(sidecar_of(writer))
    writer.abort()
    assert list(tmp_path.iterdir()) == []
