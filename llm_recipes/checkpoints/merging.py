"""What becomes of an adapter's checkpoint: a model, the adapter added to its base; or the adapter alone, for peft."""

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_recipes.checkpoints import adapters, hub, shards
from llm_recipes.folders import is_checkpoint
from llm_recipes.models import loading
from llm_recipes.models.weights import Whole

log = logging.getLogger(__name__)

Writer = Callable[[Path], None]
"""Writes weights and configuration into a folder."""


def open_merged(source: Path, dtype: torch.dtype, most: int, what: str) -> Writer:
    """What writes the sum of an adapter and its base: added in fp32, then rounded; a few tensors at a time in memory,
    where the model's conversions allow it.

    Args:
        source: a checkpoint's `model/`.
        most: bytes of a file.
        what: what a user asked for, as `checkpoint=...`.

    Raises:
        UserError: the base is not there, or is another by now.
        Damaged: a tensor is missing, or of another shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    base, folder = adapters.base_folder(source, what)
    own = AutoConfig.from_pretrained(source)
    added = adapters.deltas(loading.empty_model(own, torch.float32, None), source, base.adapter)
    if base.adapter.base != "full":
        log.warning(
            "the adapter learned beside weights in %s, and is added to the original ones of %s: the model that trained "
            "had their rounding", base.adapter.base, base.path,
        )  # fmt: skip
    model = loading.empty_model(own, dtype, None)
    state, parts = hub.saved(model), hub.units(model)
    read: Callable[[str], torch.Tensor] | None = None
    if is_checkpoint(str(folder)):
        hub.refuse_another_model(model, folder)
        read = shards.Folder(folder).read
    else:
        whole = Whole(loading.empty_model(own, torch.float32, None), str(folder))
        read = whole.read if all(name in whole for name in state) else None
    if parts is None or read is None:
        log.warning("the weights of this model do not convert in parts: all of it goes through memory at once")
        full = AutoModelForCausalLM.from_pretrained(folder, config=own, dtype=dtype)
        original = AutoModelForCausalLM.from_pretrained(folder, config=own, dtype=torch.float32)
        precise = dict(original.named_parameters())
        for name, parameter in full.named_parameters():
            if name in added:
                parameter.data = (precise[name].detach() + added[name]()).to(parameter.dtype)
        return partial(full.save_pretrained, max_shard_size=most)
    hub.own_generation(model, source)

    def summed(name: str) -> torch.Tensor:
        value = read(name).float()
        return (value + added[name]() if name in added else value).to(state[name].dtype)

    def write(target: Path) -> None:
        model.save_pretrained(target, state_dict={})  # all but the weights
        hub.write_weights(model, summed, target, parts, most)

    return write


def open_alone(source: Path, dtype: torch.dtype) -> Writer:
    """What writes an adapter as a folder that `peft.PeftModel.from_pretrained` opens on its base.

    Raises:
        UserError: it does not say what it stands on.
        Damaged: the weights are.
    """
    adapters.read(source)
    folder = shards.Folder(source)

    def write(target: Path) -> None:
        shutil.copyfile(source / "adapter_config.json", target / "adapter_config.json")
        names = sorted(folder)
        boxes = [shards.Box(name, dtype, folder.shape(name), (0,) * len(folder.shape(name))) for name in names]
        values: Any = (folder.read(name).to(dtype) for name in names)
        shards.write(target / "adapter_model.safetensors", boxes, values)

    return write
