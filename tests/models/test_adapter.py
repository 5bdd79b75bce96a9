"""An adapter under FSDP is peft's on plain transformers: the same loss, the same gradients, on any number of ranks."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F

from llm_recipes.config import AdapterConfig, ModelConfig, OptimConfig, ParallelConfig
from llm_recipes.errors import UserError

LORA: dict[str, Any] = {"kind": "lora", "rank": 4, "alpha": 8.0}
ROWS, LENGTH = 12, 16


def window(row: int) -> list[int]:
    return [(7 * row + 3 * at) % 250 for at in range(LENGTH + 1)]


def batch(rank: int = 0, ranks: int = 1) -> dict[str, torch.Tensor]:
    """This rank's part of twelve windows."""
    from llm_recipes.data.documents import window as fill
    from llm_recipes.data.stream import stack

    rows = [fill([torch.tensor(window(row)).numpy()], LENGTH, separate=True) for row in range(ROWS)]
    return stack(rows[rank * ROWS // ranks : (rank + 1) * ROWS // ranks])


def build(folder: str, adapter: dict[str, Any], parallel: dict[str, Any], **model: Any) -> Any:
    from llm_recipes.models import causal, topology

    config = ParallelConfig(**{"precision": "fp32", **parallel})
    place = topology.start(config)
    own = AdapterConfig(**{**LORA, **adapter})
    lm = causal.build(ModelConfig(path=folder, **model), config, place, folder, True, seed=0, adapter=own)
    lm.use_loss_head = lm.loss_head is not None
    return lm


def teach(lm: Any) -> None:
    """Give B values, the same on any number of ranks: with zeros A would have no gradient."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    from llm_recipes.models import adapter

    for name, each in adapter.stored(lm.model).items():
        if ".lora_B." in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            value = torch.randn(each.shape, generator=generator).to(each.dtype) * 0.1
            assert isinstance(each, DTensor)
            own = distribute_tensor(value, each.device_mesh, each.placements, src_data_rank=None)
            each.data.to_local().copy_(own.to_local())


def stepped(folder: str, adapter: dict[str, Any], parallel: dict[str, Any], **model: Any) -> dict[str, Any]:
    """Forward and backward over all ranks' windows, and a step of the optimizer."""
    from llm_recipes.models import adapter as adapters
    from llm_recipes.training import optimizer

    lm = build(folder, adapter, parallel, **model)
    first = {name: each.detach().full_tensor().clone() for name, each in adapters.stored(lm.model).items()}
    teach(lm)
    place, mine = lm.topology, batch(lm.topology.rank, lm.topology.ranks)
    losses, _ = lm.token_losses(mine)
    (losses.sum() / (ROWS * LENGTH) * place.ranks).backward()
    named = adapters.stored(lm.model)
    adam = optimizer.adamw(lm.model, OptimConfig(lr=1e-3))
    answer = {
        "first": first,
        "values": {name: each.detach().full_tensor().clone() for name, each in named.items()},
        "loss": float(place.sum(losses.detach().sum()) / (ROWS * LENGTH)),
        "gradients": {name: each.grad.full_tensor() for name, each in named.items()},
        "frozen_gradients": sum(
            each.grad is not None for each in lm.model.parameters() if not any(each is own for own in named.values())
        ),
        "dtypes": {str(each.dtype) for each in lm.model.parameters() if not each.requires_grad},
        "adapter_dtypes": {str(each.dtype) for each in named.values()},
        "cost": lm.cost,
    }
    adam.step()
    answer["with_state"] = len(adam.state) == len(named) and all(own in adam.state for own in named.values())
    answer["moved"] = all(
        not torch.equal(each.detach().full_tensor(), answer["values"][name]) for name, each in named.items()
    )
    return answer


def reference(folder: Path, found: dict[str, Any], targets: dict[str, Any], replaced: Any = None) -> dict[str, Any]:
    """The same by peft on plain transformers, in one process."""
    import peft
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if replaced is not None:
        replaced(plain)
    config: Any = peft.LoraConfig(r=LORA["rank"], lora_alpha=8, task_type="CAUSAL_LM", **targets)
    model: Any = peft.get_peft_model(plain, config)
    said = peft.set_peft_model_state_dict(model, found["values"])
    assert not said.unexpected_keys and not any("lora_" in key for key in said.missing_keys)
    ids = torch.tensor([window(row) for row in range(ROWS)])
    logits = model(input_ids=ids[:, :-1]).logits
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1))
    loss.backward()
    named = {name.replace(".default.", "."): each for name, each in model.named_parameters() if "lora_" in name}
    return {"loss": float(loss.detach()), "gradients": {name: each.grad for name, each in named.items()}}


