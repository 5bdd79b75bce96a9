"""Predicted memory against measured: the claim is at most 10% between them.

    python benchmarks/memory.py [ranks=8] [layers=4] [hidden=512] [vocab=16384] [seq_len=512] [micro_batch_size=2]
        [accumulation=2] [precision=bf16-mixed] [attention=...] [sharding=full_shard] [reduce=every]
        [prefetch=1] [state=full]
    torchrun --nproc_per_node 2 benchmarks/memory.py ...         # on GPUs

Each row is a model of the Llama family and one way of recomputing. Predicted is what `llm_recipes.plan` says of it.
Measured is the peak of the second step of `training.loop.train` (the optimizer has its state then): on a GPU
`torch.cuda.max_memory_allocated`; on a CPU the allocator's own account of every allocation, as torch's profiler records
it, on top of the weights, moments and batches that are there. On a CPU the other ranks are imagined (torch's `fake`
process group: all collectives are called, and none does anything), since gloo's threads free what the profiler does not
see; and attention is `eager`, whose code both run. Where the logits are several chunks (vocab x tokens above 2^23) a
CPU takes more than is predicted: adding a chunk's bf16 gradient to the fp32 sum, its kernel first makes a copy in fp32,
which one on a GPU does not.
"""

import contextlib
import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from loop_overhead import draw_batches, llama, read_options
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch.distributed.tensor import DTensor

from llm_recipes.config import GuardConfig, ModelConfig, OptimConfig, ParallelConfig, PlanConfig, ScheduleConfig
from llm_recipes.data.stream import Batch
from llm_recipes.models import causal, topology
from llm_recipes.models.topology import Topology
from llm_recipes.planning.groups import imagined
from llm_recipes.planning.memory import Memory
from llm_recipes.planning.model import open_shape
from llm_recipes.planning.sizes import Sizes
from llm_recipes.training import optimizer, schedule
from llm_recipes.training.guard import Guard
from llm_recipes.training.loop import Training, train
from llm_recipes.training.objective import NextToken

DEFAULTS = {
    "ranks": "8", "layers": "4", "hidden": "512", "vocab": "16384", "seq_len": "512", "micro_batch_size": "2",
    "accumulation": "2", "precision": "bf16-mixed", "attention": "", "sharding": "full_shard", "reduce": "every",
    "prefetch": "1", "state": "full",
}  # fmt: skip


def held(run: Training, batches: list[Batch]) -> int:
    """Bytes of this process's weights, moments and batches, from the tensors themselves."""
    moments = [each for state in run.optimizer.state.values() for each in state.values() if each.ndim]
    tensors = [
        *run.models["policy"].model.parameters(),
        *moments,
        *(each for batch in batches for each in batch.values()),
    ]
    return sum((each.to_local() if isinstance(each, DTensor) else each).nbytes for each in tensors)


def peak_of(run: Training, batches: list[Batch]) -> int:
    """Peak bytes of this process in the next step."""
    gc.collect()
    device = run.models["policy"].topology.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        next(train(run, run.progress.step + 1))
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    standing = held(run, batches)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        next(train(run, run.progress.step + 1))
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = most = 0
    for each in sorted(events, key=lambda event: event.start_ns()):
        now += each.nbytes()
        most = max(most, now)
    return standing + most


