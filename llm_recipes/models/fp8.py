"""Linear layers that multiply in 8 bits (`parallel.fp8`), by `torchao`.

Each of the three products of a linear layer (its output, its input's gradient, its weight's gradient) casts both of its
factors to 8-bit floats just before, and gives bf16. A factor is multiplied by a scale that brings its largest magnitude
to the format's largest number, and the product is divided by it again.

    tensorwise  one scale for a whole tensor; inputs and weights in e4m3, gradients in e5m2
    rowwise     one for each row that is summed over, rounded down to a power of two; everything in e4m3

Weights, their names, gradients, optimizer and checkpoints are what they are without. Where `tensorwise` shards weights
they are cast before they are gathered, and a quarter of their fp32 bytes goes over the wire, a half of what bf16 would
send; the scale is of the whole weight, and no number differs from those of a weight that is cast after. (`rowwise`
gathers in bf16: the backward pass needs scales along the other axis.)

What is measured on the way (proofs, validation, evaluation, generated text) is computed without, in the dtype that
computes: a scale of a whole tensor makes every token depend on all the others of its batch, documents on one another
too. (Never run on a GPU yet; on a CPU the 8-bit numbers are real and their products are computed in fp32.)
"""

import importlib.util
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd

from llm_recipes.config import ParallelConfig
from llm_recipes.errors import UserError
from llm_recipes.models import sharding

log = logging.getLogger(__name__)

MULTIPLE = 16
"""The products' kernels take dimensions that are multiples of it."""
LEAST_CAPABILITY = (8, 9)
"""Of a GPU with products in 8 bits: Ada and Hopper, and what came after."""


def refuse_what_is_missing(parallel: ParallelConfig) -> None:
    """Find out early whether what 8 bits need is installed.

    Raises:
        UserError: names the extra.
    """
    if parallel.fp8 != "none" and importlib.util.find_spec("torchao") is None:
        raise UserError(f"parallel.fp8={parallel.fp8}: torchao is not installed; pip install 'llm_recipes[fp8]'")


def refuse_device(parallel: ParallelConfig, device: torch.device) -> None:
    """Refuse a GPU without products in 8 bits. A CPU computes the same numbers another way, and the log says so.

    Raises:
        UserError: names the device.
    """
    if parallel.fp8 == "none" or device.type == "cpu":
        return
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise UserError(
            f"parallel.fp8={parallel.fp8}: {torch.cuda.get_device_name(device)} has no products in 8 bits (compute "
            f"capability {'.'.join(map(str, LEAST_CAPABILITY))} or more has); set parallel.fp8=none"
        )


def choose(
    model: Any, parallel: ParallelConfig, precision: sharding.Precision
) -> tuple[dict[str, nn.Linear], dict[str, list[str]]]:
    """Linear layers inside a model's layers, by name: those that can multiply in 8 bits; and by the reason, the names
    of those that are left as they are.

    Raises:
        UserError: there are none to convert.
    """
    in_fp32 = {id(module) for module in sharding.declared_fp32(model, precision)}
    names = {id(module): name for name, module in model.named_modules()}
    chosen: dict[str, nn.Linear] = {}
    left: dict[str, list[str]] = {}
    for layer in sharding.layers(model):
        routers = {id(module) for module in _routers(layer)}
        listed = {id(m) for each in layer.modules() if isinstance(each, nn.ModuleList) for m in each.modules()}
        for module in layer.modules():
            name = names[id(module)]
            fused = any(each.ndim == 3 for each in module.parameters(recurse=False))
            if fused and not isinstance(module, _ConvNd):
                left.setdefault("fused experts", []).append(name)
            if type(module) is not nn.Linear:
                continue
            if id(module) in in_fp32:
                left.setdefault("declared fp32", []).append(name)
            elif id(module) in routers:
                left.setdefault("chooses experts", []).append(name)
            elif id(module) in listed:  # it may get no token at all
                left.setdefault("one of a list of experts", []).append(name)
            elif module.in_features % MULTIPLE or module.out_features % MULTIPLE:
                shape = f"{module.out_features} x {module.in_features}, no multiples of {MULTIPLE}"
                left.setdefault(shape, []).append(name)
            else:
                chosen[name] = module
    if not chosen:
        why = "; ".join(f"{reason}: {', '.join(some[:3])}" for reason, some in left.items())
        raise UserError(
            f"parallel.fp8={parallel.fp8}: {model.config.model_type} has no linear layer to convert inside its layers"
            f"{f' ({why})' if why else ''}; set parallel.fp8=none"
        )
    return chosen, left


