"""What a checkpoint holds of a run, as pieces of tensors by name; and reading it back.

`model/` holds the weights under transformers' names, with config and tokenizer beside them: a model folder. Where an
adapter trains it holds the adapter (see `adapters`).
`optimizer/` holds `<parameter>.exp_avg`, `.exp_avg_sq` and `.step` (of moments in 8 bits their scales too), and no
hyperparameters: those are the configuration's. A parameter that never had a gradient has no state, and the manifest
names it.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from llm_recipes.checkpoints import manifest, shards
from llm_recipes.errors import UserError
from llm_recipes.models import adapter as adapters
from llm_recipes.models import quantized
from llm_recipes.models.topology import Topology

log = logging.getLogger(__name__)

STEP = "step"
"""Of a parameter's state what is one number; all else has a value for each of its rows."""
KEPT = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
"""All else that there may be of it; scales only where moments are in 8 bits."""
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
OTHER_FILES = ("generation_config.json", "chat_template*", "LICENSE*")


class Optimizer(Protocol):
    """What a checkpoint asks of one."""

    state: Any
    """Tensors by parameter and name: `step`, and what keeps the moments."""

    def shapes(self, parameter: torch.Tensor) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """The tensors that keep this rank's part of a parameter's moments, by name."""

    def empty_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state before a parameter's first gradient; sharded as the parameter is."""

    def read(self, stored: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Both moments of a matrix, or of fused ones, as fp32 rows, from what keeps them."""

    def write(
        self, stored: dict[str, torch.Tensor], first: torch.Tensor, second: torch.Tensor, step: torch.Tensor
    ) -> None:
        """Put both moments back into what keeps them."""


def model_pieces(model: nn.Module, is_first: bool) -> list[shards.Piece]:
    """This rank's pieces of parameters and persistent buffers; of a model with an adapter, the adapter's alone. A tied
    one is one piece with several names: transformers asks for each of them when it opens the folder."""
    if adapters.of(model) is not None:
        return [shards.piece([name], each, is_first) for name, each in adapters.stored(model).items()]
    return _all_pieces(model, is_first)


def _all_pieces(model: nn.Module, is_first: bool) -> list[shards.Piece]:
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, each in model.state_dict(keep_vars=True).items():
        if isinstance(each, torch.Tensor):
            names.setdefault(id(each), []).append(name)
            tensors[id(each)] = each
    return [shards.piece(names[key], tensor, is_first) for key, tensor in tensors.items()]


def optimizer_pieces(model: nn.Module, optimizer: Optimizer, is_first: bool) -> tuple[list[shards.Piece], list[str]]:
    """This rank's pieces of the optimizer's tensors, and the parameters that have none; a model beneath an adapter has
    none anywhere, and is not named."""
    pieces: list[shards.Piece] = []
    absent = []
    named = dict(model.named_parameters())
    if {id(each) for each in optimizer.state} - {id(each) for each in named.values()}:
        raise RuntimeError("the optimizer holds parameters that are not the model's: it is not sharded now")
    for name, parameter in named.items():
        own = optimizer.state.get(parameter)
        if not own:
            if parameter.requires_grad or adapters.of(model) is None:
                absent.append(name)
            continue
        pieces += [shards.piece([f"{name}.{key}"], own[key], is_first) for key in own if key != STEP]
        pieces.append(shards.piece([f"{name}.{STEP}"], own[STEP].reshape(1), is_first))
    return pieces, absent


def copy_model_files(source: Path, target: Path) -> None:
    """Tokenizer, generation configuration and licence, as they are."""
    for pattern in (*TOKENIZER_FILES, *OTHER_FILES):
        for path in source.glob(pattern):
            if path.is_file() and path.suffix not in (".safetensors", ".bin"):
                shutil.copyfile(path, target / (path.name if path.suffix else f"{path.name}.txt"))


def _by_name(pieces: list[shards.Piece]) -> dict[str, shards.Piece]:
    return {each.names[0]: each for each in pieces}


def read_model(model: nn.Module, folder: Path) -> None:
    """Read a checkpoint's `model/` into a sharded model, in place; each rank reads what its shards need.

    Raises:
        UserError: the weights are damaged, or another model's.
    """
    try:
        shards.read_pieces(folder, _by_name(model_pieces(model, is_first=True)))
    except shards.Damaged as error:
        raise UserError(f"{error}; see model.path and model.overrides") from error


def read_base(model: nn.Module, folder: Path) -> None:
    """Read a checkpoint's `model/` into a sharded model, or into what lies beneath its adapter.

    Raises:
        UserError: the weights are damaged, or another model's.
    """
    device = next(model.parameters()).device
    with adapters.standing_aside(model), quantized.whole(model, device) as settle:
        pieces = _by_name(_all_pieces(model, is_first=True))
        try:
            shards.read_pieces(folder, {name: each for name, each in pieces.items() if not each.local.is_meta})
            for name in [name for name, each in pieces.items() if each.local.is_meta]:
                module: Any = model.get_submodule(name.removesuffix(".weight"))
                module.weight = nn.Parameter(torch.empty_like(module.weight, device="cpu"), requires_grad=False)
                shards.read_pieces(folder, {name: shards.piece([name], module.weight, is_first=True)})
                if settle is not None:
                    settle()
        except shards.Damaged as error:
            raise UserError(f"{error}; see model.path and model.overrides") from error


def restore(folder: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Read a whole checkpoint into a model and its optimizer. The learning rate is not among what is read.

    Returns:
        What `state.json` holds.
    """
    read_model(model, folder / "model")
    absent = set(manifest.read(folder)["without_optimizer_state"])
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        if name in absent or not parameter.requires_grad:
            continue
        optimizer.state[parameter] = optimizer.empty_state(parameter)
    pieces = _by_name(optimizer_pieces(model, optimizer, is_first=True)[0])
    try:
        done = _convert_moments(shards.Folder(folder / "optimizer"), model, optimizer)
        shards.read_pieces(folder / "optimizer", {name: each for name, each in pieces.items() if name not in done})
    except shards.Damaged as error:
        raise UserError(f"{error}; see model.path and model.overrides") from error
    return dict(json.loads((folder / "state.json").read_text(encoding="utf-8")))


def _convert_moments(there: shards.Folder, model: nn.Module, optimizer: Optimizer) -> set[str]:
    """Read moments that a checkpoint keeps in 8 bits and this run as numbers, or the other way round: codes read as
    numbers would be wrong in silence. Each parameter's are whole on the host, one after another.

    Returns:
        Names of the tensors that are done with.

    Raises:
        Damaged: a tensor is missing, or of another shape.
    """
    done: set[str] = set()
    for name, parameter in model.named_parameters():
        own, key = optimizer.state.get(parameter), f"{name}.exp_avg"
        in_8_bits = bool(own) and own["exp_avg"].dtype == torch.uint8
        if not own or key not in there or (there.dtype(key) == torch.uint8) == in_8_bits:
            continue
        stored = {each: there.read(f"{name}.{each}") for each in KEPT if f"{name}.{each}" in there}
        if stored["exp_avg"].shape != parameter.shape:
            raise shards.Damaged(f"{there.path}: of another model ({key} is {tuple(stored['exp_avg'].shape)})")
        both = optimizer.read(stored)
        box = shards.piece([name], parameter, is_first=True)
        here = tuple(slice(at, at + n) for at, n in zip(box.offsets, box.local.shape, strict=True))
        parts = [each.reshape(parameter.shape)[here].to(box.local.device).contiguous() for each in both]
        local = {each: shards.piece([each], value, True).local for each, value in own.items() if each != STEP}
        if in_8_bits:
            optimizer.write(local, parts[0], parts[1], own[STEP])
        else:
            for each, part in zip(("exp_avg", "exp_avg_sq"), parts, strict=True):
                local[each].copy_(part)
        done |= {f"{name}.{each}" for each in local}
    if done:
        log.info("moments of %s are kept in another form here (optim.state): converted", there.path)
    return done


def refuse_another_model(folder: Path, own: Any) -> None:
    """A checkpoint of another model has weights of other shapes.

    Raises:
        UserError: names what differs.
    """
    theirs = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    ours = own.to_dict()
    for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        if key in theirs and key in ours and theirs[key] != ours[key]:
            raise UserError(f"checkpoint.resume={folder}: of another model ({key} {theirs[key]}, here {ours[key]})")


def newest_intact(root: Path, topology: Topology, run_id: str | None = None) -> Path | None:
    """The newest checkpoint that is whole and can be resumed from; damaged ones are named in the log. None where
    there is none at all.

    Raises:
        UserError: there are checkpoints, and none will do.
    """
    there = topology.on_first(lambda: [(each, manifest.weights_only(each)) for each in manifest.checkpoints(root)])
    for each in (path for path, weights_only in there if not weights_only):
        problem = manifest.damage(each, topology, run_id)
        if problem is None:
            return Path(each)
        log.warning("%s is damaged: %s; looking at the one before it", each, problem)
    if there:
        kept = sum(weights_only for _, weights_only in there)
        why = f"{kept} hold weights only, {len(there) - kept} are damaged" if kept else "damaged"
        raise UserError(
            f"{root}: none of its {len(there)} checkpoints can be resumed from ({why}); bring one back, or start anew "
            "under another run.name"
        )
    return None
