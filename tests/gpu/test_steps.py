"""Steps on a GPU: no wait between logged ones, the losses of bf16, and compiled layers."""

from pathlib import Path
from typing import Any

import pytest
import short_runs
import torch
from torch._dynamo.utils import counters

from llm_recipes.models import topology
from llm_recipes.training import loop

CASES: list[dict[str, Any]] = [
    {"precision": "bf16-mixed"},
    {"precision": "fp16-mixed"},
    {"precision": "bf16-mixed", "attention": "varlen"},
    {"precision": "bf16-mixed", "compile": False},
    {"precision": "bf16-mixed", "activation_checkpointing": "selective"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_host_sync_between_logged_steps(tiny_models: dict[str, Path], case: dict[str, Any]) -> None:
    try:
        steps = loop.train(short_runs.prepared(tiny_models["mistral"], 6, **case), 6)
        for _ in range(3):  # what is made once, in the first steps, may wait
            next(steps)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")
        for step in steps:
            step.asked_to_stop.read()  # waits for the step's own beginning, and for nothing after it
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        topology.stop()


def losses_of(folder: Path, steps: int, **options: Any) -> list[float]:
    run = short_runs.prepared(folder, steps, **options)
    try:
        return [loop.figures(step, run, ["corpus"])["loss"] for step in loop.train(run, steps)]
    finally:
        topology.stop()


def test_the_loss_of_a_cycle_falls_in_bf16(tiny_models: dict[str, Path]) -> None:
    losses = losses_of(tiny_models["mistral"], 40)
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_losses_in_bf16_are_those_of_plain_fp32(tiny_models: dict[str, Path], family: str) -> None:
    """To bf16's eight bits, over the first steps, compiled or not, whatever is recomputed. (A router may send a token
    elsewhere in bf16: a mixture of experts is allowed more.)"""
    wanted = losses_of(tiny_models[family], 4, precision="fp32", compile=False, attention="eager")
    near = 1e-2 if family == "mistral" else 5e-2
    for options in (
        {"compile": False},
        {"compile": True},
        {"compile": True, "activation_checkpointing": "selective"},
        {"compile": True, "activation_checkpointing": "selective", "activation_memory_budget": 0.5},
    ):
        assert losses_of(tiny_models[family], 4, **options) == pytest.approx(wanted, rel=near), options


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("family", ["mistral", "mixtral", "tied"])
def test_layers_are_compiled_whole_and_once(tiny_models: dict[str, Path], family: str, kind: str) -> None:
    """Also by `auto`. Flash attention, where it is installed, makes a graph of each of the two layers."""
    torch._dynamo.reset()
    counters.clear()
    compiled: Any = "auto" if torch.cuda.is_available() else True
    run = short_runs.prepared(tiny_models[family], 3, compile=compiled, activation_checkpointing=kind)
    try:
        steps = loop.train(run, 3)
        next(steps)
        after_one = counters["stats"]["unique_graphs"]
        list(steps)
    finally:
        topology.stop()
    assert 1 <= after_one <= 2
    assert counters["stats"]["unique_graphs"] == after_one
    assert not counters["graph_break"]
