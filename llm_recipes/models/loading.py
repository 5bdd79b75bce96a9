"""A Hugging Face model: its configuration, its empty shape on the meta device, and its weights read into shards.

transformers gives the meta model, the sharding plan and the reader of safetensors; the sharding is ours
(`sharding`). What is private of transformers here: `get_model_conversion_mapping`,
`convert_and_load_state_dict_in_model` and `_finalize_model_loading` are how its own `from_pretrained` reads
weights since 5.x.
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import initialization as hf_init
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from llm_recipes.config import ModelConfig
from llm_recipes.errors import UserError, did_you_mean, first_line
from llm_recipes.folders import weight_files

log = logging.getLogger(__name__)


def quiet_libraries() -> None:
    """transformers reports and draws progress bars of its own, once per rank; ours says what matters."""
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels that would be faster
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # export is one process, as intended


def open_config(config: ModelConfig, folder: str) -> Any:
    """The model's own configuration, with `model.overrides` applied.

    Raises:
        UserError: no configuration here, or an override of a key that the model does not have.
    """
    try:
        own = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a broken file is met by whatever line of transformers reads it
        reason = first_line(error)
        hint = "; set model.trust_remote_code=true if you trust it" if "trust_remote_code" in str(error) else ""
        if (Path(folder) / "model" / "config.json").is_file():
            hint = f"; a checkpoint's model lies below it, give model.path={config.path}/model"
        raise UserError(f"model.path={config.path}: no model configuration opens here ({reason}){hint}") from error
    for key, value in config.overrides.items():
        override(own, key, value)
    return own


def vocabulary_size(own: Any) -> int:
    """Rows of the embedding, as a model's configuration says.

    Raises:
        UserError: it says none: a model of images, perhaps.
    """
    size = getattr(own.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise UserError(f"model.path: no language model ({own.model_type} has no vocabulary)")
    return size


def override(own: Any, key: str, value: Any) -> None:
    """Set one key of a model's configuration, dotted for what lies deeper; a name that stands inside one of its
    groups (`rope_theta` in `rope_parameters`) is found there.

    Raises:
        UserError: the model has no such key.
    """
    if key == "model_type":
        raise UserError("model.overrides.model_type: the weights are of one kind of model; give another model.path")
    target, names = own, key.split(".")
    for name in names[:-1]:
        target = target[name] if isinstance(target, dict) else getattr(target, name, None)
        if target is None:
            raise UserError(f"model.overrides.{key}: the model's configuration has no {name}")
    name = names[-1]
    if isinstance(target, dict):
        if name not in target:
            raise UserError(f"model.overrides.{key}: no such key, {did_you_mean(name, target)}")
        target[name] = value
        return
    groups = [group for group in vars(target).values() if isinstance(group, dict) and name in group]
    if hasattr(target, name) and name in target.to_dict():
        try:
            setattr(target, name, value)
        except Exception as error:
            raise UserError(f"model.overrides.{key}={value}: {' '.join(str(error).split())}") from error
    elif groups:
        for group in groups:
            group[name] = value
    else:
        raise UserError(f"model.overrides.{key}: no such key, {did_you_mean(name, target.to_dict())}")


def empty_model(
    own: Any, dtype: torch.dtype, attention: str | None, trust_remote_code: bool = False, device: str = "meta"
) -> Any:
    """The model on the meta device: shapes without memory, its tied weights tied. (On another: random weights.)

    Raises:
        UserError: no causal language model of this kind, or no such attention for it.
    """
    options = {} if attention is None else {"attn_implementation": attention}
    safely = hf_init.meta_device_safe_creation_ops() if device == "meta" else contextlib.nullcontext()
    try:
        with torch.device(device), safely:
            model = AutoModelForCausalLM.from_config(own, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # a value that makes no sense is met by whatever line of the model reads it
        raise UserError(
            f"model: {own.model_type} cannot be built from its configuration ({first_line(error)}); see config.json, "
            "model.overrides and model.attention"
        ) from error
    if hasattr(own, "vocabulary_extension"):
        # Of a configuration in parts the model may have kept the text's alone: its checkpoints would not have the key.
        model.config.vocabulary_extension = own.vocabulary_extension
    return model


def licence(folder: str) -> str | None:
    """What a model folder says of its licence: `license` in its card's front matter, else its LICENSE's first line."""
    card = Path(folder) / "README.md"
    if card.is_file():
        stated = re.search(r"\A---\n(?:.*\n)*?license:\s*(\S+)", card.read_text(encoding="utf-8", errors="replace"))
        if stated:
            return stated.group(1).strip("'\"")
    for path in sorted(Path(folder).glob("LICENSE*")):
        lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
        return next((line for line in lines if line), path.name)
    return None


def read_pretrained(
    model: Any,
    empty: Callable[[], Any],
    folder: str,
    dtype: torch.dtype,
    device: torch.device,
    settle: Callable[[], None] | None = None,
) -> None:
    """Read a folder's safetensors into a sharded meta model; each rank reads what its shards need.

    Args:
        model: the sharded model.
        empty: makes the same model on the meta device, not sharded (FSDP changes a model's class, and with it
            what transformers knows of its weights' names).
        settle: called after each layer's weights, which it may put away in another form; None: all are read at once.

    Raises:
        UserError: weights are missing, do not fit the configuration, or cannot be read.
    """
    load = LoadStateDictConfig(
        pretrained_model_name_or_path=folder,
        ignore_mismatched_sizes=True,  # They are refused below, with their names.
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(empty()),  # type: ignore[arg-type]
    )
    handles = []
    try:
        slices: dict[str, Any] = {}
        for file in weight_files(folder):
            handle = safe_open(file, framework="pt")
            handles.append(handle)
            slices |= {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
        whole = _read_whole(model, empty, slices, load, device)
        left = {key: value for key, value in slices.items() if key not in whole.keys_read}
        info = _read_by_layer(model, left, load, settle)
    except SafetensorError as error:
        raise UserError(f"{folder}: its weights cannot be read ({error}); bring the model again") from error
    for name in whole.parameters:
        info.missing_keys.discard(name)
    refuse_unread(model, info, folder)
    finish(model, info, load)


def _read_by_layer(
    model: Any, slices: dict[str, Any], load: LoadStateDictConfig, settle: Callable[[], None] | None
) -> LoadStateDictInfo:
    """Read each layer's keys (`model.layers.3.` before them), and settle; without that all at once."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in slices.items():
        layer = re.match(r".*?\.\d+(?=\.)", key) if settle else None
        groups.setdefault(layer.group() if layer else "", {})[key] = value
    total: LoadStateDictInfo | None = None
    for group in groups.values() or [{}]:
        info, _ = convert_and_load_state_dict_in_model(model, group, load)
        if settle is not None:
            settle()
        if total is None:
            total = info
            continue
        total.missing_keys &= info.missing_keys
        total.unexpected_keys |= info.unexpected_keys
        total.mismatched_keys |= info.mismatched_keys
        total.conversion_errors |= info.conversion_errors
    assert total is not None
    return total


class _Whole:
    """What had to be read whole: checkpoint keys, and the parameters they became."""

    def __init__(self) -> None:
        self.keys_read: set[str] = set()
        self.parameters: set[str] = set()


def _read_whole(
    model: Any, empty: Callable[[], Any], slices: dict[str, Any], load: LoadStateDictConfig, device: torch.device
) -> _Whole:
    """Read parameters one at a time that cannot be read shard by shard, and keep this rank's part of each.

    The reader cuts each tensor of the file before it converts it. That is right where experts are stacked
    and each rank owns some of them. It is wrong where pieces are joined or split along the sharded dimension, and
    impossible on a rank that owns no expert at all.
    """
    result = _Whole()
    shapes = model.state_dict()
    mapping = get_model_conversion_mapping(empty())  # A renaming remembers what it met: not the reader's own.
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = {
        pattern: entry for entry in mapping if isinstance(entry, WeightConverter) for pattern in entry.source_patterns
    }
    groups: dict[str, dict[str, Any]] = {}
    for key, value in slices.items():
        name, pattern = rename_source_key(
            key, renamings, list(dict.fromkeys(converters.values())), model.base_model_prefix, shapes
        )
        if name in shapes and pattern is None and list(value.get_shape()) != list(shapes[name].shape):
            raise UserError(
                f"{load.pretrained_model_name_or_path}: {name} has shape {tuple(value.get_shape())}, the configuration "
                f"says {tuple(shapes[name].shape)}; see model.overrides"
            )
        if name in shapes and pattern is not None and not _reads_by_shard(converters[pattern], shapes[name]):
            groups.setdefault(name, {})[key] = value
    for group in groups.values():
        part = loaded_alone(empty(), group, load)
        for name, full in part.items():
            place_parameter(model, name, full.to(device))
        result.keys_read |= set(group)
        result.parameters |= set(part)
    return result


def _reads_by_shard(converter: WeightConverter, parameter: torch.Tensor) -> bool:
    if not isinstance(parameter, DTensor):
        return True
    along_first = all(getattr(placement, "dim", 0) == 0 for placement in parameter.placements)
    ranks = parameter.device_mesh.shape[-1]
    every_rank_owns_some = -(-parameter.shape[0] // ranks) * (ranks - 1) < parameter.shape[0]
    stacks = all(
        (isinstance(operation, MergeModulelist) and operation.dim == 0)
        or (isinstance(operation, Concatenate) and operation.dim > 0)
        for operation in converter.operations
    )
    return along_first and every_rank_owns_some and stacks


def loaded_alone(plain: Any, group: dict[str, Any], load: LoadStateDictConfig) -> dict[str, torch.Tensor]:
    """The full parameters that some checkpoint keys become, on the CPU."""
    alone = LoadStateDictConfig(
        dtype=load.dtype,
        dtype_plan=load.dtype_plan,
        weight_mapping=get_model_conversion_mapping(plain),  # type: ignore[arg-type]
        ignore_mismatched_sizes=True,
    )
    info, _ = convert_and_load_state_dict_in_model(plain, group, alone)
    if info.conversion_errors:
        raise UserError(f"the weights of {sorted(info.conversion_errors)[0]} do not convert")
    return {name: value for name, value in plain.state_dict().items() if not value.is_meta}


def place_parameter(model: Any, name: str, full: torch.Tensor) -> None:
    """Put a value, which every rank has whole, in the place of a (sharded) parameter, in the parameter's dtype."""
    module_name, _, own_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    reference = getattr(module, own_name)
    if full.shape != reference.shape:
        raise UserError(
            f"weights of {name} have shape {tuple(full.shape)}, the configuration says {tuple(reference.shape)}"
        )
    value = full.to(reference.dtype)
    if isinstance(reference, DTensor):
        # Every rank has the same full tensor: cut it, with no communication.
        value = distribute_tensor(value, reference.device_mesh, reference.placements, src_data_rank=None)
    parameter = nn.Parameter(value, requires_grad=reference.requires_grad)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    setattr(module, own_name, parameter)


def refuse_unread(model: Any, info: LoadStateDictInfo, folder: str) -> None:
    """A weight that was not read would train from noise.

    Raises:
        UserError: names what is missing or has another shape.
    """
    if info.mismatched_keys:
        name, found, expected = sorted(info.mismatched_keys, key=str)[0]
        raise UserError(
            f"{folder}: {name} has shape {tuple(found)}, the configuration says {tuple(expected)} "
            f"({len(info.mismatched_keys)} weights do not fit); see model.overrides"
        )
    if info.conversion_errors:
        raise UserError(f"{folder}: the weights of {sorted(info.conversion_errors)[0]} do not convert")
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    probe = LoadStateDictInfo(**{**info.__dict__, "missing_keys": info.missing_keys - tied})
    model._adjust_missing_and_unexpected_keys(probe)
    if probe.missing_keys:
        names = sorted(probe.missing_keys)
        raise UserError(f"{folder}: {len(names)} weights are missing, the first is {names[0]}")
    if probe.unexpected_keys:
        log.warning(
            "weights in the folder that the model does not use: %s", ", ".join(sorted(probe.unexpected_keys)[:5])
        )


def finish(model: Any, info: LoadStateDictInfo, load: LoadStateDictConfig) -> None:
    """Fill the buffers that no file holds, tie what is tied, and go to training mode."""
    for module in model.modules():
        # What has been read whole is not initialised again: that would compute on shards. What owns nothing is: it may
        # fill its children's buffers.
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        module._is_hf_initialized = bool(own) and all(getattr(each, "_is_hf_initialized", False) for each in own)
    model._finalize_model_loading(model, load, info)
    model.train()


def read_nothing(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Give a sharded meta model its memory and its computed buffers; weights come from a checkpoint next."""
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    # Not left as memory was: transformers ties again only what is equal, and no NaN is.
                    value = nn.Parameter(torch.zeros_like(parameter, device=device), parameter.requires_grad)
                    value._is_hf_initialized = True  # type: ignore[attr-defined]
                    module.register_parameter(name, value)
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta and name not in module._non_persistent_buffers_set:
                    module.register_buffer(name, torch.empty_like(buffer, device=device))
                    module._buffers[name]._is_hf_initialized = True
    model.tie_weights()
    nothing: dict[str, Any] = {
        "missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(),
        "conversion_errors": {}, "error_msgs": [], "skipped_pp_keys": set(),
    }  # fmt: skip
    finish(model, LoadStateDictInfo(**nothing), LoadStateDictConfig(device_map={"": device}, dtype=dtype))
