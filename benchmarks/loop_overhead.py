"""The price of our training step over a bare PyTorch loop: the claim is at most 2%.

    python benchmarks/loop_overhead.py [layers=4] [hidden=512] [vocab=16384] [seq_len=256] [micro_batch_size=2]
        [accumulation=2] [rounds=30] [threads=1] [precision=fp32]

Two comparisons, in one process, on random weights that are the same for all:

    loop    `training.loop.train` against a bare loop on a model of the same kind: `causal.build` gives both (one
            process, FSDP), and both ask it for the same losses. Only the loop differs. The two trade models every
            other round, so that where a model lies in memory favours neither.
    whole   `training.loop.train` against what one writes by hand for one device: plain transformers without FSDP
            (on a GPU under autocast), cross entropy of the logits, `clip_grad_norm_`, fused AdamW.

A round is one step of each on the same micro-batches, in an order that is reversed from round to round; each reads
its loss and gradient norm. All train for real from the same weights: in fp32 their losses must agree within 1e-4 in
every round, and their gradient norms within 0.1%. Shown is the median over the rounds of the ratio ours / other,
with a 95% bootstrap interval, by the clock and by the processor time of this process (which other work on the
machine disturbs less; on a GPU only the clock counts).
"""

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would measure the other work on the machine

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from llm_recipes.config import BatchWarmupConfig, GuardConfig, ModelConfig, OptimConfig, ParallelConfig, ScheduleConfig
from llm_recipes.data.documents import window
from llm_recipes.data.stream import Batch, stack
from llm_recipes.models import causal, topology
from llm_recipes.models.topology import Topology
from llm_recipes.training import optimizer, proofs, schedule
from llm_recipes.training.guard import Guard
from llm_recipes.training.loop import Step, Training, figures, train
from llm_recipes.training.objective import NextToken
from llm_recipes.training.phases import Phases

DEFAULTS = {
    "layers": "4", "hidden": "512", "vocab": "16384", "seq_len": "256", "micro_batch_size": "2", "accumulation": "2",
    "rounds": "30", "warmup": "2", "threads": "1", "precision": "", "attention": "auto",
}  # fmt: skip
OURS = {"activation_checkpointing": "none", "compile": "false", "sharding": "full_shard", "reduce": "every"}
TOLERANCE = 1e-4
Result = tuple[float, float]
"""A step's loss and gradient norm."""
Options = Mapping[str, str]


def read_options(arguments: list[str], defaults: Options) -> dict[str, str]:
    """KEY=VALUE arguments over their defaults."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(defaults)}")
    return {**defaults, **given}


def set_threads(wanted: str) -> int:
    """Threads of this process's operators: as asked for, else its share of the cores."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(int(wanted or max(1, len(os.sched_getaffinity(0)) // local)))
    return torch.get_num_threads()


def draw_batches(vocab: int, seq_len: int, rows: int, micro_batches: int, documents: int, seed: int) -> list[Batch]:
    """Micro-batches of random tokens, each window full."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [seq_len // documents] * (documents - 1)
    lengths.append(seq_len - sum(lengths))

    def draw() -> dict[str, Any]:
        pieces = [torch.randint(vocab, (length + 1,), generator=generator).numpy() for length in lengths]
        return window(pieces, seq_len, separate=documents > 1)

    result = [stack([draw() for _ in range(rows)]) for _ in range(micro_batches)]
    for batch in result:
        batch |= {"source": torch.zeros(rows, dtype=torch.int64), "position": torch.arange(rows)}
    return result


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    """A configuration of the Llama family, or with `more` of its relatives."""
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": 32768, "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


class Ours:
    """`llm_recipes`: a model as `causal.build` gives it, and the training loop, a step at a time."""

    def __init__(self, place: Topology, folder: Path, options: Options, sample: list[Batch]) -> None:
        documents, rows = int(options["documents"]), int(options["micro_batch_size"])
        model = ModelConfig(
            path=str(folder), init="random", attention=options["attention"],
            activation_checkpointing=options["activation_checkpointing"], compile=options["compile"] == "true",
        )  # fmt: skip
        parallel = ParallelConfig(options["sharding"], precision=options["precision"], reduce=options["reduce"])
        self.lm = causal.build(model, parallel, place, str(folder), documents > 1, seed=0)
        optim = OptimConfig(lr=1e-4)
        adamw = optimizer.adamw(self.lm.model, optim)
        proofs.isolate_documents(self.lm, documents > 1)
        proofs.head_equals_logits(self.lm, {key: value.to(place.device) for key, value in sample[0].items()})
        self.feed: deque[list[Batch]] = deque()
        self.training = Training(
            phases=Phases(place.device),
            models={"policy": self.lm},
            optimizer=adamw,
            objective=NextToken(sources=1),
            batches=iter(self.feed.popleft, None),
            spans=schedule.BatchSpans(rows * len(sample) * place.ranks, BatchWarmupConfig()),
            learning_rate=schedule.learning_rate(optim, ScheduleConfig("constant"), sys.maxsize),
            loss_scale=optimizer.LossScale(self.lm.precision.scales_loss, place.device),
            guard=Guard(GuardConfig(), place.device, self.lm.precision.scales_loss),
            clip_norm=optim.grad_clip_norm,
            reduce_every=options["reduce"] == "every",
            seed=0,
            seq_len=int(options["seq_len"]),
        )
        self._steps = train(self.training, sys.maxsize)

    def step(self, micro_batches: list[Batch]) -> Step:
        self.feed.append(micro_batches)
        return next(self._steps)


def by_hand(model: Any, optim: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW; vectors do not decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [each for each in parameters if each.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True)


def our_step(ours: Ours, batches: list[Batch]) -> Result:
    row = figures(ours.step(batches), ours.training, ["random"])
    return row["loss"], row["grad_norm"]


def bare_step(ours: Ours, batches: list[Batch]) -> Result:
    """The same model, losses and optimizer, without our loop."""
    lm, optimizer = ours.lm, ours.training.optimizer
    count = sum(batch["targets"].numel() for batch in batches)
    total = torch.zeros((), device=lm.topology.device)
    for batch in batches:
        batch = {key: value.to(lm.topology.device, non_blocking=True) for key, value in batch.items()}
        losses, _ = lm.token_losses(batch, uniform=True)
        loss = losses.sum() / count
        loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(lm.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(total), float(norm.full_tensor())


class Plain:
    """A plain transformers model on one device, without FSDP, from the same weights."""

    def __init__(self, ours: Ours, folder: Path, place: Topology) -> None:
        attention = ours.lm.model.config._attn_implementation
        own = AutoConfig.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_config(own, dtype=torch.float32, attn_implementation=attention)
        self.model.to(place.device)
        weights = dict(ours.lm.model.named_parameters())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name].full_tensor())
        self.device, self.mixed = place.device, ours.lm.precision.name == "bf16-mixed"
        self.optimizer = by_hand(self.model.train(), OptimConfig(lr=1e-4))

    def step(self, batches: list[Batch]) -> Result:
        count = sum(batch["targets"].numel() for batch in batches)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            ids, targets = (batch[key].to(self.device, non_blocking=True) for key in ("input_ids", "targets"))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
                logits = self.model(input_ids=ids, use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / count
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total), float(norm)


def timed(step: Callable[[list[Batch]], Result], batches: list[Batch]) -> tuple[tuple[float, float], Result]:
    """Seconds by the clock and by this process's processors, and what the step answered."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    clock, processor = time.perf_counter(), time.process_time()
    result = step(batches)
    wait()
    return (time.perf_counter() - clock, time.process_time() - processor), result


