"""Inputs of text: JSON Lines (plain, gzip, zstd), Parquet and `datasets` datasets, read in bounded memory.

Reading is split in two, so that the expensive half can run on every core. An *input* (`JsonLinesFile`,
`ParquetFile`, `SavedRows`) hands out blocks: about a megabyte of raw rows that are not parsed yet. The workers
parse them, see `rows`.
"""

import glob
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import xxhash

from llm_recipes.config import TokenizeConfig
from llm_recipes.data.rows import Block, Problem
from llm_recipes.data.token_file import checksum
from llm_recipes.errors import UserError, did_you_mean

BLOCK_BYTES = 1 << 20
COMPRESSED_BYTES = 1 << 18
MAX_BLOCK_ROWS = 1 << 16
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGICS = (b"\x28\xb5\x2f\xfd", *(bytes([low, 0x2A, 0x4D, 0x18]) for low in range(0x50, 0x60)))
PARQUET_MAGIC = b"PAR1"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DAMAGED = "rest of a damaged file"


class DamagedInput(UserError):
    """An input that cannot be read to its end: cut short, or not what its name says."""


class Input(Protocol):
    """Something that gives blocks."""

    name: str
    size: int
    """Bytes, for progress."""

    def blocks(self) -> Iterator[Block]:
        """All rows from the beginning; may be called again.

        Raises:
            DamagedInput: it cannot be read to its end.
        """

    def source(self) -> dict[str, Any]:
        """What the sidecar says of it, once its blocks were read."""


class _Plain:
    """Stands where a decompressor stands, for files that are not compressed."""

    eof = True
    unused_data = b""

    def decompress(self, data: bytes) -> bytes:
        return data


class JsonLinesFile:
    """One JSON object a line; gzip and zstd are known by their first bytes, whatever the file is called."""

    def __init__(self, path: str) -> None:
        self.name = path
        self.size = Path(path).stat().st_size
        self._checksum: str | None = None

    @staticmethod
    def _decompressor(start: bytes) -> Any:
        """For a file that starts so."""
        if start.startswith(GZIP_MAGIC):
            return zlib.decompressobj(wbits=31)
        if start.startswith(ZSTD_MAGICS):
            import zstandard

            return zstandard.ZstdDecompressor().decompressobj()
        return _Plain()

    def _pieces(self) -> Iterator[tuple[bytes, int]]:
        """The text in pieces of any length, each with the bytes of the file read so far."""
        import zstandard

        digest = xxhash.xxh3_128()
        done = 0
        try:
            with open(self.name, "rb") as file:
                start = file.read(4)
                file.seek(0)
                engine = self._decompressor(start)
                compressed = not isinstance(engine, _Plain)
                chunk_bytes = COMPRESSED_BYTES if compressed else BLOCK_BYTES
                while data := file.read(chunk_bytes):
                    digest.update(data)
                    done += len(data)
                    while data:
                        # One file may be many compressed streams, one after another.
                        if compressed and engine.eof:
                            if not data.strip(b"\0"):
                                break  # gzip files may be padded
                            engine = self._decompressor(start)
                        yield engine.decompress(data), done
                        data = engine.unused_data if compressed and engine.eof else b""
        except (zlib.error, zstandard.ZstdError) as error:
            raise DamagedInput(f"{self.name}: damaged after {done} bytes ({error})") from error
        except OSError as error:
            raise DamagedInput(f"{self.name}: cannot be read ({error.strerror})") from error
        if not engine.eof:
            raise DamagedInput(f"{self.name}: the compressed file is cut short after {done} bytes")
        self._checksum = digest.hexdigest()

    def blocks(self) -> Iterator[Block]:
        number, done = 1, 0
        waiting: list[bytes] = []
        waiting_bytes = 0
        damage: DamagedInput | None = None
        try:
            for piece, done in self._pieces():
                cut = piece.rfind(b"\n") + 1
                if not cut or waiting_bytes + cut < BLOCK_BYTES // 2:
                    waiting.append(piece)
                    waiting_bytes += len(piece)
                    continue
                data = b"".join((*waiting, piece[:cut]))
                waiting, waiting_bytes = [piece[cut:]], len(piece) - cut
                yield Block(self.name, number, self._text(data, number), False, done)
                number += data.count(b"\n")
        except DamagedInput as error:
            damage = error
        data = b"".join(waiting)
        if damage is not None:
            data = data[: data.rfind(b"\n") + 1]  # only the line that was cut is lost
        if data.strip():
            yield Block(self.name, number, self._text(data, number), False, done)
        if damage is not None:
            raise damage

    @staticmethod
    def _text(data: bytes, number: int) -> bytes:
        return data.removeprefix(BYTE_ORDER_MARK) if number == 1 else data

    def source(self) -> dict[str, Any]:
        self._checksum = self._checksum or checksum(self.name)  # asked more than once, read once
        return {"path": self.name, "bytes": self.size, "xxh3_128": self._checksum}


