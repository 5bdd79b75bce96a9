"""A plan's memory is what a step takes: against the allocator's account of real steps, and real tensors."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranks import Ranks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OPTIONS = {
    "layers": "3", "hidden": "128", "vocab": "1024", "seq_len": "96", "micro_batch_size": "2", "accumulation": "2",
    "precision": "bf16-mixed", "attention": "eager", "sharding": "full_shard", "reduce": "every", "ranks": "4",
    "activation_checkpointing": "none", "prefetch": "1", "state": "full",
}  # fmt: skip
LARGE = {"vocab": "8192", "ranks": "16", "seq_len": "64", "micro_batch_size": "1", "activation_checkpointing": "full"}
"""The head outweighs the layers, and a rank's shard is little."""
CASES: dict[str, dict[str, str]] = {
    "plain": {},
    "selective": {"activation_checkpointing": "selective"},
    "full": {"activation_checkpointing": "full"},
    "one micro-batch": {"accumulation": "1"},
    "one device": {"ranks": "1"},
    "weights outweigh": {"seq_len": "8", "micro_batch_size": "1", "accumulation": "1"},
    "one device, one micro-batch, weights outweigh": {
        "ranks": "1",
        "accumulation": "1",
        "seq_len": "8",
        "micro_batch_size": "1",
    },
    "one device, whole after forward": {"ranks": "1", "sharding": "shard_grad_op", "accumulation": "1"},
    "two layers ahead": {"prefetch": "2", "layers": "6", "seq_len": "8", "micro_batch_size": "1"},
    "three layers ahead, recomputed, one micro-batch": {
        "prefetch": "3",
        "layers": "6",
        "activation_checkpointing": "full",
        "accumulation": "1",
        "seq_len": "32",
    },
    "two layers ahead, whole after forward": {
        "prefetch": "2",
        "sharding": "shard_grad_op",
        "layers": "6",
        "seq_len": "8",
        "micro_batch_size": "1",
    },
    "reduced once": {"reduce": "last"},
    "whole after forward": {"sharding": "shard_grad_op"},
    "whole after forward, three micro-batches": {"sharding": "shard_grad_op", "accumulation": "3"},
    "whole after forward, reduced once": {"sharding": "shard_grad_op", "accumulation": "3", "reduce": "last"},
    "whole, weights outweigh": {
        "sharding": "shard_grad_op",
        "accumulation": "3",
        "seq_len": "8",
        "micro_batch_size": "1",
    },
    "a copy on each, weights outweigh": {
        "sharding": "no_shard",
        "accumulation": "3",
        "seq_len": "8",
        "micro_batch_size": "1",
    },
    "a copy on each": {"sharding": "no_shard"},
    "a copy on each, bf16": {"sharding": "no_shard", "precision": "bf16"},
    "copies, three micro-batches": {"sharding": "no_shard", "accumulation": "3"},
    "fp32": {"precision": "fp32"},
    "moments in 8 bits": {"state": "8bit"},
    "the update is the worst moment": {"state": "8bit", "seq_len": "8", "micro_batch_size": "1", "ranks": "1"},
    "a large vocabulary": LARGE,
    "a large vocabulary, whole after forward": LARGE | {"sharding": "shard_grad_op"},
    "a large vocabulary, whole after forward, three micro-batches": LARGE
    | {
        "sharding": "shard_grad_op",
        "accumulation": "3",
    },
}

