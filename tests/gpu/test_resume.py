"""A run on a GPU that is stopped goes on as if it had not been; and where there is no GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

OPTIONS: dict[str, Any] = {"train__deterministic": True, "parallel__precision": "bf16-mixed"}


def run(config: Any) -> None:
    """A whole run in this process."""
    from llm_recipes.training.run import pretrain

    try:
        pretrain(config)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("family", ["mistral", "mixtral", "gpt2"])
@pytest.mark.parametrize("compiled", [False, True])
def test_stopping_and_going_on_is_the_uninterrupted_run_bit_for_bit(
    tiny_models: dict[str, Path], workplace: Callable[[str], Path], family: str, compiled: bool
) -> None:
    """With deterministic algorithms; `gpt2` has dropout."""
    options = {**OPTIONS, "model__compile": compiled}
    whole, parts = workplace("whole"), workplace("parts")
    run(tiny.pretrain_config(whole, tiny_models[family], **options))
    run(tiny.pretrain_config(parts, tiny_models[family], train__stop_at=4, **options))
    run(tiny.pretrain_config(parts, tiny_models[family], **options))
    one, other = (tiny.state_of(folder / "run" / "checkpoints" / "step-00000008") for folder in (whole, parts))
    assert one.keys() == other.keys()
    for name, each in one.items():
        assert torch.equal(each, other[name]), name


def continued(config: Any) -> str:
    """The same run to its end where no GPU is seen; the device."""
    assert not torch.cuda.is_available()
    run(config)
    return "cpu"


@pytest.mark.parametrize("size", [1, 2])
def test_a_checkpoint_of_a_gpu_goes_on_on_cpus(
    ranks: Any, tiny_models: dict[str, Path], workplace: Callable[[str], Path], size: int
) -> None:
    """On one and on two: with the same samples, and nearly the same weights as on the GPU."""
    options = {"parallel__precision": "fp32", "model__compile": False}
    whole, parts = workplace("whole"), workplace("parts")
    run(tiny.pretrain_config(whole, tiny_models["mistral"], **options))
    run(tiny.pretrain_config(parts, tiny_models["mistral"], train__stop_at=4, **options))
    assert ranks(size, continued, tiny.pretrain_config(parts, tiny_models["mistral"], **options)) == ["cpu"] * size
    one, other = (tiny.state_of(folder / "run" / "checkpoints" / "step-00000008") for folder in (whole, parts))
    assert one.keys() == other.keys()
    for name, each in one.items():
        if name.startswith("model/"):
            torch.testing.assert_close(other[name], each, rtol=2e-2, atol=2e-3, msg=name)