def _arrow_block(where: str, first: int, table: Any, done: int) -> Block:
    import pyarrow

    sink = io.BytesIO()
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write(table)
    return Block(where, first, sink.getvalue(), True, done)


def _columns(where: str, names: list[str], config: TokenizeConfig, whole: bool) -> list[str]:
    """The columns to read."""
    if whole:
        return names
    found = [key for key in (config.messages_key, config.text_key) if key in names]
    if not found:
        raise UserError(f"{where}: no column '{config.text_key}' (text_key), {did_you_mean(config.text_key, names)}")
    return found


def _block_rows(total_bytes: int, total_rows: int) -> int:
    """How many rows make a block."""
    return max(1, min(MAX_BLOCK_ROWS, BLOCK_BYTES * total_rows // max(1, total_bytes)))


class ParquetFile:
    """A Parquet file; only the text or conversation column is read, unless whole rows are wanted."""

    def __init__(self, path: str, config: TokenizeConfig, whole: bool = False) -> None:
        import pyarrow
        import pyarrow.parquet

        self.name = path
        self.size = Path(path).stat().st_size
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                self._rows = file.metadata.num_rows
                groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
                self._columns = _columns(path, file.schema_arrow.names, config, whole)
        except (pyarrow.ArrowException, OSError) as error:
            raise DamagedInput(f"{path}: not a whole Parquet file ({str(error).splitlines()[0]})") from error
        if self._rows == 0:
            raise UserError(f"{path}: holds no rows; leave it out")
        self._block_rows = _block_rows(sum(group.total_byte_size for group in groups), self._rows)

    def blocks(self) -> Iterator[Block]:
        import pyarrow
        import pyarrow.parquet

        number = 1
        try:
            with pyarrow.parquet.ParquetFile(self.name, memory_map=True, pre_buffer=False) as file:
                for batch in file.iter_batches(self._block_rows, columns=self._columns, use_threads=False):
                    rows = batch.num_rows
                    done = self.size * (number - 1 + rows) // self._rows
                    yield _arrow_block(self.name, number, batch, done)
                    number += rows
        except (pyarrow.ArrowException, OSError) as error:
            raise DamagedInput(f"{self.name}: damaged after row {number - 1} ({str(error).splitlines()[0]})") from error

    def source(self) -> dict[str, Any]:
        return {"path": self.name, "bytes": self.size, "xxh3_128": checksum(self.name)}


class SavedRows:
    """A dataset of the `datasets` library: a name on the hub, or a folder that `save_to_disk` wrote."""

    def __init__(self, name: str, config: TokenizeConfig, whole: bool = False) -> None:
        self.name = name
        self._config, self._split = config.config, config.split
        dataset = _open_dataset(name, config)
        columns = _columns(name, dataset.column_names, config, whole)
        if len(dataset) == 0:
            raise UserError(f"{name}: the split '{config.split}' holds no rows")
        self.size = int(dataset.data.nbytes)
        self._fingerprint = str(dataset._fingerprint)
        self._block_rows = _block_rows(self.size, dataset.data.num_rows)
        self._dataset = dataset.select_columns(columns).with_format("arrow")

    def blocks(self) -> Iterator[Block]:
        number = 1
        for table in self._dataset.iter(self._block_rows):
            rows = table.num_rows
            done = self.size * (number - 1 + rows) // len(self._dataset)
            yield _arrow_block(self.name, number, table, done)
            number += rows

    def source(self) -> dict[str, Any]:
        return {
            "dataset": self.name,
            "config": self._config,
            "split": self._split,
            "fingerprint": self._fingerprint,
            "rows": len(self._dataset),
        }


def _open_dataset(name: str, config: TokenizeConfig) -> Any:
    import datasets

    try:
        if Path(name).is_dir():
            dataset = datasets.load_from_disk(name)
        else:
            dataset = datasets.load_dataset(name, config.config, split=config.split)
    except Exception as error:  # the library raises whatever its file systems and builders raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = "no dataset opens from it" if Path(name).exists() else "no such file, and no dataset opens by this name"
        raise UserError(f"{name}: {what} ({reason})") from error
    if isinstance(dataset, datasets.DatasetDict):
        if config.split not in dataset:
            raise UserError(f"{name}: no split '{config.split}', {did_you_mean(config.split, map(str, dataset))}")
        dataset = dataset[config.split]
    return dataset


def open_inputs(config: TokenizeConfig, key: str = "input", whole: bool = False) -> list[Input]:
    """Everything that `config.input` names, in its order; the files of a glob are sorted.

    Args:
        key: what the user calls it.
        whole: read all columns, whatever they are called.

    Raises:
        UserError: one is missing, empty, named twice, or has no column of text.
    """
    entries = config.input if isinstance(config.input, list) else [config.input]
    names = [name for entry in entries for name in _expand(str(entry), config, key)]
    if not names:
        raise UserError(f"{key}: names nothing; give files, a glob, or a datasets name")
    seen: set[str] = set()
    for name in names:
        real = str(Path(name).resolve()) if Path(name).exists() else name
        if real in seen:
            raise UserError(f"{key}: {name} is named twice")
        seen.add(real)
    inputs = [_open(name, config, whole) for name in names]
    for name, value, usual in (("config", config.config, None), ("split", config.split, "train")):
        if value != usual and not any(isinstance(each, SavedRows) for each in inputs):
            raise UserError(f"{name}={value}: only a dataset has one, and {names[0]} is a file; leave it out")
    return inputs


def _expand(entry: str, config: TokenizeConfig, key: str) -> list[str]:
    if Path(entry).exists() or config.format == "datasets":
        return [entry]
    if glob.has_magic(entry):
        found = sorted(path for path in glob.glob(entry, recursive=True) if Path(path).is_file())
        if not found:
            raise UserError(f"{key}={entry}: no file matches")
        return found
    # Below a folder that is there, a name without its file is a slip, not a dataset of the hub.
    folder, _, last = entry.partition("/")
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", entry) and not Path(folder).is_dir()
    if config.format == "auto" and not re.search(r"\.(jsonl?|parquet|gz|zst)$", last) and (on_hub or config.config):
        return [entry]
    raise UserError(f"{key}={entry}: no such file")


def _open(name: str, config: TokenizeConfig, whole: bool) -> Input:
    path = Path(name)
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return SavedRows(name, config, whole)
        raise UserError(f"{name}: a folder, but not a saved dataset; name its files, for example '{name}/*.jsonl'")
    if config.format == "datasets" or not path.exists():
        return SavedRows(name, config, whole)
    if not path.is_file():
        raise UserError(f"{name}: not a file that can be read twice (a pipe, perhaps); write it to a file first")
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from error
    if not start:
        raise UserError(f"{name}: an empty file; leave it out")
    looks_like_parquet = start == PARQUET_MAGIC or path.suffix == ".parquet"
    if config.format == "parquet" or (config.format == "auto" and looks_like_parquet):
        return ParquetFile(name, config, whole)
    return JsonLinesFile(name)


def all_blocks(inputs: Iterable[Input]) -> Iterator[tuple[Block | Problem, int]]:
    """The blocks of all inputs, each with the bytes of all inputs read so far.

    An input that cannot be read to its end gives a `Problem` in place of its last block.
    """
    before = 0
    for source in inputs:
        try:
            for block in source.blocks():
                yield block, before + block.done
        except DamagedInput as error:
            yield Problem(DAMAGED, str(error)), before + source.size
        before += source.size


def readable_blocks(inputs: Iterable[Input], stop: bool, skipped: Counter[str]) -> Iterator[tuple[Block, int]]:
    """`all_blocks` without what could not be read.

    Args:
        skipped: where that is counted, by its reason.

    Raises:
        UserError: an input cannot be read to its end, and `stop` is set.
    """
    for block, done in all_blocks(inputs):
        if isinstance(block, Block):
            yield block, done
        elif stop:
            raise UserError(f"{block.detail}; on_error=skip goes on with what could be read")
        else:
            skipped[block.reason] += 1
