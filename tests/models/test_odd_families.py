"""Families that do what most do not: share a block between layers, count positions from elsewhere, fill a child's
buffer from a parent, set parameters while they are built. Each was wrong once, and most of them in silence."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.distributed.tensor import DTensor

from llm_recipes.config import ModelConfig, ParallelConfig

ODD: dict[str, dict[str, Any]] = {
    "zamba": {
        "hidden_size": 64, "attention_hidden_size": 128, "attention_head_dim": 32, "mamba_d_state": 8,
        "mamba_dt_rank": 4, "num_hidden_layers": 6, "num_key_value_heads": 4, "use_mamba_kernels": False,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid",
                              "linear_attention"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "roberta": {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
                "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
                  "mamba_chunk_size": 8, "ssm_multipliers": [1.0, 2.0, 3.0, 4.0, 5.0]},
    "apertus": {"hidden_act": "xielu"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny.save_model(tmp_path_factory.mktemp(name), name, **own) for name, own in ODD.items()}


def tokens(rows: int) -> torch.Tensor:
    return torch.randint(3, 256, (rows, 25), generator=torch.Generator().manual_seed(5))


def ours(folder: str, init: str) -> dict[str, Any]:
    """Loss and gradient norm of two windows of a document each, one on each rank; every weight and buffer; what an
    optimizer's step leaves."""
    from llm_recipes.data.documents import window
    from llm_recipes.data.stream import stack
    from llm_recipes.models import causal, topology
    from llm_recipes.training import optimizer, proofs
    from llm_recipes.training.objective import NextToken

    parallel = ParallelConfig(precision="fp32")
    place = topology.start(parallel)
    lm = causal.build(ModelConfig(path=folder, init=init), parallel, place, folder, mask_documents=False, seed=3)
    adam = optimizer.adamw(lm.model, tiny_optimizer())
    mine = stack([window([row.numpy()], 24, False) for row in tokens(2).chunk(place.ranks)[place.rank]])
    mine |= {"source": torch.zeros(len(mine["targets"]), dtype=torch.int64)}
    proofs.isolate_documents(lm, False)
    proofs.head_equals_logits(lm, mine)
    values = {name: whole(each) for name, each in [*lm.model.named_parameters(), *lm.model.named_buffers()]}
    total, _, _ = NextToken(1).loss({"policy": lm}, mine)
    (total / 48 * place.ranks).backward()
    norm = optimizer.global_norm([each for group in adam.param_groups for each in group["params"]], place.device)
    adam.step()
    return {
        "loss": float(place.sum(total.detach().clone()) / 48),
        "norm": float(norm),
        "values": values,
        "sharded": all(isinstance(each, DTensor) for each in lm.model.parameters()),
    }


def tiny_optimizer() -> Any:
    from llm_recipes.config import OptimConfig

    return OptimConfig(lr=1e-3)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@pytest.mark.parametrize("family", list(ODD))
def test_an_odd_family_trains_as_plain_transformers_does(ranks: Any, folders: Any, family: str) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32).train()
    ids = tokens(2)
    logits = plain(input_ids=ids[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    norm = torch.stack([each.grad.norm() for each in plain.parameters() if each.grad is not None]).norm()
    expected = dict([*plain.named_parameters(), *plain.named_buffers()])
    for found in ranks(2, ours, str(folders[family]), "pretrained"):
        assert found["sharded"], "a parameter that is not sharded has a gradient that nobody reduces"
        different = [name for name, each in expected.items() if not torch.equal(found["values"][name], each)]
        assert found["values"].keys() == expected.keys() and different == []
        assert found["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        assert found["norm"] == pytest.approx(float(norm), rel=1e-3)


@pytest.mark.parametrize("family", ["zamba", "falcon_h1", "apertus"])
def test_random_weights_are_whole_and_the_same_on_any_number_of_ranks(ranks: Any, folders: Any, family: str) -> None:
    from transformers import AutoModelForCausalLM

    [one] = ranks(1, ours, str(folders[family]), "random")
    two = ranks(2, ours, str(folders[family]), "random")[0]
    plain = AutoModelForCausalLM.from_config(tiny.model_config(family, **ODD[family]))
    for name, each in [*plain.named_parameters(), *plain.named_buffers()]:
        found = one["values"][name]
        assert torch.isfinite(found).all(), name
        assert torch.equal(found, two["values"][name]), name
        if (each.numel() > 1 and float(each.float().std()) == 0) or each.numel() == 1:
            torch.testing.assert_close(found, each.detach(), msg=f"{name} has a value of its own from the start")
