"""torch's own flash attention over documents (`model.attention=varlen`), with plain products in place of its kernel."""

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tiny
import torch

from llm_recipes.config import ModelConfig, ParallelConfig
from llm_recipes.errors import UserError

calls = {"kernel": 0}


def kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """What torch documents of it: (T, heads, D), in each stretch those that the window lets see."""
    calls["kernel"] += 1
    assert cu_seq_q.dtype == torch.int32 and int(cu_seq_q[-1]) == len(query) and max_q == max_k
    assert int((cu_seq_q[1:] - cu_seq_q[:-1]).max()) <= max_q and window_size[1] == 0
    repeated = query.shape[1] // key.shape[1]
    assert enable_gqa or repeated == 1
    key, value = (each.repeat_interleave(repeated, 1) for each in (key, value))
    places = torch.arange(len(query))
    document = torch.searchsorted(cu_seq_q, places, right=True)
    back = places[:, None] - places[None, :]
    look = (document[:, None] == document[None, :]) & (back >= 0)
    if window_size[0] >= 0:
        look &= back <= window_size[0]
    scores = torch.einsum("qhd,khd->hqk", query, key) * (scale or query.shape[-1] ** -0.5)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~look, -torch.inf).softmax(-1), value)


def packed() -> dict[str, torch.Tensor]:
    """Two windows of 36 targets, of three documents each."""
    from llm_recipes.data.documents import window
    from llm_recipes.data.stream import stack

    generator = np.random.default_rng(0)
    return stack([window([generator.integers(0, 256, n) for n in (19, 11, 9)], 36, True) for _ in range(2)])


def beside_masks(folder: str) -> dict[str, Any]:
    """Losses and gradients of both, and logits of a padded row that nobody gives lengths for."""
    from llm_recipes.models import causal, topology
    from llm_recipes.training import proofs

    parallel = ParallelConfig(precision="fp32")
    place = topology.start(parallel)
    found: dict[str, Any] = {}
    with (
        patch("llm_recipes.models.varlen.refuse_where_it_cannot_be", lambda *_: None),
        patch("torch.nn.attention.varlen.varlen_attn", kernel),
    ):
        for attention in ("sdpa", "varlen"):
            lm = causal.build(ModelConfig(path=folder, attention=attention), parallel, place, folder, True, seed=0)
            proofs.isolate_documents(lm, True)
            before = calls["kernel"]
            losses, _ = lm.token_losses(lm.masking.prepare(packed()))
            losses.sum().backward()
            gradients = torch.cat([each.grad.full_tensor().flatten() for each in lm.model.parameters()])
            called = calls["kernel"] - before
            with lm.evaluating():
                ids, seen = torch.arange(24).view(2, 12), torch.ones(2, 12, dtype=torch.int64)
                seen[1, :5] = 0
                logits = lm.model(input_ids=ids, attention_mask=seen, use_cache=False).logits[seen > 0]
            found[attention] = (lm.masking.way, called, losses.detach(), gradients, logits)
    return found


@pytest.mark.parametrize("window", [None, 7])
def test_losses_and_gradients_are_those_under_masks(ranks: Any, tmp_path: Path, window: int | None) -> None:
    folder = tiny.save_model(tmp_path, "mistral", sliding_window=window)
    [found] = ranks(1, beside_masks, str(folder))
    assert found["sdpa"][:2] == ("own", 0) and found["varlen"][:2] == ("flat", 2), "once a layer"
    for plain, other in zip(found["sdpa"][2:], found["varlen"][2:], strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)


