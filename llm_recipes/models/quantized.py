"""Linear layers whose weights stand still in 4 bits (NF4: Dettmers et al., "QLoRA", 2023), by `bitsandbytes`.

A row of a weight is cut into blocks of 64 numbers, each with the largest of its magnitudes in fp32: 4.5 bits a number.
A row's bytes are one row of a parameter in the compute dtype, and FSDP shards and gathers them like any other, without
a cast; each rank makes its own rows. The forward pass makes the whole weight of one layer, the backward pass makes it
again: what is kept for it are the bytes.

Of 7.2 billion parameters 7.0 lie in such layers: 3.9 GB, and 0.5 GB for embeddings and head in fp16. On two GPUs it is
2.2 GB each, beside an adapter's 16 bytes a parameter (42 million at rank 16: 0.3 GB each), one layer at a time whole
(0.1 GB, and as much for its largest weight) and activations. A GPU of 16 GB without bf16 (T4) computes in `fp16-mixed`.
(Never run on a GPU yet.)
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from llm_recipes.errors import UserError
from llm_recipes.models import sharding

log = logging.getLogger(__name__)

BLOCK = 64
"""Numbers that share a scale."""
BLOCK_BYTES = BLOCK // 2 + 4
"""Of a block: two numbers a byte, and its scale."""


def pack(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight in 4 bits.

    Args:
        weight: (rows, columns) of any float dtype.
        dtype: that the bytes pass for.

    Returns:
        (rows, ...) of `dtype`: each row's numbers, two a byte, and then its scales.
    """
    from bitsandbytes.functional import quantize_4bit

    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % BLOCK)).contiguous()
    blocks = padded.shape[1] // BLOCK
    if not rows:
        return torch.empty(0, blocks * BLOCK_BYTES // dtype.itemsize, dtype=dtype, device=weight.device)
    numbers, state = quantize_4bit(padded.view(-1), blocksize=BLOCK, quant_type="nf4")
    scales = state.absmax.float().view(rows, blocks).view(torch.uint8)
    return torch.cat([numbers.view(rows, -1), scales], 1).view(dtype)


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The weight that `pack` was given, as 4 bits have it: (rows, columns), in the dtype that the bytes pass for."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    raw = packed.view(torch.uint8)
    rows, blocks = raw.shape[0], raw.shape[1] // BLOCK_BYTES
    numbers = raw[:, : blocks * BLOCK // 2].contiguous()
    scales = raw[:, blocks * BLOCK // 2 :].contiguous().view(torch.float32)
    shape = torch.Size((rows, blocks * BLOCK))
    state = QuantState(scales.view(-1), shape=shape, dtype=packed.dtype, blocksize=BLOCK, quant_type="nf4")
    return dequantize_4bit(numbers.view(-1, 1), state)[:, :columns]


class _Product(torch.autograd.Function):
    """A linear layer's product; the bytes are kept for the backward pass, and there is no gradient but the input's."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, columns: int
    ) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.columns = columns
        return F.linear(inputs, unpack(packed, columns), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (packed,) = ctx.saved_tensors
        return gradient @ unpack(packed, ctx.columns) if ctx.needs_input_grad[0] else None, None, None, None


class Linear4bit(nn.Module):
    """A linear layer that does not train, in 4 bits.

    Attributes:
        packed: see `pack`.
        bias: as the layer had it.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        width = -(-self.in_features // BLOCK) * BLOCK_BYTES // dtype.itemsize
        packed = torch.empty(self.out_features, width, dtype=dtype, device=linear.weight.device)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        product: torch.Tensor = _Product.apply(inputs, self.packed, self.bias, self.in_features)
        return product


def members(model: nn.Module) -> dict[str, Linear4bit]:
    """A model's layers in 4 bits, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def replace(model: Any, precision: sharding.Precision) -> None:
    """Put layers in 4 bits in place of the linear ones inside a meta model's layers, with an adapter beside them or
    not. What the model declares fp32 stays as it is.

    Raises:
        UserError: there are none.
    """
    left_alone = {id(module) for module in sharding.declared_fp32(model, precision)}
    total = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    held, count, bytes_held = 0, 0, 0
    for layer in sharding.layers(model):
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is not nn.Linear or child.weight.requires_grad or id(child) in left_alone:
                    continue  # what trains is the adapter
                own = Linear4bit(child, precision.compute)
                setattr(parent, name, own)
                held, count = held + child.weight.numel(), count + 1
                bytes_held += own.packed.numel() * own.packed.element_size()
    if not count:
        raise UserError("adapter.base=4bit: the model has no linear layers inside its layers; set adapter.base=full")
    log.info(
        "4 bits: %d linear layers, %s of %s parameters, in %.3g GB (%.3g GB before); head, embeddings, norms and fused "
        "experts stay as they are", count, f"{held:,}", f"{total:,}", bytes_held / 1e9,
        held * precision.compute.itemsize / 1e9,
    )  # fmt: skip


@contextmanager
def whole(model: nn.Module, device: torch.device) -> Iterator[Callable[[], None] | None]:
    """Inside, plain linear layers stand in the places of those in 4 bits, for a reader of weights; what it gives back
    packs those that have their weights by now, and is called at the end too. None where nothing is in 4 bits."""
    places = members(model)
    if not places:
        yield None
        return
    stand_ins = {name: _stand_in(own) for name, own in places.items()}

    def settle() -> None:
        for name, plain in stand_ins.items():
            if not plain.weight.is_meta:
                _take(places[name], plain, name, device)
            places[name].bias = plain.bias

    def put(modules: dict[str, Any]) -> None:
        for name, module in modules.items():
            parent, _, own_name = name.rpartition(".")
            model.get_submodule(parent)._modules[own_name] = module

    put(stand_ins)
    try:
        yield settle
        settle()
    finally:
        put(places)


def _stand_in(own: Linear4bit) -> nn.Linear:
    """A linear layer with a weight on the meta device, sharded as the bytes are."""
    plain = nn.Linear(own.in_features, own.out_features, bias=False, device="meta", dtype=own.packed.dtype)
    plain.weight = _empty_weight(own)
    plain.bias = own.bias
    return plain


def _empty_weight(own: Linear4bit) -> nn.Parameter:
    packed, columns = own.packed, own.in_features
    if not isinstance(packed, DTensor):
        weight = torch.empty(own.out_features, columns, dtype=packed.dtype, device="meta")
    else:
        local = torch.empty(packed.to_local().shape[0], columns, dtype=packed.dtype, device="meta")
        weight = _sharded_like(packed, local, columns)
    parameter = nn.Parameter(weight, requires_grad=False)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    return parameter


def _sharded_like(packed: DTensor, local: torch.Tensor, columns: int) -> torch.Tensor:
    shape = torch.Size((packed.shape[0], columns))
    return DTensor.from_local(
        local, packed.device_mesh, packed.placements, run_check=False, shape=shape, stride=(columns, 1)
    )


def _take(own: Linear4bit, plain: nn.Linear, name: str, device: torch.device) -> None:
    """Pack this rank's rows of a weight, and forget the weight."""
    weight = plain.weight.detach()
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    if not bool(torch.isfinite(local).all()):
        raise UserError(f"{name}.weight holds a value that is not finite; bring the model again")
    rows = pack(local.to(device), own.packed.dtype)
    value = _sharded_like(own.packed, rows, rows.shape[1]) if isinstance(own.packed, DTensor) else rows
    own.packed = nn.Parameter(value, requires_grad=False)
    own.packed._is_hf_initialized = True  # type: ignore[attr-defined]
    plain.weight = _empty_weight(own)