def _routers(layer: nn.Module) -> Iterator[nn.Linear]:
    """Linear layers that have an output for each of the experts that they stand beside."""
    for parent in layer.modules():
        counts = set()
        for child in parent.children():
            if isinstance(child, nn.ModuleList):
                counts.add(len(child))
            elif not isinstance(child, _ConvNd):
                counts |= {each.shape[0] for each in child.parameters(recurse=False) if each.ndim == 3}
        counts |= {each.shape[0] for each in parent.parameters(recurse=False) if each.ndim == 3}
        if counts and not isinstance(parent, _ConvNd | nn.ModuleList):
            yield from (
                module for module in parent.modules() if isinstance(module, nn.Linear) and module.out_features in counts
            )


def convert(model: Any, parallel: ParallelConfig, precision: sharding.Precision, device: torch.device) -> None:
    """Let the linear layers inside a meta model's layers multiply in 8 bits; before they are compiled and sharded.

    Raises:
        UserError: there are none; torchao is not installed; this device cannot.
    """
    refuse_what_is_missing(parallel)
    refuse_device(parallel, device)
    chosen, left = choose(model, parallel, precision)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    emulated = device.type == "cpu"
    # Not `enable_fsdp_float8_all_gather`: it makes every shard a tensor of another class, for the reader of weights,
    # the optimizer and the checkpoints too. `gather_in_8_bits` leaves them plain.
    recipe = replace(Float8LinearConfig.from_recipe_name(parallel.fp8), emulate=emulated)
    convert_to_float8_training(model, config=recipe, module_filter_fn=lambda module, name: name in chosen)
    for name in chosen:
        # A class, and not a `forward` of each: compiled layers would then no longer share one graph.
        model.get_submodule(name).__class__ = _switched()
    numbers = sum(each.weight.numel() for each in chosen.values())
    log.info(
        "8 bits (%s): %d linear layers, %s of %s parameters; embeddings, head and norms stay as they are",
        parallel.fp8, len(chosen), f"{numbers:,}", f"{sum(each.numel() for each in model.parameters()):,}",
    )  # fmt: skip
    for reason, names in left.items():
        log.info("8 bits: in %s as without, %d modules (%s): %s%s", precision.name, len(names), reason,
                 ", ".join(names[:3]), " ..." if names[3:] else "")  # fmt: skip
    if emulated:
        log.warning(
            "parallel.fp8=%s: emulated in float32, this is a CPU: the numbers of 8 bits, and none of their speed",
            parallel.fp8,
        )


def members(model: nn.Module) -> list[Any]:
    """A model's linear layers that multiply in 8 bits."""
    return [module for module in model.modules() if hasattr(module, "in_8_bits")]


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Inside, every linear layer computes as it would without."""
    changed = [linear for linear in members(model) if linear.in_8_bits]
    for linear in changed:
        linear.in_8_bits = False
    try:
        yield
    finally:
        for linear in changed:
            linear.in_8_bits = True


@cache
def _switched() -> Any:
    """torchao's linear layer, which can also compute as a plain one, and takes any number of rows."""
    from torchao.float8.float8_linear import Float8Linear

    class SwitchedLinear(Float8Linear):
        """
        Attributes:
            in_8_bits: whether it multiplies so.
            plain: the weight to use where it does not, if its own has been gathered in 8 bits.
        """

        in_8_bits = True
        plain: torch.Tensor | None = None

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            """(..., in_features) to (..., out_features)."""
            if not self.in_8_bits:
                return F.linear(inputs, self.weight if self.plain is None else self.plain, self.bias)
            flat = inputs.reshape(-1, inputs.shape[-1])
            rows = flat.shape[0]
            if rows % MULTIPLE == 0:
                return super().forward(inputs)
            # The weight's gradient is a sum over rows: those of zeros add nothing, and no scale heeds them.
            padded = super().forward(F.pad(flat, (0, 0, 0, -rows % MULTIPLE)))
            return padded[:rows].reshape(*inputs.shape[:-1], -1)

    return SwitchedLinear


