"""A mixture of experts' auxiliary loss is a product of two means over what it is computed over. Here that is a window:
how windows are dealt to ranks and micro-batches changes nothing (Fedus et al., "Switch Transformers", 2021)."""

import contextlib
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F

from llm_recipes.config import ModelConfig, ParallelConfig
from llm_recipes.errors import UserError
from llm_recipes.models import router

WEIGHT = 0.5
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    # One layer of it is dense, and each token has a shared expert too.
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16,
                                "mlp_only_layers": [0], "num_hidden_layers": 3}),
}  # fmt: skip
ON = {"output_router_logits": True, "router_aux_loss_coef": WEIGHT}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family, (name, changes) in FAMILIES.items():
        made[family] = tiny.save_model(tmp_path_factory.mktemp(family), name, **changes)
    return made


def windows(padding: int = 0) -> dict[str, torch.Tensor]:
    """Four windows of 32, the shortest with 5 targets; each of two documents but one."""
    from llm_recipes.data.documents import window
    from llm_recipes.data.stream import stack

    lengths = [(20, 12), (5,), (16, 10), (3, 9)]
    rows = [
        window([torch.arange(n + 1).mul(3 * row + 5).add(50 * row).remainder(256).numpy() for n in both], 32, True)
        for row, both in enumerate(lengths)
    ]
    every = stack(rows) | {"source": torch.zeros(4, dtype=torch.int64)}
    # What stands in padding must not matter.
    every["input_ids"] = torch.where(every["targets"] < 0, padding, every["input_ids"])
    return every


