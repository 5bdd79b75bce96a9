"""What FSDP is told to do otherwise changes no number."""

from typing import Any

import pytest
import tiny
import torch
from ranks import Ranks
from torch.distributed.fsdp import FSDPModule

from llm_recipes.models.communication import ReduceInPlace, gather_ahead

CASES: list[dict[str, Any]] = [
    {"precision": precision, "sharding": sharding}
    for precision in ("fp32", "bf16-mixed", "fp16-mixed", "bf16")
    for sharding in ("full_shard", "no_shard")
]


def gradients(folder: str, cases: list[dict[str, Any]], fsdps_own: bool) -> list[dict[str, torch.Tensor]]:
    """Of two micro-batches, reduced after each and, where a rank has a whole copy, once."""
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

    from llm_recipes.config import ModelConfig, ParallelConfig
    from llm_recipes.models import causal, topology

    found = []
    for parallel in cases:
        config = ParallelConfig(**parallel)
        place = topology.start(config)
        model = causal.build(ModelConfig(path=folder), config, place, folder, True, 0).model
        for module in model.modules():
            if fsdps_own and isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(DefaultReduceScatter())
        for once in (False, True):
            for number in range(2):
                model.set_requires_gradient_sync(number == 1 or not once)
                model.set_is_last_backward(number == 1)
                ids = torch.arange(24).reshape(2, 12) * (number + 2) + place.rank
                model(input_ids=ids).logits.float().pow(2).mean().backward()
            found.append({name: each.grad.full_tensor().clone() for name, each in model.named_parameters()})
            model.zero_grad(set_to_none=True)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_model(tmp_path_factory.mktemp("mistral"), "mistral"))


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_reduced_in_place_are_those_of_fsdp_bit_for_bit(ranks: Ranks, folder: str, size: int) -> None:
    cases = CASES if size == 1 else [each for each in CASES if each["sharding"] == "no_shard"]
    ours, fsdps = ranks(size, gradients, folder, cases, False), ranks(size, gradients, folder, cases, True)
    for rank in range(size):
        for found, wanted in zip(ours[rank], fsdps[rank], strict=True):
            assert any(float(each.abs().max()) > 0 for each in wanted.values())
            for name, each in wanted.items():
                assert torch.equal(found[name], each), name


def test_a_buffer_is_given_twice_and_then_a_new_one() -> None:
    memory = ReduceInPlace()

    def ask(size: int = 8) -> torch.Tensor:
        return memory.allocate((size,), dtype=torch.float32, device=torch.device("cpu"))

    first = ask()
    assert ask() is first, "not a copy onto itself otherwise"
    second = ask()
    assert second is not first
    with pytest.raises(RuntimeError, match="not a pair"):
        ask(9)
    with pytest.raises(RuntimeError, match="one process"):
        memory(output_tensor=first, input_tensor=second)


def test_layers_are_fetched_in_the_order_in_which_they_come() -> None:
    class Layer(FSDPModule):
        def set_modules_to_forward_prefetch(self, modules: list[FSDPModule]) -> None:
            self.forward = modules

        def set_modules_to_backward_prefetch(self, modules: list[FSDPModule]) -> None:
            self.backward = modules

    layers: Any = [object.__new__(Layer) for _ in range(4)]
    gather_ahead(layers, 2)
    assert [[layers.index(each) for each in layer.forward] for layer in layers] == [[1, 2], [2, 3], [3], []]
    assert [[layers.index(each) for each in layer.backward] for layer in layers] == [[], [0], [1, 0], [2, 1]]