def interval(ratios: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """The middle 95% of the median over bootstrap samples of the rounds."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def refuse_apart(number: int, results: dict[str, Result]) -> None:
    """All trained on the same: else the times say nothing."""
    losses, norms = zip(*results.values(), strict=True)
    if not max(losses) - min(losses) <= TOLERANCE:
        sys.exit(f"round {number}: the losses differ: {results}")
    if not max(norms) - min(norms) <= 10 * TOLERANCE * max(norms):
        sys.exit(f"round {number}: the gradient norms differ: {results}")


def run(options: Options, place: Topology, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Clock and processor seconds of each round's step, by contender."""
    numbers = [int(options[key]) for key in ("seq_len", "micro_batch_size", "accumulation")]

    def batches_of(seed: int) -> list[Batch]:
        return draw_batches(int(options["vocab"]), *numbers, documents=1, seed=seed)

    both = [Ours(place, folder, options, batches_of(0)) for _ in range(2)]
    if not all(each.lm.use_loss_head for each in both):
        sys.exit("the head that returns losses was not taken")
    plain = Plain(both[0], folder, place)
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": [], "plain": []}
    warmup, rounds = int(options["warmup"]), int(options["rounds"])
    for number in range(-warmup, rounds):
        batches = batches_of(number + warmup)
        mine, other = both if number // 2 % 2 else both[::-1]
        steps: list[tuple[str, Callable[[list[Batch]], Result]]] = [
            ("ours", lambda batches, one=mine: our_step(one, batches)),
            ("bare", lambda batches, one=other: bare_step(one, batches)),
            ("plain", plain.step),
        ]
        results = {}
        for name, step in steps if number % 2 else steps[::-1]:
            seconds, results[name] = timed(step, batches)
            if number >= 0:
                times[name].append(seconds)
        if options["precision"] == "fp32":
            refuse_apart(number, results)
    print(f"loss and gradient norm of the last round: {results}")
    return times


def main(arguments: list[str]) -> None:
    options = read_options(arguments, DEFAULTS) | OURS | {"documents": "1"}
    options["precision"] = options["precision"] or ("bf16-mixed" if torch.cuda.is_available() else "fp32")
    threads, hidden = set_threads(options["threads"]), int(options["hidden"])
    heads = max(1, hidden // 64)
    shape = llama(hidden, hidden * 11 // 4, int(options["layers"]), heads, heads, int(options["vocab"]))
    place = topology.start(ParallelConfig(precision=options["precision"]))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        times = run(options, place, Path(folder))
    on = torch.cuda.get_device_name() if place.device.type == "cuda" else f"CPU, {threads} threads"
    topology.stop()

    table = Table(
        title=f"{options['layers']} layers, hidden {hidden}, vocabulary {options['vocab']}, "
        f"{options['accumulation']} x {options['micro_batch_size']} x {options['seq_len']} tokens, "
        f"{options['precision']}; {on}, "
        f"torch {torch.__version__}, {options['rounds']} rounds (medians)"
    )
    for column in ("ours over", "ours, s", "other, s", "by the clock", "95%", "by processor time", "95%"):
        table.add_column(column, justify="left" if column == "ours over" else "right")
    for name, text in (("bare", "the same model, a bare loop"), ("plain", "plain transformers, no FSDP")):
        cells = [f"{statistics.median(clock for clock, _ in times[each]):.3f}" for each in ("ours", name)]
        for which in (0, 1):
            ratios = [a[which] / b[which] for a, b in zip(times["ours"], times[name], strict=True)]
            low, high = interval(ratios)
            cells += [f"{statistics.median(ratios):.3f}x", f"{low:.3f}-{high:.3f}"]
        table.add_row(text, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
