"""All that makes a step faster or smaller, at once, as a run has it: the plain run's losses, and exact resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from llm_recipes.telemetry import metrics

LEVERS = {
    "model__compile": True,
    "model__activation_checkpointing": "selective",
    "optim__state": "8bit",
    "data__workers": 1,
}


def run(config: Any) -> None:
    """A whole run on this rank."""
    from llm_recipes.training.run import pretrain

    pretrain(config)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in metrics.read(folder / "run" / "metrics.jsonl") if "loss" in row]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_with_all_levers_a_run_is_the_plain_one_and_resumes_bit_for_bit(
    ranks: Any, workplace: Callable[[str], Path], tmp_path: Path
) -> None:
    """The first loss is the plain run's; later ones differ by what 8 bits of the moments do, and no more."""
    model = tiny.save_model(tmp_path, "mistral", hidden_size=64, intermediate_size=128)
    plain, straight, stopped = workplace("plain"), workplace("straight"), workplace("stopped")
    short = {"optim__state": "8bit"}
    ranks(2, run, tiny.pretrain_config(plain, model, **short))
    ranks(2, run, tiny.pretrain_config(straight, model, **LEVERS))
    assert losses(straight) == pytest.approx(losses(plain), rel=1e-4)
    ranks(2, run, tiny.pretrain_config(stopped, model, **LEVERS, train__stop_at=5))
    ranks(2, run, tiny.pretrain_config(stopped, model, **LEVERS))
    assert losses(stopped) == losses(straight) and len(losses(straight)) == 8
    states = [tiny.state_of(folder / "run" / "checkpoints" / "step-00000008") for folder in (straight, stopped)]
    assert states[0].keys() == states[1].keys()
    assert [name for name, each in states[0].items() if not torch.equal(each, states[1][name])] == []
