"""Which tensors of a model grow with its vocabulary, and where they stand in its files.

No list of names: the model is built twice on the meta device, with the vocabulary as it is and with one token more.
What changes its shape is a table.
"""

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import initialization as hf_init
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from llm_recipes.checkpoints.shards import CHUNK, Damaged, Stored, read_header, read_rows
from llm_recipes.errors import UserError, first_line
from llm_recipes.folders import is_checkpoint, weight_files

log = logging.getLogger(__name__)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Those whose rows can be averaged."""


@dataclass(frozen=True)
class Table:
    """A tensor with a row (or, of a bias, a number) for each token.

    Attributes:
        key: its name in the file.
        stored: where it is, (rows, width) or (rows,).
        tied_to: the key of the first of those that are one parameter in the model; its own where it is alone.
    """

    key: str
    stored: Stored
    tied_to: str

    @property
    def row_bytes(self) -> int:
        width = self.stored.shape[1] if len(self.stored.shape) > 1 else 1
        return width * self.stored.dtype.itemsize


@dataclass(frozen=True)
class Vocabulary:
    """The tables of a model folder.

    Attributes:
        config: the model's configuration, as transformers opens it.
        rows: of each table.
        tables: by their keys in the files.
        tied: whether the input embedding and the head are one parameter.
        files: every file with weights, and what its header says.
    """

    config: Any
    rows: int
    tables: dict[str, Table]
    tied: bool
    files: dict[Path, dict[str, Stored]]


def refuse_disagreement(rows: int, tokens: int, where: object) -> None:
    """A model must have a row for each of its tokenizer's ids.

    Args:
        rows: of the model's embedding.
        tokens: the tokenizer's largest id, and one more.
        where: the model's folder.

    Raises:
        UserError: it has fewer.
    """
    if rows < tokens:
        raise UserError(
            f"{where}: the embedding has {rows} rows, the tokenizer gives ids up to {tokens - 1}; "
            "bring the model with its own tokenizer"
        )


def vocabulary_tables(folder: Path, trust_remote_code: bool = False) -> Vocabulary:
    """Find the tables of a model folder.

    A name in a file may differ from the model's: transformers renames as it loads, and older folders have other
    prefixes. What is tied in the configuration but stands twice in the files, with different values, is two tables,
    since `from_pretrained` loads it so.

    Raises:
        UserError: no model folder, a checkpoint of a run, files that do not fit the configuration, a table that is
            none of embedding, head and bias, or numbers that cannot be averaged.
    """
    if is_checkpoint(str(folder)):
        raise UserError(
            f"{folder}: a checkpoint of a run; make a model folder of it first (python -m llm_recipes.export)"
        )
    config = _open_config(folder, trust_remote_code)
    files, stored = _headers(folder)
    rows = config.get_text_config().vocab_size
    growing = _growing(config, stored, folder, trust_remote_code)
    tables: dict[str, Table] = {}
    tied = False
    for group in growing.groups:
        wanted = {name: _match(name, shape, stored, growing, folder) for name, shape in group.items()}
        found = {name: key for name, key in wanted.items() if key is not None}
        if not found:
            raise UserError(f"{folder}: {next(iter(group))} is not in its files; bring the model again")
        for name, key in found.items():
            _refuse_misfit(stored[key], key, group[name], folder)
            if key in tables:
                raise UserError(f"{folder}: {key} cannot be extended, more than one tensor of the model may be meant")
            before = [tables[each] for each in found.values() if each in tables]
            tied_to = next((each.key for each in before if _same(each.stored, stored[key])), key)
            tables[key] = Table(key, stored[key], tied_to)
        if len(growing.embeddings) > 1 and growing.embeddings <= group.keys():
            tied = len({tables[key].tied_to for key in found.values()}) == 1
    shapes = {each.stored.shape for each in tables.values() if len(each.stored.shape) > 1}
    alike = sorted(key for key in growing.unused - tables.keys() if stored[key].shape in shapes)
    if alike:  # as the parts for speculative decoding that some folders hold, and transformers does not load
        log.warning("%s: as large as the embedding, no part of the model, not extended: %s", folder, ", ".join(alike))
    return Vocabulary(config, rows, tables, tied, files)


def _open_config(folder: Path, trust_remote_code: bool) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        size = getattr(config.get_text_config(), "vocab_size", None)
    except Exception as error:  # a broken file is met by whatever line of transformers reads it
        raise UserError(f"{folder}: no model configuration opens here ({first_line(error)})") from error
    if type(size) is not int or size < 1:
        raise UserError(f"{folder}: no language model ({config.model_type} has no vocabulary)")
    return config


def _headers(folder: Path) -> tuple[dict[Path, dict[str, Stored]], dict[str, Stored]]:
    """What a model folder's files hold: file by file, and all together."""
    files: dict[Path, dict[str, Stored]] = {}
    together: dict[str, Stored] = {}
    try:
        for path in map(Path, weight_files(str(folder))):
            files[path] = read_header(path)
            twice = sorted(together.keys() & files[path].keys())
            if twice:
                raise UserError(f"{folder}: {twice[0]} stands in two of its files; bring the model again")
            together |= files[path]
    except Damaged as error:
        raise UserError(f"{error}; bring the model again") from error
    return files, together