def measure(place: Topology, folder: Path, options: dict[str, str]) -> int:
    """Peak bytes of this process in its second training step."""
    model = ModelConfig(
        str(folder), attention=options["attention"], activation_checkpointing=options["activation_checkpointing"]
    )
    rows, accumulation = int(options["micro_batch_size"]), int(options["accumulation"])
    lm = causal.build(model, parallel(options), place, str(folder), False, seed=0, weights=False)
    lm.use_loss_head = True
    for each in lm.model.parameters():
        torch.nn.init.normal_(each.to_local(), std=0.02)
    batches = draw_batches(int(options["vocab"]), int(options["seq_len"]), rows, accumulation, 1, seed=place.rank)
    optim = OptimConfig(lr=1e-4, state=options["state"])
    run = Training(
        models={"policy": lm},
        optimizer=optimizer.adamw(lm.model, optim),
        objective=NextToken(sources=1),
        batches=iter([batches, batches]),
        spans=schedule.BatchSpans(rows * accumulation * place.ranks, schedule.BatchWarmupConfig()),
        learning_rate=schedule.learning_rate(optim, ScheduleConfig("constant"), 2),
        loss_scale=optimizer.LossScale(lm.precision.scales_loss, place.device),
        guard=Guard(GuardConfig(), place.device, lm.precision.scales_loss),
        clip_norm=optim.grad_clip_norm,
        reduce_every=options["reduce"] == "every",
        seed=0,
        seq_len=int(options["seq_len"]),
    )
    next(train(run, 1))
    return peak_of(run, batches)


def parallel(options: dict[str, str]) -> ParallelConfig:
    return ParallelConfig(
        options["sharding"],
        precision=options["precision"],
        reduce=options["reduce"],
        prefetch=int(options["prefetch"]),
    )


def predict(folder: Path, options: dict[str, str], ranks: int, device: str) -> Memory:
    """What a plan says."""
    rows, accumulation = int(options["micro_batch_size"]), int(options["accumulation"])
    said = {
        "devices": ranks, "optim": {"lr": 1e-4, "state": options["state"]}, "run": {"name": "memory"},
        "model": {"path": str(folder), "activation_checkpointing": options["activation_checkpointing"],
                  "attention": options["attention"]},
        "data": {"seq_len": int(options["seq_len"]), "mask_documents": False},
        "train": {"steps": 1, "global_batch_size": rows * accumulation * ranks, "micro_batch_size": rows},
        "parallel": {key: options[key] for key in ("sharding", "precision", "reduce", "prefetch")},
    }  # fmt: skip
    config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PlanConfig), said))
    own, _ = open_shape(config.model)
    return Sizes(config, own, device).memory(config, ranks)


@contextlib.contextmanager
def world(options: dict[str, str]) -> Iterator[Topology]:
    """The processes that a launcher started, on their GPUs; or this one among others that are imagined."""
    if not torch.cuda.is_available():
        with imagined(parallel(options), int(options["ranks"]), hosts=1) as place:
            yield place
        return
    yield topology.start(parallel(options))
    topology.stop()


def write_model(folder: Path, options: dict[str, str], **more: Any) -> Path:
    """A model folder without weights: `llama`, with `more` one of its relatives."""
    hidden, layers = int(options["hidden"]), int(options["layers"])
    shape = llama(hidden, 4 * hidden, layers, hidden // 64, max(1, hidden // 128), int(options["vocab"]))
    (folder / "config.json").write_text(json.dumps(shape | more))
    return folder


def main(arguments: list[str]) -> None:
    options = read_options(arguments, DEFAULTS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options["attention"] = options["attention"] or ("sdpa" if device == "cuda" else "eager")
    ranks = topology.launch().ranks if device == "cuda" else int(options["ranks"])
    table = Table("recomputing", "predicted, MB", "measured, MB", "predicted / measured", "worst moment")
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name), options)
        chosen = [{**options, "activation_checkpointing": kind} for kind in ("none", "selective", "full")]
        # Before the processes meet: a plan imagines a world of its own.
        predicted = [predict(folder, each, ranks, device) for each in chosen]
        with world(options) as place:
            found = [measure(place, folder, each) for each in chosen]
            first = place.is_first
    for each, memory, peak in zip(chosen, predicted, found, strict=True):
        ratio = f"{memory.total / peak:.3f}"
        kind = each["activation_checkpointing"]
        table.add_row(kind, f"{memory.total / 1e6:,.1f}", f"{peak / 1e6:,.1f}", ratio, memory.moment)
    if first:
        Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