FAMILIES: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "experts": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """benchmarks/memory.py, which takes real steps and asks a plan."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import memory

        yield memory
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_plan_says_what_a_step_takes(benchmark: Any, tmp_path: Path, case: str) -> None:
    """Real FSDP, real tensors, the real loop on the CPU, among ranks that are imagined: the allocator counts."""
    options = OPTIONS | CASES[case]
    folder = benchmark.write_model(tmp_path, options)
    predicted = benchmark.predict(folder, options, int(options["ranks"]), "cpu")
    with benchmark.world(options) as place:
        measured = benchmark.measure(place, folder, options)
    assert predicted.total == pytest.approx(measured, rel=0.03), predicted


@pytest.mark.parametrize("case", ["plain", "one micro-batch"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_so_it_does_of_other_families(benchmark: Any, tmp_path: Path, family: str, case: str) -> None:
    options = OPTIONS | CASES[case] | {"precision": "bf16"}
    folder = benchmark.write_model(tmp_path, options, **FAMILIES[family])
    predicted = benchmark.predict(folder, options, 4, "cpu")
    with benchmark.world(options) as place:
        measured = benchmark.measure(place, folder, options)
    assert predicted.total == pytest.approx(measured, rel=0.03), predicted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here")
@pytest.mark.parametrize("recomputing", ["none", "selective", "full"])
def test_a_plan_is_within_a_tenth_on_a_gpu(benchmark: Any, tmp_path: Path, recomputing: str) -> None:
    large = {"hidden": "1024", "layers": "8", "vocab": "32000", "seq_len": "2048", "attention": "sdpa"}
    options = OPTIONS | large | {"activation_checkpointing": recomputing}
    folder = benchmark.write_model(tmp_path, options)
    predicted = benchmark.predict(folder, options, 1, "cuda")
    with benchmark.world(options) as place:
        measured = benchmark.measure(place, folder, options)
    assert predicted.total == pytest.approx(measured, rel=0.1), predicted


def shards_of(folder: str, model: str, changes: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes of this rank's weights, gradients and moments after a real step."""
    from torch.distributed.tensor import DTensor

    from llm_recipes.models import causal, topology
    from llm_recipes.training import optimizer

    config = tiny.pretrain_config(Path(folder), Path(model), **changes)
    place = topology.start(config.parallel)
    lm = causal.build(config.model, config.parallel, place, model, False, 0)
    adamw = optimizer.adamw(lm.model, config.optim)
    lm.model(input_ids=torch.arange(32)[None]).logits.sum().backward()
    adamw.step()
    own = list(lm.model.parameters())
    moments = [each for state in adamw.state.values() for each in state.values() if each.ndim]
    found = []
    for tensors in (own, [each.grad for each in own], moments):
        found.append(sum(each.to_local().nbytes for each in tensors if isinstance(each, DTensor)))
    return found[0], found[1], found[2]


@pytest.mark.parametrize(
    ("precision", "state"), [("bf16", "full"), ("bf16-mixed", "full"), ("bf16-mixed", "bf16"), ("bf16-mixed", "8bit")]
)
@pytest.mark.parametrize("family", ["mistral", "tied", "mixtral"])
def test_weights_gradients_and_moments_are_those_of_a_sharded_run(
    ranks: Ranks,
    tiny_models: dict[str, Path],
    corpora: Path,
    family: str,
    precision: str,
    state: str,
    sizes_of: Any,
    tmp_path: Path,
) -> None:
    changes = {"parallel__precision": precision, "optim__state": state}
    model = tiny_models[family]
    if state == "8bit":  # rows of whole blocks
        if family == "mixtral":
            pytest.skip("its experts' rows are cut on three processes")
        model = tiny.save_model(tmp_path / "wide", "mistral", hidden_size=64, intermediate_size=192)
    found = ranks(3, shards_of, str(corpora), str(model), changes)
    sizes, config = sizes_of(model, {"parallel": {"precision": precision}, "optim": {"state": state}})
    memory = sizes.memory(config, 3)
    assert (memory.weights, memory.gradients, memory.optimizer) == found[0]
    assert all(each <= found[0] for each in found), "the first rank has the largest shard"


def test_what_is_offloaded_is_on_the_host(tiny_models: dict[str, Path], sizes_of: Any) -> None:
    sizes, config = sizes_of(tiny_models["mistral"], {})
    here = sizes.memory(config, 2)
    config.parallel.cpu_offload = True
    there = sizes.memory(config, 2)
    assert (there.weights, there.gradients, there.optimizer) == (0, 0, 0)
    assert there.host - here.host == here.weights + here.optimizer + here.weights, "with gradients"
    assert there.gathered > 0


def test_frozen_weights_have_neither_gradients_nor_moments(tiny_models: dict[str, Path], sizes_of: Any) -> None:
    sizes, config = sizes_of(tiny_models["mistral"], {"train": {"trainable": "embeddings"}})
    memory = sizes.memory(config, 1)
    assert memory.optimizer == 2 * 4 * (2 * 264 * 32), "fp32 moments of the two tables"
    assert memory.weights > memory.optimizer / 2