class _Gathered:
    """A sharded weight that FSDP gathers in 8 bits: its two hooks for that, which hang on the shard itself.

    Attributes:
        parameter: the sharded weight.
        scale: fp32 scalar of the whole weight, from the last forward pass; None: there was none yet.
    """

    def __init__(self, linear: Any, compute: torch.dtype) -> None:
        self.parameter: Any = linear.weight
        self.compute = compute
        self.scale: torch.Tensor | None = None
        self._products = linear.linear_mm_config
        self._format = linear.config.cast_config_weight.target_dtype
        # The tensor that FSDP keeps and looks at, and not a view of it.
        self.parameter._local_tensor.fsdp_pre_all_gather = self._before
        self.parameter._local_tensor.fsdp_post_all_gather = self._after

    def whole(self) -> torch.Tensor:
        """The weight in the dtype that computes, gathered in it."""
        return self.parameter.detach().to(self.compute).full_tensor()

    def _before(self, mesh: Any) -> tuple[tuple[torch.Tensor], tuple[torch.Tensor]]:
        if self.scale is None:
            set_scales([self])
        from torchao.float8.float8_utils import to_fp8_saturated

        shard = self.parameter._local_tensor.to(self.compute).float()
        return (to_fp8_saturated(shard * self.scale, self._format),), (self.scale,)  # type: ignore[return-value]

    def _after(
        self, outputs: tuple[torch.Tensor], metadata: tuple[torch.Tensor], dtype: torch.dtype, *, out: Any = None
    ) -> Any:
        from torchao.float8 import Float8TrainingTensor, GemmInputRole

        (numbers,), (scale,) = outputs, metadata
        if out is not None:
            out._scale = scale
            return None
        return Float8TrainingTensor(numbers, scale, dtype, self._products, GemmInputRole.WEIGHT), (numbers,)


@torch.no_grad()
def set_scales(weights: list[_Gathered]) -> None:
    """Find the scales of some weights, with one reduction for all of them over the ranks that share them."""
    from torchao.float8.float8_utils import amax_to_scale

    largest = torch.stack(torch._foreach_norm([each.parameter._local_tensor for each in weights], ord=math.inf))
    dist.all_reduce(largest, dist.ReduceOp.MAX, weights[0].parameter.device_mesh["shard"].get_group())
    # Rounding keeps the order: the largest rounded number is the largest number, rounded.
    scales = amax_to_scale(largest.to(weights[0].compute), weights[0]._format)
    for each, scale in zip(weights, scales.unbind(), strict=True):
        each.scale = scale


def gather_in_8_bits(model: Any, parallel: ParallelConfig, precision: sharding.Precision, ranks: int) -> None:
    """Have the weights of a sharded model cast before they are gathered, where that can be. Once every parameter has
    its place: FSDP takes the hooks over when a model first runs.

    Args:
        ranks: that the weights are sharded over.
    """
    linears = members(model)
    if not linears or parallel.fp8 != "tensorwise" or ranks == 1:
        return
    if parallel.cpu_offload:
        log.info("8 bits: with parallel.cpu_offload weights are gathered in %s", precision.compute_name)
        return
    evenly = [linear for linear in linears if gathers_in_8_bits(linear.weight, parallel, ranks)]
    weights = {linear: _Gathered(linear, precision.compute) for linear in evenly}
    if weights:
        # At each pass, and not after each update: whatever moved the weights, no scale is an old one's. Before FSDP's
        # own hook, which has its streams wait for what is queued by then.
        model.register_forward_pre_hook(lambda *_: set_scales(list(weights.values())), prepend=True)
    for layer in sharding.layers(model):
        inside = {module: weights[module] for module in layer.modules() if module in weights}
        layer.register_forward_pre_hook(partial(_bring_plain, inside))
        layer.register_forward_hook(partial(_drop_plain, inside), always_call=True)
    uneven = f"; the rows of the others are no multiple of {ranks} ranks" if len(weights) < len(linears) else ""
    log.info("8 bits: %d of %d weights are gathered in 8 bits%s", len(weights), len(linears), uneven)


def _bring_plain(weights: dict[Any, _Gathered], layer: nn.Module, *_: Any) -> None:
    """Outside of the layer's own forward, which may be compiled."""
    for linear, weight in weights.items():
        if not linear.in_8_bits:
            linear.plain = weight.whole()


def _drop_plain(weights: dict[Any, _Gathered], layer: nn.Module, *_: Any) -> None:
    for linear in weights:
        linear.plain = None


def gathers_in_8_bits(weight: torch.Tensor, parallel: ParallelConfig, ranks: int) -> bool:
    """Whether a converted weight that is sharded over so many ranks is gathered in 8 bits: its rows lie evenly, since
    FSDP pads the shards of others in new memory, where the hooks would not be; nor are those that it fetches from the
    host the tensors with the hooks."""
    there = parallel.fp8 == "tensorwise" and not parallel.cpu_offload and ranks > 1
    return there and weight.shape[0] % ranks == 0
