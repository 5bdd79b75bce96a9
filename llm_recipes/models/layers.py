"""What is done to each layer: recompute its activations, compile it.

Both replace the layer's `forward`, inside FSDP's hooks, so that parameter names never change. Compiling goes around
recomputing and not the other way: what `selective` keeps is chosen operator by operator, and out of a compiled layer
come no operators that it would know (inductor's products are written into buffers), so that all of them would be
computed again. Inside, torch's partitioner of forward and backward obeys the choice.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.utils import output_capturing

MATRIX_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}
"""Costly to compute again: `selective` keeps their results and recomputes the rest."""
PRODUCTS_BY_NAME = (
    "transformers::grouped_mm_fallback", "flash_attn::_flash_attn", "flash_attn_3::", "flash_attn_4::",
    "torch_attn::_varlen_attn",
)  # fmt: skip
"""The same of packages that may not be there, or not yet: experts without a kernel of torch's, flash attention."""
BACKEND = "inductor"
"""Of `torch.compile`."""


def _is_product(operation: Any) -> bool:
    return operation in MATRIX_PRODUCTS or str(operation).replace(".", "::", 1).startswith(PRODUCTS_BY_NAME)


def _keep_matrix_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_product(operation) else CheckpointPolicy.PREFER_RECOMPUTE


def recompute(forward: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """A forward whose activations are recomputed in the backward pass: `full`, or all but matrix products."""
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_matrix_products)

    def forward_again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return forward_again


def whether_to_compile(asked: str | bool, device: torch.device, beside_experts: bool = False) -> tuple[bool, str]:
    """Whether layers are compiled, and why. (`auto` on CUDA has never run on a GPU yet.)

    Args:
        asked: `model.compile`.
        beside_experts: whether an adapter stands beside fused weights of experts: a graph break at each (peft 0.19).
    """
    if asked != "auto":
        return bool(asked), "asked for"
    if device.type != "cuda":
        return False, f"model.compile=auto: not on the {device.type}"
    if beside_experts:
        return False, "model.compile=auto: not with an adapter beside fused experts"
    # Triton compiles the launchers of its kernels with it; where there is none, the first step would fail.
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return False, "model.compile=auto: there is no C compiler (gcc, or CC) here"
    return True, "model.compile=auto: on CUDA"


def compile_forward(forward: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that is compiled where it trains.

    Training has one shape. Without gradients batches come in many (proofs, validation, generated text): each would be
    a compilation of its own, or make the compiler give up fixed shapes, and with them speed, for training too.
    """
    compiled = torch.compile(forward, dynamic=False, backend=BACKEND)

    def forward_compiled(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        with _collecting():
            return compiled(*args, **kwargs)

    return forward_compiled


@contextmanager
def _collecting() -> Iterator[None]:
    """Let the compiler follow what transformers collects on the way, such as the logits of routers.

    It does so by hooks that look up where to in a context variable: a graph break at each router, and where activations
    are recomputed the whole layer uncompiled. Its collector can be a plain variable too (transformers 5.23). Each layer
    gets an empty one: by the length of a common one the compiler would tell layers apart.
    """
    collector = getattr(output_capturing, "_active_collector", None)
    collected = collector and collector.get()
    # Of hidden states the first layer gives another than the others, and must see the common collector.
    if collector is None or not collected or "hidden_states" in collected:
        yield
        return
    own: dict[str, list[Any]] = {key: [] for key in collected}
    collector.compiling, collector.global_var = True, own
    try:
        yield
    finally:
        collector.compiling, collector.global_var = False, None
    for key, values in own.items():
        collected[key].extend(values)


def _settle_compiler(layers: int, memory_budget: float | None) -> None:
    """The compiler's options that there is no argument for.

    All layers share one code, and with it one count of compilations, after which torch (2.13: 8 of them) runs the rest
    uncompiled. Most families' layers are alike to the compiler; where one reads its own number, as with transformers'
    flash attention (5.23), each is compiled for itself, and may be twice.
    """
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    dynamo.recompile_limit = max(dynamo.recompile_limit, 8 + 2 * layers)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 8 + 2 * layers)
    # A recomputed layer collects once: not again in the backward pass, where nobody waits for it.
    dynamo.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    functorch.activation_memory_budget = 1.0 if memory_budget is None else memory_budget


def prepare(
    layers: list[nn.Module], activation_checkpointing: str, compiled: bool, memory_budget: float | None = None
) -> None:
    """Replace the layers' forwards, in place, before they are sharded.

    Args:
        memory_budget: of compiled layers with `selective`: see `ModelConfig.activation_memory_budget`.
    """
    if compiled:
        _settle_compiler(len(layers), memory_budget)
    for layer in layers:
        plain = forward = layer.forward
        if activation_checkpointing != "none" and memory_budget is None:
            forward = recompute(forward, activation_checkpointing)
        layer.forward = compile_forward(forward, plain) if compiled else forward


def compilations() -> str | None:
    """What the compiler has done in this process so far, in words; None: nothing.

    A graph break is a place where a layer falls into parts, with what lies between them not compiled.
    """
    import sys

    if "torch._dynamo.utils" not in sys.modules:
        return None
    counters = sys.modules["torch._dynamo.utils"].counters
    graphs, breaks = counters["stats"]["unique_graphs"], counters["graph_break"]
    if not graphs and not breaks:
        return None
    first = f" (the first: {next(iter(breaks)).strip().splitlines()[0]})" if breaks else ""
    return f"{graphs} graphs compiled, {sum(breaks.values()) or 'no'} graph breaks{first}"
