"""How fast a model of a named shape trains here: tokens/s, model TFLOPs and MFU, beside a peer written by hand.

    python benchmarks/throughput.py shape=135m [KEY=VALUE ...]
    python benchmarks/throughput.py shape=1b ablation=true save=ablation_1b
    torchrun --nproc_per_node 8 benchmarks/throughput.py shape=7b documents=1 peer=true \\
        sweep='micro_batch_size=1;micro_batch_size=2,activation_checkpointing=selective' save=mistral_8_gpus

A step is a whole one of `llm_recipes.training.loop`: micro-batches from token files to the device, forward, backward,
clipping, AdamW; fp32 weights and optimizer state, on a GPU bf16 compute. The data is what a run reads, through the same
functions: token files of random tokens (Zipf's law) in documents of log-normal lengths, the mixture, `workers`
processes, page-locked memory. A document sees itself alone; `documents=1`: attention over the whole window. Weights
are random; routers of a mixture of experts choose as they do. A key with a dot in it is one of a run's configuration.

`sweep` lists configurations separated by `;`, each some KEY=VALUE separated by commas. `ablation=true` tries what makes
a step faster or smaller (levers.py), each alone and together. `peer=true` (with `documents=1`) adds to each a plain
transformers model with `fully_shard` called by hand and cross entropy of its logits. What is not given is
as the library has it. Configurations take turns: in each
of `rounds` rounds each is built, warmed up and measured over `steps` steps, then its memory is freed. Shown are the
median over all measured steps, and the quartiles; `ratio` is a row's seconds over ours of the same configuration, in an
ablation over the first row's. Tokens are targets. Nothing waits for a GPU between steps: they are timed by its own
events. Where the time of our steps went is told by phase: data, forward, backward, optimizer, rest
(`llm_recipes.training.phases`); `profile.steps` gives a run a trace.

    MFU = tokens/s/device * (6 * matrix parameters + 12 * layers * heads * head_dim * seq_len) / peak FLOPs
    (llm_recipes.models.flops, as torchtitan counts: recomputation is not, of experts those that a token meets; no
    peak is known for a CPU)

On a GPU windows are 4,096 tokens, and micro-batches what fits 141 GB (shapes.py). Without one a tiny model of the same
family stands in for a large shape, and the title says so. What a CUDA device does with this script has not been seen
yet: so far it has run on CPUs only.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would measure the other work on the machine

import gc
import statistics
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import corpus
import torch
import torch.nn.functional as F
from contender import Ours, configure, open_batches
from levers import ablation
from loop_overhead import by_hand, set_threads
from measuring import (
    Stopwatch,
    answer,
    device_name,
    formula,
    let_go,
    peak_bytes,
    rates,
    read_all_options,
    reset_peak,
    show,
)
from shapes import SHAPES, settle, write_shape
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from llm_recipes.config import OptimConfig, ParallelConfig
from llm_recipes.errors import UserError, first_line
from llm_recipes.models import topology
from llm_recipes.models.flops import Cost
from llm_recipes.models.topology import Topology
from llm_recipes.training.data import open_data

DEFAULTS = {
    "shape": "135m", "seq_len": "", "micro_batch_size": "", "accumulation": "", "documents": "packed", "workers": "0",
    "attention": "auto", "activation_checkpointing": "", "compile": "", "head": "uniform", "precision": "",
    "sharding": "full_shard", "reduce": "every", "steps": "5", "warmup": "2", "rounds": "3", "threads": "",
    "peer": "false", "sweep": "", "ablation": "false", "save": "",
}  # fmt: skip
COLUMNS = ["configuration", "", "s/step", "quartiles", "tokens/s/device", "TFLOPs/device", "MFU", "peak GB", "ratio"]
PHASES = ("data", "forward", "backward", "optimizer", "rest")
GLOBAL = ("shape", "steps", "warmup", "rounds", "threads", "peer", "sweep", "ablation", "save")


class Peer:
    """What one writes by hand: transformers, `fully_shard`, cross entropy of the logits, clipping, fused AdamW."""

    def __init__(self, place: Topology, folder: Path, options: dict[str, str], steps: int) -> None:
        attention = None if options["attention"] == "auto" else options["attention"]
        self.place, self.last_only = place, options["reduce"] == "last"
        if options["documents"] != "1" or options["activation_checkpointing"] == "selective":
            sys.exit("peer=true goes with documents=1, and has no selective activation checkpointing")
        own = AutoConfig.from_pretrained(folder)
        with place.device:  # whole on each device before it is sharded
            self.model = AutoModelForCausalLM.from_config(own, dtype=torch.float32, attn_implementation=attention)
        if options["activation_checkpointing"] == "full":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        compute = {"bf16-mixed": torch.bfloat16, "fp32": None}[options["precision"]]
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        reshard = place.reshard_after_forward
        for layer in self.model.model.layers:
            if options["compile"] == "true":
                layer.compile()
            fully_shard(layer, mesh=place.mesh, mp_policy=policy, reshard_after_forward=reshard)
        fully_shard(self.model, mesh=place.mesh, mp_policy=policy)
        self.model.train()
        self.optimizer = by_hand(self.model, OptimConfig(lr=1e-4))
        config = configure(options, folder, steps, place.ranks)
        data = open_data(config, str(folder), place.ranks, place.is_first)
        self.batches = open_batches(config, data, place, own.vocab_size, steps)

    def step(self) -> torch.Tensor:
        micro_batches = next(self.batches)
        count = sum(batch["targets"].numel() for batch in micro_batches)
        total = torch.zeros((), device=self.place.device)
        for number, batch in enumerate(micro_batches):
            ids, targets = (batch[key].to(self.place.device, non_blocking=True) for key in ("input_ids", "targets"))
            last = number == len(micro_batches) - 1
            self.model.set_requires_gradient_sync(last or not self.last_only)
            logits = self.model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") / count
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def close(self) -> None:
        self.batches.close()


@dataclass
class Found:
    """Of one configuration and side, over its rounds."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    targets: float = 0.0
    """Of a step, on one device."""
    spent: Counter[str] = field(default_factory=Counter)
    cost: Cost | None = None
    why_not: str = ""


