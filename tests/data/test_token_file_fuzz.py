"""Whatever bytes lie where a token file should be: it opens and reads within its bounds, or is refused in one line."""

import contextlib
import dataclasses
import json
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llm_recipes.data.documents import window
from llm_recipes.data.token_file import HEADER, MAGIC, Sidecar, TokenFile
from llm_recipes.data.windows import Windows
from llm_recipes.errors import UserError

DOCUMENTS = [[5, 6, 7, 0], [9, 0], [8, 999, 3, 2, 1, 0], [4, 0]]
ENDINGS = ("idx", "bin", "json", "bytes")
BOUND = 4 << 20
"""Bytes of memory; all files here are far smaller than what one scan takes at once."""
CASUAL = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def refused(prefix: Path) -> bool:
    """Read everything that a run reads. What is refused is refused in one line; nothing else may happen."""
    whole = True

    @contextlib.contextmanager
    def answered() -> Any:
        nonlocal whole
        try:
            yield
        except UserError as error:
            assert "\n" not in str(error)
            whole = False

    with answered():
        file = TokenFile(prefix)
        for separate in (True, False):
            with answered():
                windows = Windows([file, file], 3, separate)
                for number in range(len(windows)):
                    with answered():
                        pieces = windows.read(number)
                        laid = window(pieces, 3, separate)
                        assert {key: each.shape for key, each in laid.items()} == dict.fromkeys(laid, (3,))
        for number in range(file.documents):
            with answered():
                assert len(file.document(number)) > 0
        with answered():
            file.document_bytes()
        with answered():
            file.verify()
    return not whole


@pytest.fixture
def originals(write_corpus: Callable[..., Path], write_megatron: Callable[..., Path]) -> dict[str, dict[str, bytes]]:
    """The bytes of a token file of ours and of one of Megatron's, by ending."""
    ours = write_corpus("ours", DOCUMENTS)
    theirs = write_megatron("theirs", [[document[:1], document[1:]] for document in DOCUMENTS], np.int32)
    return {
        prefix.name: {
            each: Path(f"{prefix}.{each}").read_bytes() for each in ENDINGS if Path(f"{prefix}.{each}").exists()
        }
        for prefix in (ours, theirs)
    }


def laid(folder: str, files: dict[str, bytes]) -> Path:
    for ending, data in files.items():
        (Path(folder) / f"corpus.{ending}").write_bytes(data)
    return Path(folder) / "corpus"


@pytest.mark.parametrize("name", ["ours", "theirs"])
def test_what_nobody_changed_is_read(originals: dict[str, dict[str, bytes]], tmp_path: Path, name: str) -> None:
    assert not refused(laid(str(tmp_path), originals[name]))


@settings(CASUAL, max_examples=150)
@given(
    index=st.binary(max_size=80) | st.binary(max_size=60).map(lambda rest: MAGIC + struct.pack("<QB", 1, 8) + rest),
    tokens=st.binary(max_size=16),
    sidecar=st.none() | st.binary(max_size=20),
)
def test_arbitrary_bytes_are_refused(index: bytes, tokens: bytes, sidecar: bytes | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = {"idx": index, "bin": tokens} | ({} if sidecar is None else {"json": sidecar})
        assert refused(laid(folder, files))


@settings(CASUAL, max_examples=300)
@given(
    name=st.sampled_from(["ours", "theirs"]),
    ending=st.sampled_from(["idx", "idx", *ENDINGS]),
    place=st.floats(0, 1, exclude_max=True),
    change=st.sampled_from(["flip", "cut", "insert", "remove", "number", "number"]),
    value=st.integers(1, 255),
    number=st.sampled_from([-1, 0, 1, 2, 3, 5, 2**31 - 1, -(2**31), 2**40, 2**62, -(2**63)]),
    lie=st.booleans(),
)
def test_one_change_anywhere_is_read_within_bounds_or_refused(
    originals: dict[str, dict[str, bytes]], name: str, ending: str, place: float, change: str, value: int, number: int,
    lie: bool,
) -> None:  # fmt: skip
    files = {each: bytearray(data) for each, data in originals[name].items()}
    data = files.get(ending, files["idx"])
    at = int(place * len(data))
    if change == "flip":
        data[at] ^= value
    elif change == "cut":
        del data[at:]
    elif change == "insert":
        data.insert(at, value)
    elif change == "remove":
        del data[at]
    else:
        at -= (at - HEADER.size) % 4
        data[at : at + 8] = struct.pack("<q", number)[: len(data) - at]
    if lie and name == "ours":  # the sidecar does not know better
        with contextlib.suppress(ValueError, TypeError):
            files["json"] = bytearray(json.dumps(json.loads(files["json"]) | {"checksums": {}}).encode())
    with tempfile.TemporaryDirectory() as folder:
        refused(laid(folder, {each: bytes(data) for each, data in files.items()}))


FIELDS = [each.name for each in dataclasses.fields(Sidecar)]
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(CASUAL, max_examples=150)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), ANY, min_size=1, max_size=3))
@example(changes={"documents": True})
@example(changes={"largest_token_id": "999"})
@example(changes={"checksums": [1]})
@example(changes={"checksums": {"bin\0": "a"}})
@example(changes={"checksums": {"bin": 5}})
def test_a_sidecar_of_any_content_is_believed_only_where_it_is_right(
    originals: dict[str, dict[str, bytes]], changes: dict[str, Any]
) -> None:
    files = originals["ours"]
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(json.loads(files["json"]) | changes).encode()
        prefix = laid(folder, files | {"json": text})
        refused(prefix)
        with contextlib.suppress(UserError):
            sidecar = TokenFile(prefix).sidecar
            assert sidecar is not None
            assert type(sidecar.largest_token_id) is type(sidecar.vocab_size) is type(sidecar.documents) is int


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"tokens":' * 100_000, b"9" * 10_000, b"\xff\xfe"])
def test_a_hostile_sidecar_is_refused(originals: dict[str, dict[str, bytes]], tmp_path: Path, text: bytes) -> None:
    prefix = laid(str(tmp_path), originals["ours"] | {"json": text})
    with pytest.raises(UserError, match="not a sidecar of ours"):
        TokenFile(prefix)


