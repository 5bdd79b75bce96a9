"""What ranks write, any other number of ranks reads, bit for bit; others open it too; and what is damaged is said to
be, whatever the damage."""

import dataclasses
import itertools
import json
import resource
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llm_recipes.checkpoints import shards
from llm_recipes.checkpoints.shards import Damaged, Folder, Piece
from llm_recipes.data.token_file import checksum

EVERY_DTYPE = tuple(shards.DTYPES.values())
CASUAL = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def random_tensor(dtype: torch.dtype, shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Every bit pattern that the type has: NaNs and negative zeros too."""
    generator = np.random.default_rng(seed)
    if not prod(shape):
        return torch.empty(*shape, dtype=dtype)
    if dtype is torch.bool:
        return torch.from_numpy(np.asarray(generator.integers(0, 2, shape)).astype(bool))
    data = torch.from_numpy(generator.integers(0, 256, prod(shape) * dtype.itemsize).astype(np.uint8))
    return data.view(dtype).reshape(tuple(shape))


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Bit for bit."""
    described = [(each.dtype, tuple(each.shape), bytes(shards.raw(each.contiguous()))) for each in (first, second)]
    return described[0] == described[1]


def cuts(size: int, ranks: int) -> Iterator[tuple[int, int]]:
    """Where `torch.chunk` cuts; the last ranks may get nothing."""
    each = -(-size // ranks)
    for rank in range(ranks):
        yield min(rank * each, size), min((rank + 1) * each, size)


def boxes(shape: Sequence[int], dims: dict[int, int]) -> list[tuple[slice, ...]]:
    """One box per rank of a mesh: `dims` gives the ranks along each dimension that is cut."""
    along = [list(cuts(size, dims.get(dim, 1))) for dim, size in enumerate(shape)]
    return [tuple(slice(*each) for each in box) for box in itertools.product(*along)]


def alone(name: str, tensor: torch.Tensor, *further: str) -> Piece:
    """A whole tensor as one piece."""
    return Piece((name, *further), tensor, (0,) * tensor.ndim, tuple(tensor.shape), True)


@dataclass
class Cut:
    """A tensor, and how it lies on the ranks that write it and on those that read it."""

    names: tuple[str, ...]
    whole: torch.Tensor
    written: dict[int, int]
    read: dict[int, int]

    def pieces(self, dims: dict[int, int], empty: bool = False) -> list[Piece]:
        found = []
        for box in boxes(self.whole.shape, dims if self.whole.numel() else {}):  # of nothing there is one piece
            part = self.whole[box]
            local = torch.zeros(part.shape).to(self.whole.dtype) if empty else part.clone()
            offsets = tuple(each.start for each in box)
            found.append(Piece(self.names, local, offsets, tuple(self.whole.shape), local.numel() > 0))
        return found


@st.composite
def tensors(draw: Any) -> list[Cut]:
    found = []
    for number in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 7), max_size=4))
        whole = random_tensor(draw(st.sampled_from(EVERY_DTYPE)), shape, draw(st.integers(0, 9)))
        names = tuple(f"{kind}.{number}" for kind in ("head", "embed", "other")[: draw(st.integers(1, 3))])
        along = st.dictionaries(st.integers(0, max(0, len(shape) - 1)), st.integers(1, 5), max_size=2)
        found.append(Cut(names, whole, draw(along), draw(along)))
    return found


def write(folder: Path, cut: list[Cut]) -> list[dict[str, Any]]:
    """As so many ranks as the widest cut needs; of what is empty one rank writes its zero numbers."""
    laid = [each.pieces(each.written) for each in cut]
    described = []
    for rank in range(max(map(len, laid))):
        mine = [own[rank] for own in laid if rank < len(own) and (own[rank].mine or rank == 0)]
        described.append(shards.write_pieces(folder / shards.file_name(rank), mine))
    return described


