"""Flash attention over documents laid end to end, with torch alone (`model.attention=varlen`): the kernel that torch
carries (`torch.nn.attention.varlen`), as one of transformers' attentions. No package has to be installed for it.

Where documents begin it is told by `masking` (the way `flat`). Whatever comes without that, as padded rows of text that
is generated, is torch's own attention with transformers' mask for it. (Never run on a GPU yet; shown on a CPU with a
stand-in for the kernel. So `model.attention=auto` takes it only where a trial has shown it right on the GPU at hand.)
"""

from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llm_recipes.errors import UserError, first_line

NAME = "varlen"
LARGEST_HEAD = 256
TOLERANCE = 0.02
"""Of bf16's eight bits, over a few products: relative, in the root of squares."""


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
        raise UserError(f"{said}: {model.config.model_type} takes no flash attention; use model.attention=sdpa")


def why_not(model: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model's attention cannot be this one here; None: it can, as a trial on the device has just shown."""
    try:
        refuse_where_it_cannot_be(model, device, dtype)
    except UserError as error:
        return str(error)
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int):
        return "its heads are not the same in all layers, or not known"
    if getattr(text, "qk_rope_head_dim", None):
        return "its queries and values differ in size"
    if getattr(text, "attn_logit_softcapping", None) or getattr(text, "attention_dropout", 0):
        return "its attention has soft-capped scores, or dropout"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "its attention has sinks"
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    if size > LARGEST_HEAD:
        return f"its heads are larger than {LARGEST_HEAD}"
    return _trial(heads, getattr(text, "num_key_value_heads", None) or heads, size, device, dtype)


def _trial(heads: int, kv_heads: int, size: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Two documents through the kernel and through torch's attention under a mask: what was wrong, if anything."""
    generator = torch.Generator().manual_seed(0)
    length, first = 160, 67
    ends = torch.tensor([0, first, length], dtype=torch.int32, device=device)
    places = torch.arange(length, device=device)
    document = places >= first
    look = (document[:, None] == document[None, :]) & (places[:, None] >= places[None, :])

    def states(number: int) -> torch.Tensor:
        return torch.randn(1, number, length, size, generator=generator).to(device, dtype).requires_grad_()

    def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = query.float(), key.float(), value.float()
        return nn.functional.scaled_dot_product_attention(query, key, value, look, enable_gqa=True).transpose(1, 2)

    given = states(heads), states(kv_heads), states(kv_heads)
    upstream = torch.randn(1, length, heads, size, generator=generator).to(device)
    try:
        found, _ = attention(nn.Module(), *given, None, cu_seq_lens_q=ends, max_length_q=length)
        wanted = plain(*given)
        of_found = torch.autograd.grad(found, given, upstream.to(dtype))
        of_wanted = torch.autograd.grad(wanted, given, upstream)
    except Exception as error:  # a kernel that is not built for this GPU, or takes other arguments
        return f"a trial failed ({first_line(error)})"
    pairs = zip((found.detach(), *of_found), (wanted.detach(), *of_wanted), strict=True)
    apart = torch.stack([(mine.float() - its).norm() / its.norm() for mine, its in pairs]).max()  # NaN if any is
    return None if apart <= TOLERANCE else f"in a trial it lay {float(apart):.2g} from plain attention"


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
            "attention does; use model.attention=sdpa"
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
