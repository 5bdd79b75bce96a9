"""Parameters are spread, computed and reduced as the configuration says, and what is computed never depends on it."""

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import tiny
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_recipes.config import ModelConfig, OptimConfig, ParallelConfig
from llm_recipes.errors import UserError

EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in tiny.FAMILIES},
    # These declare parameters fp32: routers and the sinks of attention; routers and, inside them, their biases.
    "flint": ("flint", {**EXPERTS, "num_experts": 4, "head_dim": 8}),
    "ernie4_5_moe": ("ernie4_5_moe", {**EXPERTS, "num_experts": 4, "moe_layer_start_index": 0}),
    # And this one its norms, under fp16 only.
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "gpt2": ("gpt2", {"num_hidden_layers": None, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1}),
    "mamba": ("mamba", {"state_size": 4}),
    "jamba": ("jamba", {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ["mistral", "mixtral", "qwen3_tied"]
    return {name: tiny.save_model(tmp_path_factory.mktemp(name), name) for name in names}


def batch(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """This rank's part of twelve windows, whose numbers of targets differ."""
    from llm_recipes.data.documents import window
    from llm_recipes.data.stream import stack

    lengths = [17, 3, 9, 12, 17, 6, 2, 15, 17, 5, 11, 4]
    documents = [[(7 * row + 3 * i) % 256 for i in range(length)] for row, length in enumerate(lengths)]
    rows = [window([torch.tensor(each).numpy()], 16, separate=True) for each in documents]
    return stack(rows[rank * 12 // ranks : (rank + 1) * 12 // ranks])


def open_model(folder: str, model: dict[str, Any], parallel: dict[str, Any]) -> Any:
    from llm_recipes.models import causal, topology

    config = ParallelConfig(**{"precision": "fp32", **parallel})
    place = topology.start(config)
    lm = causal.build(ModelConfig(path=folder, **model), config, place, folder, mask_documents=True, seed=0)
    lm.use_loss_head = True
    return lm


def step(lm: Any) -> dict[str, Any]:
    """Forward and backward over all ranks' windows."""
    place = lm.topology
    mine = batch(place.rank, place.ranks)
    targets = place.sum((mine["targets"] >= 0).sum())
    losses, _ = lm.token_losses(mine)
    resharded = {isinstance(each, DTensor) for each in lm.layers[0].parameters()}
    (losses.sum() / targets * place.ranks).backward()
    return {"loss": float(place.sum(losses.detach().sum()) / targets), "resharded_after_forward": resharded}


def gradients(lm: Any) -> dict[str, torch.Tensor]:
    return {name: each.grad.full_tensor() for name, each in lm.model.named_parameters() if each.grad is not None}


def live_bytes() -> int:
    """Of all that this process's tensors look at. (A view of a file that is mapped into memory is as large as it is,
    not as the file.)"""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)]
    held = {
        (each.data_ptr(), each.numel() * each.element_size())
        for each in tensors
        if each.device.type == "cpu" and each.untyped_storage().nbytes() and each.is_contiguous()
    }
    total = end = 0
    for start, size in sorted(held):
        total += max(0, start + size - max(start, end))
        end = max(end, start + size)
    return total


def run(folder: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A step of each case (settings of `parallel`), and where its parameters lay."""
    found = []
    for parallel in cases:
        before = live_bytes()
        lm = open_model(folder, {}, parallel)
        answer, parameters = step(lm), dict(lm.model.named_parameters())
        total = sum(each.numel() for each in parameters.values())
        answer |= {
            "held": (live_bytes() - before) / (4 * total),
            "all_sharded": all(isinstance(each, DTensor) for each in parameters.values()),
            "share": sum(each.to_local().numel() for each in parameters.values()) / total,
            "placements": {name: each.placements[-1] for name, each in parameters.items()},
            "dtypes": {each.dtype for each in parameters.values()} | {each.grad.dtype for each in parameters.values()},
            "gradients": gradients(lm),
        }
        found.append(answer)
        del lm, parameters
    return found


def assert_same_step(found: dict[str, Any], wanted: dict[str, Any], where: str = "", rtol: float = 1e-4) -> None:
    assert found["loss"] == pytest.approx(wanted["loss"], rel=rtol / 10), where
    assert found["gradients"].keys() == wanted["gradients"].keys(), where
    for name, each in wanted["gradients"].items():
        torch.testing.assert_close(
            found["gradients"][name], each, rtol=rtol, atol=rtol * float(each.abs().max()), msg=f"{where} {name}"
        )


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", ["mistral", "mixtral", "qwen3_tied"])
def test_each_rank_holds_its_part_of_every_parameter_and_no_copy(
    ranks: Any, folders: Any, family: str, size: int
) -> None:
    """Between steps a rank has its part of the weights and of the gradients, and nothing else worth speaking of."""
    for ((found),) in ranks(size, run, str(folders[family]), [{}]):
        assert found["all_sharded"]
        assert found["share"] == pytest.approx(1 / size, rel=0.05)
        assert found["held"] < 2 / size + 0.15
        assert found["dtypes"] == {torch.float32}


def test_four_experts_lie_on_three_ranks_and_learn_as_on_one(ranks: Any, folders: Any) -> None:
    one = ranks(1, run, str(folders["mixtral"]), [{}])[0][0]
    for (three,) in ranks(3, run, str(folders["mixtral"]), [{}]):
        assert three["placements"]["model.layers.0.mlp.experts.gate_up_proj"] == Shard(1)
        assert three["placements"]["model.layers.0.mlp.experts.down_proj"] == Shard(2)
        assert three["share"] == pytest.approx(1 / 3, rel=0.1)
        assert_same_step(three, one)


def test_a_parameter_is_cut_where_it_divides() -> None:
    from llm_recipes.models.sharding import placement

    def dimension(*shape: int, over: int) -> int | None:
        found = placement(nn.Parameter(torch.empty(shape, device="meta")), over)
        return None if found is None else found.dim

    assert dimension(8, 30, 32, over=4) is None, "experts that divide stay whole experts"
    assert dimension(4, 30, 32, over=8) == 2
    assert dimension(4, 32, 30, over=8) == 1
    assert dimension(4, 30, 30, over=8) is None, "nothing divides: unevenly on the first"
    assert dimension(5, 32, over=4) is None, "matrices and vectors may be cut unevenly"


def test_every_sharding_has_the_same_loss_and_gradients(ranks: Any, folders: Any) -> None:
    shares = {"full_shard": 0.25, "shard_grad_op": 0.25, "hybrid_shard": 0.5, "no_shard": 1}
    cases = [{"sharding": name, "replicas": 2 if name == "hybrid_shard" else None} for name in shares]
    ahead = [{"sharding": name, "prefetch": layers} for name, layers in (("full_shard", 2), ("shard_grad_op", 9))]
    for answers in ranks(4, run, str(folders["mixtral"]), cases + ahead):
        for fetched in answers[len(cases) :]:
            assert_same_step(fetched, answers[0], "weights gathered further ahead", rtol=0)
        found = dict(zip(shares, answers, strict=False))
        for name, each in found.items():
            assert_same_step(each, found["full_shard"], name)
            assert each["share"] == pytest.approx(shares[name], rel=0.05)
        resharded = {name: each["resharded_after_forward"] for name, each in found.items()}
        assert resharded["full_shard"] == resharded["hybrid_shard"] == {True}
        assert resharded["shard_grad_op"] == resharded["no_shard"] == {False}, "weights stay for the backward pass"


def offloaded(folder: str) -> Any:
    """A step with parameters kept on the CPU, or the one line that says why not."""
    try:
        lm = open_model(folder, {}, {"cpu_offload": True})
        answer = step(lm)
    except UserError as error:
        return str(error)
    answer["gradients"] = gradients(lm)
    return answer


def test_cpu_offload_without_a_gpu_works_or_says_so(ranks: Any, folders: Any) -> None:
    usual = ranks(2, run, str(folders["mistral"]), [{}])[0][0]
    for found in ranks(2, offloaded, str(folders["mistral"])):
        if isinstance(found, str):
            assert "cpu_offload" in found and "\n" not in found
        else:
            assert_same_step(found, usual)


class Reduced(TorchDispatchMode):
    """Notes the dtype of what is added up over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "reduce_scatter" in str(func):
            self.dtypes |= {each.dtype for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def watched(folder: str, precision: str) -> dict[str, Any]:
    """The dtypes of everything in a step: what modules compute in, what is reduced, what an optimizer keeps."""
    from llm_recipes.training import optimizer

    lm = open_model(folder, {}, {"precision": precision})
    seen: dict[str, set[torch.dtype]] = {}

    # Registered after FSDP's own hooks: runs when a module's weights are gathered and cast.
    def watch(name: str, module: nn.Module) -> None:
        def entered(module: nn.Module, inputs: Any) -> None:
            for key, each in module.named_parameters(recurse=False):
                seen.setdefault(f"{name}.{key}", set()).add(each.dtype)
            if isinstance(module, nn.Linear):
                seen.setdefault(f"{name} in", set()).add(inputs[0].dtype)

        def left(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(module, nn.Linear) and name != "lm_head":  # Its answer is losses.
                seen.setdefault(f"{name} out", set()).add(output.dtype)

        module.register_forward_pre_hook(entered)
        module.register_forward_hook(left)

    for name, module in lm.model.named_modules():
        watch(name, module)
    with Reduced() as reduced:
        answer = step(lm)
    adamw = optimizer.adamw(lm.model, OptimConfig(lr=1e-3))
    answer["gradients"] = gradients(lm)
    adamw.step()
    state = [each for per in adamw.state.values() for each in per.values() if each.numel() > 1]
    return answer | {
        "seen": seen,
        "reduced": reduced.dtypes,
        "stored": {name: each.dtype for name, each in lm.model.named_parameters()},
        "gradient_dtypes": {each.grad.dtype for each in lm.model.parameters() if each.grad is not None},
        "state": {each.dtype for each in state},
        "scaled": lm.precision.scales_loss,
    }


@pytest.mark.parametrize(
    ("precision", "stored", "computed", "nearness"),
    [
        ("fp32", torch.float32, torch.float32, 1e-5),
        ("bf16-mixed", torch.float32, torch.bfloat16, 2e-2),
        ("fp16-mixed", torch.float32, torch.float16, 2e-3),
        ("bf16", torch.bfloat16, torch.bfloat16, 2e-2),
    ],
)
def test_masters_state_compute_and_reduction_have_the_precision_asked_for(
    ranks: Any, folders: Any, precision: str, stored: torch.dtype, computed: torch.dtype, nearness: float
) -> None:
    """No surprise: gradients are reduced in fp32 whatever computed them, and only `bf16` stores bf16. The result is
    as near to that of fp32 as the dtype allows, and no nearer (fp16 has 11 bits, bf16 8)."""
    reference = ranks(2, run, str(folders["mistral"]), [{}])[0][0]
    for found in ranks(2, watched, str(folders["mistral"]), precision):
        assert set(found["stored"].values()) == found["gradient_dtypes"] == found["state"] == {stored}
        assert found["reduced"] == {torch.float32}
        assert found["seen"]["model.layers.0.self_attn.q_proj.weight"] == {computed}
        for name, dtypes in found["seen"].items():
            assert dtypes == {computed}, name
        assert found["scaled"] == (precision == "fp16-mixed")
        assert found["loss"] == pytest.approx(reference["loss"], rel=nearness)
        for name, each in reference["gradients"].items():
            difference = (found["gradients"][name].float() - each).norm() / each.norm()
            assert difference < 10 * nearness, name
            assert precision == "fp32" or difference > 0, name


def plain(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Plain transformers with the whole model in a dtype, but for what it declares itself."""
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    every = batch(0, 1)
    logits = model(input_ids=every["input_ids"], position_ids=every["position_ids"], use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), every["targets"].flatten())
    loss.backward()
    return {
        "loss": float(loss.detach()),
        "gradients": {name: each.grad for name, each in model.named_parameters() if each.grad is not None},
        "dtypes": {name: each.dtype for name, each in model.named_parameters()},
    }


@pytest.mark.parametrize(
    ("family", "precision", "computed"),
    [
        (family, precision, torch.bfloat16)
        for family in ("flint", "ernie4_5_moe")
        for precision in ("bf16-mixed", "bf16")
    ]
    + [("gpt_oss", "fp16-mixed", torch.float16)],
)
def test_what_a_model_declares_fp32_computes_in_fp32_and_nothing_else(
    ranks: Any, tmp_path: Path, family: str, precision: str, computed: torch.dtype
) -> None:
    """A router in bf16 sends tokens to other experts."""
    name, changes = FAMILIES[family]
    folder = tiny.save_model(tmp_path, name, **changes)
    wanted = plain(folder, computed)
    declared = {name for name, dtype in wanted["dtypes"].items() if dtype == torch.float32}
    assert declared and declared != set(wanted["dtypes"]), "else this shows nothing"
    for found in ranks(2, watched, str(folder), precision):
        for name, dtype in wanted["dtypes"].items():
            # Parameters of modules that are never called themselves are not seen.
            assert found["seen"].get(name, {dtype}) == {dtype}, name
        assert declared & set(found["seen"])
        assert found["reduced"] == {torch.float32}
        assert found["loss"] == pytest.approx(wanted["loss"], rel=2e-3)
        for name, each in wanted["gradients"].items():
            difference = (found["gradients"][name].float() - each.float()).norm() / each.float().norm()
            assert difference < 0.2, name


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_repeated_layers_of_a_model_are_found(family: str) -> None:
    from llm_recipes.models import loading, sharding

    name, changes = FAMILIES[family]
    model = loading.empty_model(tiny.model_config(name, **changes), torch.float32, None)
    layers = sharding.layers(model)
    assert len(layers) == model.config.get_text_config().num_hidden_layers
    names = {id(module): name for name, module in model.named_modules()}
    # One list, numbered from 0: not experts, not parts of a layer.
    assert [int(names[id(layer)].rpartition(".")[2]) for layer in layers] == list(range(len(layers)))
    assert len({names[id(layer)].rpartition(".")[0] for layer in layers}) == 1


def test_layers_of_a_model_without_a_plan_are_the_members_of_its_outermost_list() -> None:
    from llm_recipes.models.sharding import layers

    model: Any = nn.Module()
    experts = [nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(2)]
    model.layers = nn.ModuleList(nn.ModuleDict({"experts": each}) for each in experts)
    model.fsdp_plan = model._no_split_modules = None
    assert layers(model) == list(model.layers)


def calls(folder: str, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A step for each way of running layers, with how often a layer's parts ran and the names of parameters."""
    from torch._dynamo.utils import counters

    found = []
    for setting in settings:
        torch._dynamo.reset()
        counters.clear()
        lm = open_model(folder, setting, {})
        counted = {"mlp": 0}

        def count(*_: Any, counted: dict[str, int] = counted) -> None:
            counted["mlp"] += 1

        if not setting.get("compile"):
            lm.layers[0].mlp.register_forward_pre_hook(count)
        answer = step(lm)
        found.append(answer | {
            "gradients": gradients(lm), "calls": counted["mlp"], "graphs": counters["stats"]["unique_graphs"],
            "names": [name for name, _ in lm.model.named_parameters()] + list(lm.model.state_dict()),
        })  # fmt: skip
    return found


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_recomputed_activations_give_the_same_gradients_under_the_same_names(
    ranks: Any, folders: Any, family: str
) -> None:
    settings = [{"activation_checkpointing": kind} for kind in ("none", "full", "selective")]
    for kept, full, selective in ranks(2, calls, str(folders[family]), settings):
        assert (kept["calls"], full["calls"], selective["calls"]) == (1, 2, 2)
        for recomputed in (full, selective):
            assert recomputed["names"] == kept["names"]
            assert_same_step(recomputed, kept, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral"])
def test_compiled_layers_give_the_same_gradients_under_the_same_names(ranks: Any, tmp_path: Path, family: str) -> None:
    """With the compiler's own code."""
    folder = tiny.save_model(tmp_path, family, num_hidden_layers=1)  # Compiling one takes half a minute.
    kinds = [{"compile": True, "activation_checkpointing": kind} for kind in ("none", "selective")]
    for plainly, *others in ranks(1, calls, str(folder), [{}, *kinds]):
        assert plainly["graphs"] == 0
        for compiled in others:
            assert compiled["graphs"] > 0
            assert compiled["names"] == plainly["names"]
            assert_same_step(compiled, plainly)


def test_a_gpu_without_bf16_is_told_what_to_ask_for() -> None:
    from llm_recipes.models.sharding import precision_for

    device = SimpleNamespace(type="cuda")
    with patch.multiple("torch.cuda", get_device_capability=lambda _: (7, 0), get_device_name=lambda _: "V100"):
        for precision in ("bf16-mixed", "bf16"):
            with pytest.raises(UserError, match=r"V100.*fp16-mixed"):
                precision_for(ParallelConfig(precision=precision), device)  # type: ignore[arg-type]
        assert precision_for(ParallelConfig(precision="fp16-mixed"), device).scales_loss  # type: ignore[arg-type]
