"""Promise 1: whatever `AutoModelForCausalLM` opens has the loss and the gradients of plain transformers."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from llm_recipes.config import ModelConfig, ParallelConfig

TARGETS = [31, 7, 1, 24]
"""Of four windows of 32 targets: what a rank or a micro-batch holds is unequal."""
WORLDS = [("mistral", 1), ("mistral", 2), ("mixtral", 2), ("mixtral", 3), ("qwen3_tied", 1), ("qwen3_tied", 2),
          ("gemma2", 1), ("gemma2", 2), ("gpt_neox", 2)]  # fmt: skip


def windows() -> dict[str, torch.Tensor]:
    """Four windows, each of two documents and padding."""
    from llm_recipes.data.documents import window
    from llm_recipes.data.stream import stack

    documents = tiny.random_documents(8, seed=1, longest=60)
    rows = []
    for number, targets in enumerate(TARGETS):
        first = [(7 * number + i) % 256 for i in range(targets // 2 + 1)]
        second = (documents[number] * 40)[: targets - targets // 2 + 1]
        rows.append(window([torch.tensor(each).numpy() for each in (first, second) if len(each) > 1], 32, True))
    return stack(rows)


def ours(folder: str, micro_batch_size: int) -> dict[str, Any]:
    """One step's loss and gradients on this rank's part of the windows, through the library."""
    from llm_recipes.data.stream import rank_positions
    from llm_recipes.models import causal, topology
    from llm_recipes.training import optimizer, proofs
    from llm_recipes.training.objective import NextToken

    parallel = ParallelConfig(precision="fp32")
    place = topology.start(parallel)
    lm = causal.build(ModelConfig(path=folder), parallel, place, folder, mask_documents=True, seed=0)
    proofs.isolate_documents(lm, True)
    every = windows() | {"source": torch.zeros(4, dtype=torch.int64)}
    proofs.head_equals_logits(lm, every)
    # A world of three takes windows 0, 1 and 2: the last one is left to nobody.
    size = 4 if 4 % place.ranks == 0 else place.ranks
    mine = rank_positions(range(size), micro_batch_size, place.rank, place.ranks)
    batches = [{key: value[rows] for key, value in every.items()} for rows in mine]
    objective = NextToken(1)
    targets = place.sum(sum(objective.count(batch) for batch in batches))
    total = torch.zeros(())
    for batch in batches:
        summed, _, _ = objective.loss({"policy": lm}, batch)
        (summed / targets * place.ranks).backward()
        total += summed.detach()
    norm = optimizer.global_norm(lm.model.parameters(), place.device)
    return {
        "loss": float(place.sum(total) / targets),
        "norm": float(norm),
        "chunked_head": lm.use_loss_head,
        "gradients": {name: each.grad.full_tensor() for name, each in lm.model.named_parameters()},
        "sharded": all(isinstance(each, DTensor) for each in lm.model.parameters()),
    }


def plain(folder: Path, rows: int) -> dict[str, Any]:
    """The same by plain transformers in one process, each document alone, with its own loss function."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    every = windows()
    total, count = torch.zeros(()), 0
    for row in range(rows):
        for document in range(2):
            inside = (every["document_ids"][row] == document) & (every["targets"][row] != -100)
            inputs, targets = every["input_ids"][row][inside], every["targets"][row][inside]
            if len(inputs) == 0:
                continue
            whole = torch.cat([inputs, targets[-1:]])[None]
            mean = model(input_ids=whole, labels=whole, use_cache=False).loss
            by_hand = F.cross_entropy(model(input_ids=whole, use_cache=False).logits[0, :-1].float(), whole[0, 1:])
            torch.testing.assert_close(mean, by_hand)
            total = total + mean * len(targets)
            count += len(targets)
    (total / count).backward()
    gradients = {name: each.grad for name, each in model.named_parameters()}
    return {"loss": float((total / count).detach()), "gradients": gradients}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny.save_model(tmp_path_factory.mktemp(name), name) for name in tiny.FAMILIES}


@pytest.mark.parametrize(("family", "size"), WORLDS)
def test_loss_and_gradients_are_those_of_plain_transformers(ranks: Any, models: Any, family: str, size: int) -> None:
    reference = plain(models[family], rows=4 if 4 % size == 0 else size)
    for found in ranks(size, ours, str(models[family]), 1):
        assert found["sharded"]
        assert found["chunked_head"] == (family != "gemma2"), "a soft-capped model must keep its own logits"
        assert found["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert found["gradients"].keys() == reference["gradients"].keys()
        for name, gradient in reference["gradients"].items():
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-3, atol=1e-6, msg=name)
        whole = torch.stack([gradient.norm() for gradient in reference["gradients"].values()]).norm()
        assert found["norm"] == pytest.approx(float(whole), rel=1e-4), "the norm is the whole gradient's"


def test_micro_batches_of_any_size_add_up_to_the_same_gradient(ranks: Any, models: Any) -> None:
    one, two = (ranks(2, ours, str(models["mistral"]), size)[0] for size in (1, 2))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-4, atol=1e-7)