def test_what_the_kernel_cannot_do_is_refused_in_one_line() -> None:
    from llm_recipes.models import loading, varlen

    varlen.register()
    model = loading.empty_model(tiny.model_config("mistral"), torch.float32, varlen.NAME)
    cuda = torch.device("cuda", 0)
    for device, dtype, said in (
        (torch.device("cpu"), torch.bfloat16, "needs a GPU"),
        (cuda, torch.float32, "bf16 or fp16"),
    ):
        with pytest.raises(UserError, match=said):
            varlen.refuse_where_it_cannot_be(model, device, dtype)
    varlen.refuse_where_it_cannot_be(model, cuda, torch.bfloat16)
    model._supports_flash_attn = False
    with pytest.raises(UserError, match="mistral takes no flash attention"):
        varlen.refuse_where_it_cannot_be(model, cuda, torch.bfloat16)
    states, ends = torch.zeros(1, 2, 4, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(UserError, match="no softcap"):
        varlen.attention(model, states, states, states, None, cu_seq_lens_q=ends, max_length_q=4, softcap=30.0)


def wrong(**changed: Any) -> Any:
    """A kernel that is told something else than it was asked."""
    return lambda *given, **options: kernel(*given, **{**options, **changed})


def of_one_document(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, *given: Any,
                    **options: Any) -> torch.Tensor:  # fmt: skip
    whole = ends[[0, -1]]
    return kernel(query, key, value, whole, whole, len(query), len(query), **options)


def without_a_gradient(*given: Any, **options: Any) -> torch.Tensor:
    query, key, value, *rest = given
    return kernel(query, key.detach() + 0 * key, value, *rest, **options)


def with_a_gradient_of_nan(*given: Any, **options: Any) -> torch.Tensor:
    query, key, value, *rest = given
    return kernel(query, key, value + (value - value.detach()).sqrt(), *rest, **options)


def broken(*_: Any, **__: Any) -> torch.Tensor:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("its", "said"),
    [
        (kernel, None),
        (wrong(scale=0.2), "lay .* from plain attention"),
        (wrong(window_size=(20, 0)), "lay .* from plain attention"),
        (of_one_document, "lay .* from plain attention"),
        (without_a_gradient, "lay .* from plain attention"),
        (with_a_gradient_of_nan, "lay nan from plain attention"),
        (broken, "no kernel image is available"),
    ],
)
def test_auto_takes_it_only_where_a_trial_shows_it_right(its: Any, said: str | None) -> None:
    from llm_recipes.models import causal, loading, varlen

    model = loading.empty_model(tiny.model_config("mistral", head_dim=64), torch.bfloat16, "sdpa")
    with (
        patch("llm_recipes.models.varlen.refuse_where_it_cannot_be", lambda *_: None),
        patch("torch.nn.attention.varlen.varlen_attn", its),
        patch.multiple(causal, is_flash_attn_3_available=lambda: False, is_flash_attn_2_available=lambda: False),
    ):
        problem = varlen.why_not(model, torch.device("cpu"), torch.bfloat16)
        assert re.search(said, problem or "") if said else problem is None
        with patch.object(varlen, "why_not", lambda *_: problem):
            name, why = causal.flash_attention(model, torch.device("cuda"), torch.bfloat16)
    assert name == (None if said else "varlen")
    assert (problem or "a trial of it was right") in why


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gemma2", {"head_dim": 8}, "soft-capped"),
        ("mistral", {"attention_dropout": 0.1}, "dropout"),
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, "sinks"),
        ("deepseek_v3", {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 8,
                         "q_lora_rank": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}, "size"),
        ("mistral", {"head_dim": 512}, "larger than 256"),
    ],
)  # fmt: skip
def test_auto_leaves_out_what_the_kernel_has_not(family: str, changes: dict[str, Any], said: str) -> None:
    from llm_recipes.models import loading, varlen

    model = loading.empty_model(tiny.model_config(family, **changes), torch.bfloat16, None)
    model._supports_flash_attn = True
    assert said in (varlen.why_not(model, torch.device("cuda", 0), torch.bfloat16) or "")


def test_recomputing_keeps_what_it_made() -> None:
    import torch.nn.attention.varlen

    from llm_recipes.models import layers

    assert layers._is_product(torch.ops.torch_attn._varlen_attn.default)


def test_torch_has_the_kernel_as_it_is_called() -> None:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size", "enable_gqa"} <= set(names)
