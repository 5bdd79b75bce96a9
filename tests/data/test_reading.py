"""Rows come out of every kind of input as they lie there, and what is wrong with one is said with its place."""

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_recipes.config import TokenizeConfig
from llm_recipes.data import reading
from llm_recipes.data.reading import DAMAGED, DamagedInput, JsonLinesFile, all_blocks, open_inputs
from llm_recipes.data.rows import BROKEN_JSON, NO_TEXT, NOT_A_STRING, NOT_UTF8, Block, Problem, rows
from llm_recipes.data.token_file import checksum
from llm_recipes.errors import UserError

TEXTS = [
    "日本語の文。",
    "English text.",
    "ＡＢＣ〜ｶﾅ\u3000改行\nあり",
    "🎌👨\u200d👩\u200d👧 €",
    "a\u2028b\x85c\x0bd\x00e",
    "",
]


def configuration(source: Any, **others: Any) -> TokenizeConfig:
    return TokenizeConfig(input=source, output="unused", tokenizer="unused", **others)


def read(source: Any, **others: Any) -> list[tuple[int, Any]]:
    """Number and value of every row."""
    config = configuration(source, **others)
    found: list[tuple[int, Any]] = []
    for block, _ in all_blocks(open_inputs(config)):
        if isinstance(block, Problem):
            found.append((0, block))
        else:
            found.extend(rows(block, config.text_key, config.messages_key))
    return found


def texts_of(source: Any, **others: Any) -> list[Any]:
    return [value for _, value in read(source, **others)]


def json_lines(texts: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({key: text}, ensure_ascii=False).encode() + b"\n" for text in texts)


COMPRESSED = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "gzip in members, padded": lambda data: gzip.compress(data[:7]) + gzip.compress(data[7:]) + b"\0" * 512,
    "zstd": zstandard.compress,
    "zstd in frames, one to be skipped": lambda data: (
        struct.pack("<II", 0x184D2A50, 5) + b"index" + zstandard.compress(data[:7]) + zstandard.compress(data[7:])
    ),
}


@pytest.mark.parametrize("compress", COMPRESSED.values(), ids=COMPRESSED.keys())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1, max_size=30),
    ending=st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n \n"]),
    closed=st.booleans(),
    block_bytes=st.sampled_from([1, 3, 64, 1 << 20]),
)
def test_every_line_comes_out_once_and_in_order_with_its_number(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compress: Any,
    texts: list[str],
    ending: bytes,
    closed: bool,
    block_bytes: int,
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(reading, "COMPRESSED_BYTES", block_bytes)
    lines = json_lines(texts).replace(b"\n", ending)
    path = tmp_path / "input"
    path.write_bytes(compress(lines if closed else lines.removesuffix(ending)))
    step = ending.count(b"\n")
    assert read(str(path)) == [(1 + step * index, text) for index, text in enumerate(texts)]


def test_a_file_is_cut_into_blocks_of_about_one_size_and_its_checksum_is_taken_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "input.jsonl"
    path.write_bytes(json_lines([f"{number:040d}" for number in range(2000)]))
    monkeypatch.setattr(reading, "BLOCK_BYTES", 4096)
    file = JsonLinesFile(str(path))
    blocks = list(file.blocks())
    assert max(len(block.data) for block in blocks) <= 2 * 4096
    assert blocks[-1].done == file.size == path.stat().st_size
    # Read again, it would be this one.
    path.write_bytes(b"changed")
    source = file.source()
    path.write_bytes(b"".join(block.data for block in blocks))
    assert source == {"path": str(path), "bytes": file.size, "xxh3_128": checksum(path)}


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json_lines(["あ", "\ufeffい"]))
    assert texts_of(str(path)) == ["あ", "\ufeffい"]


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return str(path)


def test_parquet_rows_come_in_order_across_row_groups_and_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 256)
    texts = TEXTS * 20
    path = write_parquet(tmp_path / "p", {"id": list(range(len(texts))), "text": texts}, row_group_size=7)
    assert read(path) == list(enumerate(texts, 1))
    assert [source.source()["xxh3_128"] for source in open_inputs(configuration(path))] == [checksum(path)]


def test_parquet_conversations_and_columns_of_other_names(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "問い"}, {"role": "assistant", "content": "答え"}]
    path = write_parquet(tmp_path / "chat.parquet", {"messages": [turns, turns], "text": ["a", "b"]})
    assert texts_of(path) == [turns, turns]
    assert texts_of(path, messages_key="none") == ["a", "b"]
    path = write_parquet(tmp_path / "body.parquet", {"body": pyarrow.array(["x", "y"]).dictionary_encode()})
    assert texts_of(path, text_key="body") == ["x", "y"]


def test_broken_parquet_rows_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "p.parquet", {"text": ["a", None, "c"]})
    assert read(path)[1] == (2, Problem(NOT_A_STRING, "'text' is null, not a string"))
    data, offsets = pyarrow.py_buffer(b"ab\xffc"), pyarrow.py_buffer(struct.pack("<4i", 0, 2, 3, 4))
    invalid = pyarrow.StringArray.from_buffers(3, offsets, data)
    path = write_parquet(tmp_path / "q.parquet", {"text": invalid})
    assert read(path) == [(1, "ab"), (2, Problem(NOT_UTF8, "not UTF-8")), (3, "c")]


