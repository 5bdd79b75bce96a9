"""How fast a model of a named shape trains here: tokens/s, model TFLOPs and MFU, beside a peer written by hand.

    python benchmarks/throughput.py shape=135m [KEY=VALUE ...]
    torchrun --nproc_per_node 8 benchmarks/throughput.py shape=7b seq_len=4096 activation_checkpointing=full \\
        peer=true sweep='micro_batch_size=1;micro_batch_size=2,activation_checkpointing=selective' save=mistral_8_gpus

A step is a whole one of `llm_recipes.training.loop`: micro-batches to the device, forward, backward, clipping, AdamW.
Weights and tokens are random; every window is full. `sweep` lists configurations separated by `;`, each some
KEY=VALUE separated by commas; `peer=true` adds to each a plain transformers model with `fully_shard` called by hand
and cross entropy of its logits. Configurations take turns: in each of `rounds` rounds each is built, warmed up and
measured over `steps` steps, then its memory is freed. Shown are the median over all measured steps, and the
quartiles; `ratio` is a row's seconds over ours of the same configuration. Nothing waits for a GPU between steps: they
are timed by its own events. Where the time of our steps went is told by phase: data, forward, backward, optimizer,
rest (`llm_recipes.training.phases`); `profile.steps` gives a run a trace.

    MFU = tokens/s/device * (6 * matrix parameters + 12 * layers * heads * head_dim * seq_len) / peak FLOPs
    (llm_recipes.models.flops; recomputation is not counted, and no peak is known for a CPU)

What a CUDA device does with this script has not been seen yet: so far it has run on CPUs only.
"""

import contextlib
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would measure the other work on the machine

import torch
import torch.nn.functional as F
from loop_overhead import Options, Ours, by_hand, draw_batches, llama, read_options, set_threads
from rich.console import Console
from rich.table import Table
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from llm_recipes.config import OptimConfig, ParallelConfig
from llm_recipes.data.stream import Batch
from llm_recipes.models import flops, topology
from llm_recipes.models.topology import Topology

SHAPES = {
    "tiny": llama(256, 704, 4, 4, 2, 8192),
    "135m": llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),  # SmolLM2-135M
    "1b": llama(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True),  # Llama-3.2-1B
    "3b": llama(3072, 8192, 28, 24, 8, 128256, tie_word_embeddings=True),  # Llama-3.2-3B
    "7b": llama(4096, 14336, 32, 32, 8, 32000, model_type="mistral", sliding_window=None),  # Mistral-7B
    "moe": llama(512, 1792, 6, 8, 2, 32000, model_type="mixtral", num_local_experts=8, num_experts_per_tok=2),
}
DEFAULTS = {
    "shape": "135m", "seq_len": "256", "micro_batch_size": "1", "accumulation": "1", "documents": "1",
    "attention": "auto", "activation_checkpointing": "none", "compile": "false", "precision": "",
    "sharding": "full_shard", "reduce": "every", "steps": "5", "warmup": "1", "rounds": "3", "threads": "",
    "peer": "false", "sweep": "", "save": "",
}  # fmt: skip
COLUMNS = ["configuration", "", "s/step", "quartiles", "tokens/s/device", "TFLOPs/device", "MFU", "peak GB", "ratio"]
GLOBAL = ("steps", "warmup", "rounds", "threads", "peer", "sweep", "save")


class Peer:
    """What one writes by hand: transformers, `fully_shard`, cross entropy of the logits, clipping, fused AdamW."""

    def __init__(self, place: Topology, folder: Path, options: Options, sample: list[Batch]) -> None:
        attention = None if options["attention"] == "auto" else options["attention"]
        self.place, self.last_only = place, options["reduce"] == "last"
        if options["documents"] != "1" or options["activation_checkpointing"] == "selective":
            sys.exit("peer=true goes with documents=1, and has no selective activation checkpointing")
        with place.device:  # whole on each device before it is sharded
            own = AutoConfig.from_pretrained(folder)
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

    def step(self, micro_batches: list[Batch]) -> torch.Tensor:
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


class Stopwatch:
    """Times steps: by the GPU's own events, without waiting for it in between, or by the clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.marks = device.type == "cuda", []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between one mark and the next."""
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks[:-1], self.marks[1:], strict=True)]
        return [b - a for a, b in zip(self.marks[:-1], self.marks[1:], strict=True)]


def reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak since `reset_peak`: allocated on the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def measure(kind: type, place: Topology, options: Options, steps: int, warmup: int) -> tuple[Any, ...]:
    """Seconds of each step, peak bytes, what a token costs, and seconds of each phase; the last two of ours alone."""
    shape = SHAPES[options["shape"]]
    numbers = [int(options[key]) for key in ("seq_len", "micro_batch_size", "accumulation", "documents")]
    batches = [draw_batches(shape["vocab_size"], *numbers, seed) for seed in range(place.rank, 4 + place.rank)]
    reset_peak(place.device)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        contender = kind(place, Path(folder), options, batches[0])
    for number in range(warmup):
        contender.step(batches[number % 4])
    watch = Stopwatch(place.device)
    if kind is Ours:
        contender.training.phases.start()
    watch.mark()
    for number in range(steps):
        contender.step(batches[number % 4])
        watch.mark()
    own = (contender.lm.cost, contender.training.phases.stop()) if kind is Ours else (None, {})
    return watch.seconds(), peak_bytes(place.device), *own