@settings(CASUAL, max_examples=60)
@given(cut=tensors(), chunk=st.sampled_from([1, 3, 64, 1 << 24]))
def test_any_number_of_ranks_reads_what_any_number_wrote(
    monkeypatch: pytest.MonkeyPatch, cut: list[Cut], chunk: int
) -> None:
    monkeypatch.setattr(shards, "CHUNK", chunk)
    with tempfile.TemporaryDirectory() as name:
        described = write(Path(name), cut)
        for rank, entry in enumerate(described):
            path = Path(name) / shards.file_name(rank)
            assert entry == {"bytes": path.stat().st_size, "xxh3_128": checksum(path)}
        folder = Folder(Path(name))
        assert sorted(folder) == sorted(each for own in cut for each in own.names)
        for own, each in [(one, name) for one in cut for name in one.names]:
            assert each in folder
            assert (folder.shape(each), folder.dtype(each)) == (tuple(own.whole.shape), own.whole.dtype)
            assert same(folder.read(each), own.whole)
        wanted = [own.pieces(own.read, empty=True) for own in cut]
        for rank in range(max(map(len, wanted))):
            mine = {own.names[-1]: laid[rank] for own, laid in zip(cut, wanted, strict=True) if rank < len(laid)}
            shards.read_pieces(Path(name), mine)
        for own, laid in zip(cut, wanted, strict=True):
            for piece, filled in zip(own.pieces(own.read), laid, strict=True):
                assert same(piece.local, filled.local)


