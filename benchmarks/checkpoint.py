"""What a save costs while training goes on: at most 5% of gathering to rank 0, no more than torch's own, is the claim.

    python benchmarks/checkpoint.py [shapes=135m] [rounds=5] [steps=4] [resumes=3] [processes=2] [seq_len=32]
        [micro_batch_size=1] [precision=] [threads=1] [dcp=default] [patience=300] [folder=outputs]

It starts torchrun itself: two processes on a CPU, one per GPU where there are GPUs (shapes=1b,3b, and 7b computed from
the last in proportion to the parameters; not run yet). shapes=tiny takes a minute. Tokens are random, and weights too,
but where launches of 135m find `outputs/quickstart`. Ways to save take turns in one process group that trains with
`training.loop.train`, in an order that is reversed from round to round:

    ours    `checkpoints.saving.Saver`: `start`, and `wait_for_copy` before the weights move
    sync    the same, and `finish` at once
    gather  the first llm-recipes: model and optimizer whole on rank 0 (`full_state_dict`, `cpu_offload`), two
            `torch.save` (which wait for no disk), barrier
    dcp     `torch.distributed.checkpoint.async_save` of both sharded state dicts with its defaults: it copies inside
            the call, and talks over training's own process group. Where that fails, or hangs for `patience` seconds,
            all begins anew with a group of its own for it (as with dcp=own), and the table says so

Around a save, `steps` steps without one are timed before and after it. From a barrier on come the call that saves, and
steps until the save is whole on every rank, `steps` at least. On every rank:

    stands still  seconds in the call + in `wait_for_copy` (on a GPU the device's seconds) + in what ends the save
    extra         seconds from the barrier to the end of these n steps - n * the mean of the steps without a save
                  around them: what the work behind takes from training, or training from it, counts too
    processor     the same in processor seconds of the process, which other work on the machine disturbs less
    whole after   seconds from the barrier until the files are there
    disk          bytes in the folder / parameters (a tied one counted once)
    memory        peak resident bytes during a way's first save - during the steps before it; sync uses ours' buffers

The slowest rank counts. Shown are medians over the rounds after the first, which makes buffers and is shown apart.
Then `torchrun -m llm_recipes.pretrain` is launched, in turn as a fresh run and from a checkpoint, whose files and the
base model's are dropped from the page cache first. Seconds are those from there to the events `start` and `first_step`
in `metrics.jsonl`; `seconds` is what `first_step` says itself, since the import of llm_recipes.
"""

import ctypes
import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would measure the other work on the machine

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from loop_overhead import OURS, Options, Ours, draw_batches, read_options, set_threads
from rich.console import Console
from rich.table import Column, Table
from throughput import SHAPES, Stopwatch, peak_bytes, reset_peak
from tokenizers import Tokenizer, models
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from transformers import PreTrainedTokenizerFast

from llm_recipes.checkpoints.saving import Saver
from llm_recipes.config import CheckpointConfig, ParallelConfig
from llm_recipes.data import tokenizer as tokenizers
from llm_recipes.data.token_file import Sidecar, TokenFileWriter, smallest_dtype
from llm_recipes.models import topology
from llm_recipes.models.topology import Topology
from llm_recipes.telemetry import metrics

DEFAULTS = {
    "shapes": "", "rounds": "5", "steps": "4", "resumes": "3", "processes": "", "seq_len": "",
    "micro_batch_size": "1", "precision": "", "threads": "1", "dcp": "default", "patience": "300",
    "folder": "outputs", "shape": "", "work": "",
}  # fmt: skip
QUICKSTART = Path("outputs/quickstart/models/smollm2-135m")
PARAMETERS_7B = 7_241_732_096  # Mistral-7B
HOST = torch.device("cpu")
WAYS = {"ours": "ours", "sync": "ours, waited for", "gather": "gather, torch.save", "dcp": "torch async_save"}
Save = dict[str, float]


