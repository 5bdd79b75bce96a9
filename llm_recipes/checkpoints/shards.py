"""Tensors in safetensors files, a part of each tensor in each rank's file: written by any number of ranks, read by any
other.

A file is an ordinary safetensors file; where its pieces stand in the whole tensors is in its header's metadata, as
`torch.distributed.checkpoint` writes it (`DCP_SHARDING_INFO`), so that torch and transformers open such a folder too.
Format: https://huggingface.co/docs/safetensors/index#format
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch.distributed.tensor import DTensor, Replicate, Shard

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMED_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""As the configuration names those that weights are converted to."""
CODES = {dtype: code for code, dtype in DTYPES.items()}
CHUNK = 1 << 24
"""Bytes read or written at once."""
LARGEST = 2**62
"""More numbers than any tensor has; torch counts them in 64 bits."""
LONGEST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""


class Damaged(ValueError):
    """A file is not what its header says, or the header is none."""


def file_name(rank: int) -> str:
    """As torch names the file of one rank; whoever looks for a model's shards knows them by it."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, in this process's memory.

    Attributes:
        names: of the tensor; a tied one has several, and is written under each.
        local: the box's values.
        offsets: where the box begins in the whole tensor, one number per dimension.
        shape: of the whole tensor.
        mine: whether this rank writes it; of copies that several ranks hold, one is written.
    """

    names: tuple[str, ...]
    local: torch.Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    mine: bool