def test_a_saved_dataset_gives_its_rows_also_after_a_selection(tmp_path: Path) -> None:
    import datasets

    every = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(len(TEXTS)))})
    some = every.select([4, 0, 2])
    some.save_to_disk(tmp_path / "some")
    assert read(str(tmp_path / "some")) == [(1, TEXTS[4]), (2, TEXTS[0]), (3, TEXTS[2])]
    datasets.DatasetDict({"train": every, "test": some}).save_to_disk(tmp_path / "splits")
    assert texts_of(str(tmp_path / "splits")) == TEXTS
    assert len(texts_of(str(tmp_path / "splits"), split="test")) == 3
    with pytest.raises(UserError, match="no split 'tset', did you mean 'test'"):
        read(str(tmp_path / "splits"), split="tset")
    (source,) = open_inputs(configuration(str(tmp_path / "some")))
    described = source.source()
    assert (described["split"], described["rows"]) == ("train", 3)
    assert described["fingerprint"] == datasets.load_from_disk(tmp_path / "some")._fingerprint


def test_globs_and_lists_keep_their_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines([name]))
    folder = str(tmp_path)
    assert texts_of(f"{folder}/*.jsonl") == ["a", "b", "c"]
    assert texts_of([f"{folder}/c.jsonl", f"{folder}/[ab].jsonl"]) == ["c", "a", "b"]


def test_progress_counts_up_to_the_size_of_all_inputs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    write_parquet(tmp_path / "b.parquet", {"text": TEXTS})
    inputs = open_inputs(configuration(f"{tmp_path}/*"))
    marks = [done for _, done in all_blocks(inputs)]
    assert marks == sorted(marks)
    assert marks[-1] == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b'{"text": "a"', BROKEN_JSON, "broken JSON (Expecting ',' delimiter at character 13)"),
        (b"plain words", BROKEN_JSON, "broken JSON (Expecting value at character 1)"),
        (b"[" * 100_000, BROKEN_JSON, "broken JSON"),
        (b'["text"]', BROKEN_JSON, "a list, not a JSON object"),
        (b'{"text": "\xe3\x81"}', NOT_UTF8, "not UTF-8 (byte 11 of the line)"),
        (b'{"txt": "a"}', NO_TEXT, "no 'text' (text_key), did you mean 'txt'?"),
        (b'{"text": 5}', NOT_A_STRING, "'text' is a number, not a string"),
        (b'{"text": null}', NOT_A_STRING, "'text' is null, not a string"),
        (b'{"text": ["a"]}', NOT_A_STRING, "'text' is a list, not a string"),
        (b'{"messages": "hello"}', NO_TEXT, "'messages' is not a list of messages"),
        (b'{"messages": []}', NO_TEXT, "'messages' is not a list of messages"),
    ],
)
def test_a_broken_line_is_named_and_the_others_are_read(line: bytes, reason: str, detail: str) -> None:
    data = json_lines(["first"]) + line + b"\n" + json_lines(["last"])
    first, broken, last = rows(Block("file.jsonl", 41, data, False, 0), "text", "messages")
    assert (first, last) == ((41, "first"), (43, "last"))
    number, problem = broken
    assert number == 42
    assert isinstance(problem, Problem)
    assert problem.reason == reason
    assert problem.detail.startswith(detail)


def incompressible(count: int) -> list[str]:
    import random

    numbers = random.Random(0)
    return [f"{number} {numbers.getrandbits(800)}" for number in range(count)]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_a_truncated_file_gives_its_whole_lines_and_then_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Any
) -> None:
    monkeypatch.setattr(reading, "COMPRESSED_BYTES", 4096)
    texts = incompressible(3000)
    whole = compress(json_lines(texts))
    (tmp_path / "a.jsonl").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.jsonl").write_bytes(json_lines(["next file"]))
    found = texts_of(f"{tmp_path}/*")
    problem = found[-2]
    assert problem.reason == DAMAGED
    assert problem.detail == f"{tmp_path}/a.jsonl: the compressed file is cut short after {len(whole) // 2} bytes"
    assert found[-1] == "next file"
    assert 0 < len(found) - 2 < len(texts)
    assert found[:-2] == texts[: len(found) - 2]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data + b"no gzip stream",
        lambda data: data[:50] + bytes(50) + data[100:],
        lambda data: data[:6],
    ],
    ids=["something after the end", "zeros inside", "only a header"],
)
def test_a_damaged_gzip_file_is_an_error(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(damage(gzip.compress(json_lines(incompressible(20)))))
    with pytest.raises(DamagedInput, match=r"a\.jsonl\.gz"):
        list(JsonLinesFile(str(path)).blocks())


def test_a_truncated_parquet_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, {"text": TEXTS * 100})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a whole Parquet file"):
        open_inputs(configuration(str(path)))


def test_inputs_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a"]))
    (tmp_path / "empty.jsonl").touch()
    write_parquet(tmp_path / "other.parquet", {"txt": ["a"]})
    write_parquet(tmp_path / "none.parquet", {"text": pyarrow.array([], pyarrow.string())})
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    for source, message in {
        "missing.jsonl": "no such file",
        "ja": "no such file",
        "missing/*.jsonl": "no file matches",
        "empty.jsonl": "an empty file",
        "none.parquet": "holds no rows",
        "other.parquet": "no column 'text' .*did you mean 'txt'",
        "": "a folder, but not a saved dataset",
    }.items():
        with pytest.raises(UserError, match=message):
            open_inputs(configuration(f"{tmp_path}/{source}"))
    with pytest.raises(UserError, match="named twice"):
        open_inputs(configuration([f"{tmp_path}/a.jsonl", f"{tmp_path}/link.jsonl"]))
    with pytest.raises(UserError, match="names nothing"):
        open_inputs(configuration([]))