@dataclass
class Pending:
    """A save after the call that began it."""

    wait_for_copy: Callable[[], None] = lambda: None
    in_flight: Callable[[], bool] = lambda: False
    finish: Callable[[], float] = time.perf_counter
    """Raises what went wrong; when the files were whole."""


def done(at: float) -> Pending:
    return Pending(finish=lambda: at)


def ours(training: Ours, saver: Saver, wait: bool, folder: Path) -> Pending:
    saver.root = folder
    saver.start(1, training.lm.model, training.training.optimizer, {"step": 1}, dict)
    begun = time.perf_counter()

    def finish() -> float:
        outcome = saver.finish()
        if outcome is None or outcome.problem is not None:
            raise OSError(outcome)
        return begun + outcome.seconds

    return done(finish()) if wait else Pending(saver.wait_for_copy, lambda: saver.in_flight, finish)


def state_of(training: Ours, options: StateDictOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    model, optimizer = training.lm.model, training.training.optimizer
    return get_model_state_dict(model, options=options), get_optimizer_state_dict(model, optimizer, options=options)


def gather(training: Ours, folder: Path) -> Pending:
    model, optimizer = state_of(training, StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        torch.save(model, folder / "model.pt")
        torch.save(optimizer, folder / "optimizer.pt")
    dist.barrier()
    return done(time.perf_counter())


def async_save(training: Ours, group: Any, folder: Path) -> Pending:
    state = dict(zip(("model", "optimizer"), state_of(training, StateDictOptions()), strict=True))
    future: Any = dcp.async_save(state, checkpoint_id=folder / "dcp", process_group=group)
    whole: list[float] = []
    future.add_done_callback(lambda _: whole.append(time.perf_counter()))

    return Pending(in_flight=lambda: not whole, finish=lambda: (future.result(), whole[0])[1])


class Bench:
    """One process's training, and saves of it. It stands where training has its saver."""

    def __init__(self, options: Options, place: Topology, work: Path) -> None:
        self.place, self.work, self.steps, self.taken = place, work, int(options["steps"]), 0
        numbers = [int(options[key]) for key in ("seq_len", "micro_batch_size", "accumulation", "documents")]
        vocabulary, base = SHAPES[options["shape"]]["vocab_size"], base_of(options["shape"], work)
        self.batches = [draw_batches(vocabulary, *numbers, seed) for seed in range(place.rank, 4 + place.rank)]
        self.training = Ours(place, base, options, self.batches[0])
        self.training.training.saver = self  # type: ignore[assignment]
        self.group = place.group_of_its_own()  # what is asked here is not in the way of what is measured
        saver = Saver(work, base, CheckpointConfig(keep=None), place)
        saver.reserve(self.training.lm.model, self.training.training.optimizer)
        group = place.group_of_its_own() if options["dcp"] == "own" else None
        self.ways: dict[str, Callable[[Path], Pending]] = {
            "ours": partial(ours, self.training, saver, False), "sync": partial(ours, self.training, saver, True),
            "gather": partial(gather, self.training), "dcp": partial(async_save, self.training, group),
        }  # fmt: skip
        self.pending, self.watches = Pending(), list[Stopwatch]()
        self.take(2)
        self.without = self.take_without()

    def wait_for_copy(self) -> None:
        self.watches.append(watch := Stopwatch(self.place.device))
        watch.mark()
        self.pending.wait_for_copy()
        watch.mark()

    def take(self, least: int) -> int:
        """Steps, until the save is whole on every rank; how many."""
        taken = 0
        while taken < least or any(self.place.gather(self.pending.in_flight(), self.group)):
            self.training.step(self.batches[self.taken % 4])
            self.taken, taken = self.taken + 1, taken + 1
            (self.work / "progress").touch()
        if self.place.device.type == "cuda":
            torch.cuda.synchronize()
        return taken

    def take_without(self) -> tuple[float, float, float]:
        """Of steps without a save: seconds and processor seconds of one, and peak resident bytes."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        reset_peak(HOST)
        clock, processor = time.perf_counter(), time.process_time()
        self.take(self.steps)
        seconds = time.perf_counter() - clock, time.process_time() - processor
        return seconds[0] / self.steps, seconds[1] / self.steps, float(peak_bytes(HOST))

    def save(self, name: str) -> Save:
        """Save once; of each figure the largest of all ranks."""
        folder, before, self.watches = self.work / "saved", self.without, []
        self.place.on_first(folder.mkdir)
        self.place.on_first(os.sync)
        reset_peak(HOST)
        self.place.barrier()
        started, processor = time.perf_counter(), time.process_time()
        self.pending = self.ways[name](folder)
        called = time.perf_counter()
        steps = self.take(self.steps)
        ended = time.perf_counter()
        whole = self.pending.finish()
        finished, worked, peak = time.perf_counter(), time.process_time() - processor, peak_bytes(HOST)
        waited = sum(sum(watch.seconds()) for watch in self.watches)
        self.pending = Pending()
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        self.place.barrier()
        self.place.on_first(partial(shutil.rmtree, folder))
        self.without = self.take_without()
        usual, usual_processor = ((before[at] + self.without[at]) / 2 for at in (0, 1))
        mine = {
            "still": called - started + waited + finished - ended, "extra": finished - started - steps * usual,
            "processor": worked - steps * usual_processor, "whole": whole - started, "disk": float(size),
            "memory": peak - before[2], "resident": before[2], "steps": float(steps), "usual": usual,
        }  # fmt: skip
        every = self.place.gather(mine, self.group)
        return {key: max(each[key] for each in every) for key in mine}


def worker(options: dict[str, str]) -> None:
    """One of torchrun's processes."""
    set_threads("" if torch.cuda.is_available() else options["threads"])
    place, work = topology.start(ParallelConfig(precision=options["precision"])), Path(options["work"])
    bench = Bench({**options, **OURS, "documents": "1", "accumulation": "1", "attention": "auto"}, place, work)
    saves: dict[str, list[Save]] = {name: [] for name in WAYS}
    for number in range(int(options["rounds"]) + 1):
        for name in list(WAYS)[:: -1 if number % 2 else 1]:
            saves[name].append(one := bench.save(name))
            if place.is_first:
                print(f"round {number} {name}: stands still {one['still']:.3f} s; {one['extra']:.2f} s extra in "
                      f"{one['steps']:.0f} steps of {one['usual']:.2f} s", flush=True)  # fmt: skip
    if place.is_first:
        on = torch.cuda.get_device_name() if place.device.type == "cuda" else f"CPU, {options['threads']} thread each"
        result = {"saves": saves, "parameters": bench.training.lm.cost.parameters, "on": on, "dcp": options["dcp"]}
        (work / "result.json").write_text(json.dumps(result))
    topology.stop()


def base_of(shape: str, work: Path) -> Path:
    """The model folder that a shape starts from."""
    return QUICKSTART if shape == "135m" and (QUICKSTART / "model.safetensors").exists() else work / "base"


def prepare(shape: str, work: Path) -> None:
    """A model folder without weights, where there is none, and a token file."""
    base, vocabulary = base_of(shape, work), SHAPES[shape]["vocab_size"]
    if base != QUICKSTART:
        words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
        made: Any = PreTrainedTokenizerFast
        made(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(base)
        (base / "config.json").write_text(json.dumps(SHAPES[shape]))
    tokenizer, ids = tokenizers.open_tokenizer(str(base)), np.random.default_rng(0).integers(3, vocabulary, (200, 1000))
    ids[:, -1] = end = tokenizer.eos_token_id
    writer = TokenFileWriter(work / "tokens", smallest_dtype(vocabulary))
    writer.append(ids.reshape(-1), np.full(200, 1000), np.full(200, 999))
    facts = (vocabulary, writer.largest_token_id, end, None, writer.documents, writer.tokens, writer.bytes)
    writer.close(Sidecar(tokenizers.fingerprint(tokenizer), "random", *facts))


def launch(arguments: Iterable[str], options: Options, work: Path, log: Path | None = None) -> int | None:
    """torchrun's status; None: nothing touched `progress` for too long, and it was ended."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = dict(os.environ) | ({} if torch.cuda.is_available() else {"OMP_NUM_THREADS": options["threads"]})
    progress, patience = work / "progress", math.inf if log else float(options["patience"])
    progress.touch()
    with open(log or os.devnull, "wb") as file:
        command, out = [*torchrun, f"--nproc_per_node={options['processes']}", *arguments], file if log else None
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            while process.poll() is None and time.time() - progress.stat().st_mtime < patience:
                time.sleep(0.2)
            return process.poll()
        finally:
            process.terminate()  # and torchrun ends its processes
            process.wait()


def measure_saves(options: dict[str, str], work: Path) -> dict[str, Any]:
    """Saves of a shape; where torch's defaults do not go through, once more with a group of its own for them."""
    while True:
        given = [f"{key}={value}" for key, value in options.items() if key != "work"]
        status = launch([__file__, *given, f"work={work}"], options, work)
        if status == 0:
            return dict(json.loads((work / "result.json").read_text()))
        if options["dcp"] == "own":
            sys.exit("the measurement failed, see above")
        why = f"nothing moved for {options['patience']} s" if status is None else f"ended with status {status}"
        print(f"dcp=default, on training's own process group: {why}; anew with a group of its own", flush=True)
        options["dcp"] = "own"
        shutil.rmtree(work / "saved", ignore_errors=True)


def first_step(keys: list[str], run: Path, options: Options) -> dict[str, float]:
    """Launch a run; seconds until its first step."""
    for path in (*run.rglob("*.safetensors"), *base_of(options["shape"], run.parent).glob("*.safetensors")):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    log, started = run.with_suffix(".log"), time.time()
    arguments = ["-m", "llm_recipes.pretrain", *keys, f"run.name={run.name}", f"run.dir={run.parent}"]
    if launch(arguments, options, run.parent, log) != 0:
        sys.exit(log.read_text(errors="replace"))
    last = {row["event"]: row for row in metrics.read(run / "metrics.jsonl") if "event" in row}
    start, first = last["start"]["time"], last["first_step"]["time"]
    own = last["first_step"]["seconds"]
    return {"all": first - started, "start": start - started, "step": first - start, "seconds": own}


def measure_launches(options: Options, work: Path) -> dict[str, list[Save]]:
    """Fresh launches and resumed ones, in turn. Each saves when it ends."""
    base, batch = base_of(options["shape"], work), int(options["micro_batch_size"])
    keys = [
        f"model.path={base}", f"model.init={'pretrained' if base == QUICKSTART else 'random'}", "data.bos=never",
        f"data.seq_len={options['seq_len']}", f"data.sources.random.path={work / 'tokens'}", "train.steps=1000",
        f"train.global_batch_size={int(options['processes']) * batch}", f"train.micro_batch_size={batch}",
        "optim.lr=1e-4", f"parallel.precision={options['precision']}", "checkpoint.keep=1",
    ]  # fmt: skip
    found: dict[str, list[Save]] = {"fresh": [], "resumed": []}
    for number in range(int(options["resumes"])):
        fresh = work / ("fresh" if number else "run")
        found["fresh"].append(first_step([*keys, "train.stop_at=1"], fresh, options))
        shutil.rmtree(work / "fresh", ignore_errors=True)
        found["resumed"].append(first_step([*keys, f"train.stop_at={number + 2}"], work / "run", options))
        print(*(f"{name}: first step after {rows[-1]['all']:.1f} s" for name, rows in found.items()), flush=True)
    return found


def middle(rows: Iterable[Save], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def spread(rows: list[Save], key: str) -> str:
    return f"{min(row[key] for row in rows):.2f}-{max(row[key] for row in rows):.2f}"


def show(title: str, columns: str, rows: Iterable[Iterable[str]]) -> None:
    named = (Column(column, justify="right") for column in columns.split(" | "))
    table = Table(Column(no_wrap=True), *named, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)


def report(options: Options, result: Mapping[str, Any], launches: Mapping[str, list[Save]], last: bool) -> None:
    shape, parameters, every = options["shape"], result["parameters"], result["saves"]
    saves = {name: rows[1:] for name, rows in every.items()}
    show(
        f"{shape} ({parameters:,} parameters), {options['processes']} x {result['on']}, torch {torch.__version__}, "
        f"{options['precision']}, {options['micro_batch_size']} x {options['seq_len']} tokens and "
        f"{statistics.median(row['usual'] for rows in saves.values() for row in rows):.2f} s a step, "
        f"medians of {options['rounds']} saves; resident before: {every['ours'][0]['resident'] / 1e9:.2f} GB",
        "stands still, s | least - most | first one | extra, s | process or, s | in steps | whole after, s | "
        "disk, B/param. | memory, GB each",
        [(label + ", own group" * ((name, result["dcp"]) == ("dcp", "own")), f"{middle(rows, 'still'):.3f}",
          spread(rows, "still"), f"{every[name][0]['still']:.3f}",
          *(f"{middle(rows, key):.3g}" for key in ("extra", "processor", "steps", "whole")),
          f"{middle(rows, 'disk') / parameters:.2f}",
          f"{every['ours' if name == 'sync' else name][0]['memory'] / 1e9:.2f}")
         for (name, label), rows in zip(WAYS.items(), saves.values(), strict=True)],
    )  # fmt: skip
    show(
        f"{shape}: seconds from launch to first step, medians of {options['resumes']}",
        "all | least - most | until the loop | the first step | `seconds`",
        [(name, f"{middle(rows, 'all'):.1f}", spread(rows, "all"),
          *(f"{middle(rows, key):.1f}" for key in ("start", "step", "seconds"))) for name, rows in launches.items()],
    )  # fmt: skip
    for key in ("still", "extra", "processor"):
        a, b, c = (middle(saves[name], key) for name in ("ours", "gather", "dcp"))
        said = f"; at most 5%: {a <= 0.05 * b}, at most 1: {a <= c}" if key == "still" else ""
        print(f"{shape}, {key}: ours / gather = {a:.3f} / {b:.3f} = {a / b:.1%}, ours / dcp = {a:.3f} / {c:.3f} = "
              f"{a / c:.3f}{said}")  # fmt: skip
    if last and torch.cuda.is_available():
        scale = PARAMETERS_7B / parameters
        figures = (f"{name} {scale * middle(rows, 'still'):.2f} s" for name, rows in saves.items())
        print(f"7b stands still, computed as {scale:.2f} x {shape}: {', '.join(figures)}")


def main(arguments: list[str]) -> None:
    options = read_options(arguments, DEFAULTS)
    if "RANK" in os.environ:
        return worker(options)
    gpus = torch.cuda.device_count()
    usual = ("bf16-mixed", str(gpus), "1b,3b", "2048") if gpus else ("fp32", "2", "135m", "32")
    for key, value in zip(("precision", "processes", "shapes", "seq_len"), usual, strict=True):
        options[key] = options[key] or value
    shapes = options["shapes"].split(",")
    if unknown := set(shapes) - set(SHAPES):
        sys.exit(f"shapes={','.join(unknown)}: known are {', '.join(SHAPES)}")
    Path(options["folder"]).mkdir(parents=True, exist_ok=True)
    for options["shape"] in shapes:
        print(f"{options['shape']}, load {os.getloadavg()[0]:.1f}", flush=True)
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=options["folder"]) as folder:
            work = Path(folder).resolve()
            prepare(options["shape"], work)
            result = measure_saves(options, work)
            launches = measure_launches(options, work)
        report(options, result, launches, options["shape"] == shapes[-1])
        print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
