"""What a token costs: floating point operations, from the model's own shapes.

Per token and training step, 6 operations for each weight that multiplies it (2 forward, 4 backward) and
12 * layers * heads * head_dim * seq_len for attention (scores and their use, over the whole window);
recomputation is not counted. (Chowdhery et al., "PaLM", 2022, appendix B; torchtitan counts so too.)
A weight that does not train needs 2 of the 4 backward: there is no gradient of its own.
"""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from torch import nn

PEAK_FLOPS = {
    # Dense bf16, per device, from the vendors' data sheets; products in 8 bits (`parallel.fp8`) are held against it.
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device, or None for one that is not in the table: then there is no MFU."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


@dataclass(frozen=True)
class Cost:
    """Parameters and operations of a model."""

    parameters: int
    active_parameters: int
    """Of a mixture of experts: those that one token meets."""
    matrix_parameters: int
    """Those that a token is multiplied with."""
    attention_width: int
    """Layers * heads * head_dim."""
    frozen_matrix_parameters: int = 0
    """Those of them that do not train."""

    def per_token(self, seq_len: int) -> float:
        """Operations per token of a training step."""
        weights = 6 * self.matrix_parameters - 2 * self.frozen_matrix_parameters
        return weights + 12 * self.attention_width * seq_len


def _first(config: Any, *names: str) -> int | None:
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # transformers: it differs from layer to layer
            continue
        if isinstance(value, int):
            return value
    return None


def _attention_width(text: Any) -> int:
    """Heads * head_dim, summed over the layers."""
    layers = _first(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers") or 0
    each_layer = [text] * layers
    if getattr(text, "is_heterogeneous", False):
        each_layer = [text.per_layer_config[layer] for layer in range(layers)]
    total = 0
    for layer in each_layer:
        heads = _first(layer, "num_attention_heads", "n_head", "n_heads", "num_heads") or 0
        hidden = _first(layer, "hidden_size", "n_embd", "d_model") or 0
        head_dim = _first(layer, "head_dim") or (hidden // heads if heads else 0)
        # Latent attention: keys and values of their own sizes, scores and their use half of the work each.
        width = ((_first(layer, "qk_head_dim") or head_dim) + (_first(layer, "v_head_dim") or head_dim)) // 2
        total += heads * width
    return total


def experts(text: Any) -> int | None:
    """How many experts a layer has, as a model's configuration says; None where it says nothing."""
    return _first(text, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def cost(model: Any, of_experts: Set[nn.Parameter] = frozenset()) -> Cost:
    """Count a model's parameters and what a token costs, from its modules and its configuration.

    A linear layer's weight multiplies every token, the output head's too (tied or not), an embedding's none.
    Of fused experts (three axes, the first as many as there are experts) a token meets `top_k`.

    Args:
        of_experts: further parameters of which a token meets its experts' part.
    """
    text = model.config.get_text_config()
    count = experts(text)
    top_k = _first(text, "num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk", "num_experts_per_token")
    share = top_k / count if count and top_k else 1.0

    total, active, matrix, frozen = 0.0, 0.0, 0.0, 0.0
    seen: set[int] = set()
    embedding = model.get_input_embeddings()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            expert = count is not None and parameter.ndim >= 3 and parameter.shape[0] == count
            expert = expert or parameter in of_experts
            size = parameter.numel() * (share if expert else 1)
            # A tied weight is stored once, and multiplies where it is the head.
            is_matrix = parameter.ndim >= 2 and not isinstance(module, nn.Embedding) and module is not embedding
            matrix += size if is_matrix else 0
            frozen += size if is_matrix and not parameter.requires_grad else 0
            if id(parameter) not in seen:
                seen.add(id(parameter))
                total += parameter.numel()
                active += size
    return Cost(int(total), int(active), int(matrix), _attention_width(text), int(frozen))
