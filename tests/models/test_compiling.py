"""Compiled layers compute what plain ones do, keep for the backward pass what was asked for, and are compiled once.

What depends on graphs and not on the code made of them runs on backends without a code generator; inductor itself is
in `test_sharding.py`.
"""

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from llm_recipes.config import ModelConfig, ParallelConfig
from llm_recipes.errors import UserError

MANY = 12
"""Layers: more than the compilations of one code that torch allows by itself."""
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
SETTINGS: list[dict[str, Any]] = [
    {"activation_checkpointing": "none"},
    {"activation_checkpointing": "selective"},
    {"activation_checkpointing": "full"},
]


def open_model(folder: str, **settings: Any) -> Any:
    from llm_recipes.models import causal, topology

    parallel = ParallelConfig(precision="fp32")
    config = ModelConfig(path=folder, **settings)
    lm = causal.build(config, parallel, topology.start(parallel), folder, mask_documents=True, seed=0)
    lm.use_loss_head = True
    return lm


def packed(documents: int, rows: int = 2) -> dict[str, torch.Tensor]:
    """Windows of 36 targets, each with so many documents of one length."""
    from llm_recipes.data.documents import window
    from llm_recipes.data.stream import stack

    generator = np.random.default_rng(documents)
    lengths = [36 // documents + 1] * documents
    return stack([window([generator.integers(0, 256, each) for each in lengths], 36, True) for _ in range(rows)])


def starting(backend: str) -> Any:
    """Compile anew, and with another backend."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    return patch("llm_recipes.models.layers.BACKEND", backend)


def total(lm: Any) -> torch.Tensor:
    """Of all tokens, and what a mixture of experts adds for its routers."""
    losses, router = lm.token_losses(packed(3))
    return losses.sum() if router is None else losses.sum() + router.sum()


def stepped(folder: str, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A forward and a backward pass for each way of running layers: loss, gradients, the products of the backward pass,
    and bytes of what it was given (weights left out)."""
    from torch.profiler import ProfilerActivity, profile

    found = []
    for setting in settings:
        with starting("aot_eager_decomp_partition"):
            lm = open_model(folder, **setting)
        total(lm).backward()  # What is compiled is compiled now.
        lm.model.zero_grad()
        held: dict[int, int] = {}

        def keep(tensor: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = total(lm)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            loss.backward()
        names = Counter(each.name for each in seen.events() or ())
        found.append({
            "loss": float(loss),
            "gradients": {name: each.grad.full_tensor() for name, each in lm.model.named_parameters()},
            "products": sum(names[each] for each in PRODUCTS),
            "attention": names["aten::_scaled_dot_product_flash_attention_for_cpu"],
            "saved": sum(held.values()),
        })  # fmt: skip
    return found


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    for name, each in wanted["gradients"].items():
        torch.testing.assert_close(
            found["gradients"][name], each, rtol=1e-4, atol=1e-5 * float(each.abs().max()), msg=name
        )


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_compiled_layers_keep_for_the_backward_pass_what_was_asked_for(
    ranks: Any, tiny_models: dict[str, Path], family: str
) -> None:
    """`selective` multiplies no matrix again, experts' neither, and keeps less than `none`."""
    compiled = [{"compile": True, **setting} for setting in SETTINGS]
    (answers,) = ranks(1, stepped, str(tiny_models[family]), [SETTINGS[0], *compiled])
    plain, kept, selective, full = answers
    for each in (kept, selective, full):
        assert_same(each, plain)
    assert selective["products"] == kept["products"] < full["products"]
    assert selective["attention"] == kept["attention"] == 0 < full["attention"]
    assert full["saved"] < selective["saved"] < kept["saved"]


def test_a_memory_budget_is_kept_to(ranks: Any, tiny_models: dict[str, Path]) -> None:
    """From what `full` keeps to what `none` does, and never a wrong gradient. (To within what is in no layer.)"""
    compiled = {"compile": True, "activation_checkpointing": "selective"}
    budgets = [{**compiled, "activation_memory_budget": budget} for budget in (0.0, 0.3, 1.0)]
    (answers,) = ranks(1, stepped, str(tiny_models["mistral"]), [SETTINGS[0], *budgets])
    plain, least, some, most = answers
    for each in (least, some, most):
        assert_same(each, plain)
    assert least["saved"] < some["saved"] <= least["saved"] + 0.35 * (most["saved"] - least["saved"])
    assert most["products"] <= some["products"] < least["products"]


def compiled_over(folder: str, ways: list[str]) -> dict[str, list[Any]]:
    """For each way of masking: graphs after batches of 1, 2, 5 and 9 documents a window, and graph breaks."""
    from torch._dynamo.utils import counters

    found: dict[str, list[Any]] = {}
    for way in ways:
        with starting("eager"):
            lm = open_model(folder, init="random", compile=True)
        lm.masking = replace(lm.masking, way=way)
        found[way] = []
        for documents in (1, 2, 5, 9):
            lm.token_losses(packed(documents))[0].sum().backward()
            found[way].append(counters["stats"]["unique_graphs"])
        found[way].append(sum(counters["graph_break"].values()))
    return found


@pytest.mark.parametrize("family", ["mistral", "qwen3_tied"])
def test_a_layer_is_one_graph_whatever_documents_are_packed(ranks: Any, tmp_path: Path, family: str) -> None:
    """And one for all layers. transformers gives no mask to windows of one document each: a second graph, once."""
    folder = tiny.save_model(tmp_path, family, num_hidden_layers=MANY)
    ways = ["own", "positions", "block", "flat", "none"]
    (found,) = ranks(1, compiled_over, str(folder), ways)
    for way, (*graphs, breaks) in found.items():
        assert graphs == ([1, 2, 2, 2] if way == "positions" else [1, 1, 1, 1]), way
        assert breaks == 0


def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, **_: Any,
) -> torch.Tensor:  # fmt: skip
    """What flash attention computes of (tokens, heads, D), causal in each stretch, by plain products."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    places = torch.arange(query.shape[0])
    document = torch.searchsorted(cu_seqlens_q, places, right=True)
    look = (document[:, None] == document[None, :]) & (places[:, None] >= places[None, :])
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~look, -torch.inf).softmax(-1), value)


def by_lengths(folder: str) -> dict[str, Any]:
    """With a flash attention of our own making: losses beside those under masks, and graphs over 2 to 9 documents."""
    from torch._dynamo.utils import counters

    def options(max_seqlen_q: int = 0, max_seqlen_k: int = 0, **_: Any) -> dict[str, int]:
        assert max_seqlen_q == max_seqlen_k == 36, "the lengths are not ours"
        return {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}

    given = ((None, varlen, None, None, None), (options, None))
    found: dict[str, Any] = {"apart": [], "graphs": []}
    with (
        patch("transformers.modeling_flash_attention_utils.lazy_import_flash_attention", lambda *_: given),
        # It warns of fp32, which real flash attention does not take.
        patch("transformers.integrations.flash_attention.get_target_dtype", lambda *_: None),
    ):
        with starting("eager"):
            lm, plain = open_model(folder, compile=True), open_model(folder)
        lm.model.config._attn_implementation = "flash_attention_2"
        lm.masking = replace(lm.masking, way="flat")
        for documents in (2, 5, 9, 1):
            batch = packed(documents)
            with patch("transformers.masking_utils.find_packed_sequence_indices", side_effect=AssertionError):
                losses, _ = lm.token_losses(lm.masking.prepare(batch))  # nobody looks for what it has been told
            losses.sum().backward()
            found["apart"].append(float((losses - plain.token_losses(batch)[0]).abs().max()))
            found["graphs"].append(counters["stats"]["unique_graphs"])
    found["breaks"] = dict(counters["graph_break"])
    return found


def test_flash_attention_is_given_the_documents_lengths_and_no_layer_is_compiled_twice(
    ranks: Any, tmp_path: Path
) -> None:
    """transformers would find them in each layer, and wait for the GPU there. It also asks each layer for its number
    (5.23), so that each is a graph of its own: more of them than torch would allow by itself, and none uncompiled."""
    folder = tiny.save_model(tmp_path, "mistral", num_hidden_layers=MANY)
    (found,) = ranks(1, by_lengths, str(folder))
    assert max(found["apart"]) < 1e-4
    assert found["graphs"] == [MANY] * 4 and not found["breaks"]


class Numbered(nn.Module):
    """A layer that no other one's graph fits."""

    def __init__(self, number: int, broken: bool = False) -> None:
        super().__init__()
        self.number, self.broken = number, broken
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(hidden) * self.number
        if self.broken:
            torch._dynamo.graph_break()
        return torch.tanh(hidden)


def through(layers: list[Any], hidden: torch.Tensor) -> list[torch.Tensor]:
    """The result, and the weights' gradients."""
    for layer in layers:
        hidden = layer(hidden)
    hidden.sum().backward()
    return [hidden.detach(), *(layer.linear.weight.grad for layer in layers)]


@pytest.mark.parametrize("kind", ["none", "selective"])
def test_many_layers_that_differ_are_all_compiled(kind: str) -> None:
    """After 8 of one code torch would run the others as they are, and say so in a warning among many."""
    from torch._dynamo.utils import counters

    from llm_recipes.models.layers import prepare

    with starting("eager"), torch._dynamo.config.patch(recompile_limit=8):
        plain, compiled = [Numbered(n) for n in range(1, MANY + 1)], [Numbered(n) for n in range(1, MANY + 1)]
        for one, other in zip(plain, compiled, strict=True):
            other.load_state_dict(one.state_dict())
        prepare(list(compiled), kind, compiled=True)
        inputs = torch.randn(2, 4)
        for one, other in zip(through(plain, inputs), through(compiled, inputs), strict=True):
            torch.testing.assert_close(one, other)
        assert counters["stats"]["unique_graphs"] == MANY


def test_a_layer_that_cannot_be_one_graph_is_several_and_that_is_said() -> None:
    from llm_recipes.models.layers import compilations, prepare

    with starting("eager"):
        assert compilations() is None
        plain, compiled = Numbered(2), Numbered(2, broken=True)
        compiled.load_state_dict(plain.state_dict())
        prepare([compiled], "none", compiled=True)
        inputs = torch.randn(2, 4)
        for one, other in zip(through([plain], inputs), through([compiled], inputs), strict=True):
            torch.testing.assert_close(one, other)
        said = compilations()
    assert said is not None and said.startswith("2 graphs compiled, 1 graph breaks (the first: "), said


def test_what_does_not_train_is_not_compiled() -> None:
    """Validation and generation come in many shapes; training keeps its fixed one."""
    from torch._dynamo.utils import counters

    from llm_recipes.models.layers import prepare

    with starting("eager"):
        layer = Numbered(2)
        prepare([layer], "full", compiled=True)
        with torch.no_grad():
            for rows in (1, 2, 3):
                layer(torch.randn(rows, 4))
        assert counters["stats"]["unique_graphs"] == 0
        through([layer], torch.randn(5, 4))
        assert counters["stats"]["unique_graphs"] == 1


def test_auto_compiles_on_cuda_and_says_why() -> None:
    from llm_recipes.models.layers import whether_to_compile

    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    with patch("shutil.which", lambda name: "/usr/bin/gcc"):
        assert whether_to_compile("auto", cuda) == (True, "model.compile=auto: on CUDA")
        assert whether_to_compile("auto", cpu) == (False, "model.compile=auto: not on the cpu")
        assert not whether_to_compile("auto", cuda, beside_experts=True)[0]
        for device in (cuda, cpu):
            assert whether_to_compile(True, device, beside_experts=True) == (True, "asked for")
            assert whether_to_compile(False, device) == (False, "asked for")
    with patch("shutil.which", lambda name: None), patch.dict("os.environ"):
        import os

        os.environ.pop("CC", None)
        compiled, why = whether_to_compile("auto", cuda)
    assert not compiled and "C compiler" in why


def said_of_layers(folder: str, settings: dict[str, Any]) -> list[str]:
    """What the log says of layers, or why the model is refused."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("llm_recipes.models.causal")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        open_model(folder, **settings)
    except UserError as error:
        return [str(error)]
    finally:
        log.removeHandler(handler)
    return [line for line in lines if line.startswith("layers: ")]


def test_the_log_says_what_is_done_to_layers(ranks: Any, tiny_models: dict[str, Path]) -> None:
    budget = {"activation_checkpointing": "selective", "activation_memory_budget": 0.5}
    said = {
        "layers: not compiled (model.compile=auto: not on the cpu), activation checkpointing none": {},
        "layers: each compiled as it first trains (asked for), activation checkpointing selective within 0.5 of the "
        "activations' bytes": {"compile": True, **budget},
    }
    for line, settings in said.items():
        assert ranks(1, said_of_layers, str(tiny_models["mistral"]), settings) == [[line]]
    (refused,) = ranks(1, said_of_layers, str(tiny_models["mistral"]), budget)
    assert refused[0].startswith("model.activation_memory_budget=0.5: it is the compiler that keeps to it, and layers")
