"""Which parameters decay, and how a loss is scaled where fp16 would underflow."""

from typing import Any

import pytest
import tiny
import torch

from llm_recipes.config import OptimConfig
from llm_recipes.training.optimizer import LossScale, adamw, parameter_groups, set_learning_rate


def model(family: str, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(tiny.model_config(family, **changes))


@pytest.mark.parametrize("family", ["mistral", "mixtral", "gpt_neox", "gpt2", "qwen3_tied", "gpt_oss"])
def test_norms_and_biases_do_not_decay_and_all_matrices_do(family: str) -> None:
    groups = parameter_groups(model(family), OptimConfig(lr=1.0, weight_decay=0.1))
    by_decay = {group["weight_decay"]: set(group["names"]) for group in groups}
    assert set(by_decay) == {0.1, 0.0}
    shapes = {name: each.ndim for name, each in model(family).named_parameters()}
    assert by_decay[0.1] | by_decay[0.0] == set(shapes)
    assert all(shapes[name] == 1 or name.endswith("bias") for name in by_decay[0.0])
    assert all(shapes[name] >= 2 for name in by_decay[0.1])
    assert any("norm" in name or "ln_" in name for name in by_decay[0.0])
    assert not any(name.endswith("bias") for name in by_decay[0.1])


def test_embeddings_decay_by_choice_and_a_tied_one_stands_in_one_group() -> None:
    tied = model("qwen3_tied")
    for decay in (True, False):
        groups = parameter_groups(tied, OptimConfig(lr=1.0, decay_embeddings=decay))
        inside = [group["weight_decay"] > 0 for group in groups if "model.embed_tokens.weight" in group["names"]]
        assert inside == [decay]
        ids = [id(each) for group in groups for each in group["params"]]
        assert len(ids) == len(set(ids))


def test_frozen_parameters_are_not_the_optimizer_s() -> None:
    frozen = model("mistral")
    frozen.lm_head.weight.requires_grad_(False)
    names = [name for group in parameter_groups(frozen, OptimConfig(lr=1.0)) for name in group["names"]]
    assert "lm_head.weight" not in names and "model.norm.weight" in names


def test_a_weight_without_gradient_but_with_decay_shrinks_by_exactly_lr_times_decay() -> None:
    small = model("mistral")
    optimizer = adamw(small, OptimConfig(lr=1.0, weight_decay=0.1))
    set_learning_rate(optimizer, 0.5)
    before = small.lm_head.weight.detach().clone()
    norm_before = small.model.norm.weight.detach().clone()
    for parameter in small.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(small.lm_head.weight.detach(), before * (1 - 0.5 * 0.1))
    assert torch.equal(small.model.norm.weight.detach(), norm_before)


def test_loss_scale_halves_on_overflow_and_doubles_after_good_steps() -> None:
    scale = LossScale(True, torch.device("cpu"), interval=3)
    values = []
    for overflow in (1.0, 0.0, 0.0, 0.0, 0.0, 1.0):
        scale.update(torch.tensor(overflow))
        values.append(float(scale.value) / 2**16)
    assert values == [0.5, 0.5, 0.5, 1.0, 1.0, 0.5]
    again = LossScale(True, torch.device("cpu"), interval=3)
    again.load(scale.state())
    assert again.state() == scale.state()
    off = LossScale(False, torch.device("cpu"))
    off.update(torch.tensor(1.0))
    assert float(off.value) == 1.0