def steps(folder: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A step of each case, as the training loop adds it up."""
    from llm_recipes.data.stream import rank_positions
    from llm_recipes.models import causal, topology
    from llm_recipes.training import proofs
    from llm_recipes.training.objective import NextToken

    parallel = ParallelConfig(precision="fp32")
    place = topology.start(parallel)
    found = []
    for case in cases:
        config = ModelConfig(
            path=folder, overrides=case["overrides"], activation_checkpointing=case.get("recompute", "none")
        )
        lm = causal.build(config, parallel, place, folder, mask_documents=True, seed=0)
        proofs.isolate_documents(lm, True)
        every = windows(case.get("padding", 0))
        proofs.head_equals_logits(lm, every)
        mine = rank_positions(range(4), case.get("micro_batch_size", 1), place.rank, place.ranks)
        objective, sums = NextToken(1), {"loss": torch.zeros(()), "added": torch.zeros(())}
        for rows in mine:
            batch = {key: value[rows] for key, value in every.items()}
            total, per_window, reported = objective.loss({"policy": lm}, batch)
            ((total / (every["targets"] >= 0).sum() + per_window / 4) * place.ranks).backward()
            parts = {"loss": total.detach(), "added": per_window.detach(), **reported}
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value
        found.append({
            "weight": lm.router_weight,
            "sums": {name: place.sum(value) for name, value in sums.items()},
            "gradients": {name: each.grad.full_tensor() for name, each in lm.model.named_parameters()},
            "chunked_head": lm.use_loss_head,
        })  # fmt: skip
    return found


def by_hand(folder: Path, top_k: int = 2, experts: int = 4) -> dict[str, Any]:
    """Of plain transformers, a document and a window at a time: number of experts * sum over experts of (share of the
    window's tokens sent there) * (mean probability given to it), over all layers that have experts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    every = windows()
    losses, router = [], []
    for row in range(4):
        ids, targets, owner = (every[key][row] for key in ("input_ids", "targets", "document_ids"))
        logits: list[torch.Tensor] = []
        for document in owner[targets >= 0].unique():
            here = owner == document
            output = model(input_ids=ids[here][None], output_router_logits=True, use_cache=False)
            losses.append(F.cross_entropy(output.logits[0], targets[here], reduction="sum"))
            logits += [*output.router_logits]
        layers = len(logits) // len(owner[targets >= 0].unique())
        of_window = torch.cat(logits)
        assert of_window.shape == (layers * int((targets >= 0).sum()), experts)
        probabilities = of_window.softmax(-1)
        sent = F.one_hot(probabilities.topk(top_k).indices, experts).sum(1).float().mean(0)
        router.append(experts * (sent * probabilities.mean(0)).sum())
    total, auxiliary = torch.stack(losses).sum(), torch.stack(router)
    (total / (every["targets"] >= 0).sum() + WEIGHT * auxiliary.mean()).backward()
    return {
        "loss": total.detach(),
        "router": auxiliary.detach(),
        "gradients": {name: each.grad for name, each in model.named_parameters()},
    }


def assert_gradients(found: dict[str, Any], wanted: dict[str, torch.Tensor], rtol: float = 1e-3) -> None:
    assert found["gradients"].keys() == wanted.keys()
    for name, each in wanted.items():
        torch.testing.assert_close(
            found["gradients"][name], each, rtol=rtol, atol=1e-6 + rtol / 10 * float(each.abs().max()), msg=name
        )


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_auxiliary_loss_is_that_of_each_window_however_windows_are_dealt_out(
    ranks: Any, folders: Any, family: str
) -> None:
    wanted = by_hand(folders[family])
    assert float(wanted["router"].std()) > 1e-3, "else a mean over more windows would be the same"
    for size, micro_batches in ((1, (1, 2, 4)), (2, (1, 2)), (4, (1,))):
        cases = [{"overrides": ON, "micro_batch_size": each} for each in micro_batches]
        for answers in ranks(size, steps, str(folders[family]), cases):
            for found in answers:
                assert found["weight"] == WEIGHT
                sums = found["sums"]
                torch.testing.assert_close(sums["router_loss"], wanted["router"].sum(), rtol=1e-5, atol=0)
                torch.testing.assert_close(sums["added"], WEIGHT * wanted["router"].sum(), rtol=1e-5, atol=0)
                # Logged apart: the token loss has none of it.
                torch.testing.assert_close(sums["loss"], wanted["loss"], rtol=1e-5, atol=0)
                torch.testing.assert_close(sums["loss_by_source"][0], wanted["loss"], rtol=1e-5, atol=0)
                assert_gradients(found, wanted["gradients"])
                assert found["chunked_head"], "and the head needs no logits for it"


def test_padding_is_sent_to_no_expert(ranks: Any, folders: Any) -> None:
    cases = [{"overrides": ON, "micro_batch_size": 4, "padding": token} for token in (0, 77)]
    zeros, others = ranks(1, steps, str(folders["mixtral"]), cases)[0]
    assert torch.equal(zeros["sums"]["router_loss"], others["sums"]["router_loss"])
    assert_gradients(others, zeros["gradients"], rtol=1e-5)


def test_recomputed_activations_have_the_same_auxiliary_loss(ranks: Any, folders: Any) -> None:
    cases = [{"overrides": ON, "recompute": kind} for kind in ("none", "full", "selective")]
    kept, *recomputed = ranks(2, steps, str(folders["mixtral"]), cases)[0]
    for found in recomputed:
        assert torch.equal(found["sums"]["router_loss"], kept["sums"]["router_loss"])
        assert_gradients(found, kept["gradients"], rtol=1e-6)


def test_a_coefficient_of_zero_is_plain_cross_entropy(ranks: Any, folders: Any) -> None:
    cases = [{"overrides": each} for each in ({}, {**ON, "router_aux_loss_coef": 0.0}, ON)]
    off, zero, on = ranks(2, steps, str(folders["mixtral"]), cases)[0]
    assert off["weight"] == zero["weight"] == 0
    for found in (off, zero):
        assert "router_loss" not in found["sums"]
        assert found["sums"]["added"] == 0
        assert found["sums"]["loss"] == on["sums"]["loss"]
    for name, each in off["gradients"].items():
        assert torch.equal(zero["gradients"][name], each), name
    gate = "model.layers.0.mlp.gate.weight"
    assert not torch.allclose(on["gradients"][gate], off["gradients"][gate], rtol=1e-2), "else this shows nothing"


def empty_window(folder: str) -> dict[str, Any]:
    """A window without a target, as a rank runs in validation that has none left."""
    from llm_recipes.models import causal, topology
    from llm_recipes.training.objective import NextToken

    parallel = ParallelConfig(precision="fp32")
    config = ModelConfig(path=folder, overrides=ON)
    lm = causal.build(config, parallel, topology.start(parallel), folder, mask_documents=True, seed=0)
    batch = {key: value[:2] for key, value in windows().items()}
    batch["targets"][1] = -100
    total, per_window, sums = NextToken(1).loss({"policy": lm}, batch)
    (total + per_window).backward()
    finite = all(bool(torch.isfinite(each.grad.to_local()).all()) for each in lm.model.parameters())
    return {"added": float(per_window.detach()), "router_loss": float(sums["router_loss"]), "finite": finite}


def test_a_window_without_targets_adds_nothing(ranks: Any, folders: Any) -> None:
    (found,) = ranks(1, empty_window, str(folders["mixtral"]))
    first = float(by_hand(folders["mixtral"])["router"][0])
    assert found["finite"]
    assert found["router_loss"] == pytest.approx(first, rel=1e-5)
    assert found["added"] == pytest.approx(WEIGHT * first, rel=1e-5)


def answers_alone(folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The auxiliary loss where every token trains, and where of each document the last one does alone."""
    from llm_recipes.models import causal, topology

    parallel = ParallelConfig(precision="fp32")
    config = ModelConfig(path=folder, overrides=ON)
    lm = causal.build(config, parallel, topology.start(parallel), folder, mask_documents=True, seed=0)
    every = windows()
    owner, targets = every["document_ids"], every["targets"]
    last = torch.ones_like(targets, dtype=torch.bool)
    last[:, :-1] = owner[:, 1:] != owner[:, :-1]
    some = {**every, "targets": torch.where(last, targets, -100)}
    with torch.no_grad():
        whole, part = (lm.token_losses(batch)[1] for batch in (every, some))
    assert whole is not None and part is not None and bool((some["targets"] >= 0).any(1).all())
    return whole, part


def test_prompts_that_do_not_train_are_sent_to_experts_all_the_same(ranks: Any, folders: Any) -> None:
    ((whole, part),) = ranks(1, answers_alone, str(folders["mixtral"]))
    torch.testing.assert_close(part, whole, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"])
def test_the_loss_is_the_family_s_own_where_there_is_one_window(family: str) -> None:
    own = importlib.import_module(f"transformers.models.{family}.modeling_{family}").load_balancing_loss_func
    torch.manual_seed(0)
    logits = tuple(torch.randn(30, 8).bfloat16() for _ in range(3))
    counted = (torch.arange(30) < 23)[None].long()
    torch.testing.assert_close(router.losses(logits, 3, counted)[0], own(logits, 8, 3, counted), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("family", "text", "said"),
    [
        ("mixtral", {"num_experts_per_tok": 2}, None),
        ("mixtral", {"num_experts_per_tok": 2, "output_router_logits": False}, None),
        ("mixtral", {}, "no loss of routers"),
        ("mistral", {"num_experts_per_tok": 2}, "no loss of routers"),
        ("doge", {"num_experts_per_tok": 2}, "another loss of routers"),
    ],
)
def test_another_loss_of_routers_is_refused(family: str, text: dict[str, Any], said: str | None) -> None:
    module = f"transformers.models.{family}.modeling_{family}"
    importlib.import_module(module)
    config = SimpleNamespace(**{**ON, "model_type": family, **text})
    model = type("Family", (), {"__module__": module})()
    model.config = SimpleNamespace(get_text_config=lambda: config)
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        router.refuse_another(model)
