"""An adapter's checkpoint, and the model that it stands on: known by a fingerprint, brought back, added up.

`model/` of such a checkpoint holds the adapter's weights under peft's names, `adapter_config.json`, and `base.json`:
where the base lies, its fingerprint, and how the adapter was asked for.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_recipes.checkpoints import manifest, shards
from llm_recipes.config import AdapterConfig
from llm_recipes.data import tokenizer as tokenizers
from llm_recipes.errors import UserError, first_line
from llm_recipes.folders import is_adapter
from llm_recipes.models import adapter as adapters
from llm_recipes.models.sharding import PRECISIONS


@dataclass(frozen=True)
class Base:
    """What an adapter stands on.

    Attributes:
        path: where it lies, or its name on the hub.
        fingerprint: of its weights and its configuration.
        adapter: how the adapter was asked for.
    """

    path: str
    fingerprint: str
    adapter: AdapterConfig


def base_of(path: str, folder: Path, adapter: AdapterConfig) -> Base:
    """The base of a run that begins with a model folder; every byte of its weights is read."""
    where = str(Path(path).resolve()) if Path(path).is_dir() else path  # whoever opens it may stand elsewhere
    return Base(where, manifest.fingerprint(folder, ("config.json",)), adapter)


def read(folder: Path) -> Base:
    """What an adapter's folder says of its base.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / "base.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return Base(str(said["path"]), str(said["fingerprint"]), AdapterConfig(**said["adapter"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: it does not say what the adapter stands on ({first_line(error)})") from error


def remember(model: Any, base: Base | None) -> None:
    """Tell a model's adapter its base: its checkpoints say it."""
    own = adapters.of(model)
    if own is not None and base is not None:
        own.base, own.fingerprint = base.path, base.fingerprint


def refuse_another_base(checkpoint: Path, base: Base | None) -> None:
    """An adapter is nothing without the weights that it learned beside.

    Args:
        base: of the run that goes on; None: it has no adapter.

    Raises:
        UserError: the checkpoint has an adapter and the run none, or the other way round, or the base is another.
    """
    folder = checkpoint / "model"
    if is_adapter(str(folder)) != (base is not None):
        theirs, ours = ("an adapter", "none") if base is None else ("a whole model", "an adapter")
        raise UserError(f"{checkpoint}: holds {theirs}, this run trains {ours}; see adapter.kind, or give a run.name")
    if base is None:
        return
    known = read(folder)
    if known.fingerprint != base.fingerprint:
        raise UserError(
            f"model.path={base.path}: not the model that the adapter in {checkpoint} stands on (fingerprint "
            f"{base.fingerprint}, there {known.fingerprint} of {known.path}); bring that one back, or give a run.name"
        )
    for key in ("rank", "alpha", "targets", "base"):
        theirs, ours = getattr(known.adapter, key), getattr(base.adapter, key)
        if theirs != ours:
            raise UserError(f"adapter.{key}={ours}: the adapter in {checkpoint} has {theirs}")


def base_folder(folder: Path, what: str, trust_remote_code: bool = False) -> tuple[Base, Path]:
    """An adapter's base, and where it lies; shown to be the same.

    Args:
        folder: the adapter's.
        what: what a user asked for, as `model=...`.

    Raises:
        UserError: it is not there, or is another by now.
    """
    known = read(folder)
    own = Path(tokenizers.resolve(known.path, f"{what}: its base", trust_remote_code))
    found = base_of(known.path, own, known.adapter)
    if found.fingerprint != known.fingerprint:
        raise UserError(
            f"{what}: its base {known.path} is another model by now (fingerprint {found.fingerprint}, it was "
            f"{known.fingerprint}); bring that one back"
        )
    return known, own


def deltas(plain: Any, folder: Path, adapter: AdapterConfig) -> dict[str, Callable[[], torch.Tensor]]:
    """What an adapter adds to each of the weights that it stands beside, by the weight's plain name; made when called,
    in fp32.

    Args:
        plain: the model on the meta device in fp32, which the adapter is put into.
        folder: the adapter's.

    Raises:
        Damaged: a tensor is missing, or of another shape.
    """
    own = adapters.inject(plain, adapter, PRECISIONS["fp32"])
    there = shards.Folder(folder)
    for name, parameter in adapters.stored(plain).items():
        if name not in there or there.shape(name) != tuple(parameter.shape):
            raise shards.Damaged(f"{folder}: {name} is missing, or of another shape")
    adapters.put(plain, {name: there.read(name).float() for name in adapters.stored(plain)})
    return adapters.deltas(own)