@settings(CASUAL, max_examples=30)
@given(cut=tensors(), dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_a_copy_in_another_dtype_is_the_cast(cut: list[Cut], dtype: torch.dtype) -> None:
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "source", Path(name) / "target"
        source.mkdir()
        target.mkdir()
        write(source, cut)
        for path in source.iterdir():
            entry = shards.rewrite(path, target / path.name, dtype)
            assert entry == {"bytes": (target / path.name).stat().st_size, "xxh3_128": checksum(target / path.name)}
        copied = Folder(target)
        for own in cut:
            expected = own.whole.to(dtype) if own.whole.is_floating_point() else own.whole
            found = copied.read(own.names[0])
            if dtype != own.whole.dtype and expected.is_floating_point():
                # What is no number stays none; with which bits depends on how many numbers are cast at once.
                assert torch.equal(found.isnan(), expected.isnan())
                found, expected = found.nan_to_num(0), expected.nan_to_num(0)
            assert same(found, expected)


def test_numbers_that_come_in_parts_are_written_as_if_whole(tmp_path: Path) -> None:
    whole = [random_tensor(torch.bfloat16, (4, 5)), random_tensor(torch.int8, (0, 3)), random_tensor(torch.float32, ())]
    described = [shards.Box(str(number), each.dtype, tuple(each.shape), (0,) * each.ndim)
                 for number, each in enumerate(whole)]  # fmt: skip
    parts = (iter(each.reshape(-1).split(3)) for each in whole)
    entries = [shards.write(tmp_path / name, described, values, {"format": "pt", "own": "1"})
               for name, values in (("whole", whole), ("parts", parts))]  # fmt: skip
    assert entries[0] == entries[1]
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    assert shards.read_metadata(tmp_path / "parts") == {"format": "pt", "own": "1"}


def test_reading_a_box_takes_a_chunk_of_memory_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random_tensor(torch.float32, (3, 40, 100))
    shards.write_pieces(tmp_path / shards.file_name(0), [alone("experts", whole)])
    monkeypatch.setattr(shards, "CHUNK", 4096)
    taken = []
    rows = shards.read_rows

    def counting(stored: shards.Stored, start: int, stop: int) -> torch.Tensor:
        found = rows(stored, start, stop)
        taken.append(found.nbytes)
        return found

    monkeypatch.setattr(shards, "read_rows", counting)
    target = torch.zeros(2, 5, 100)
    Folder(tmp_path).read_into("experts", target, (1, 20, 0))
    assert same(target, whole[1:, 20:25])
    assert max(taken) <= 4096
    assert sum(taken) <= 2 * target.nbytes  # a rank reads its part, not everybody's


# Others' readers and writers


MIXED = {
    "odd": random_tensor(torch.bool, (3,)),
    "after": random_tensor(torch.float64, (2, 3)),
    "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
    "nothing": torch.empty(0, 4),
    "last": random_tensor(torch.int16, (5, 1, 2)),
}


def test_safetensors_opens_ours_and_ours_opens_theirs(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load, save_file

    path = tmp_path / "ours" / "model.safetensors"
    path.parent.mkdir()
    shards.write_pieces(path, [alone(name, each) for name, each in MIXED.items()])
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {name: same(file.get_tensor(name), each) for name, each in MIXED.items()} == dict.fromkeys(MIXED, True)
    assert {name: same(each, MIXED[name]) for name, each in load(path.read_bytes()).items()} == dict.fromkeys(
        sorted(MIXED), True
    )
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file(MIXED, theirs / "model.safetensors", metadata={"anything": "they like"})
    save_file({"bare": MIXED["after"]}, theirs / "other.safetensors")
    folder = Folder(theirs)
    assert sorted(folder) == sorted([*MIXED, "bare"])
    assert all(same(folder.read(name), each) for name, each in MIXED.items())


@pytest.mark.parametrize("dims", [{}, {0: 3}, {1: 2}, {0: 5, 1: 2}])
def test_torch_opens_ours(tmp_path: Path, dims: dict[int, int]) -> None:
    cut = [Cut(("a",), random_tensor(torch.bfloat16, (4, 6), 1).nan_to_num(), dims, {})]
    cut.append(Cut(("b", "tied"), torch.arange(7), {0: dims.get(0, 1)}, {}))
    for part in ("model", "optimizer"):
        (tmp_path / part).mkdir()
        write(tmp_path / part, cut)
    found = tiny.state_of(tmp_path)
    assert sorted(found) == [f"{part}/{name}" for part in ("model", "optimizer") for name in ("a", "b", "tied")]
    assert same(found["model/a"], cut[0].whole)
    assert same(found["optimizer/tied"], cut[1].whole)


def test_transformers_opens_ours(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_models["tied"])
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    write(tmp_path, [Cut((name,), each, {0: 3}, {}) for name, each in state.items()])
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert {name: same(each, state[name]) for name, each in opened.items()} == dict.fromkeys(state, True)


PLACED: tuple[tuple[str, ...], ...] = (
    ("S0",),
    ("S1",),
    ("R", "S0"),
    ("S1", "R"),
    ("S0", "S1"),
    ("S0", "S0"),
    ("R", "R"),
)


def placed(folder: str) -> list[str]:
    """On each rank: tensors laid out in every way that can be saved, written by torch and by us; what is read wrong."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    rank, ranks = dist.get_rank(), dist.get_world_size()
    kinds = {"R": Replicate(), "S0": Shard(0), "S1": Shard(1)}
    wholes, state = {}, {}
    for number, names in enumerate(PLACED):
        mesh = init_device_mesh("cpu", (ranks,) if len(names) == 1 else (2, ranks // 2))
        wholes["/".join(names)] = whole = torch.arange(7 * 5, dtype=torch.float32).reshape(7, 5) + 100 * number
        state["/".join(names)] = distribute_tensor(whole, mesh, [kinds[name] for name in names])
    theirs, ours = Path(folder) / "theirs", Path(folder) / "ours"
    simple = {name: each for name, each in state.items() if name != "S0/S0"}  # torch's own writer has it wrong
    dcp.save(simple, storage_writer=HuggingFaceStorageWriter(str(theirs), save_distributed=True))
    pieces = {name: shards.piece([name], each, rank == 0) for name, each in state.items()}
    ours.mkdir(exist_ok=True)
    shards.write_pieces(ours / shards.file_name(rank), [each for each in pieces.values() if each.mine])
    dist.barrier()
    wrong = []
    for where, names in ((theirs, simple), (ours, state)):
        empty = {n: dataclasses.replace(pieces[n], local=torch.zeros_like(pieces[n].local)) for n in names}
        shards.read_pieces(where, empty)
        for name in names:
            right = same(empty[name].local, pieces[name].local) and same(Folder(where).read(name), wholes[name])
            wrong += [] if right else [f"{where.name} {name}"]
    dist.barrier()
    return wrong


@pytest.mark.parametrize("count", [2, 4])
def test_torch_writes_what_ours_opens_and_every_layout_can_be_saved(ranks: Any, tmp_path: Path, count: int) -> None:
    assert ranks(count, placed, str(tmp_path)) == [[]] * count


# Damage


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def survives(*files: bytes) -> bool:
    """Whether a folder of these files opens; if it does not, it is said in the one way that callers expect."""
    with tempfile.TemporaryDirectory() as name:
        for number, data in enumerate(files):
            (Path(name) / f"{number}.safetensors").write_bytes(data)
        try:
            folder = Folder(Path(name))
            wanted = sum(prod(folder.shape(each)) * folder.dtype(each).itemsize for each in folder)
            assert wanted <= sum(map(len, files)), "memory that no file's size accounts for"
            for each in folder:
                assert folder.read(each).dtype is folder.dtype(each)
        except (Damaged, OSError):
            return False
        return True


def sample() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / shards.file_name(1)
        pieces = [
            Piece((key,), each, (2, 1, 3)[: each.ndim], tuple(each.shape), True)
            for key, each in MIXED.items()
            if key != "scalar"
        ]
        shards.write_pieces(path, pieces)
        shards.write_pieces(path.with_name("whole.safetensors"), [alone("a", torch.arange(4.0), "b")])
        return path.with_name("whole.safetensors").read_bytes()


WHOLE = sample()
PLACE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NUMBERS = st.one_of(
    st.integers(-2, 9), st.sampled_from([2**31, 2**61, 2**62, 2**63, 2**64, 10**30, -(2**63)]),
    st.floats(), st.booleans(), st.none(), st.text(max_size=2),
)  # fmt: skip
LISTS = st.lists(NUMBERS, max_size=5)
ANY_JSON = st.recursive(
    NUMBERS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner), max_leaves=6
)
ENTRIES = st.fixed_dictionaries(
    {}, optional={"dtype": st.sampled_from([*shards.DTYPES, "F4"]) | ANY_JSON, "shape": LISTS | ANY_JSON,
                  "data_offsets": LISTS | ANY_JSON}
) | ANY_JSON  # fmt: skip
PLACES = st.dictionaries(st.sampled_from(["a", "b"]), st.fixed_dictionaries({"saved_offsets": LISTS}) | ANY_JSON)
METADATA = st.fixed_dictionaries({}, optional={"DCP_SHARDING_INFO": PLACES.map(json.dumps) | ANY_JSON}) | ANY_JSON


@settings(CASUAL, max_examples=200)
@given(data=st.binary(max_size=64))
def test_arbitrary_bytes_are_damaged(data: bytes) -> None:
    assert not survives(data) or data[8:].startswith(b"{")


@settings(CASUAL, max_examples=200)
@given(
    entries=st.dictionaries(st.sampled_from(["a", "b", "\ud800", "line\nbreak", ""]), ENTRIES, max_size=3),
    metadata=METADATA,
    data=st.binary(max_size=16),
)
@example({"a": PLACE | {"dtype": ["F32"]}}, {}, bytes(8))
@example({"a": PLACE | {"shape": [1] * 100 + [2]}}, {}, bytes(8))
@example({"a": PLACE | {"shape": [True, 2]}}, {}, bytes(8))
@example({"a": PLACE | {"shape": [0, 2**61, 2**61], "data_offsets": [0, 0]}}, {}, b"")
@example({"a": PLACE | {"shape": [2**61, 0], "data_offsets": [0, 0]}}, {}, b"")
@example({"a": PLACE}, {"DCP_SHARDING_INFO": '{"a": {"saved_offsets": [4611686018427387900]}}'}, bytes(8))
def test_headers_of_any_content_are_right_or_damaged(
    entries: dict[str, Any], metadata: dict[str, Any], data: bytes
) -> None:
    survives(file_of({**entries, "__metadata__": metadata}, data))
    survives(file_of(entries, data))


@settings(CASUAL, max_examples=300)
@given(
    at=st.integers(0, len(WHOLE) - 1),
    change=st.sampled_from(["flip", "cut", "insert", "remove", "swap"]),
    value=st.integers(1, 255),
    other=st.integers(0, len(WHOLE) - 1),
)
def test_one_change_anywhere_is_right_or_damaged(at: int, change: str, value: int, other: int) -> None:
    data = bytearray(WHOLE)
    if change == "flip":
        data[at] ^= value
    elif change == "cut":
        del data[at:]
    elif change == "insert":
        data.insert(at, value)
    elif change == "remove":
        del data[at]
    else:
        data[at], data[other] = data[other], data[at]
    assert not survives(bytes(data)) or change in ("flip", "swap") or bytes(data) == WHOLE


NESTED = {
    "lists": b'{"a": ' + b"[" * 100_000,
    "objects": b'{"a":' * 100_000,
    "whole": b"[" * 50_000 + b"]" * 50_000,
    "a number": b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5_000 + b'], "data_offsets": [0, 8]}}',
    "exponents": b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, NaN]}}',
    "utf-16": json.dumps({"a": PLACE}).encode("utf-16"),
    "no object": b"null",
    "a list": b"[]",
    "nothing": b"",
    "not utf-8": b'{"\xff\xfe": 1}',
}


@pytest.mark.parametrize("text", NESTED.values(), ids=NESTED.keys())
def test_a_header_that_is_hostile_is_damaged(text: bytes) -> None:
    assert not survives(file_of(text, b""))
    if text in (b"null", b"[]", b""):
        return
    inner = json.dumps(text.decode("latin-1")).encode()
    places = b'{"a": %s, "__metadata__": {"DCP_SHARDING_INFO": %s}}' % (json.dumps(PLACE).encode(), inner)
    assert not survives(file_of(places, bytes(8)))


def test_of_two_entries_of_one_name_no_half_is_read() -> None:
    one = json.dumps(PLACE)
    two = json.dumps(PLACE | {"data_offsets": [8, 16]})
    assert not survives(file_of(f'{{"a": {one}, "a": {two}}}'.encode(), bytes(16)))


def at(offsets: list[int], shape: list[int], name: str = "a") -> bytes:
    size = prod(shape) * 4
    places = {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": offsets}})}
    return file_of(
        {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}, "__metadata__": places}, b"\1" * size
    )


def test_pieces_that_overlap_or_leave_holes_are_damaged() -> None:
    assert survives(at([0], [2]), at([2], [2]), at([4], [2]))
    assert not survives(at([0], [2]), at([4], [2]))
    assert not survives(at([0], [2]), at([0], [2]))
    # As many numbers as the whole has, and yet 2 and 3 are nobody's.
    assert not survives(at([0], [2]), at([0], [2]), at([4], [2]))
    assert survives(at([0, 0], [2, 1]), at([0, 1], [2, 2]), at([2, 0], [1, 3]))
    assert not survives(at([0, 0], [2, 2]), at([0, 1], [2, 1]), at([2, 0], [1, 3]))
    assert not survives(at([0, 0], [2, 2]), at([0], [2]))


@settings(CASUAL, max_examples=100)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 2, *[st.integers(0, 3)] * 2), min_size=1, max_size=5))
def test_a_folder_opens_where_its_pieces_tile_the_tensor(laid: list[tuple[int, int, int, int]]) -> None:
    covered = np.zeros((8, 8), int)
    for row, column, rows, columns in laid:
        covered[row : row + rows, column : column + columns] += 1
    height, width = max(row + rows for row, _, rows, _ in laid), max(c + columns for _, c, _, columns in laid)
    tiled = bool((covered[:height, :width] == 1).all())
    assert survives(*(at([row, column], [rows, columns]) for row, column, rows, columns in laid)) == tiled


BOMBS = {
    "a header of 2**62": file_of(b"{}", length=2**62),
    "a header of 2**64 - 1": file_of(b"{}", length=2**64 - 1),
    "a tensor of 2**61": file_of({"a": PLACE | {"shape": [2**61], "data_offsets": [0, 2**63 - 4]}}, bytes(8)),
    "offsets beyond": file_of({"a": PLACE | {"data_offsets": [2**50, 2**50 + 8]}}, bytes(8)),
    "far away": at([2**50], [2]),
    "far away and empty": at([2**50], [0]),
    "wide and empty": at([0, 0], [0, 2**61]),
    "nested": file_of(b"[" * 4_000_000),
    "many entries": file_of(b'{"a":[' + b"[]," * 300_000 + b"[]]}"),
}


def opens_within(root: str, allowed: int) -> list[str]:
    """Folders that opened in so many bytes more than this process has; called in a process of its own."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + allowed, hard))
    opened = []
    try:
        for path in sorted(Path(root).iterdir()):
            try:
                folder = Folder(path)
                opened += [f"{path.name} {folder.read(name).shape}" for name in folder]
            except (Damaged, OSError):
                continue
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    return opened


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to know what a process uses")
def test_no_header_takes_memory_that_the_file_does_not_have(ranks: Any, tmp_path: Path) -> None:
    for number, data in enumerate(BOMBS.values()):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "model.safetensors").write_bytes(data)
    assert ranks(1, opens_within, str(tmp_path), 200 << 20) == [[]]