def piece(names: Sequence[str], tensor: torch.Tensor, is_first: bool) -> Piece:
    """The box of a (sharded) tensor that lies on this rank. What is not sharded is written by the first rank."""
    if not isinstance(tensor, DTensor):
        return Piece(tuple(names), tensor.detach(), (0,) * tensor.ndim, tuple(tensor.shape), is_first)
    local: torch.Tensor = tensor.to_local().detach()
    offsets, sizes = [0] * tensor.ndim, list(tensor.shape)
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    mine = True
    for place, ranks, at in zip(tensor.placements, tensor.device_mesh.shape, coordinate, strict=True):
        if isinstance(place, Replicate):
            mine = mine and at == 0
        elif type(place) is Shard:
            size = sizes[place.dim]  # what a mesh dimension before this one has left of it
            each = -(-size // ranks)  # as torch.chunk cuts: the last ones may be shorter, or empty
            first = min(at * each, size)
            offsets[place.dim] += first
            sizes[place.dim] = min(each, size - first)
        else:
            raise RuntimeError(f"{names[0]}: {place} is no placement that can be saved")
    return Piece(tuple(names), local, tuple(offsets), tuple(tensor.shape), mine and local.numel() > 0)


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else memoryview(b"")


@dataclass(frozen=True)
class Box:
    """What a file's header says of one of its tensors."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_pieces(path: Path, pieces: Iterable[Piece]) -> dict[str, Any]:
    """Write pieces as one file; see `write`."""
    entries = [(name, each) for each in pieces for name in each.names]
    boxes = [Box(name, each.local.dtype, tuple(each.local.shape), each.offsets) for name, each in entries]
    return write(path, boxes, (each.local for _, each in entries))


def write(
    path: Path,
    boxes: Sequence[Box],
    values: Iterable[torch.Tensor | Iterator[torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write a safetensors file and bring it to the disk; the checksum is taken on the way.

    Args:
        boxes: what the file holds, in order.
        values: each box's values, taken one at a time: a tensor of the box's shape, or its numbers in row-major order,
            some at a time.
        metadata: what the file says of itself; None: that torch wrote it.

    Returns:
        Its entry in a manifest: `bytes` and `xxh3_128`.

    Raises:
        OSError: the disk refuses.
    """
    header: dict[str, Any] = {}
    end = 0
    for box in boxes:
        start, end = end, end + box.bytes
        header[box.name] = {"dtype": CODES[box.dtype], "shape": list(box.shape), "data_offsets": [start, end]}
    header["__metadata__"] = {"format": "pt"} if metadata is None else dict(metadata)
    if any(any(box.offsets) for box in boxes) or path.name.startswith("shard-"):
        offsets = {box.name: {"saved_offsets": list(box.offsets)} for box in boxes}
        header["__metadata__"] |= {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[memoryview]:
        yield memoryview(len(text).to_bytes(8, "little") + text)
        for box, value in zip(boxes, values, strict=True):
            whole = isinstance(value, torch.Tensor)
            left = box.bytes
            for tensor in (value,) if isinstance(value, torch.Tensor) else value:
                assert tensor.dtype == box.dtype and (not whole or tuple(tensor.shape) == box.shape)
                block = raw(tensor.contiguous())
                left -= len(block)
                yield from (block[start : start + CHUNK] for start in range(0, len(block), CHUNK))
            assert left == 0

    digest, written = xxhash.xxh3_128(), 0
    with open(path, "wb", buffering=0) as file:
        for block in chunks():
            digest.update(block)
            while block:  # a nearly full disk may take less than it is given
                taken = file.write(block)
                block, written = block[taken:], written + taken
        os.fsync(file.fileno())
    if path.stat().st_size != written:
        raise OSError(f"{path}: {path.stat().st_size} bytes on the disk, {written} were written")
    return {"bytes": written, "xxh3_128": digest.hexdigest()}


@dataclass(frozen=True)
class Stored:
    """A box of a tensor in a file; its bytes are there from `start` on, in row-major order."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]


def read_metadata(path: Path) -> dict[str, str] | None:
    """What a safetensors file says of itself; None where it says nothing.

    Raises:
        Damaged, OSError: as `read_header`.
    """
    try:
        found: dict[str, str] | None = json.loads(_header(path)[0]).get("__metadata__")
    except (ValueError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path}: its header cannot be read ({type(error).__name__})") from error
    return found


def _header(path: Path) -> tuple[bytes, int]:
    """A file's header, not parsed, and the file's size."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise Damaged(f"{path}: shorter than its header says")
        return file.read(length), size


def read_header(path: Path) -> dict[str, Stored]:
    """The pieces in a safetensors file. Nothing that its header says is believed: sizes are held against the file's.

    Raises:
        Damaged: the header, or the file's length, is not what it must be.
        OSError: it cannot be read.
    """
    text, size = _header(path)
    length = len(text)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        boxes = json.loads(metadata.get("DCP_SHARDING_INFO", "{}"))
        found, ends = {}, []
        for name, entry in header.items():
            shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
            where = tuple(boxes[name]["saved_offsets"]) if boxes else (0,) * len(shape)
            dtype = DTYPES[entry["dtype"]]
            numbers = (*shape, *where, start, end)
            if len(where) != len(shape) or not all(type(each) is int and 0 <= each < LARGEST for each in numbers):
                raise Damaged(f"{path}: {name!r} has no place")
            if end - start != prod(shape) * dtype.itemsize:
                raise Damaged(f"{path}: {name!r} has {end - start} bytes for shape {list(shape)}")
            found[name] = Stored(path, 8 + length + start, dtype, shape, where)
            ends.append((start, end))
    except Damaged:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path}: its header cannot be read ({type(error).__name__})") from error
    last = 0
    for start, end in sorted(ends):
        if start != last:
            raise Damaged(f"{path}: its pieces do not follow one another")
        last = end
    if size != 8 + length + last:
        raise Damaged(f"{path}: {size} bytes, its header says {8 + length + last}")
    return found


class Folder:
    """The tensors in a folder's safetensors files, whoever wrote which part of them.

    Raises:
        Damaged: a file is, or a tensor is not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pieces: dict[str, list[Stored]] = {}
        for file in sorted(path.glob("*.safetensors")):
            for name, stored in read_header(file).items():
                self._pieces.setdefault(name, []).append(stored)
        for name, pieces in self._pieces.items():
            if len({(each.dtype, len(each.shape)) for each in pieces}) > 1:
                raise Damaged(f"{path}: the pieces of {name!r} are of different kinds")
            shape = self.shape(name)
            if sum(prod(each.shape) for each in pieces) != prod(shape) or _overlap(pieces):
                raise Damaged(f"{path}: {name!r} is not whole")
            if prod(max(each, 1) for each in shape) > LARGEST // 8:
                raise Damaged(f"{path}: {name!r} has an impossible shape, {list(shape)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        boxes = [[at + n for at, n in zip(each.offsets, each.shape, strict=True)] for each in self._pieces[name]]
        return tuple(map(max, zip(*boxes, strict=True)))

    def dtype(self, name: str) -> torch.dtype:
        return self._pieces[name][0].dtype

    def read_into(self, name: str, target: torch.Tensor, offsets: Sequence[int]) -> None:
        """Fill a box of a tensor, in its own dtype, reading no more than what lies in it and a chunk beside it.

        Raises:
            Damaged: the pieces do not cover the box.
        """
        filled = 0
        for stored in self._pieces.get(name, ()):
            if len(stored.shape) != target.ndim:
                raise Damaged(f"{self.path}: {name} has {len(stored.shape)} dimensions, not {target.ndim}")
            first = [max(a, b) for a, b in zip(stored.offsets, offsets, strict=True)]
            last = [
                min(a + n, b + m)
                for a, n, b, m in zip(stored.offsets, stored.shape, offsets, target.shape, strict=True)
            ]
            if any(start >= end for start, end in zip(first, last, strict=True)):
                continue
            here = [slice(a - at, b - at) for a, b, at in zip(first, last, offsets, strict=True)]
            there = [slice(a - at, b - at) for a, b, at in zip(first, last, stored.offsets, strict=True)]
            part = target[tuple(here)]
            _copy(stored, there, part)
            filled += part.numel()
        if filled != target.numel():
            raise Damaged(f"{self.path}: of {name} {filled} of {target.numel()} numbers are there")

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, on the CPU."""
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.read_into(name, whole, (0,) * whole.ndim)
        return whole


def _overlap(pieces: Sequence[Stored]) -> bool:
    """Whether two pieces hold the same number. Each is compared with those that begin before it ends, along the
    dimension that is cut most: with none but its neighbours, as ranks cut."""
    boxes = [each for each in pieces if prod(each.shape)]
    if len(boxes) < 2:
        return False
    along = max(range(len(boxes[0].shape)), key=lambda dim: len({each.offsets[dim] for each in boxes}), default=0)
    boxes.sort(key=lambda each: each.offsets[along : along + 1])
    for number, one in enumerate(boxes):
        for other in boxes[number + 1 :]:
            sides = list(zip(one.offsets, one.shape, other.offsets, other.shape, strict=True))
            if all(a < b + m and b < a + n for a, n, b, m in sides):
                return True
            if sides[along][2] >= sides[along][0] + sides[along][1]:
                break
    return False


def rewrite(source: Path, target: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Copy a file, its floating-point tensors in another dtype; a tensor at a time in memory.

    Returns:
        As `write`.
    """
    stored = read_header(source)

    def cast(own: torch.dtype) -> torch.dtype:
        return dtype if own.is_floating_point else own

    boxes = [Box(name, cast(each.dtype), each.shape, each.offsets) for name, each in stored.items()]
    return write(target, boxes, (_whole(each).to(cast(each.dtype)) for each in stored.values()))


def _whole(stored: Stored) -> torch.Tensor:
    return read_rows(stored, 0, stored.shape[0]) if stored.shape else read_rows(stored, 0, 1).reshape(())


def _copy(stored: Stored, box: Sequence[slice], target: torch.Tensor) -> None:
    """Read a box of a stored piece into a tensor of the box's shape, some rows at a time; of long rows a part."""
    if not stored.shape:
        target.copy_(read_rows(stored, 0, 1).reshape(()))
        return
    row = prod(stored.shape[1:]) * stored.dtype.itemsize
    if row > CHUNK and len(stored.shape) > 1:
        for number in range(box[0].start, box[0].stop):
            inner = Stored(stored.path, stored.start + number * row, stored.dtype, stored.shape[1:], stored.offsets[1:])
            _copy(inner, box[1:], target[number - box[0].start])
        return
    rows = max(1, CHUNK // max(1, row))
    for start in range(box[0].start, box[0].stop, rows):
        stop = min(start + rows, box[0].stop)
        read = read_rows(stored, start, stop)
        target[start - box[0].start : stop - box[0].start].copy_(read[(slice(None), *box[1:])])


def read_rows(stored: Stored, start: int, stop: int) -> torch.Tensor:
    """Rows `start` .. `stop - 1` of a piece, (stop - start, ...)."""
    row = prod(stored.shape[1:])
    values = torch.empty((stop - start) * row, dtype=stored.dtype)
    with open(stored.path, "rb", buffering=0) as file:
        file.seek(stored.start + start * row * stored.dtype.itemsize)
        view = raw(values)
        while view:
            taken = file.readinto(view)
            if not taken:
                raise Damaged(f"{stored.path}: shorter than its header says")
            view = view[taken:]
    return values.reshape(stop - start, *stored.shape[1:])


def read_pieces(folder: Path, pieces: Mapping[str, Piece]) -> None:
    """Fill this rank's pieces by name, in place and in their own dtypes, from a folder.

    Raises:
        Damaged: a tensor is missing, or of another shape.
    """
    there = Folder(folder)
    for name, each in pieces.items():
        if name not in there:
            raise Damaged(f"{folder}: of another model, {name} is not in it")
        if there.shape(name) != each.shape:
            raise Damaged(f"{folder}: of another model ({name} is {there.shape(name)}, here {each.shape})")
        if each.local.numel():
            there.read_into(name, each.local, each.offsets)
