"""A base in 4 bits computes what a model of the rounded weights computes, on any number of ranks."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from llm_recipes.config import AdapterConfig, ModelConfig, ParallelConfig
from llm_recipes.errors import UserError
from llm_recipes.models import quantized

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
"""Rows of whole blocks: bitsandbytes alone cuts them as we do."""
IDS = torch.arange(2, 2 + 4 * 16).view(4, 16)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """By bitsandbytes alone, row by row."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    rows = []
    for row in weight:
        padded = F.pad(row, (0, -len(row) % 64)).contiguous()
        rows.append(dequantize_4bit(*quantize_4bit(padded, blocksize=64, quant_type="nf4")).flatten()[: len(row)])
    return torch.stack(rows)


@pytest.fixture(scope="module", autouse=True)
def processes_of_its_own(ranks: Any) -> Iterator[None]:
    """peft brings bitsandbytes, with native code and threads of its own: nobody else works where that has been."""
    yield
    ranks.stop()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(48, 128), (5, 100), (3, 16), (0, 64)])
def test_what_is_packed_comes_back_as_bitsandbytes_rounds_it(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = quantized.pack(weight, dtype)
    blocks = -(-shape[1] // 64)
    assert packed.dtype == dtype and packed.numel() * packed.element_size() == shape[0] * blocks * 36
    if shape[0]:
        found = quantized.unpack(packed, shape[1])
        assert found.dtype == dtype and torch.equal(found, rounded(weight))
        assert 0 < float((found - weight).abs().max()) < 0.5


def test_a_weight_of_whole_blocks_is_rounded_as_bitsandbytes_rounds_it_at_once() -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    wanted = dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    assert torch.equal(quantized.unpack(quantized.pack(weight, torch.float32), 128), wanted)


def test_the_gradient_is_the_rounded_weight_s_and_only_bytes_are_kept_for_it() -> None:
    linear = nn.Linear(100, 24)
    layer = quantized.Linear4bit(linear, torch.float32)
    layer.packed = nn.Parameter(quantized.pack(linear.weight.detach(), torch.float32), requires_grad=False)
    layer.requires_grad_(False)
    inputs = torch.randn(3, 7, 100, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.numel()) or each, lambda each: each):
        found = layer(inputs)
    assert sum(kept) == layer.packed.numel() < linear.weight.numel() / 4
    (found.square().sum()).backward()
    again = inputs.detach().clone().requires_grad_()
    wanted = F.linear(again, rounded(linear.weight.detach()), linear.bias.detach())
    wanted.square().sum().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inputs.grad, again.grad, rtol=1e-5, atol=1e-5)


