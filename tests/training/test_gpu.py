"""What only a GPU can show. These have not run on one yet."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_recipes.config import BatchWarmupConfig, GuardConfig, ModelConfig, OptimConfig, ParallelConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here"),
]


def prepared(folder: Path, steps: int, precision: str = "bf16-mixed") -> Any:
    """A run of some steps on one GPU, its batches already there in page-locked memory."""
    from llm_recipes.data.documents import window
    from llm_recipes.data.stream import stack
    from llm_recipes.models import causal, topology
    from llm_recipes.training import loop, optimizer, proofs, schedule
    from llm_recipes.training.guard import Guard
    from llm_recipes.training.objective import NextToken

    parallel = ParallelConfig(precision=precision)
    place = topology.start(parallel)
    lm = causal.build(ModelConfig(path=str(folder)), parallel, place, str(folder), True, seed=0)
    proofs.isolate_documents(lm, True)
    tokens, sources = np.arange(1, 120) % 250, {"source": torch.zeros(2, dtype=torch.int64)}
    batch = stack([window([tokens], 128, True)] * 2) | sources
    answers = stack([window([tokens], 128, True, [tokens > 60])] * 2) | sources  # half of it trains
    micro_batches = [{key: value.pin_memory() for key, value in each.items()} for each in (batch, answers)]
    proofs.head_equals_logits(lm, {key: value.to(place.device) for key, value in batch.items()})
    return loop.Training(
        models={"policy": lm},
        optimizer=optimizer.adamw(lm.model, OptimConfig(lr=1e-3)),
        objective=NextToken(1),
        batches=iter([micro_batches] * steps),
        spans=schedule.BatchSpans(4, BatchWarmupConfig()),
        learning_rate=schedule.LearningRate("constant", 1e-3, 0.0, 0, 0, steps),
        loss_scale=optimizer.LossScale(lm.precision.scales_loss, place.device),
        guard=Guard(GuardConfig(), place.device, lm.precision.scales_loss),
        clip_norm=1.0,
        reduce_every=True,
        seed=0,
        seq_len=128,
    )


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed"])
def test_no_host_sync_between_logged_steps(tiny_models: dict[str, Path], precision: str) -> None:
    from llm_recipes.models import topology
    from llm_recipes.training import loop

    steps = loop.train(prepared(tiny_models["mistral"], 6, precision), 6)
    for _ in range(3):  # what is made once, in the first steps, may wait
        next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps:
            step.asked_to_stop.read()  # waits for the step's own beginning, and for nothing after it
    finally:
        torch.cuda.set_sync_debug_mode("default")
        topology.stop()


def test_the_loss_of_a_cycle_falls_in_bf16(tiny_models: dict[str, Path]) -> None:
    from llm_recipes.models import topology
    from llm_recipes.training import loop

    run = prepared(tiny_models["mistral"], 40)
    try:
        losses = [loop.figures(step, run, ["corpus"])["loss"] for step in loop.train(run, 40)]
    finally:
        topology.stop()
    assert losses[-1] < losses[0] / 2
