"""Some steps of training by hand, on whatever device there is: what GPU tests and the hunt for host syncs run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_recipes.config import BatchWarmupConfig, GuardConfig, ModelConfig, OptimConfig, ParallelConfig

SEQ_LEN = 128


def windows(lengths: list[int], trained_from: int = 0, rows: int = 2) -> dict[str, torch.Tensor]:
    """Windows of documents of so many targets; tokens from `trained_from` on are targets. In page-locked memory where
    there is a GPU."""
    from llm_recipes.data.documents import window
    from llm_recipes.data.stream import stack

    documents = [(np.arange(length + 1) + 7 * number) % 250 for number, length in enumerate(lengths)]
    trained = [np.arange(len(each)) >= trained_from for each in documents]
    batch = stack([window(documents, SEQ_LEN, True, trained)] * rows) | {"source": torch.zeros(rows, dtype=torch.int64)}
    return {key: value.pin_memory() for key, value in batch.items()} if torch.cuda.is_available() else batch


def prepared(
    folder: Path | str, steps: int, precision: str = "bf16-mixed", way: str | None = None, **model: Any
) -> Any:
    """A run of some steps of two micro-batches in one process: of one in which all trains, and of one in which half
    does.

    Args:
        way: of masking; None: the one that isolates documents.
        model: settings of `ModelConfig`.
    """
    from llm_recipes.models import causal, topology
    from llm_recipes.training import loop, optimizer, proofs, schedule
    from llm_recipes.training.guard import Guard
    from llm_recipes.training.objective import NextToken

    parallel = ParallelConfig(precision=precision)
    place = topology.start(parallel)
    lm = causal.build(ModelConfig(path=str(folder), **model), parallel, place, str(folder), True, seed=0)
    if way is None:
        proofs.isolate_documents(lm, True)
    else:
        lm.masking = replace(lm.masking, way=way)
    every, half = windows([60, 40, 19]), windows([119], trained_from=60)
    proofs.head_equals_logits(lm, {key: value.to(place.device) for key, value in every.items()})
    return loop.Training(
        models={"policy": lm},
        optimizer=optimizer.adamw(lm.model, OptimConfig(lr=1e-3)),
        objective=NextToken(1),
        batches=iter([[every, half]] * steps),
        spans=schedule.BatchSpans(4, BatchWarmupConfig()),
        learning_rate=schedule.LearningRate("constant", 1e-3, 0.0, 0, 0, steps),
        loss_scale=optimizer.LossScale(lm.precision.scales_loss, place.device),
        guard=Guard(GuardConfig(), place.device, lm.precision.scales_loss),
        clip_norm=1.0,
        reduce_every=True,
        seed=0,
        seq_len=SEQ_LEN,
    )