def assert_same(found: dict[str, Any], wanted: dict[str, Any], rtol: float = 1e-4) -> None:
    assert found["loss"] == pytest.approx(wanted["loss"], rel=rtol / 10)
    assert found["gradients"].keys() == wanted["gradients"].keys()
    for name, each in wanted["gradients"].items():
        assert float(each.abs().max()) > 0, name
        torch.testing.assert_close(
            found["gradients"][name], each, rtol=rtol, atol=rtol * float(each.abs().max()), msg=name
        )


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = {"target_modules": LINEAR[:4], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.fixture(scope="module", autouse=True)
def processes_of_its_own(ranks: Any) -> Iterator[None]:
    """peft brings bitsandbytes, with native code and threads of its own: nobody else works where that has been."""
    yield
    ranks.stop()


@pytest.mark.parametrize(
    ("family", "targets", "worlds"),
    [
        ("mistral", {"target_modules": LINEAR}, (1, 2, 4)),
        ("tied", {"target_modules": LINEAR}, (2, 3)),
        ("mixtral", FUSED, (1, 2, 3)),
        # Four ranks share four experts, three cannot: see `sharding.placement`.
        ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, (2,)),
    ],
)
def test_loss_and_gradients_are_peft_s_on_plain_transformers(
    ranks: Any, tmp_path: Path, family: str, targets: dict[str, Any], worlds: tuple[int, ...]
) -> None:
    changes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    folder = tiny.save_model(tmp_path / family, {"tied": "qwen3_tied"}.get(family, family), **changes)
    wanted = None
    for size in worlds:
        found = ranks(size, stepped, str(folder), {}, {})[0]
        wanted = wanted or reference(folder, found, targets)
        assert_same(found, wanted)
        assert found["frozen_gradients"] == 0
        assert found["with_state"] and found["moved"]


def test_an_adapter_begins_as_its_base_and_the_same_on_any_number_of_ranks(ranks: Any, tiny_models: Any) -> None:
    first = [ranks(size, stepped, str(tiny_models["mixtral"]), {}, {})[0]["first"] for size in (1, 3)]
    for name, each in first[0].items():
        assert torch.equal(each, first[1][name])
        if ".lora_B." in name:
            assert not each.any()
        else:
            bound = each.shape[1] ** -0.5
            assert 0.9 * bound < float(each.abs().max()) <= bound


def test_what_stands_still_is_kept_in_the_compute_dtype_and_the_adapter_in_fp32(ranks: Any, tiny_models: Any) -> None:
    for sharding in ("full_shard", "no_shard"):
        found = ranks(2, stepped, str(tiny_models["mistral"]), {}, {"precision": "bf16-mixed", "sharding": sharding})[0]
        assert found["dtypes"] == {"torch.bfloat16"} and found["adapter_dtypes"] == {"torch.float32"}
        wanted = reference(tiny_models["mistral"], found, {"target_modules": LINEAR})
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-2)
        for name, each in wanted["gradients"].items():
            cosine = F.cosine_similarity(found["gradients"][name].flatten(), each.flatten(), dim=0)
            assert float(cosine) > 0.99, name


@pytest.mark.parametrize(
    ("setting", "parallel"),
    [
        ({"activation_checkpointing": "full"}, {}),
        ({"activation_checkpointing": "selective"}, {"sharding": "shard_grad_op"}),
        ({}, {"cpu_offload": True}),
        ({}, {"sharding": "hybrid_shard", "replicas": 2}),
    ],
)
def test_recomputing_and_where_parameters_lie_change_no_gradient(
    ranks: Any, tiny_models: Any, setting: dict[str, Any], parallel: dict[str, Any]
) -> None:
    wanted = ranks(2, stepped, str(tiny_models["mixtral"]), {}, {})[0]
    found = ranks(2, stepped_with, str(tiny_models["mixtral"]), parallel, setting)[0]
    assert_same(found, wanted, rtol=1e-5)