def configurations(options: Options) -> Iterator[tuple[str, dict[str, str]]]:
    """What `sweep` lists, each named by what it changes."""
    for entry in options["sweep"].split(";"):
        changes = [change for change in entry.split(",") if change]
        if any(change.partition("=")[0] in GLOBAL for change in changes):
            sys.exit(f"sweep={entry}: {', '.join(GLOBAL)} hold for all configurations")
        changed = read_options(changes, options)
        if changed["shape"] not in SHAPES:
            sys.exit(f"shape={changed['shape']}: known are {', '.join(SHAPES)}")
        changed["precision"] = changed["precision"] or ("bf16-mixed" if torch.cuda.is_available() else "fp32")
        yield " ".join(changes), changed


def main(arguments: list[str]) -> None:
    options = read_options(arguments, DEFAULTS)
    runs = list(configurations(options))
    kinds: list[type] = [Ours, Peer] if options["peer"] == "true" else [Ours]
    threads = set_threads(options["threads"])
    steps, warmup, rounds = (int(options[key]) for key in ("steps", "warmup", "rounds"))
    times: dict[tuple[int, type], list[float]] = {(run, kind): [] for run in range(len(runs)) for kind in kinds}
    peaks, costs = dict.fromkeys(times, 0), {}
    spent: dict[int, Counter[str]] = {run: Counter() for run in range(len(runs))}
    for number in range(rounds):
        for run, kind in times:
            place = topology.start(ParallelConfig(runs[run][1]["sharding"], precision=runs[run][1]["precision"]))
            seconds, peak, cost, phases = measure(kind, place, runs[run][1], steps, warmup)
            times[run, kind] += seconds
            peaks[run, kind] = max(peaks[run, kind], peak)
            costs[run] = cost or costs[run]
            spent[run].update(phases)
            if place.is_first:
                print(f"round {number + 1}/{rounds} {kind.__name__.lower()} {runs[run][0]}: "
                      f"median {statistics.median(seconds):.3f} s a step", flush=True)  # fmt: skip

    name = torch.cuda.get_device_name() if place.device.type == "cuda" else f"CPU, {threads} threads a process"
    peak_flops = flops.peak_flops(name)
    title = f"{options['shape']}, {place.ranks} x {name}, torch {torch.__version__}, {rounds} x {steps} steps"
    rows, formulas, splits = [], [], []
    for (run, kind), seconds in times.items():
        given, cost = runs[run][1], costs[run]
        tokens = int(given["seq_len"]) * int(given["micro_batch_size"]) * int(given["accumulation"])
        median = statistics.median(seconds)
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median,) * 3
        rate = tokens / median
        operations = rate * cost.per_token(int(given["seq_len"]))
        mfu = f"{operations / peak_flops:.1%}" if peak_flops else "-"
        ratio = median / statistics.median(times[run, Ours])
        base = f"seq {given['seq_len']}, {given['micro_batch_size']} x {given['accumulation']}, {given['precision']}"
        rows.append((f"{base} {runs[run][0]}".strip(), kind.__name__.lower(), f"{median:.3f}", f"{low:.3f}-{high:.3f}",
                     f"{rate:,.0f}", f"{operations / 1e12:.3f}", mfu, f"{peaks[run, kind] / 1e9:.2f}",
                     f"{ratio:.2f}x"))  # fmt: skip
        if kind is Ours:
            whole = spent[run].total()
            shares = ", ".join(f"{phase} {seconds / whole:.1%}" for phase, seconds in spent[run].items())
            splits.append(f"where the time of ours {runs[run][0]}".rstrip() + f" went: {shares}")
        formulas.append(
            f"{given['shape']}, seq {given['seq_len']}: {cost.parameters:,} parameters ({cost.active_parameters:,} "
            f"active), 6 * {cost.matrix_parameters:,} + 12 * {cost.attention_width:,} * {given['seq_len']} = "
            f"{cost.per_token(int(given['seq_len'])) / 1e9:.3f} GFLOPs a token"
        )
    if place.is_first:
        show(title, rows, [*splits, *dict.fromkeys(formulas)], options["save"])
    topology.stop()


def show(title: str, rows: list[Any], notes: list[str], save: str) -> None:
    """Print a table, and keep it as `benchmarks/results/<save>.md`."""
    table = Table(title=title)
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if number > 1 else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
    print(*notes, sep="\n")
    if save:
        path = Path(__file__).parent / "results" / f"{save}.md"
        path.parent.mkdir(exist_ok=True)
        lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        path.write_text(f"# {title}\n\n{body}\n\n" + "\n".join(f"- {note}" for note in notes) + "\n")
        print(f"saved as {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main(sys.argv[1:])
