"""All that makes a step faster or smaller, at once, as a run has it: the plain run's losses, and exact resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from whole_runs import losses, run

LEVERS = {
    "model__compile": True,
    "model__activation_checkpointing": "selective",
    "optim__state": "8bit",
    "data__workers": 1,
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_with_all_levers_a_run_is_the_plain_one_and_resumes_bit_for_bit(
    ranks: Any, workplace: Callable[[str], Path], tmp_path: Path
) -> None:
    """Until moments are read back, losses are the plain run's; then they differ by what 8 bits do, and no more."""
    model = tiny.save_model(tmp_path, "mistral", hidden_size=64, intermediate_size=128)
    plain, straight, stopped = workplace("plain"), workplace("straight"), workplace("stopped")
    ranks(1, run, tiny.pretrain_config(plain, model))
    ranks(1, run, tiny.pretrain_config(straight, model, **LEVERS))
    assert losses(straight)[:2] == pytest.approx(losses(plain)[:2], rel=1e-5)
    assert losses(straight) == pytest.approx(losses(plain), abs=0.02)
    ranks(1, run, tiny.pretrain_config(stopped, model, **LEVERS, train__stop_at=5))
    ranks(1, run, tiny.pretrain_config(stopped, model, **LEVERS))
    assert losses(stopped) == losses(straight) and len(losses(straight)) == 8
    states = [tiny.state_of(folder / "run" / "checkpoints" / "step-00000008") for folder in (straight, stopped)]
    assert states[0].keys() == states[1].keys()
    assert [name for name, each in states[0].items() if not torch.equal(each, states[1][name])] == []