def computed(folder: str, parallel: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradients of an adapter that has values, and where the bytes lie."""
    from llm_recipes.models import adapter as adapters
    from llm_recipes.models import causal, initial, topology

    config = ParallelConfig(**{"precision": "fp32", **parallel})
    place = topology.start(config)
    lm = causal.build(
        ModelConfig(path=folder, **model), config, place, folder, False, seed=0,
        adapter=AdapterConfig(kind="lora", rank=4, alpha=8.0, base="4bit"),
    )  # fmt: skip
    initial.refuse_uninitialised(lm.model, Path(folder))
    for name, each in adapters.stored(lm.model).items():
        if ".lora_B." in name:
            assert isinstance(each, DTensor)
            each.data.to_local().fill_(0.02)
    rows = IDS.chunk(place.ranks)[place.rank]
    logits = lm.model(input_ids=rows[:, :-1]).logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    packed = {name: each.packed for name, each in quantized.members(lm.model).items()}
    columns = {name: each.in_features for name, each in quantized.members(lm.model).items()}
    named = adapters.stored(lm.model)
    return {
        "loss": float(place.sum(loss.detach())) / place.ranks,
        "values": {name: each.detach().full_tensor().clone() for name, each in named.items()},
        "gradients": {name: each.grad.full_tensor() for name, each in named.items()},
        "bytes": sum(each.to_local().numel() * each.element_size() for each in packed.values()),
        "weights": {
            name.replace(".base_layer", ""): quantized.unpack(each.full_tensor(), columns[name])
            for name, each in packed.items()
        },
        "frozen": {
            name: str(each.dtype) for name, each in lm.model.named_parameters() if not each.requires_grad
        },
    }  # fmt: skip


def by_peft(folder: Path, found: dict[str, Any], **targets: Any) -> dict[str, Any]:
    """Plain transformers, its linear layers' weights replaced by what 4 bits make of them."""
    import peft
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    replaced = 0
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and "layers." in name:
            module.weight.data = rounded(module.weight.detach())
            assert torch.equal(found["weights"][name], module.weight)
            replaced += 1
    assert replaced == len(found["weights"])
    config: Any = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **targets)
    model: Any = peft.get_peft_model(plain, config)
    peft.set_peft_model_state_dict(model, found["values"])
    logits = model(input_ids=IDS[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    loss.backward()
    named = {name.replace(".default.", "."): each for name, each in model.named_parameters() if "lora_" in name}
    return {"loss": float(loss.detach()), "gradients": {name: each.grad for name, each in named.items()}}


@pytest.mark.parametrize(
    ("family", "targets", "worlds"),
    [
        ("mistral", {"target_modules": "all-linear"}, (1, 2, 4)),
        (
            "mixtral",
            {
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            },
            (2,),
        ),
        ("qwen2", {"target_modules": "all-linear"}, (2,)),  # biases
    ],
)
def test_loss_and_gradients_are_those_beside_the_rounded_weights(
    ranks: Any, tmp_path: Path, family: str, targets: dict[str, Any], worlds: tuple[int, ...]
) -> None:
    folder = tiny.save_model(tmp_path / family, family, **WIDE if family == "mistral" else {})
    for size in worlds:
        found = ranks(size, computed, str(folder), {}, {})[0]
        wanted = by_peft(folder, found, **targets)
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert found["gradients"].keys() == wanted["gradients"].keys()
        for name, each in wanted["gradients"].items():
            torch.testing.assert_close(
                found["gradients"][name], each, rtol=1e-4, atol=1e-4 * float(each.abs().max()), msg=name
            )


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed"])
def test_the_bytes_are_gathered_as_they_are_in_every_precision(ranks: Any, tmp_path: Path, precision: str) -> None:
    folder = tiny.save_model(tmp_path / "mistral", "mistral", **WIDE)
    wanted = ranks(1, computed, str(folder), {}, {})[0]
    found = ranks(2, computed, str(folder), {"precision": precision}, {"activation_checkpointing": "full"})
    half = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}[precision]
    assert set(found[0]["frozen"].values()) == {str(half)}
    assert found[0]["loss"] == pytest.approx(wanted["loss"], rel=2e-2)
    total = sum(each.numel() for each in wanted["weights"].values())
    assert wanted["bytes"] == total * 36 // 64, "4.5 bits a number"
    assert sum(each["bytes"] for each in found) == wanted["bytes"], "each rank keeps its rows alone"
    for name, each in wanted["gradients"].items():
        cosine = F.cosine_similarity(found[0]["gradients"][name].flatten(), each.flatten(), dim=0)
        assert float(cosine) > 0.9, name


def failing(folder: str) -> str:
    try:
        computed(folder, {}, {})
    except UserError as error:
        return str(error)
    raise AssertionError("was not refused")


def test_a_model_without_linear_layers_is_refused(ranks: Any, tiny_models: Any) -> None:
    assert "adapter.base=4bit: the model has no linear layers" in ranks(1, failing, str(tiny_models["gpt2"]))[0]


def test_a_weight_that_is_not_finite_is_found_before_it_is_rounded(ranks: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny.save_model(tmp_path / "mistral")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for said in ranks(2, failing, str(folder)):
        assert "model.layers.1.mlp.up_proj.weight holds a value that is not finite" in said


def said(folder: str) -> list[str]:
    """What the log says of a base in 4 bits."""
    lines: list[str] = []
    ear = logging.Handler()
    ear.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    room = logging.getLogger("llm_recipes.models.quantized")
    room.addHandler(ear)
    room.setLevel(logging.INFO)
    computed(folder, {}, {})
    room.removeHandler(ear)
    return lines


def test_the_log_says_what_is_in_4_bits(ranks: Any, tiny_models: Any) -> None:
    (line,) = ranks(1, said, str(tiny_models["mixtral"]))[0]
    # Two layers, each of q and o (32 x 32) and k and v (16 x 32).
    assert line.startswith("4 bits: 8 linear layers, 6,144 of ") and "experts stay as they are" in line