def stepped_with(folder: str, parallel: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    return stepped(folder, {}, parallel, **model)


def test_names_choose_what_an_adapter_stands_beside(ranks: Any, tiny_models: Any) -> None:
    found = ranks(1, stepped, str(tiny_models["mixtral"]), {"targets": ["q_proj", "experts.down_proj"]}, {})[0]
    wanted = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    assert_same(found, reference(tiny_models["mixtral"], found, wanted))


def refused(folder: str, adapter: dict[str, Any]) -> str:
    try:
        build(folder, adapter, {})
    except UserError as error:
        return str(error)
    raise AssertionError("was not refused")


def test_what_no_adapter_can_stand_beside_is_refused_by_name(ranks: Any, tiny_models: Any) -> None:
    near = ranks(1, refused, str(tiny_models["mistral"]), {"targets": ["q_porj"]})[0]
    assert "adapter.targets: q_porj" in near and "did you mean 'q_proj'?" in near
    assert "adapter.targets: lm_head" in ranks(1, refused, str(tiny_models["mistral"]), {"targets": ["lm_head"]})[0]
    said = ranks(1, refused, str(tiny_models["mixtral"]), {"dropout": 0.1})[0]
    assert "adapter.dropout=0.1" in said and "experts" in said


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_recipes.models import adapter

    monkeypatch.setattr(adapter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'llm_recipes\[adapters\]'"):
        adapter.refuse_what_is_missing(AdapterConfig(kind="lora"))
    adapter.refuse_what_is_missing(AdapterConfig())


def plain_run(folder: str) -> tuple[list[str], list[str]]:
    from transformers import AutoModelForCausalLM

    from llm_recipes.models import causal, topology

    config = ParallelConfig(precision="fp32")
    lm = causal.build(ModelConfig(path=folder), config, topology.start(config), folder, True, seed=0)
    return [*dict(lm.model.named_parameters())], [
        *dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    ]


def test_without_an_adapter_no_name_changes(ranks: Any, tiny_models: Any) -> None:
    found, wanted = ranks(1, plain_run, str(tiny_models["mixtral"]))[0]
    assert found == wanted


def test_a_model_s_declared_fp32_parts_are_left_alone(ranks: Any, tmp_path: Path) -> None:
    changes = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4, "head_dim": 8}
    folder = tiny.save_model(tmp_path / "flint", "flint", **changes)
    found = ranks(2, stepped, str(folder), {}, {"precision": "bf16-mixed"})[0]
    assert found["dtypes"] == {"torch.bfloat16", "torch.float32"}
    assert not any("router" in name or "gate." in name for name in found["gradients"])
    assert all(bool(each.isfinite().all()) for each in found["gradients"].values())


def costs(folder: str) -> Any:
    return [build(folder, {"targets": names}, {}).cost for names in (["q_proj"], ["q_proj", "down_proj"])]


def test_a_token_meets_its_own_experts_part_of_an_adapter(ranks: Any, tiny_models: Any) -> None:
    without, with_experts = ranks(1, costs, str(tiny_models["mixtral"]))[0]
    whole = 2 * 4 * 4 * (48 + 32)  # layers, experts, rank; 48 to 32
    assert with_experts.parameters - without.parameters == whole
    assert with_experts.matrix_parameters - without.matrix_parameters == whole // 2, "two of four"
    assert with_experts.frozen_matrix_parameters == without.frozen_matrix_parameters


@pytest.mark.slow
@pytest.mark.parametrize(("family", "base"), [("mistral", "full"), ("mistral", "4bit"), ("mixtral", "full")])
def test_compiled_it_has_the_same_gradients(ranks: Any, tmp_path: Path, family: str, base: str) -> None:
    """Beside dense layers in one graph for all of them; beside fused experts in pieces (`auto` compiles none there)."""
    folder = tiny.save_model(tmp_path / family, family, hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    plain = ranks(1, stepped_compiled, str(folder), base, {})[0]
    recomputing = {"compile": True, "activation_checkpointing": "selective"}
    found = ranks(1, stepped_compiled, str(folder), base, recomputing)[0]
    assert_same(found, plain)
    assert family == "mixtral" or found["graphs"] == "2 graphs compiled, no graph breaks", "a layer, and the head"


def stepped_compiled(folder: str, base: str, model: dict[str, Any]) -> dict[str, Any]:
    from llm_recipes.models import layers

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return stepped(folder, {"base": base}, {}, **model) | {"graphs": layers.compilations()}