def measure(kind: type, place: Topology, folder: Path, options: dict[str, str], found: Found) -> None:
    """Build one side, warm it up, and add its steps to what has been found."""
    steps, warmup = int(options["steps"]), int(options["warmup"])
    torch.compiler.reset()  # else the tenth configuration would no longer be compiled, and say little of it
    let_go(place.device)
    reset_peak(place.device)
    contender = kind(place, folder, options, warmup + steps)
    try:
        for _ in range(warmup):
            contender.step()
        watch = Stopwatch(place.device)
        if kind is Ours:
            contender.training.phases.start()
        watch.mark()
        done = []
        for _ in range(steps):
            done.append(contender.step())
            watch.mark()
        found.seconds += watch.seconds()
        found.peak = max(found.peak, peak_bytes(place.device))
        if kind is Ours:
            found.cost = contender.lm.cost
            found.targets = float(sum(step.targets for step in done)) / steps / place.ranks
            found.spent.update(contender.training.phases.stop())
    finally:
        contender.close()


def configurations(options: dict[str, str]) -> tuple[list[tuple[str, dict[str, str]]], list[str]]:
    """What `sweep` or `ablation` lists, each named by what it changes; and notes."""
    if options["ablation"] == "true":
        return ablation(options)
    runs = []
    for entry in options["sweep"].split(";"):
        changes = [change for change in entry.split(",") if change]
        if any(change.partition("=")[0] in GLOBAL for change in changes):
            sys.exit(f"sweep={entry}: {', '.join(GLOBAL)} hold for all configurations")
        runs.append((" ".join(changes), read_all_options(changes, options)))
    return runs, []


