"""Activations are counted on the meta device; here against what real tensors of a real pass hold."""

import gc
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from llm_recipes.models import head, layers, sharding
from llm_recipes.models.causal import CausalLM
from llm_recipes.models.masking import Masking, accepted_arguments

ROWS, TOKENS = 3, 32
KINDS = ["none", "selective", "full"]
FAMILIES = ["mistral", "tied", "experts", "gpt2"]


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """And `experts`: a mixture that asks for no auxiliary loss, of which transformers' code takes no mask of T x T."""
    return {**tiny_models, "experts": tiny.save_model(tmp_path_factory.mktemp("models") / "experts", "mixtral")}


def dtype_of(folder: Path) -> torch.dtype:
    """The meta device multiplies experts in bf16 alone."""
    return torch.bfloat16 if folder.name == "experts" else torch.float32


def real(folder: Path, recomputing: str) -> tuple[Any, Any]:
    """A model in memory, prepared as for a run, and a batch."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype_of(folder)).train()
    installed = head.install(model)
    layers.prepare(sharding.layers(model), recomputing, compiled=False)
    way = Masking("block", accepted_arguments(model), dtype_of(folder))
    nothing: Any = None
    names = ("input_ids", "position_ids", "document_ids", "targets")
    batch = {name: torch.zeros((ROWS, TOKENS), dtype=torch.int64) for name in names}
    return CausalLM(model, nothing, nothing, nothing, way, installed, use_loss_head=True), batch


def allocated(step: Any) -> tuple[Any, int, int]:
    """What a call gives, and the bytes of the CPU's allocator that it leaves and that it has at most."""
    gc.collect()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, products of bf16 matrices take room of their own, which no GPU does
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = step()
    finally:
        torch.set_num_threads(threads)
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = most = 0
    for each in sorted(events, key=lambda event: event.start_ns()):
        now += each.nbytes()
        most = max(most, now)
    return result, now, most


def traced(sizes_of: Any, folder: Path, recomputing: str) -> Any:
    changes = {
        "model": {"activation_checkpointing": recomputing},
        "data": {"seq_len": TOKENS},
        "train": {"micro_batch_size": ROWS},
        "parallel": {"precision": "bf16" if dtype_of(folder) == torch.bfloat16 else "fp32"},
    }
    sizes, config = sizes_of(folder, changes)
    found = sizes.trace(config)
    assert sizes.problem is None
    return found


@pytest.mark.parametrize("recomputing", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_forward_pass_leaves_is_what_the_allocator_says(
    models: dict[str, Path], sizes_of: Any, family: str, recomputing: str
) -> None:
    lm, batch = real(models[family], recomputing)
    _, left, most = allocated(lambda: lm.token_losses(batch, uniform=True))
    found = traced(sizes_of, models[family], recomputing)
    largest = max(each.total for each in found.forward.values())
    # To recompute, a layer keeps the random numbers' state: 5,056 bytes, which is on the host whatever the device.
    states = 0 if recomputing == "none" else 2 * 5056
    assert found.saved + states == pytest.approx(left, rel=0.01)
    assert largest + states == pytest.approx(most, rel=0.02)


@pytest.mark.parametrize("family", ["mistral", "tied"])
def test_saved_activations_are_the_tensors_that_autograd_keeps(
    tiny_models: dict[str, Path], sizes_of: Any, family: str
) -> None:
    lm, batch = real(tiny_models[family], "none")
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses, _ = lm.token_losses(batch, uniform=True)
    own = [*lm.model.parameters(), *lm.model.buffers(), *batch.values()]
    known = {each.untyped_storage().data_ptr() for each in own}
    saved = sum(storage.nbytes() for place, storage in kept.items() if place not in known)
    assert traced(sizes_of, tiny_models[family], "none").saved == pytest.approx(saved + losses.nbytes, rel=0.01)


def test_recomputing_keeps_less_and_less(tiny_models: dict[str, Path], sizes_of: Any) -> None:
    none, selective, full = (traced(sizes_of, tiny_models["mistral"], kind).saved for kind in KINDS)
    assert none > selective > full


def test_every_layer_has_its_stretch_in_order(tiny_models: dict[str, Path], sizes_of: Any) -> None:
    found = traced(sizes_of, tiny_models["mistral"], "full")
    assert found.order == ["model.embed_tokens", "model.layers.0", "model.layers.1", "the loss"]
    assert found.roots == ["model.embed_tokens"]
    assert {"model.layers.0", "model.layers.1", "the loss"} <= set(found.backward)


def test_flash_attention_keeps_no_scores_and_eager_does(tiny_models: dict[str, Path], sizes_of: Any) -> None:
    def saved(kind: str, tokens: int) -> int:
        changes = {
            "model": {"attention": kind}, "data": {"seq_len": tokens, "mask_documents": True},
            "parallel": {"precision": "bf16"},
        }  # fmt: skip
        sizes, config = sizes_of(tiny_models["mistral"], changes)
        found: int = sizes.trace(config).saved
        return found

    def more(kind: str, tokens: int) -> int:
        return saved(kind, tokens) - saved("flash_attention_2", tokens)

    assert saved("flash_attention_2", 128) <= 2 * saved("flash_attention_2", 64), "grows with the tokens"
    table = 2 * 2 * (128**2 - 2 * 64**2)  # of T x T in bf16, in each of two layers, what grows with T squared
    assert more("sdpa", 128) - 2 * more("sdpa", 64) == pytest.approx(table, rel=0.01), "a mask"
    assert more("eager", 128) - 2 * more("eager", 64) >= 4 * table, "scores of four heads"


def test_a_model_that_looks_at_its_values_has_no_activations_and_says_so(
    tiny_models: dict[str, Path], sizes_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.mistral.modeling_mistral import MistralMLP

    plain = MistralMLP.forward
    monkeypatch.setattr(MistralMLP, "forward", lambda self, x: plain(self, x) if x.sum() > 0 else x)
    sizes, config = sizes_of(tiny_models["mistral"], {})
    memory = sizes.memory(config, 2)
    assert sizes.problem is not None and sizes.problem.startswith("mistral: ")
    assert memory.activations == 0 and memory.weights > 0
