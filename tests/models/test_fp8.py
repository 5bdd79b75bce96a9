"""Linear layers in 8 bits: which, what they compute (by hand), and that all else is as without. On a CPU the numbers
are those of 8 bits and the products are computed in fp32 (`torchao`'s emulation)."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from whole_runs import run

from llm_recipes.config import GuardConfig, ModelConfig, OptimConfig, ParallelConfig
from llm_recipes.errors import UserError

pytest.importorskip("torchao")

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
IDS = torch.arange(2, 2 + 4 * 17).view(4, 17)
KINDS = ["rowwise", "tensorwise"]
PRODUCT_NOISE = 0.04
"""Of a product of normal numbers, relative (root of the mean square). Rounding to three bits of mantissa is off by up
to 2^-4 of a number, by 2.6% in the middle; two factors, independent: 3.7%."""
LEAST_COSINE = 0.965
"""Of a gradient with that without. It is made of about 14 products in a row: 1 - 14 * 0.037^2 / 2 = 0.990 where each is
a single sum; in a model of width 32, with e5m2 in it, it is 0.978 to 0.986."""
DENSE = {
    f"model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
}  # fmt: skip
ATTENTION = {name for name in DENSE if "self_attn" in name}


def empty(family: str, **changes: Any) -> Any:
    from llm_recipes.models import loading

    return loading.empty_model(tiny.model_config(family, **changes), torch.float32, None)


def mixed() -> Any:
    from llm_recipes.models.sharding import PRECISIONS

    return PRECISIONS["bf16-mixed"]


@pytest.mark.parametrize(
    ("family", "changes", "wanted", "reasons"),
    [
        ("mistral", {}, DENSE, {}),
        ("qwen3_tied", {}, DENSE, {}),
        ("mixtral", {}, ATTENTION, {"fused experts": 2}),
        # A linear layer with as many outputs as there are experts, 16, and shared experts that all tokens meet.
        (
            "afmoe",
            {"num_experts": 16, "num_local_experts": None, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
             "num_dense_layers": 1, "num_shared_experts": 1, "head_dim": 16},
            None,
            {"fused experts": 1, "chooses experts": 1},
        ),
        ("mistral", {"intermediate_size": 40}, ATTENTION,
         {"40 x 32, no multiples of 16": 4, "32 x 40, no multiples of 16": 2}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_inside_the_layers_are_converted_and_no_other_parameter_is_touched(
    family: str, changes: dict[str, Any], wanted: set[str] | None, reasons: dict[str, int], kind: str
) -> None:
    from llm_recipes.models import fp8

    model, parallel = empty(family, **changes), ParallelConfig(fp8=kind)
    before = {name: id(each) for name, each in model.named_parameters()}
    saved = {name: (each.shape, each.dtype) for name, each in model.state_dict().items()}
    _, left = fp8.choose(model, parallel, mixed())
    assert {reason: len(names) for reason, names in left.items()} == reasons
    fp8.convert(model, parallel, mixed(), torch.device("cpu"))
    assert {name: id(each) for name, each in model.named_parameters()} == before
    assert {name: (each.shape, each.dtype) for name, each in model.state_dict().items()} == saved
    converted = {name for name, module in model.named_modules() if "in_8_bits" in dir(module)}
    if wanted is None:
        gates = {name for name in left["chooses experts"]}
        assert all(model.get_submodule(name).out_features == 16 for name in gates)
        linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        wanted = linear - gates - {"lm_head"}
    assert converted == wanted and type(model.get_output_embeddings()) is torch.nn.Linear


def test_what_the_model_declares_fp32_stays_so() -> None:
    from llm_recipes.models import fp8

    model = empty("mistral")
    model._keep_in_fp32_modules_strict = {"o_proj"}
    chosen, left = fp8.choose(model, ParallelConfig(fp8="rowwise"), mixed())
    assert left == {"declared fp32": [f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)]}
    assert set(chosen) == {name for name in DENSE if "o_proj" not in name}


def rounded(tensor: torch.Tensor, kind: str, dim: int, form: torch.dtype) -> torch.Tensor:
    """What 8 bits make of a factor, in fp32. `dim`: that the product sums over."""
    plain = tensor.float()
    largest = plain.abs().amax(dim, keepdim=True) if kind == "rowwise" else plain.abs().max()
    scale = (torch.finfo(form).max / largest.double()).float()
    if kind == "rowwise":
        scale = 2 ** scale.log2().floor()
    return (plain * scale).to(form).float() / scale


def converted_linear(kind: str) -> Any:
    """48 outputs of 32 inputs, bf16."""
    from llm_recipes.models import fp8
    from llm_recipes.models.sharding import PRECISIONS

    torch.manual_seed(1)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny.model_config("mistral"), dtype=torch.bfloat16)
    fp8.convert(model, ParallelConfig(fp8=kind), PRECISIONS["bf16"], torch.device("cpu"))
    return model.model.layers[0].mlp.up_proj


@pytest.mark.parametrize("rows", [32, 21])
@pytest.mark.parametrize("kind", KINDS)
def test_the_three_products_are_those_of_factors_rounded_by_hand(kind: str, rows: int, monkeypatch: Any) -> None:
    """21: the weight's gradient is a sum over rows, and a GPU's kernel takes multiples of 16."""
    linear = converted_linear(kind)
    inputs = torch.randn(rows, 32).to(torch.bfloat16).requires_grad_()
    given = torch.randn(rows, 48).to(torch.bfloat16)
    multiplied: list[int] = []
    theirs = type(linear).__mro__[1]

    def watched(self: Any, given: torch.Tensor, inner: Any = theirs.forward) -> Any:
        multiplied.append(given.numel() // given.shape[-1])
        return inner(self, given)

    monkeypatch.setattr(theirs, "forward", watched)
    found = linear(inputs.view(1, rows, 32))
    assert multiplied == [32]
    found.backward(given.view(1, rows, 48))
    weight, form = linear.weight.detach(), E5M2 if kind == "tensorwise" else E4M3
    a, b, g = inputs.detach(), weight, given
    wanted = {
        "output": (found[0], rounded(a, kind, 1, E4M3) @ rounded(b, kind, 1, E4M3).T, a.float() @ b.float().T),
        "input": (inputs.grad, rounded(g, kind, 1, form) @ rounded(b, kind, 0, E4M3), g.float() @ b.float()),
        "weight": (
            linear.weight.grad, rounded(g, kind, 0, form).T @ rounded(a, kind, 0, E4M3), g.float().T @ a.float()
        ),
    }  # fmt: skip
    for name, (ours, by_hand, exact) in wanted.items():
        torch.testing.assert_close(ours, by_hand.to(torch.bfloat16), rtol=2**-7, atol=1e-5, msg=lambda m, n=name: n + m)
        noise = float((ours.detach().float() - exact).norm() / exact.norm())
        # e5m2 has two bits of mantissa: twice as far off.
        assert 0.4 * PRODUCT_NOISE < noise < (1 if name == "output" or kind == "rowwise" else 2) * PRODUCT_NOISE, name


def computed(folder: str, cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Loss and gradients of each case, its logits in and out of 8 bits, and the type of a weight that is whole."""
    from llm_recipes.models import causal, topology

    found = []
    for parallel, model in cases:
        config = ParallelConfig(**{"precision": "bf16-mixed", **parallel})
        place = topology.start(config)
        lm = causal.build(ModelConfig(path=folder, **model), config, place, folder, False, seed=0)
        rows = IDS.tensor_split(place.ranks)[place.rank]

        def logits(lm: Any = lm, rows: torch.Tensor = rows) -> torch.Tensor:
            return lm.model(input_ids=rows[:, :-1], use_cache=False).logits.float()

        with lm.evaluating():
            before = logits()
        loss = F.cross_entropy(logits().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        gradients = {name: each.grad.full_tensor() for name, each in lm.model.named_parameters()}
        with torch.no_grad():
            own = logits()
        with lm.evaluating():
            after = logits()
        layer = lm.layers[0]
        layer.unshard()
        weight = layer.self_attn.q_proj.weight
        found.append({
            "loss": float(place.sum(loss.detach())) / place.ranks,
            "gradients": gradients,
            "evaluated": (before, after),
            "logits": own,
            "whole": str(getattr(weight, "_data", weight).dtype),
        })  # fmt: skip
        layer.reshard()
    return found


def cosine(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Of two whole gradients."""
    flat = [torch.cat([each.flatten().double() for each in found["gradients"].values()]) for found in (one, other)]
    return float(F.cosine_similarity(*flat, dim=0))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(each, other["gradients"][name]) for name, each in one["gradients"].items())


def test_on_any_number_of_ranks_all_is_near_fp32_and_measured_without(ranks: Any, tiny_models: Any) -> None:
    folder = str(tiny_models["mistral"])
    exact, plain, *alone = ranks(1, computed, folder, [({"precision": "fp32"}, {}), ({}, {}),
                                                       *(({"fp8": kind}, {}) for kind in KINDS)])[0]  # fmt: skip
    assert cosine(exact, plain) > 0.9995
    both = [({"fp8": kind}, {}) for kind in KINDS]
    options: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
        "rowwise": [({"sharding": "no_shard"}, {}), ({}, {"activation_checkpointing": "selective"})],
        "tensorwise": [
            ({"sharding": "no_shard"}, {}),
            ({"sharding": "hybrid_shard", "replicas": 2}, {}),
            ({"cpu_offload": True}, {}),
            ({}, {"activation_checkpointing": "selective"}),
        ],
    }
    others = [({"fp8": kind} | parallel, model) for kind in KINDS for parallel, model in options[kind]]
    one_rank, other_rank = ranks(2, computed, folder, both + others)
    for at, kind in enumerate(KINDS):
        for found in (alone[at], one_rank[at]):
            assert LEAST_COSINE < cosine(exact, found) < 0.9995
            assert 0 < abs(found["loss"] - exact["loss"]) < 0.03
        # A scale of all inputs depends on which of them a rank has; one of a row does not.
        assert cosine(alone[at], one_rank[at]) > (0.9999 if kind == "rowwise" else LEAST_COSINE)
        assert one_rank[at]["whole"] == ("torch.float8_e4m3fn" if kind == "tensorwise" else "torch.bfloat16")
        for moment in (0, 1):  # before a pass in 8 bits, and after it
            whole = torch.cat([found[at]["evaluated"][moment] for found in (one_rank, other_rank)])
            assert torch.equal(whole, plain["evaluated"][0]) and torch.equal(alone[at]["evaluated"][moment], whole)
        assert not torch.equal(alone[at]["logits"], plain["logits"])
        # Gathered in bf16 and cast after, or cast and gathered in 8 bits: not one bit differs.
        for parallel, model in options[kind]:
            found = one_rank[2 + others.index(({"fp8": kind} | parallel, model))]
            assert same(one_rank[at], found) and found["loss"] == one_rank[at]["loss"], (kind, parallel, model)
            gathers = kind == "tensorwise" and parallel.get("sharding") not in ("no_shard", "hybrid_shard")
            gathers = gathers and not parallel.get("cpu_offload")
            assert found["whole"] == ("torch.float8_e4m3fn" if gathers else "torch.bfloat16"), (kind, parallel)


def test_rows_that_do_not_divide_among_the_ranks_are_gathered_as_without(ranks: Any, tiny_models: Any) -> None:
    """Three ranks: of weights with 48 rows each has 16, those with 32 or 16 are padded."""
    folder = str(tiny_models["mistral"])
    cases = [({"fp8": "tensorwise"}, {}), ({"fp8": "tensorwise", "cpu_offload": True}, {})]
    found = ranks(3, computed, folder, cases)[0]
    assert same(*found) and found[0]["whole"] == "torch.bfloat16"


def compiled(folder: str, kind: str) -> tuple[int, int, dict[str, Any]]:
    """Graphs that were made of all layers, in training and out of it, and gradients."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    found = computed(folder, [({"fp8": kind}, {"compile": True})])[0]
    stats = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    torch._dynamo.reset()
    return *stats, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensorwise"])
def test_compiled_layers_share_a_graph_and_are_as_near(ranks: Any, tmp_path: Path, kind: str) -> None:
    """Ten layers: a graph for each would be more than torch compiles before it gives up, without a word."""
    folder = str(tiny.save_model(tmp_path, num_hidden_layers=10))
    graphs, breaks, found = ranks(2, compiled, folder, kind)[0]
    # With and without gradients, in 8 bits and not.
    assert 1 <= graphs <= 3 and breaks == 0
    plain = ranks(2, computed, folder, [({"fp8": kind}, {})])[0][0]
    exact = ranks(2, computed, folder, [({"precision": "fp32"}, {})])[0][0]
    assert cosine(exact, found) > cosine(exact, plain) - 0.03


def isolated(folder: str, kind: str) -> tuple[float, float]:
    """How far a first document moves the second one's logits: as it trains, and as it is measured."""
    from llm_recipes.models import causal, topology
    from llm_recipes.training import proofs

    config = ParallelConfig(fp8=kind)
    place = topology.start(config)
    lm = causal.build(ModelConfig(path=folder), config, place, folder, True, seed=0)
    proofs.isolate_documents(lm, True)

    def second(first: int) -> torch.Tensor:
        ids = torch.tensor([[first] * 16 + list(range(60, 76))])
        batch = {
            "input_ids": ids,
            "position_ids": torch.arange(16).repeat(2)[None],
            "document_ids": torch.arange(2).repeat_interleave(16)[None],
        }
        return lm.logits(batch)[0, 16:].float()

    with torch.no_grad():
        trained = float((second(5) - second(9)).abs().max())
    with lm.evaluating():
        return trained, float((second(5) - second(9)).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_isolated_where_it_is_probed_and_only_scales_couple_them(
    ranks: Any, tiny_models: Any, kind: str
) -> None:
    trained, measured = ranks(1, isolated, str(tiny_models["mistral"]), kind)[0]
    assert measured == 0
    assert (trained == 0) == (kind == "rowwise"), trained


def overfit(folder: str, kind: str) -> list[float]:
    """60 steps of the real loop on a cycle."""
    import numpy as np

    from llm_recipes.config import BatchWarmupConfig
    from llm_recipes.data.documents import window
    from llm_recipes.data.stream import stack
    from llm_recipes.models import causal, topology
    from llm_recipes.training import loop, optimizer, proofs, schedule
    from llm_recipes.training.guard import Guard
    from llm_recipes.training.objective import NextToken

    steps, parallel = 60, ParallelConfig(fp8=kind)
    place = topology.start(parallel)
    lm = causal.build(ModelConfig(path=folder), parallel, place, folder, True, seed=0)
    proofs.isolate_documents(lm, True)
    cycle = window([np.arange(33) % 4 + 1], 32, True)
    batch = stack([cycle] * 2) | {"source": torch.zeros(2, dtype=torch.int64)}
    batch = {key: value.to(place.device) for key, value in batch.items()}
    run = loop.Training(
        models={"policy": lm},
        optimizer=optimizer.adamw(lm.model, OptimConfig(lr=3e-3)),
        objective=NextToken(1),
        batches=iter([[batch]] * steps),
        spans=schedule.BatchSpans(2 * place.ranks, BatchWarmupConfig()),
        learning_rate=schedule.LearningRate("constant", 3e-3, 0.0, 0, 0, steps),
        loss_scale=optimizer.LossScale(False, place.device),
        guard=Guard(GuardConfig(threshold=None), place.device, False),
        clip_norm=1.0,
        reduce_every=True,
        seed=0,
        seq_len=32,
    )
    return [float(step.loss) for step in loop.train(run, steps)]


def test_a_cycle_is_learned_as_without(ranks: Any, tiny_models: Any) -> None:
    folder = str(tiny_models["mistral"])
    plain, *losses = (ranks(1, overfit, folder, kind)[0] for kind in ("none", *KINDS))
    assert plain[0] > 4 and plain[-1] < 0.1
    for found in losses:
        assert found[-1] < 2 * plain[-1] + 0.01
        assert max(abs(a - b) for a, b in zip(found, plain, strict=True)) < 0.5


MIXED = {"parallel__precision": "bf16-mixed"}


def last(place: Path, step: int = 8) -> Path:
    return place / "run" / "checkpoints" / f"step-{step:08d}"


def test_a_run_resumes_bit_for_bit(ranks: Any, tiny_models: Any, workplace: Callable[[str], Path]) -> None:
    straight, stopped = workplace("straight"), workplace("stopped")
    changes = MIXED | {"parallel__fp8": "tensorwise"}
    for place, more in ((straight, {}), (stopped, {"train__stop_at": 5}), (stopped, {})):
        assert ranks(2, run, tiny.pretrain_config(place, tiny_models["mistral"], **changes, **more)) == [None] * 2
    expected, found = tiny.state_of(last(straight)), tiny.state_of(last(stopped))
    assert expected.keys() == found.keys() and all(torch.equal(each, found[key]) for key, each in expected.items())


def test_a_checkpoint_is_that_of_a_run_without_and_either_goes_on_from_the_other_s(
    ranks: Any, tiny_models: Any, workplace: Callable[[str], Path]
) -> None:
    places = {kind: workplace(kind) for kind in ("none", "tensorwise")}

    def done(size: int, place: Path, kind: str, **more: Any) -> str | None:
        changes = MIXED | {"parallel__fp8": kind, "checkpoint__every": 2} | more
        said: str | None = ranks(size, run, tiny.pretrain_config(place, tiny_models["mistral"], **changes))[0]
        return said

    forms = []
    for kind, place in places.items():
        assert done(2, place, kind, train__stop_at=2) is None
        forms.append({key: (each.shape, each.dtype) for key, each in tiny.state_of(last(place, 2)).items()})
    assert forms[0] == forms[1]
    assert {str(dtype) for _, dtype in forms[1].values()} == {"torch.float32"}
    refused = done(2, places["tensorwise"], "none")
    assert refused is not None and "parallel.fp8" in refused and "\n" not in refused
    for kind, other in (("tensorwise", "none"), ("none", "rowwise")):
        assert done(1, places[kind], other, train__stop_at=3, run__allow_changes=True) is None
        assert last(places[kind], 3).is_dir()


def test_reducing_once_a_step_changes_no_more_than_the_order_of_sums(
    ranks: Any, tiny_models: Any, workplace: Callable[[str], Path]
) -> None:
    from llm_recipes.telemetry import metrics

    courses = []
    for reduce in ("every", "last"):
        place = workplace(reduce)
        changes = MIXED | {"parallel__fp8": "tensorwise", "parallel__reduce": reduce, "train__stop_at": 3}
        assert ranks(2, run, tiny.pretrain_config(place, tiny_models["mistral"], **changes))[0] is None
        courses.append([row["loss"] for row in metrics.read(place / "run" / "metrics.jsonl") if "loss" in row])
    assert courses[0][0] == courses[1][0] and courses[0] == pytest.approx(courses[1], abs=5e-3)


def test_a_plan_counts_what_is_gathered_in_8_bits() -> None:
    from llm_recipes.planning.groups import lay_out

    def gathered(**changes: Any) -> int:
        return lay_out(empty("mistral"), ParallelConfig(**changes), "full", 2, 1).groups["model.layers.0"].gathered

    linear, norms = 32 * (32 + 16 + 16 + 32 + 3 * 48), 2 * 32
    assert gathered() == gathered(fp8="rowwise") == 2 * (linear + norms)
    assert gathered(fp8="tensorwise") == linear + 2 * norms
    assert gathered(fp8="tensorwise", cpu_offload=True) == gathered(fp8="tensorwise", sharding="no_shard") == gathered()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel__precision": "fp32"}, "parallel.fp8=rowwise needs parallel.precision=bf16-mixed or bf16, not fp32"),
        ({"parallel__precision": "fp16-mixed"}, "not fp16-mixed"),
        ({"adapter__kind": "lora"}, "parallel.fp8=rowwise: weights beside an adapter stand still"),
        ({"adapter__kind": "lora", "adapter__base": "4bit"}, "set parallel.fp8=none"),
        ({"parallel__fp8": "columnwise"}, "parallel.fp8=columnwise: no such choice"),
    ],
)
def test_what_cannot_be_is_refused_of_the_configuration_alone(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    settings = {"parallel__precision": "bf16-mixed", "parallel__fp8": "rowwise"} | changes
    with pytest.raises(UserError, match=said) as caught:
        tiny.pretrain_config(tmp_path, tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_a_device_a_model_or_an_installation_without_is_refused_in_one_line(monkeypatch: Any) -> None:
    from llm_recipes.models import fp8

    parallel, gpu = ParallelConfig(fp8="rowwise"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=r"parallel.fp8=rowwise: NVIDIA A100 has no products in 8 bits .* 8\.9 "):
        fp8.convert(empty("mistral"), parallel, mixed(), gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    fp8.refuse_device(parallel, gpu)
    with pytest.raises(UserError, match="gpt2 has no linear layer to convert inside its layers; set parallel"):
        fp8.convert(empty("gpt2"), parallel, mixed(), torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torchao is not installed; pip install 'llm_recipes\[fp8\]'"):
        fp8.refuse_what_is_missing(parallel)
    fp8.refuse_what_is_missing(ParallelConfig())


def test_what_is_left_out_and_the_emulation_are_said(caplog: Any) -> None:
    from llm_recipes.models import fp8

    with caplog.at_level(logging.INFO, "llm_recipes.models.fp8"):
        fp8.convert(empty("mixtral"), ParallelConfig(fp8="tensorwise"), mixed(), torch.device("cpu"))
    said = {record.getMessage(): record.levelname for record in caplog.records}
    assert any("8 linear layers" in line and "embeddings, head and norms stay" in line for line in said)
    assert any("fused experts" in line and "model.layers.0.mlp.experts" in line for line in said)
    assert [level for line, level in said.items() if "emulated in float32" in line] == ["WARNING"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_the_loss_is_near_bf16_s(tiny_models: dict[str, Path], kind: str) -> None:
    """Also that the kernels take what they are given: contiguity, 21 x 16 rows, fast accumulation."""
    from llm_recipes.models import topology

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no products in 8 bits")
    courses = []
    for each in ("none", kind):
        try:
            courses.append(overfit(str(tiny_models["mistral"]), each))
        finally:
            topology.stop()
    assert courses[1][0] == pytest.approx(courses[0][0], abs=0.05)
    assert courses[1][-1] < 2 * courses[0][-1] + 0.01