def prepare(folder: str, shape: str, runs: list[tuple[str, dict[str, str]]], ranks: int) -> str:
    """A model's folder with tokens for every configuration's steps."""
    write_shape(Path(folder), SHAPES[shape])
    most = 0
    for _, run in runs:
        rows = int(run["micro_batch_size"]) * int(run["accumulation"]) * ranks
        most = max(most, rows * (int(run["steps"]) + int(run["warmup"])) * int(run["seq_len"]))
    corpus.write_corpus(Path(folder), SHAPES[shape]["vocab_size"], most + 1)
    return folder


def main(arguments: list[str]) -> None:
    options, said = settle(read_all_options(arguments, DEFAULTS))
    runs, notes = configurations(options)
    kinds: list[type] = [Ours, Peer] if options["peer"] == "true" else [Ours]
    threads, rounds = set_threads(options["threads"]), int(options["rounds"])
    found = {(run, kind): Found() for run in range(len(runs)) for kind in kinds}
    place = topology.start(ParallelConfig())
    if place.is_first and said:
        print(said, flush=True)
    title = f"{said or options['shape']}; {place.ranks} x {device_name(threads)}, torch {torch.__version__}, "
    title += f"{rounds} x {options['steps']} steps"
    with tempfile.TemporaryDirectory() as own:
        folder = place.on_first(lambda: prepare(own, options["shape"], runs, place.ranks))
        for number in range(rounds):
            for (run, kind), each in found.items():
                if each.why_not:
                    continue
                given = runs[run][1]
                here = topology.start(ParallelConfig(given["sharding"], precision=given["precision"]))
                try:
                    measure(kind, here, Path(folder), given, each)
                except torch.OutOfMemoryError:
                    each.why_not = "out of memory"
                except UserError as error:
                    each.why_not = str(error)
                except Exception as error:
                    if place.ranks > 1:  # the others would wait for this one
                        raise
                    traceback.print_exc()
                    each.why_not = f"{type(error).__name__}: {first_line(error)}"[:60]
                gc.collect()
                if place.is_first:
                    seconds = each.why_not or f"median {statistics.median(each.seconds):.3f} s a step"
                    print(f"round {number + 1}/{rounds} {kind.__name__.lower()} {runs[run][0]}: {seconds}", flush=True)
            if place.is_first:  # a table after each round: what comes later may run out of time
                report(title, options, runs, found, notes, device_name(threads))
        place.barrier()
    topology.stop()
    if all(each.why_not for each in found.values()):
        sys.exit(2)


def report(
    title: str,
    options: dict[str, str],
    runs: list[tuple[str, dict[str, str]]],
    found: dict[tuple[int, type], Found],
    notes: list[str],
    device: str,
) -> None:
    """Show what has been found so far."""
    rows: list[Any] = []
    splits, formulas = [], []
    first = found[0, Ours]
    for (run, kind), each in found.items():
        name, given = runs[run]
        shape = f"seq {given['seq_len']}, {given['micro_batch_size']} x {given['accumulation']}, {given['precision']}"
        label = f"{shape} {name}".strip()
        ours = found[run, Ours]
        if each.why_not or ours.cost is None:
            rows.append((label, kind.__name__.lower(), each.why_not or ours.why_not, *[""] * 6))
            continue
        base = first if options["ablation"] == "true" else ours
        ratio = "-" if not base.seconds else f"{rate_of(base, ours) / rate_of(each, ours):.2f}x"
        cells = rates(ours.targets, each.seconds, ours.cost, int(given["seq_len"]), device)
        rows.append((label, kind.__name__.lower(), *cells, f"{each.peak / 1e9:.2f}", ratio))
        if kind is Ours:
            shares = ", ".join(f"{phase} {each.spent[phase] / each.spent.total():.1%}" for phase in PHASES)
            splits.append(f"where the time of ours {name}".rstrip() + f" went: {shares}")
        formulas.append(formula(options["shape"], ours.cost, int(given["seq_len"])))
    show(title, COLUMNS, rows, [*splits, *dict.fromkeys(formulas), *notes], options["save"], left=2)


def rate_of(each: Found, ours: Found) -> float:
    """Targets a second."""
    return (each.targets or ours.targets) / statistics.median(each.seconds)


if __name__ == "__main__":
    answer(main)
