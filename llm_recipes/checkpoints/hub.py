"""A checkpoint's weights as the hub has them: whole, under the hub's names, a few tensors at a time in memory.

transformers knows how a model's tensors become those of its folder on the hub (`revert_weight_conversion`), and does it
for a whole model at once. Here it is asked for as few tensors at a time as give the same; tried first without values.
"""

import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.serialization._base import parse_size_to_int
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    build_glob_alternation,
    dot_natural_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from llm_recipes.checkpoints.shards import Box, Folder, write
from llm_recipes.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unit:
    """Tensors that are converted together: the model's names, and what they become."""

    names: tuple[str, ...]
    boxes: tuple[Box, ...]


def saved(model: Any) -> dict[str, torch.Tensor]:
    """What of a model on the meta device a folder on the hub holds, under the model's own names: of tied weights the
    one that is kept."""
    state = {name: each for name, each in model.state_dict().items() if isinstance(each, torch.Tensor)}
    plan = model._get_dtype_plan(model.dtype)
    if plan:  # what the model declares fp32 stays so, as in the folders on the hub
        declared, _, _ = build_glob_alternation(list(plan))
        state = {name: each.float() if declared.search(name) else each for name, each in state.items()}
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    return dict(remove_tied_weights_from_state_dict(state, model))


def _boxes(model: Any, state: dict[str, torch.Tensor]) -> tuple[Box, ...] | None:
    """What weights become, without values; None where they do not become anything alone."""
    try:
        found = revert_weight_conversion(model, state)
    except Exception as error:  # an operation that lacks what it joins, or needs values, fails in a way of its own
        log.debug("%s do not convert alone: %s: %s", ", ".join(state), type(error).__name__, error)
        return None
    return tuple(Box(name, each.dtype, tuple(each.shape), (0,) * each.ndim) for name, each in found.items())


def _layer(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj.weight`; what is in no layer stands alone."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match.group() if match else name


def units(model: Any) -> list[Unit] | None:
    """The smallest groups of a model's weights that become, one group at a time, what all of them become at once: each
    tensor alone, or each layer. None where neither does."""
    state = saved(model)
    whole = _boxes(model, state)
    # Without them `revert_weight_conversion` walks the model at each call for the same; if they were not, the groups
    # would not give what all at once gave.
    found_by_walking = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [each for each in found_by_walking if not isinstance(each, PrefixChange)]
    kinds: tuple[Callable[[str], str], ...] = (str, _layer)
    for kind in kinds if whole is not None else ():
        groups: dict[str, list[str]] = {}
        for name in sorted(state, key=dot_natural_key):
            groups.setdefault(kind(name), []).append(name)
        found = []
        for group in groups.values():
            boxes = _boxes(model, {name: state[name] for name in group})
            if boxes is None:
                break
            found.append(Unit(tuple(group), boxes))
        # Sorted, and no dictionary: what two groups both give is not what all at once give.
        if sorted(map(repr, (box for unit in found for box in unit.boxes))) == sorted(map(repr, whole or ())):
            return found
    return None


def sizes(text: str) -> int:
    """Bytes in `5GB`.

    Raises:
        UserError: no size.
    """
    try:
        found = parse_size_to_int(text)
    except (ValueError, OverflowError) as error:
        raise UserError(f"max_shard_size={text}: no size, write it as 5GB or 500MB") from error
    if found <= 0:
        raise UserError(f"max_shard_size={text}: must be more than nothing")
    return found


def in_files(boxes: Iterable[Box], most: int) -> list[list[Box]]:
    """Boxes in order, cut into files of no more than `most` bytes but where one tensor alone has more."""
    files: list[list[Box]] = []
    size = 0
    for box in boxes:
        if not files or size + box.bytes > most:
            files.append([])
            size = 0
        files[-1].append(box)
        size += box.bytes
    return files


def refuse_another_model(model: Any, source: Path) -> None:
    """Raise `UserError` where a model's tensor is missing in a folder, or of another shape."""
    folder = Folder(source)
    for name, each in saved(model).items():
        if name not in folder:
            raise UserError(f"{source}: {name} is missing")
        if folder.shape(name) != tuple(each.shape):
            raise UserError(
                f"{source}: {name} has shape {folder.shape(name)}, the configuration says {tuple(each.shape)}"
            )


def own_generation(model: Any, source: Path) -> None:
    """Give a model the settings for generation that its configuration holds, where its folder has no file of them."""
    from transformers import GenerationConfig

    if model.can_generate() and not (source / "generation_config.json").exists():  # else it is copied as it is
        model.generation_config = GenerationConfig.from_pretrained(
            source, config_file_name="config.json", _from_model_config=True
        )


def reader(model: Any, source: Path) -> Callable[[str], torch.Tensor]:
    """Gives a checkpoint's tensors by name, whole, in the dtypes of a model on the meta device."""
    folder = Folder(source)
    state = saved(model)

    def read(name: str) -> torch.Tensor:
        value = torch.empty(state[name].shape, dtype=state[name].dtype)
        folder.read_into(name, value, (0,) * value.ndim)
        return value

    return read


def write_weights(model: Any, read: Callable[[str], torch.Tensor], target: Path, parts: list[Unit], most: int) -> None:
    """Write a model's tensors as the hub has them.

    Args:
        model: on the meta device; knows names and conversions.
        read: gives a tensor by the model's name for it, in the dtype that it is written in.
        parts: as `units` gave them.
        most: bytes of a file.

    Raises:
        Damaged, OSError: as reading and writing do.
    """

    def values() -> Iterator[torch.Tensor]:
        for unit in parts:
            found = revert_weight_conversion(model, {name: read(name) for name in unit.names})
            for box in unit.boxes:
                yield found.pop(box.name)

    files = in_files((box for unit in parts for box in unit.boxes), most)
    stream = values()
    where: dict[str, str] = {}
    for number, boxes in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        write(target / name, boxes, itertools.islice(stream, len(boxes)))
        where |= {box.name: name for box in boxes}
    if len(files) > 1:
        total = sum(box.bytes for boxes in files for box in boxes)
        counted = {"total_parameters": model.num_parameters(), "total_size": total}
        text = json.dumps({"metadata": counted, "weight_map": where}, indent=2, sort_keys=True)
        (target / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
