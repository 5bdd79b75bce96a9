"""Random weights, part by part; and the proof that nothing was left without a value, wherever it came from."""

import logging
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from llm_recipes.errors import UserError
from llm_recipes.models import quantized

log = logging.getLogger(__name__)


def random_weights(model: Any, seed: int, plain: Callable[[], Any]) -> Callable[[nn.Module, str], None]:
    """A function that fills one part of a meta model with its own random initialisation, just before it is sharded.

    Part by part, seeded by the part's name: the weights do not depend on the number of processes, and no
    process ever holds more than one part whole. The root must come last.

    Args:
        plain: makes the whole model on the CPU. Asked only for what gets its values while a model is built, and from
            no initialisation function, which the meta device has lost.
    """
    owners = {id(module): owner for owner in model.modules() if isinstance(owner, PreTrainedModel)
              for module in owner.modules()}  # fmt: skip
    whole: list[dict[str, torch.Tensor]] = []

    def from_plain(name: str) -> torch.Tensor:
        if not whole:
            log.info("random weights: %s (and others) are set while the model is built; building it whole", name)
            torch.manual_seed(seed)
            built = plain()
            tensors: dict[str, torch.Tensor] = dict(built.named_buffers())
            tensors.update(built.named_parameters())
            whole.append(tensors)
        return whole[0][name].detach()

    def fill(part: nn.Module, name: str) -> None:
        state = torch.random.get_rng_state()
        torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        try:
            filled: dict[str, torch.Tensor] = {}
            for module_name, module in part.named_modules(prefix=name):
                for key, parameter in list(module.named_parameters(recurse=False)):
                    if parameter.is_meta and not isinstance(parameter, DTensor):
                        new = nn.Parameter(_unset(parameter), parameter.requires_grad)
                        _fill_shared(model, parameter, new)
                        filled[f"{module_name}.{key}".lstrip(".")] = new
                for key, buffer in module.named_buffers(recurse=False):
                    if buffer.is_meta:
                        module._buffers[key] = _unset(buffer)
            for module in reversed(list(part.modules())):
                owners[id(module)]._initialize_weights(module)
            if part is model:
                filled.update(model.named_buffers())
            with torch.no_grad():
                for key, tensor in filled.items():
                    if bool(_is_unset(tensor).any()):
                        tensor.copy_(from_plain(key))
        finally:
            torch.random.set_rng_state(state)

    return fill


def _unset(like: torch.Tensor) -> torch.Tensor:
    """Memory on the CPU that shows where nothing has been written: NaN, or the smallest whole number."""
    empty = torch.empty_like(like, device="cpu")
    if like.is_floating_point():
        return empty.fill_(math.nan)
    return empty.zero_() if like.dtype == torch.bool else empty.fill_(torch.iinfo(like.dtype).min)


def _is_unset(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.isnan()
    return torch.zeros(1, dtype=torch.bool) if tensor.dtype == torch.bool else tensor == torch.iinfo(tensor.dtype).min


def _fill_shared(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in place of another everywhere that it stands."""
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is old:
                module._parameters[key] = new


def refuse_uninitialised(model: nn.Module, folder: Path | None = None) -> None:
    """No parameter or buffer may be left on the meta device, or hold what memory held before.

    Args:
        folder: where the weights were read from.

    Raises:
        RuntimeError: names it. (A bug of ours or of transformers, not of the user's.)
        UserError: weights that were read are not finite.
    """
    bytes_alone = {id(each.packed) for each in quantized.members(model).values()}  # they were proved before
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise RuntimeError(f"{name} was left without memory")
        if id(tensor) in bytes_alone:
            continue
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not local.is_floating_point():
            continue
        # A buffer may be a bound, and infinite.
        wrong = torch.isfinite(local).logical_not() if isinstance(tensor, nn.Parameter) else torch.isnan(local)
        if bool(wrong.any()) and folder is not None:
            raise UserError(
                f"{folder}: {name} holds a value that is not finite; bring the model again, and see model.overrides"
            )
        if bool(wrong.any()):
            raise RuntimeError(f"{name} was left uninitialised, or holds a value that is not finite")
    log.info("weights: every parameter and buffer has its value")