def index(sequences: int, marks: int, body: bytes = b"") -> bytes:
    return HEADER.pack(MAGIC, 1, 8, sequences, marks) + body


HUGE = {
    "2**60 sequences": index(2**60, 2),
    "2**64 - 1 of everything": index(2**64 - 1, 2**64 - 1),
    "2**60 documents of one sequence": index(1, 2**60, bytes(20)),
    "a length of 2**31 - 1": index(1, 2, struct.pack("<iqqq", 2**31 - 1, 0, 0, 1)),
    "a pointer of 2**62": index(1, 2, struct.pack("<iqqq", 2, 2**62, 0, 1)),
    "a negative pointer that ends right": index(2, 2, struct.pack("<iiqqqq", 2**31 - 1, 4, -(2**62), 0, 0, 2)),
    "more documents than tokens": index(1, 6, struct.pack("<iqqqqqqq", 4, 0, 0, 0, 0, 0, 0, 1)),
    "no tokens": index(1, 2, struct.pack("<iqqq", 0, 8, 0, 1)),
}


@pytest.mark.parametrize("data", HUGE.values(), ids=HUGE.keys())
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "theirs"])
def test_a_header_that_promises_too_much_takes_no_memory(
    originals: dict[str, dict[str, bytes]], tmp_path: Path, data: bytes, ours: bool
) -> None:
    files = {"idx": data, "bin": bytes(8)}
    if ours:
        _, _, _, _, marks = HEADER.unpack(data[: HEADER.size])
        told = json.loads(originals["ours"]["json"]) | {"documents": marks - 1, "tokens": 4, "checksums": {}}
        files["json"] = json.dumps(told).encode()
    prefix = laid(str(tmp_path), files)
    tracemalloc.start()
    try:
        assert refused(prefix)
        assert tracemalloc.get_traced_memory()[1] < BOUND
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64])
def test_a_negative_id_is_read_as_one_past_every_vocabulary(write_megatron: Callable[..., Path], dtype: Any) -> None:
    file = TokenFile(write_megatron("theirs", [[[-1, 1]]], dtype))
    found = file.read(0, 2).tolist()
    assert found[0] >= np.iinfo(dtype).max and found[1] == 1


def test_documents_out_of_order_are_found_by_whoever_reads_them(
    originals: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    marks = HEADER.size + 4 * 12
    for number, wrong in enumerate(([0, 3, 1, 2, 4], [0, 9, 2, 3, 4], [0, -9, 2, 3, 4], [0, 0, 2, 3, 4])):
        folder = tmp_path / str(number)
        folder.mkdir()
        data = originals["ours"]["idx"]
        changed = data[:marks] + struct.pack("<5q", *wrong)
        file = TokenFile(laid(str(folder), originals["ours"] | {"idx": changed}))
        windows = Windows([file], 100, True)
        if number < 3:  # that the first document is empty, no later one knows
            with pytest.raises(UserError, match=r"corpus\.idx: its documents do not lie end to end"):
                windows.read(0)
        with pytest.raises(UserError, match=r"corpus\.idx: its documents do not lie end to end"):
            [file.document(document) for document in range(file.documents)]
