"""The head that answers with losses is cross entropy of its logits, to the last gradient, in less memory."""

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from llm_recipes.config import ModelConfig, ParallelConfig
from llm_recipes.data.documents import IGNORE, window
from llm_recipes.data.stream import Batch, stack, with_counted
from llm_recipes.models import head


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    """Hidden states, a head, targets and upstream gradients, and how many logits fit into a chunk."""
    tokens, hidden, vocabulary = (draw(st.integers(1, most)) for most in (17, 9, 23))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    ignored = torch.tensor(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    return {
        "hidden": 2 * torch.randn(tokens, hidden, generator=generator),
        "weight": torch.randn(vocabulary, hidden, generator=generator),
        "bias": torch.randn(vocabulary, generator=generator) if draw(st.booleans()) else None,
        "targets": torch.where(ignored, IGNORE, torch.randint(vocabulary, (tokens,), generator=generator)),
        "upstream": torch.randn(tokens, generator=generator),
        # One token at a time, several with a remainder, or all at once.
        "chunk": draw(st.integers(1, (tokens + 1) * vocabulary)),
    }


def chunks_of(elements: int) -> Any:
    return patch.dict(head.CHUNK_ELEMENTS, {"cpu": elements})


def by_chunks(problem: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Losses and gradients of hidden states, weight and bias, by the chunked head."""
    leaves = leaves_of(problem, dtype)
    with chunks_of(problem["chunk"]):
        losses = head.head_losses(leaves["hidden"], leaves["weight"], leaves.get("bias"), problem["targets"])
        losses.backward(problem["upstream"])
    return losses.detach(), [each.grad for each in leaves.values()]


def at_once(problem: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same by torch, on all logits."""
    leaves = leaves_of(problem, dtype)
    logits = F.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
    logits = logits if dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(logits, problem["targets"], ignore_index=IGNORE, reduction="none")
    losses.backward(problem["upstream"].to(losses.dtype))
    return losses.detach(), [each.grad for each in leaves.values()]


def leaves_of(problem: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    names = [name for name in ("hidden", "weight", "bias") if problem[name] is not None]
    # Whatever the dtype, the numbers are ones that bf16 can hold.
    return {name: problem[name].bfloat16().to(dtype).requires_grad_() for name in names}


@given(problems())
@settings(max_examples=80, deadline=None)
def test_losses_and_gradients_are_those_of_full_logits_however_they_are_chunked(problem: dict[str, Any]) -> None:
    losses, gradients = by_chunks(problem)
    expected, expected_gradients = at_once(problem)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    assert not losses[problem["targets"] == IGNORE].any(), "an ignored target has no loss"
    assert not gradients[0][problem["targets"] == IGNORE].any(), "nor a gradient"


@given(problems())
@settings(max_examples=40, deadline=None)
def test_losses_of_given_logits_are_cross_entropy_too(problem: dict[str, Any]) -> None:
    ours, theirs = (problem["hidden"].clone().requires_grad_() for _ in range(2))
    targets = torch.where(problem["targets"] == IGNORE, IGNORE, problem["targets"] % ours.shape[1])
    with chunks_of(problem["chunk"]):
        losses = head.logits_losses(ours, targets)
        losses.backward(problem["upstream"])
    expected = F.cross_entropy(theirs, targets, ignore_index=IGNORE, reduction="none")
    expected.backward(problem["upstream"])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.detach(), problem["hidden"], rtol=0, atol=0, msg="the model's logits are its own")


def large(tokens: int, hidden: int, vocabulary: int, chunk: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(tokens, hidden, generator=generator),
        "weight": torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5,
        "bias": torch.randn(vocabulary, generator=generator),
        "targets": torch.randint(vocabulary, (tokens,), generator=generator),
        "upstream": torch.rand(tokens, generator=generator),
        "chunk": chunk,
    }


@pytest.mark.parametrize("rows", [7, 64, 1000])
def test_in_bf16_nothing_is_lost_beyond_what_full_logits_lose(rows: int) -> None:
    """Against the same numbers in fp64. Adding chunks up in bf16 would cost several times the error."""
    problem = large(512, 32, 96, rows * 96)
    exact, exact_gradients = at_once(problem, torch.float64)
    ours, theirs = by_chunks(problem, torch.bfloat16), at_once(problem, torch.bfloat16)

    def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((found.double() - wanted).norm() / wanted.norm())

    assert ours[0].dtype == torch.float32
    assert error(ours[0], exact) <= 1.1 * error(theirs[0], exact) < 1e-2
    for found, plain, wanted in zip(ours[1], theirs[1], exact_gradients, strict=True):
        assert found.dtype == torch.bfloat16
        assert error(found, wanted) <= 1.2 * error(plain, wanted) < 2e-2


def test_a_batch_without_targets_has_no_loss_no_gradient_and_no_nan() -> None:
    problem = large(12, 8, 16, 3 * 16) | {"targets": torch.full((12,), IGNORE)}
    for dtype in (torch.float32, torch.bfloat16):
        losses, gradients = by_chunks(problem, dtype)
        assert torch.equal(losses, torch.zeros(12))
        assert all(torch.equal(each, torch.zeros_like(each)) for each in gradients)


def test_logits_too_large_for_exp_give_no_nan() -> None:
    problem = large(12, 8, 16, 3 * 16)
    problem["hidden"] = problem["hidden"] * 1e3
    losses, gradients = by_chunks(problem)
    expected, expected_gradients = at_once(problem)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-3)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_what_is_frozen_gets_no_gradient() -> None:
    problem = large(12, 8, 16, 3 * 16)
    leaves = leaves_of(problem, torch.float32)
    leaves["weight"].requires_grad_(False)
    leaves["bias"].requires_grad_(False)
    with chunks_of(problem["chunk"]):
        head.head_losses(*leaves.values(), problem["targets"]).backward(problem["upstream"])
    torch.testing.assert_close(leaves["hidden"].grad, at_once(problem)[1][0], rtol=1e-5, atol=1e-6)
    assert leaves["weight"].grad is None and leaves["bias"].grad is None


class Largest(TorchDispatchMode):
    """Notes the largest fp32 tensor that any operation gives, and that of any dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.fp32 = self.any = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self.any = max(self.any, each.numel())
                if each.dtype in (torch.float32, torch.float64):
                    self.fp32 = max(self.fp32, each.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_by_vocabulary_matrix_is_ever_held(dtype: torch.dtype) -> None:
    tokens, hidden, vocabulary, chunk = 256, 8, 128, 4 * 128
    problem = large(tokens, hidden, vocabulary, chunk)
    with Largest() as noted:
        at_once(problem, dtype)
    assert noted.fp32 == tokens * vocabulary, "the watch sees forward and backward of the plain way"
    with Largest() as noted:
        by_chunks(problem, dtype)
    # The weight's and the hidden states' own gradients are as large as they are.
    assert noted.any <= max(chunk, vocabulary * hidden, tokens * hidden)


def test_given_logits_are_never_held_whole_in_fp32() -> None:
    logits = torch.randn(256, 128).bfloat16().requires_grad_()
    with chunks_of(4 * 128), Largest() as noted:
        head.logits_losses(logits, torch.arange(256) % 128).sum().backward()
    assert noted.fp32 <= 4 * 128


def tiny_model(family: str = "mistral", **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny.model_config(family, **changes), dtype=torch.float32)


def test_an_end_of_document_target_keeps_its_loss_where_padding_has_the_same_id() -> None:
    """PAD = EOS is common; a library that masks by id never teaches a model to stop."""
    model = tiny_model(pad_token_id=257)
    batch = stack([window([np.asarray([1, 2, 3, 257]), np.asarray([5, 257])], 8, separate=True)])
    assert batch["targets"].tolist() == [[2, 3, 257, 257, *[IGNORE] * 4]]
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    logits = model(**inputs, use_cache=False).logits
    loss_head = head.install(model)
    assert loss_head is not None
    loss_head.targets = batch["targets"]
    losses = model(**inputs, use_cache=False).logits[..., 0]
    expected = F.cross_entropy(logits[0], batch["targets"][0], reduction="none", ignore_index=IGNORE)
    torch.testing.assert_close(losses[0], expected)
    assert bool((losses[0, :4] > 1).all()), "both ends of document are learned"
    assert not losses[0, 4:].any(), "padding is not"


def test_a_head_answers_with_logits_unless_it_is_given_targets() -> None:
    model = tiny_model()
    ids = torch.arange(12).view(2, 6)
    before = model(input_ids=ids, use_cache=False).logits
    loss_head = head.install(model)
    assert loss_head is not None
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, before, rtol=0, atol=0)
    loss_head.targets = ids
    assert model(input_ids=ids, use_cache=False).logits.shape == (2, 6, 1)
    loss_head.targets = None
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, before, rtol=0, atol=0)


def test_the_answer_of_a_loss_head_is_no_view() -> None:
    """FSDP puts a hook on a module's output, and warns of, or fails on, a view that is changed in place."""
    linear = nn.Linear(8, 16)
    loss_head = head.LossHead(linear)
    loss_head.targets = torch.arange(6).view(2, 3)
    losses = linear(torch.randn(2, 3, 8, requires_grad=True))
    assert losses.shape == (2, 3, 1)
    assert not losses._is_view()


def test_only_a_plain_linear_head_is_replaced() -> None:
    class Scaled(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden)

    class Model:
        def __init__(self, output: Any) -> None:
            self.output = output

        def get_output_embeddings(self) -> Any:
            return self.output

    for other in (Scaled(4, 4), nn.Embedding(4, 4), nn.Sequential(nn.Linear(4, 4)), None):
        forward = getattr(other, "forward", None)
        assert head.install(Model(other)) is None
        assert getattr(other, "forward", None) == forward, "it is left as it is"
    assert head.install(Model(nn.Linear(4, 4))) is not None


def test_a_chunk_holds_at_least_one_token() -> None:
    with chunks_of(100):
        assert head.chunk_rows(1000, torch.device("cpu")) == 1
        assert head.chunk_rows(10, torch.device("cpu")) == 10


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 23), rows=st.integers(1, 9), bias=st.booleans(), ignored=st.floats(0, 1))
def test_the_gradient_made_in_the_forward_pass_is_the_one_of_the_backward_pass(
    tokens: int, rows: int, bias: bool, ignored: float
) -> None:
    from llm_recipes.models import head

    generator = torch.Generator().manual_seed(tokens * 10 + rows)
    hidden = torch.randn(tokens, 5, generator=generator)
    weight, offset = torch.randn(11, 5, generator=generator), torch.randn(11, generator=generator)
    targets = torch.randint(11, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = -100
    found = []
    for function in (head._HeadLoss, head._UniformHeadLoss):
        inputs = [each.clone().requires_grad_() for each in (hidden, weight, *([offset] if bias else []))]
        fused = [False] if function is head._UniformHeadLoss else []
        losses = function.apply(*inputs, *([] if bias else [None]), targets, rows, *fused)
        (losses.sum() * 0.37).backward()
        found.append([losses.detach(), *(each.grad for each in inputs)])
    for one, two in zip(*found, strict=True):
        assert torch.isfinite(two).all()
        torch.testing.assert_close(one, two)


def test_losses_of_unequal_weight_are_not_taken_for_equal_ones_in_silence() -> None:
    from llm_recipes.models import head

    weight = torch.randn(11, 5, requires_grad=True)
    losses = head.head_losses(torch.randn(3, 5), weight, None, torch.tensor([1, 2, -100]), uniform=True)
    (losses * torch.tensor([1.0, 2.0, 5.0])).sum().backward()
    assert weight.grad is not None and weight.grad.isnan().all()
    weight.grad = None
    losses = head.head_losses(torch.randn(3, 5), weight, None, torch.tensor([1, 2, -100]), uniform=True)
    (losses * torch.tensor([2.0, 2.0, 5.0])).sum().backward()
    assert weight.grad.isfinite().all(), "an ignored one may have any weight"


@given(problems(), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=60, deadline=None)
def test_tokens_without_a_target_can_be_left_out(problem: dict[str, Any], uniform: bool, dtype: torch.dtype) -> None:
    counted = with_counted({"targets": problem["targets"]}).get("counted")
    weights = torch.full_like(problem["upstream"], 0.37) if uniform else problem["upstream"]
    found = []
    for rows in (None, counted):
        leaves = leaves_of(problem, dtype)
        own = leaves["hidden"], leaves["weight"], leaves.get("bias")
        with chunks_of(problem["chunk"]):
            losses = head.head_losses(*own, problem["targets"], uniform, rows)
            losses.backward(weights)
        found.append([losses.detach(), *(each.grad for each in leaves.values())])
    for every, some in zip(*found, strict=True):
        torch.testing.assert_close(some, every, rtol=1e-6, atol=1e-5)
    assert not found[1][0][problem["targets"] == IGNORE].any()


def test_only_tokens_with_a_target_are_multiplied_by_the_head() -> None:
    problem = large(96, 8, 16, 96 * 16)
    problem["targets"][torch.arange(96) % 4 > 0] = IGNORE
    operations = []
    for rows in (None, with_counted({"targets": problem["targets"]})["counted"]):
        leaves = leaves_of(problem, torch.float32)
        with chunks_of(problem["chunk"]), FlopCounterMode(display=False) as counter:
            head.head_losses(*leaves.values(), problem["targets"], True, rows).sum().backward()
        operations.append(counter.get_total_flops())
    assert operations[1] * 4 == operations[0]


def test_positions_that_count_are_named_where_they_are_few() -> None:
    targets = torch.full((2, 8), IGNORE)
    batch = {"targets": targets}
    assert with_counted(batch)["counted"].tolist() == [0], "one at least, or the weights would have no gradient"
    targets[0, 5] = targets[1, 0] = 3
    assert with_counted(batch)["counted"].tolist() == [5, 8]
    assert "counted" not in batch, "the caller's own batch is as it was"
    assert "counted" not in with_counted({"targets": torch.arange(16).view(2, 8)}), "pretraining pays nothing"


def few_targets() -> Batch:
    """Two windows of two documents each, of which the second trains; one window has no target at all."""
    documents = [np.arange(start, start + length) % 256 for start, length in ((3, 9), (40, 7), (80, 12), (7, 4))]
    marks = [np.full(len(each), len(each) == 7) for each in documents]
    rows = [window(documents[at : at + 2], 16, separate=True, trained=marks[at : at + 2]) for at in (0, 2)]
    return stack(rows)


def token_losses(folder: str, way: str) -> list[dict[str, torch.Tensor]]:
    """Losses and gradients of a sharded model, its head multiplied for every token and for those that count."""
    from dataclasses import replace

    from llm_recipes.models import causal, topology

    parallel = ParallelConfig(precision="fp32")
    place = topology.start(parallel)
    lm = causal.build(ModelConfig(path=folder), parallel, place, folder, mask_documents=True, seed=0)
    lm.masking, lm.use_loss_head = replace(lm.masking, way=way), True
    found = []
    for batch in (few_targets(), with_counted(few_targets())):
        losses, _ = lm.token_losses(batch, uniform=True)
        losses.sum().backward()
        gradients = {name: each.grad.full_tensor() for name, each in lm.model.named_parameters()}
        lm.model.zero_grad()
        found.append(
            {"losses": losses.detach(), **gradients, "multiplied": torch.tensor(len(batch.get("counted", [])))}
        )
    return found


@pytest.mark.parametrize("family", ["mistral", "mixtral", "qwen3_tied"])
@pytest.mark.parametrize("way", ["positions", "flat", "block"])
def test_a_model_s_losses_are_the_same_whatever_the_head_is_multiplied_for(
    ranks: Any, tmp_path: Any, family: str, way: str
) -> None:
    (found,) = ranks(1, token_losses, str(tiny.save_model(tmp_path, family)), way)
    every, some = found
    assert (int(every.pop("multiplied")), int(some.pop("multiplied"))) == (0, 6)
    assert every["losses"].count_nonzero() == 6
    for name, each in every.items():
        torch.testing.assert_close(some[name], each, rtol=1e-5, atol=1e-6, msg=name)


def test_a_head_is_compared_on_a_window_that_begins_with_nothing_to_train(ranks: Any, tiny_models: Any) -> None:
    """As a conversation's does: were its own targets compared, no difference would show."""
    assert ranks(1, compared, str(tiny_models["mistral"])) == [(True, False)]


def compared(folder: str) -> tuple[bool, bool]:
    """Whether the head that returns losses is used: as it is, and where the model's own does something more."""
    from llm_recipes.models import causal, topology
    from llm_recipes.training import proofs

    parallel = ParallelConfig(precision="fp32")
    lm = causal.build(ModelConfig(path=folder), parallel, topology.start(parallel), folder, True, seed=0)
    ids = np.arange(3, 84)
    batch = stack([window([ids], 80, True, [np.arange(81) > 75])])
    proofs.head_equals_logits(lm, batch)
    same = lm.use_loss_head
    assert lm.loss_head is not None
    own = lm.loss_head._logits
    lm.loss_head._logits = lambda hidden: 1.5 * own(hidden)
    proofs.head_equals_logits(lm, batch)
    return same, lm.use_loss_head


@pytest.mark.slow
def test_fused_it_is_the_same_and_no_number_of_tokens_is_compiled_for_itself() -> None:
    """By inductor, on a CPU. In bf16 the gradient of the logits is rounded as before: after everything else."""
    torch._dynamo.reset()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for tokens in (64, 37, 50, 21, 5, 100):
            torch.manual_seed(tokens)
            targets = torch.randint(300, (tokens,))
            targets[::3] = IGNORE
            made = torch.randn(tokens, 24), torch.randn(300, 24), torch.randn(300)
            found = []
            for fused in (False, True):
                leaves = [each.to(dtype).requires_grad_() for each in made]
                with chunks_of(16 * 300):
                    losses = head.head_losses(*leaves, targets, uniform=True, fused=fused)
                (losses.sum() / tokens).backward()
                found.append([losses.detach(), *(each.grad for each in leaves)])
            for plain, other in zip(*found, strict=True):
                assert float((plain - other).float().norm()) <= tolerance * float(plain.float().norm())
            assert not found[1][0][::3].any() and not found[1][1][::3].any()
        assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 2
