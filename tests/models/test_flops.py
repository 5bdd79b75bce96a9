"""What a token costs is what PyTorch counts, and a device that is not known has no peak."""

from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llm_recipes.models.flops import cost, peak_flops

EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("mistral", {"num_key_value_heads": 4}),
    "grouped queries": ("mistral", {"num_key_value_heads": 1}),
    # Four heads of 16 on a hidden size of 32, and a head that shares the embedding's weight.
    "wide heads, tied": ("qwen3_tied", {"head_dim": 16}),
    "no gate, no rotary": ("gpt2", {"num_hidden_layers": None, "n_embd": 32, "n_layer": 3, "n_head": 4,
                                    "n_positions": 128, "num_attention_heads": None}),
    "experts": ("mixtral", {}),
    "experts with wide heads": ("qwen3_moe", {**EXPERTS, "num_experts": 4, "head_dim": 16}),
    "shared and routed experts": ("qwen2_moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24}),
    # Keys of 16 (half of it rotary), values of 8.
    "latent attention": ("deepseek_v3", {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                         "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
                         "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}),
}  # fmt: skip


def model_of(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    family, changes = MODELS[name]
    config = tiny.model_config(family, **changes)
    # Experts one by one, each on its own tokens: what is counted is what a token needs.
    config._experts_implementation = "eager"
    # On a CPU PyTorch has no formula for its fused attention, and so counts it as nothing: eager is matrix products.
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("seq_len", [16, 96])
def test_a_token_costs_what_pytorch_counts(name: str, seq_len: int) -> None:
    """Two lengths: with the short one weights count, with the long one attention."""
    torch.manual_seed(0)
    model = model_of(name)
    ids = torch.randint(256, (2, seq_len))
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, use_cache=False).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    tokens = ids.numel()
    # Rotary angles are a product too, too small for the formula.
    assert cost(model).per_token(seq_len) * tokens == pytest.approx(3 * forward, rel=2e-3)
    assert cost(model).per_token(seq_len) * tokens == pytest.approx(counter.get_total_flops(), rel=2e-3)


@pytest.mark.parametrize(("name", "targets"), [
    ("dense", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}),
    ("wide heads, tied", {"target_modules": ["q_proj", "down_proj"]}),
])  # fmt: skip
def test_beside_an_adapter_a_token_costs_what_pytorch_counts(name: str, targets: dict[str, Any]) -> None:
    """Weights that stand still have no gradient of their own; the adapter's have."""
    import peft

    torch.manual_seed(0)
    plain = model_of(name)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, **targets), plain)
    ids = torch.randint(256, (2, 16))
    # Hidden states that need a gradient, as those of every layer but the first do.
    hidden = plain.get_input_embeddings()(ids).detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        plain(inputs_embeds=hidden, use_cache=False).logits.sum().backward()
    found = cost(plain)
    assert 0 < found.frozen_matrix_parameters < found.matrix_parameters
    assert found.per_token(16) * ids.numel() == pytest.approx(counter.get_total_flops(), rel=2e-3)


def test_a_cost_needs_no_weights_and_counts_each_parameter_once() -> None:
    from llm_recipes.models.loading import empty_model

    for name, (family, changes) in MODELS.items():
        model = model_of(name)
        found = cost(model)
        assert found.parameters == sum(each.numel() for each in model.parameters()), name
        assert cost(empty_model(tiny.model_config(family, **changes), torch.float32, None)) == found, name


def test_a_token_meets_the_experts_it_is_sent_to() -> None:
    model = model_of("experts")
    experts = sum(each.numel() for name, each in model.named_parameters() if ".experts." in name)
    found = cost(model)
    assert experts > 0
    assert found.parameters - found.active_parameters == experts // 2, "two of four"
    assert found.active_parameters < found.parameters
    dense = cost(model_of("dense"))
    assert dense.active_parameters == dense.parameters


def test_a_tied_head_multiplies_though_it_is_stored_once() -> None:
    from transformers import AutoModelForCausalLM

    tied, untied = (
        cost(AutoModelForCausalLM.from_config(tiny.model_config("mistral", tie_word_embeddings=choice)))
        for choice in (True, False)
    )
    assert untied.parameters - tied.parameters == 264 * 32
    assert untied.per_token(64) == tied.per_token(64)


def test_peaks_are_those_of_the_data_sheets_and_an_unknown_device_has_none() -> None:
    """Names as `torch.cuda.get_device_name` gives them."""
    peaks = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A100-PCIE-40GB": 312e12,
        "NVIDIA B200": 2250e12,
        # Not in the table, though a part of the name is, or nearly.
        "NVIDIA GB10": None,
        "NVIDIA A10": None,
        "Tesla V100-SXM2-16GB": None,
        "NVIDIA GeForce RTX 4090": None,
        "AMD Instinct MI300X": None,
        "": None,
    }
    assert {name: peak_flops(name) for name in peaks} == peaks


def test_a_variant_of_a_device_does_not_borrow_the_peak_of_its_namesake() -> None:
    """The NVL cards have another power limit, the GB200 a higher one: their own peak, or none."""
    assert peak_flops("NVIDIA H100 NVL") in (None, 835e12)
    assert peak_flops("NVIDIA H200 NVL") in (None, 835e12)
    assert peak_flops("NVIDIA GB200") in (None, 2500e12)


def test_selective_recomputing_keeps_matrix_products() -> None:
    """It differs from `full` in that alone: a second forward multiplies no matrices."""
    from llm_recipes.models import layers

    operations = {}
    for kind in ("none", "full", "selective"):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU())
        layers.prepare([layer], kind, compiled=False)
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(4, 8, requires_grad=True)).sum().backward()
        operations[kind] = counter.get_total_flops()
    assert operations["selective"] == operations["none"] < operations["full"]
