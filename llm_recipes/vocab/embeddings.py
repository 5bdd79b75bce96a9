"""A model folder with a larger vocabulary: its weights, its configuration and its generation configuration.

Nothing but the tables' new rows is computed. All else goes from file to file, a chunk at a time.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from llm_recipes.checkpoints import shards
from llm_recipes.checkpoints.shards import Box, Stored
from llm_recipes.errors import UserError, first_line
from llm_recipes.vocab.base import write_json
from llm_recipes.vocab.rows import NewRows, new_rows
from llm_recipes.vocab.tables import Table, Vocabulary, vocabulary_tables

INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Grown:
    """A table that was extended: its key in the files, its dtype, and what it takes more on the disk."""

    key: str
    old_rows: int
    new_rows: int
    dtype: str
    bytes_added: int


@dataclass(frozen=True)
class Summary:
    """What was done to a model.

    Attributes:
        tied: whether the input embedding and the head are one parameter.
        memory_added: bytes of the model's parameters, one that stands twice in the files counted once.
    """

    tables: tuple[Grown, ...]
    tied: bool
    memory_added: int


def extend_model(
    source: Path,
    target: Path,
    new: NewRows,
    extension: Mapping[str, Any],
    trust_remote_code: bool = False,
) -> Summary:
    """Write a model with a larger vocabulary; its tokenizer and all else in the folder are the caller's to write.

    Written are the files with weights, each under its own name, their index, `config.json` and
    `generation_config.json`. In memory are some chunks, and one table's new rows in fp32. Nothing is
    renamed into its place: `target` is a folder that the caller renames.

    Args:
        source: a model folder.
        target: an empty folder.
        extension: what `config.json` says under `vocabulary_extension`.

    Raises:
        UserError: the model cannot be extended (see `vocabulary_tables`), or would lose rows.
        OSError: the disk refuses.
    """
    vocabulary = vocabulary_tables(source, trust_remote_code)
    if new.rows < vocabulary.rows or new.first > vocabulary.rows:
        raise UserError(
            f"{source}: has {vocabulary.rows} rows, {new.rows} with new tokens from {new.first} on do not extend it; "
            "its tokenizer must have no more tokens than the model, and no row may be lost"
        )
    config = _larger_config(source, vocabulary.config, vocabulary.rows, new.rows)
    config["vocabulary_extension"] = dict(extension)
    for path, stored in vocabulary.files.items():
        _write_file(target / path.name, path, stored, vocabulary.tables, new)
    summary = _summary(vocabulary, new)
    if (source / INDEX).exists():
        write_json(target / INDEX, _larger_index(source, vocabulary, summary))
    write_json(target / "config.json", config)
    generation = _quiet_padding(source, new)
    if generation is not None:
        write_json(target / GENERATION, generation)
    return summary


def _write_file(
    target: Path, source: Path, stored: Mapping[str, Stored], tables: Mapping[str, Table], new: NewRows
) -> None:
    def shape(key: str) -> tuple[int, ...]:
        own = stored[key].shape
        return (new.rows, *own[1:]) if key in tables else own

    def values(key: str) -> Iterator[torch.Tensor]:
        own = stored[key]
        if key not in tables:
            yield from _flat(own)
            return
        yield from _flat(replace(own, shape=(new.first, *own.shape[1:])))
        yield new_rows(own, new, tables[key].tied_to)  # of two that are tied, the same numbers

    keys = sorted(stored, key=lambda key: stored[key].start)
    boxes = [Box(key, stored[key].dtype, shape(key), stored[key].offsets) for key in keys]
    try:
        shards.write(target, boxes, map(values, keys), shards.read_metadata(source))
    except shards.Damaged as error:
        raise UserError(f"{error}; bring the model again") from error


def _flat(stored: Stored) -> Iterator[torch.Tensor]:
    """The numbers of a stored tensor in row-major order, a chunk at a time."""
    flat = replace(stored, shape=(prod(stored.shape),), offsets=(0,))
    step = max(1, shards.CHUNK // stored.dtype.itemsize)
    for start in range(0, flat.shape[0], step):
        yield shards.read_rows(flat, start, min(start + step, flat.shape[0]))


def _summary(vocabulary: Vocabulary, new: NewRows) -> Summary:
    added = new.rows - vocabulary.rows
    grown = [
        Grown(key, vocabulary.rows, new.rows, str(each.stored.dtype).removeprefix("torch."), added * each.row_bytes)
        for key, each in vocabulary.tables.items()
    ]
    own = sum(added * each.row_bytes for key, each in vocabulary.tables.items() if each.tied_to == key)
    return Summary(tuple(grown), vocabulary.tied, own)


def _larger_index(source: Path, vocabulary: Vocabulary, summary: Summary) -> dict[str, Any]:
    """The index with the new sizes, where it states them."""
    index = _read_json(source / INDEX)
    stated = index.get("metadata")
    more = {
        "total_size": sum(each.bytes_added for each in summary.tables),
        "total_parameters": sum(
            (each.new_rows - each.old_rows) * prod(vocabulary.tables[each.key].stored.shape[1:])
            for each in summary.tables
            if vocabulary.tables[each.key].tied_to == each.key
        ),
    }
    for name, number in more.items():
        if isinstance(stated, dict) and isinstance(stated.get(name), int | float):
            stated[name] = int(stated[name]) + number
    return index


def _larger_config(source: Path, config: Any, old: int, rows: int) -> dict[str, Any]:
    """`config.json` with the vocabulary's new size where it states the old one: at the top, in the part that is about
    text, or in both. Where neither does (the old one is the default of the model's kind), in the part about text.

    Raises:
        UserError: transformers does not take the size from there.
    """
    found = _read_json(source / "config.json")
    text = config.get_text_config()
    key = text.attribute_map.get("vocab_size", "vocab_size")
    parts = [name for name, each in vars(config).items() if each is text and isinstance(found.get(name), dict)]
    places = [found, *(found[name] for name in parts)]
    for place in [each for each in places if each.get(key) == old] or places[-1:]:
        place[key] = rows
    try:
        opened = type(config).from_dict(json.loads(json.dumps(found))).get_text_config().vocab_size
    except Exception as error:  # a value that makes no sense is met by whatever line of transformers reads it
        raise UserError(f"{source}: its configuration refuses vocab_size={rows} ({first_line(error)})") from error
    if opened != rows:
        raise UserError(f"{source}: cannot be extended, its vocab_size is not set by its config.json")
    return found


def _quiet_padding(source: Path, new: NewRows) -> dict[str, Any] | None:
    """The generation configuration, with the padding ids among those that are never generated, and the new tokens not
    (they may have been an earlier extension's padding); None where the model has none and needs none."""
    if (source / GENERATION).exists():
        found = _read_json(source / GENERATION)
    elif new.padding:
        # A folder without one gets its own when it is opened, with the end-of-text token that generating stops at;
        # with one that lacks it, generating would not stop.
        made = GenerationConfig.from_pretrained(source, config_file_name="config.json", _from_model_config=True)
        found = json.loads(made.to_json_string(ignore_metadata=True))
    else:
        return None
    before = found.get("suppress_tokens") or []
    suppressed = sorted({each for each in before if not new.first <= each < new.padding.start} | set(new.padding))
    if suppressed or before:
        found["suppress_tokens"] = suppressed or None
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); bring the model again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: no JSON object; bring the model again")
    return found
