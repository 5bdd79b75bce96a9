"""Flash attention over documents laid end to end, with torch alone (`model.attention=varlen`): the kernel that torch
carries (`torch.nn.attention.varlen`), as one of transformers' attentions. No package has to be installed for it.

Where documents begin it is told by `masking` (the way `flat`). Whatever comes without that, as padded rows of text that
is generated, is torch's own attention with transformers' mask for it. (Never run on a GPU yet; shown on a CPU with a
stand-in for the kernel.)
"""

from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llm_recipes.errors import UserError

NAME = "varlen"


def register() -> None:
    """Let models be built with it."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def refuse_where_it_cannot_be(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """
    Raises:
        UserError: another device or dtype than the kernel's, or a model that takes no flash attention.
    """
    said = f"model.attention={NAME}"
    if device.type != "cuda":
        raise UserError(f"{said}: torch's kernel needs a GPU; use sdpa")
    if dtype not in (torch.bfloat16, torch.float16):
        raise UserError(f"{said}: its kernel computes in bf16 or fp16; use parallel.precision=bf16-mixed, or sdpa")
    if not model._supports_flash_attn:
        raise UserError(f"{said}: {model.config.model_type} takes no flash attention; use model.attention=auto")


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Of queries (1, heads, T, D), and keys and values (1, kv heads, T, D): (1, T, heads, D).

    Raises:
        UserError: what this kernel has not: dropout, soft-capped scores, sinks.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    lacks = [name for name in ("softcap", "s_aux", "position_bias") if more.get(name) is not None]
    if lacks or dropout:
        raise UserError(
            f"model.attention={NAME}: torch's kernel has no {' and no '.join(lacks or ['dropout'])}, and this model's "
            "attention does; use model.attention=auto"
        )
    from torch.nn.attention import varlen

    heads, kv_heads = query.shape[1], key.shape[1]
    query, key, value = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    back = -1 if sliding_window is None else sliding_window - 1  # a window counts the token itself
    grouped: Any = {"enable_gqa": True} if heads != kv_heads else {}
    result: Any = varlen.varlen_attn(
        query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
        window_size=(back, 0), **grouped,
    )  # fmt: skip
    return result[None], None
