"""Attention for the trace: what each kernel keeps for the backward pass, and what it makes in it, without a device that
has the kernel."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llm_recipes.models import varlen

NAMES = {"flash": "planned_tiles", "fused": "planned_fused"}
"""As transformers knows them; a name with `flash` in it would be looked for among its kernels."""


class _Flash(torch.autograd.Function):
    """Keeps queries, keys, values, the result, and a number for each row of scores; never the scores.
    (Dao et al., "FlashAttention", 2022, algorithm 1 and its backward pass.)"""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rows, heads, length, _ = query.shape
        result = query.new_empty(rows, length, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, result, query.new_empty(rows, heads, length, dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def flash(module: nn.Module, query: Any, key: Any, value: Any, mask: Any = None, **_: Any) -> tuple[Any, None]:
    """Of queries (B, heads, T, D), and keys and values (B, kv heads, T, D): (B, T, heads, D)."""
    return _Flash.apply(query, key, value), None


def fused(module: nn.Module, query: Any, key: Any, value: Any, mask: Any = None, **_: Any) -> tuple[Any, None]:
    """torch's own, with documents kept apart: a mask of T x T in each layer, and keys and values once for each head."""
    length, repeated = query.shape[2], query.shape[1] // key.shape[1]
    bias = query.new_empty(query.shape[0], 1, length, key.shape[2]).expand(-1, query.shape[1], -1, -1)
    if repeated > 1:
        key, value = (each.repeat_interleave(repeated, 1) for each in (key, value))
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention.default
    result = kernel(query, key, value, bias, True)[0]
    return result.transpose(1, 2).contiguous(), None


def register(kind: str) -> str:
    """The name to build a model with whose attention is to be `flash` or `fused`; any other name is itself."""
    kernels = {"flash": flash, "fused": fused}
    if kind not in kernels:
        return kind
    ALL_ATTENTION_FUNCTIONS.register(NAMES[kind], kernels[kind])
    return NAMES[kind]


def assumed(model: Any, asked: str, compute: torch.dtype, mask_documents: bool) -> str:
    """Which attention a run will have, on a device that has flash-attn installed where that is asked for (`auto`)."""
    if asked == "auto":
        return (
            "flash"
            if compute != torch.float32 and model._supports_flash_attn
            else assumed(model, "sdpa", compute, mask_documents)
        )
    if "flash" in asked or asked == varlen.NAME or (asked == "sdpa" and not mask_documents):
        return "flash"
    return "fused" if asked == "sdpa" else asked
