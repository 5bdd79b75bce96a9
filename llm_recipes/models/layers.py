"""What is done to each layer: recompute its activations, compile it.

Both replace the layer's `forward`, inside FSDP's hooks, so that parameter names never change.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MATRIX_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Costly to compute again: `selective` keeps their results and recomputes the rest."""


def _keep_matrix_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in MATRIX_PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


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


def prepare(layers: list[nn.Module], activation_checkpointing: str, compiled: bool) -> None:
    """Replace the layers' forwards, in place, before they are sharded."""
    for layer in layers:
        if compiled:
            layer.forward = torch.compile(layer.forward)
        if activation_checkpointing != "none":
            layer.forward = recompute(layer.forward, activation_checkpointing)