@dataclass(frozen=True)
class _Growing:
    """What grows in a model by a row when its vocabulary does.

    Attributes:
        groups: the tables' names in the model and their shapes; of those that are one parameter, together.
        embeddings: the names of the input embedding's weight and of the head's.
        renamed: keys in the files by the names in the model that transformers gives them.
        unused: keys in the files that become nothing in the model.
    """

    groups: tuple[dict[str, torch.Size], ...]
    embeddings: frozenset[str]
    renamed: dict[str, list[str]]
    unused: frozenset[str]


def _growing(config: Any, keys: Iterable[str], folder: Path, trust_remote_code: bool) -> _Growing:
    larger = copy.deepcopy(config)
    larger.get_text_config().vocab_size += 1
    model = _empty(config, folder, trust_remote_code)
    state, after = _state(model), _state(_empty(larger, folder, trust_remote_code))
    modules = [each for each in (model.get_input_embeddings(), model.get_output_embeddings()) if each is not None]
    own = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
    weights = {id(getattr(module, "weight", None)) for module in modules}
    groups: dict[int, dict[str, torch.Size]] = {}
    for name, tensor in state.items():
        new = after[name].shape if name in after else torch.Size()
        if new == tensor.shape:
            continue
        rows_grow = len(new) == tensor.ndim > 0 and new == (tensor.shape[0] + 1, *tensor.shape[1:])
        bias = isinstance(tensor, nn.Parameter) and tensor.ndim == 1
        if not rows_grow or tensor.ndim > 2 or not (bias or id(tensor) in own):
            raise UserError(
                f"{folder}: {name} cannot be extended: its shape {tuple(tensor.shape)} depends on the vocabulary, "
                "but not as an embedding's or a head's"
            )
        groups.setdefault(id(tensor), {})[name] = tensor.shape
    if not groups:
        raise UserError(f"{folder}: cannot be extended, nothing in the model grows with its vocab_size")
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    renamed: dict[str, list[str]] = {}
    for key in keys:
        name, _ = rename_source_key(key, renamings, [], model.base_model_prefix, state)
        renamed.setdefault(name, []).append(key)
    return _Growing(
        tuple(groups.values()),
        frozenset(name for name, tensor in state.items() if id(tensor) in weights),
        renamed,
        frozenset(key for name, own_keys in renamed.items() if name not in state for key in own_keys),
    )


def _empty(config: Any, folder: Path, trust_remote_code: bool) -> Any:
    try:
        with torch.device("meta"), hf_init.meta_device_safe_creation_ops():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a value that makes no sense is met by whatever line of the model reads it
        raise UserError(
            f"{folder}: {config.model_type} cannot be built from its configuration ({first_line(error)})"
        ) from error


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's tensors by name; tied ones are one object."""
    state = model.state_dict(keep_vars=True)
    return {name: each for name, each in state.items() if isinstance(each, torch.Tensor)}


def _match(name: str, shape: torch.Size, stored: Mapping[str, Stored], growing: _Growing, folder: Path) -> str | None:
    """The key of a model's tensor in its files: the same name, else the one that transformers gives that name, else the
    only one that ends in the same two parts and is nothing else in the model."""
    if name in stored:
        return name
    near = growing.renamed.get(name)
    if near is None:
        near = [key for key in sorted(growing.unused) if key.split(".")[-2:] == name.split(".")[-2:]]
        near = [key for key in near if stored[key].shape == tuple(shape)] or near
    if len(near) > 1:
        raise UserError(f"{folder}: {name} cannot be extended, its files have {near[0]} and {near[1]}")
    return near[0] if near else None


def _refuse_misfit(stored: Stored, key: str, shape: torch.Size, folder: Path) -> None:
    if stored.shape[1:] != shape[1:] or len(stored.shape) != len(shape):
        raise UserError(f"{folder}: {key} has shape {stored.shape}, the configuration says {tuple(shape)}")
    if stored.shape[0] != shape[0]:
        raise UserError(
            f"{folder}: {key} has {stored.shape[0]} rows, config.json says vocab_size={shape[0]}; they must agree, "
            "bring the model again"
        )
    if stored.dtype not in DTYPES:
        name = str(stored.dtype).removeprefix("torch.")
        raise UserError(f"{folder}: {key} is in {name} and cannot be extended; bring the model in bfloat16")
    if any(stored.offsets):
        raise UserError(f"{folder}: {key} is a part of a larger tensor; bring the model as from_pretrained opens it")


def _same(one: Stored, other: Stored) -> bool:
    """Whether two tables hold the same numbers; some rows at a time in memory."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    step = max(1, CHUNK // (max(1, *one.shape[1:], 1) * one.dtype.itemsize))
    starts = range(0, one.shape[0], step)
    stops = [min(start + step, one.shape[0]) for start in starts]
    return all(
        torch.equal(read_rows(one, start, stop), read_rows(other, start, stop))
        for start, stop in zip(starts, stops, strict=True)
    )
