"""Each attention that a GPU has keeps documents apart, and computes what plain attention does."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import short_runs
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from llm_recipes.config import ModelConfig, ParallelConfig
from llm_recipes.errors import UserError
from llm_recipes.models import causal, topology, varlen
from llm_recipes.training import proofs

INSTALLED = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
KERNELS = {"sdpa by cuDNN": SDPBackend.CUDNN_ATTENTION, "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION}
"""Of `scaled_dot_product_attention` those that take a mask; its flash attention takes none."""
ATTENTIONS = ["eager", "sdpa", "flex_attention", "varlen", *INSTALLED, *KERNELS]


@pytest.fixture
def place() -> Iterator[Any]:
    yield topology.start(ParallelConfig(precision="bf16-mixed"))
    topology.stop()


def opened(folder: Path, place: Any, attention: str, precision: str = "bf16-mixed") -> Any:
    parallel = ParallelConfig(precision=precision)
    config = ModelConfig(path=str(folder), attention=attention.split()[0], compile=False)
    lm = causal.build(config, parallel, place, str(folder), True, seed=0)
    lm.use_loss_head = True
    proofs.isolate_documents(lm, True)
    return lm


def first_gradient(lm: Any, batch: dict[str, torch.Tensor], targets: slice) -> torch.Tensor:
    """Of some targets' losses by the embeddings, (T, hidden)."""
    reached: list[torch.Tensor] = []
    hook = lm.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: reached.append(output.requires_grad_()) or output
    )
    losses, _ = lm.token_losses(lm.masking.prepare(batch))
    hook.remove()
    (gradient,) = torch.autograd.grad(losses[0, targets].sum(), reached[0])
    return gradient.reshape(*batch["input_ids"].shape, -1)[0]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", ["mistral", "tied", "mixtral"])
def test_documents_are_isolated(tiny_models: dict[str, Path], place: Any, family: str, attention: str) -> None:
    if attention in INSTALLED and not INSTALLED[attention]():
        pytest.skip(f"{attention} is not installed")
    kernel = sdpa_kernel(KERNELS[attention]) if attention in KERNELS else sdpa_kernel(list(KERNELS.values()))
    host = short_runs.windows([60, 40, 19])
    batch = {key: value.to(place.device) for key, value in host.items()}
    with kernel if "sdpa" in attention and torch.cuda.is_available() else torch.enable_grad():
        lm = opened(tiny_models[family], place, attention)
        losses = lm.token_losses(lm.masking.prepare(batch))[0].detach()
        reached = first_gradient(lm, batch, slice(60, 100)).abs().amax(-1)
    assert reached[60:100].max() > 0, "else this shows nothing"
    assert reached[:60].max() == 0, "a document sees the one before it"
    assert reached[100:].max() == 0, "a document sees the one after it"
    plain = opened(tiny_models[family], place, "eager", "fp32")
    plain.masking = replace(plain.masking, way="block" if family != "mixtral" else "positions")
    wanted = plain.token_losses(batch)[0].detach()
    far = (losses - wanted).abs().mean() / wanted.abs().mean()
    assert far < (2e-2 if family != "mixtral" else 1e-1)


def test_auto_takes_flash_attention_where_there_is_one_and_says_what_else(
    tiny_models: dict[str, Path], place: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "llm_recipes.models.causal")
    lm = opened(tiny_models["mistral"], place, "auto")
    torchs = "sdpa" if varlen.why_not(lm.model, place.device, torch.bfloat16) else "varlen"
    wanted = next((name for name, there in reversed(INSTALLED.items()) if there()), torchs)
    assert lm.model.config._attn_implementation == wanted
    assert f"attention {wanted} (" in caplog.text


def test_an_attention_that_is_not_there_is_refused_in_a_line(tiny_models: dict[str, Path], place: Any) -> None:
    with pytest.raises(UserError) as refused:
        opened(tiny_models["mistral"], place, "no_such_attention")
    assert "\n" not in str(refused.value)
