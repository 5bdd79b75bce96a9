"""Our training step beside others' of the same model on the same tokens: tokens/s, TFLOPs, MFU and peak memory.

    python benchmarks/compare.py shape=1b peers=hf_trainer,torchtitan [seq_len=] [micro_batch_size=] [accumulation=]
        [steps=10] [warmup=4] [rounds=3] [threads=] [precision=] [save=NAME] [KEY.OF.OURS=VALUE ...]

    ours           `llm_recipes`: model, loop and loader of a run, with compile=true and, as all other sides have them,
                   weights that stay whole for the backward pass (sharding=shard_grad_op)
    ours_plain     the same as it comes, nothing compiled
    hf_trainer     transformers' Trainer: `TrainingArguments(bf16=True)` and no more than the batch size and the
                   optimizer's numbers, which are the same for all; and the Trainer at its best for the same work
                   (hf_trainer_best: torch_compile, liger-kernel where installed, no check of every loss for NaN).
                   hf_trainer_plain, hf_trainer_compiled and hf_trainer_liger name one of them alone
    torchtitan     its own Trainer with its own Llama 3: compiled layers, chunked loss, CUDA graphs and flex attention,
                   as it has them by default (`torchtitan_no_graphs`: without CUDA graphs), no recomputation. That is
                   torchtitan 0.3.0, which wants torch 2.13 at least; of 0.2.2 (torch 2.11) peer_torchtitan_02.py says
                   what differs, and `tied=false` is needed for shapes with tied embeddings

All begin with the same weights (a Hugging Face folder; torchtitan reads it with its own adapter), kept in fp32 and on a
GPU computed in bf16, and take the same windows in the same order, cut beforehand, without padding and without a mask
(attention over the whole window): as many targets on every side. AdamW (fused), betas 0.9 and 0.95, eps 1e-8, weight
decay 0.1, learning rate 1e-4 without a schedule, gradients clipped to 1.0. Ours reads token files through the loader of
a run; the others are handed tensors that are there already. Vectors do not decay.

Each side has a process of its own; they take turns, in an order that is reversed from round to round. The losses of the
first three steps must agree to 1e-4 (fp32) or 1e-3 (bf16), relative, before times count. Timed are whole steps after
the first `warmup` ones, by the GPU's own events: the median of all, and of each round the ratio of its tokens/s to
ours. Peak memory is what torch allocated in the timed steps; on a CPU it is what is resident. The table is shown, and
saved, after every round. Formula: llm_recipes.models.flops, the same for all; recomputation is not counted.

Without a GPU a tiny model of the same family stands in for a large shape, and the title says so; there torchtitan runs
with torch's scaled_dot_product_attention, since flex attention has no backward pass on a CPU. What a CUDA device does
with this script has not been seen yet.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would measure the other work on the machine

import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import torch
from contender import Ours, configure
from loop_overhead import set_threads
from measuring import (
    COMPARED,
    Stopwatch,
    answer,
    device_name,
    formula,
    peak_bytes,
    rates,
    read_all_options,
    reset_peak,
    show,
)
from shapes import SHAPES, settle, write_shape

from llm_recipes.config import ParallelConfig
from llm_recipes.errors import UserError, first_line
from llm_recipes.models import flops, topology
from llm_recipes.training.data import open_data

DEFAULTS = {
    "shape": "1b", "peers": "hf_trainer,torchtitan", "seq_len": "", "micro_batch_size": "", "accumulation": "",
    "steps": "10", "warmup": "4", "rounds": "3", "precision": "", "threads": "", "workers": "0",
    "activation_checkpointing": "none", "tied": "", "save": "", "way": "", "work": "",
}  # fmt: skip
WAYS = {
    "ours": ("compare", {"compile": "true", "sharding": "shard_grad_op"}),
    "ours_plain": ("compare", {"compile": "false"}),
    "hf_trainer_plain": ("peer_hf", {}),
    "hf_trainer_compiled": ("peer_hf", {"torch_compile": True, "logging_nan_inf_filter": False}),
    "hf_trainer_liger": ("peer_hf", {"use_liger_kernel": True, "logging_nan_inf_filter": False}),
    "hf_trainer_best": (
        "peer_hf",
        {"torch_compile": True, "use_liger_kernel": "where installed", "logging_nan_inf_filter": False},
    ),
    "torchtitan": ("peer_torchtitan", {"cuda_graphs": True}),
    "torchtitan_no_graphs": ("peer_torchtitan", {"cuda_graphs": False}),
}
"""A side's name: the module whose `take_steps` it is, and the settings that it is given."""
GROUPS = {"hf_trainer": ["hf_trainer_plain", "hf_trainer_best"]}
NEEDS = {
    "hf_trainer_plain": {"accelerate": "accelerate"},
    "hf_trainer_compiled": {"accelerate": "accelerate"},
    "hf_trainer_liger": {"accelerate": "accelerate", "liger_kernel": "liger-kernel"},
    "hf_trainer_best": {"accelerate": "accelerate"},
    "torchtitan": {"torchtitan": "torchtitan==0.3.0 (torch 2.13 or later; 0.2.2 with torch 2.11)"},
}
NEEDS["torchtitan_no_graphs"] = NEEDS["torchtitan"]
"""Modules that a side imports, and what to install for them."""
TOLERANCE = {"fp32": 1e-4, "bf16-mixed": 1e-3}
COLUMNS = [
    "side", "s/step", "quartiles", "tokens/s", "TFLOPs", "MFU", "peak GB", "by round", "ratio to ours", "first losses",
]  # fmt: skip


def prepare(options: dict[str, str], work: Path) -> dict[str, Any]:
    """Write what every side reads: the model's folder with weights, its tokens, and these cut to windows.

    Returns:
        Parameters and operations of the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, shape = work / "model", dict(SHAPES[options["shape"]])
    if options["tied"]:
        shape["tie_word_embeddings"] = options["tied"] == "true"
    folder.mkdir()
    write_shape(folder, shape)
    steps = int(options["warmup"]) + int(options["steps"])
    windows = steps * int(options["accumulation"]) * int(options["micro_batch_size"])
    corpus.write_corpus(folder, shape["vocab_size"], windows * int(options["seq_len"]) + 1)
    config = configure(options | {"documents": "1"}, folder, steps, 1)
    data = open_data(config, str(folder), 1)
    samples = data.read(data.mix(data.stage_starts))
    drawn = [samples.sample(position) for position in range(windows)]
    for key in ("input_ids", "targets"):
        np.save(work / f"{key}.npy", np.stack([each[key] for each in drawn]))
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model.save_pretrained(folder)
    return vars(flops.cost(model))


def take_steps(options: dict[str, str], work: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Our side: seconds of each step, and the first losses."""
    count = int(options["warmup"]) + int(options["steps"])
    options = options | settings | {"documents": "1"}
    place = topology.start(ParallelConfig(options.get("sharding", "full_shard"), precision=options["precision"]))
    contender = Ours(place, work / "model", options, count)
    watch, losses = Stopwatch(place.device), []
    watch.mark()
    for number in range(count):
        step = contender.step()
        if number < COMPARED:
            losses.append(float(step.loss))
        watch.mark()
        if number + 1 == int(options["warmup"]):
            reset_peak(place.device)
    contender.close()
    seconds = watch.seconds()
    targets = int(step.targets)
    topology.stop()
    return {"seconds": seconds, "losses": losses, "targets": targets}


def one_side(options: dict[str, str]) -> None:
    """This process is one side: its figures into `work`."""
    set_threads(options["threads"])
    work, settings = Path(options["work"]), WAYS[options["way"]][1]
    module = module_of(options["way"])
    take = take_steps if module == "compare" else importlib.import_module(module).take_steps
    result = take(options, work, settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result["peak"] = peak_bytes(device)
    (work / f"{options['way']}.json").write_text(json.dumps(result))


def run(options: dict[str, str], way: str, work: Path) -> dict[str, Any]:
    """A side's steps, in a process of its own; or why there are none."""
    given = [f"{key}={value}" for key, value in (options | {"way": way, "work": str(work)}).items()]
    log = work / f"{way}.log"
    with log.open("w") as file:
        command = [sys.executable, __file__, *given]
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        print(f"{way} ended with {status}:\n{log.read_text()[-3000:]}", flush=True)
        last = log.read_text().strip().splitlines() or ["no word"]
        return {"why_not": "out of memory" if "OutOfMemoryError" in log.read_text() else last[-1][:100]}
    found: dict[str, Any] = json.loads((work / f"{way}.json").read_text())
    found["seconds"] = found["seconds"][int(options["warmup"]) :]
    return found


def module_of(way: str) -> str:
    """The module that a side is in; torchtitan 0.2 has one of its own."""
    module = WAYS[way][0]
    old = module == "peer_torchtitan" and (_version("torchtitan") or "").startswith("0.2")
    return f"{module}_02" if old else module


def refuse_what_is_missing(ways: list[str]) -> None:
    """Raise `UserError` for a side whose package is not installed."""
    for way in ways:
        if way not in WAYS:
            raise UserError(f"peers={way}: known are {', '.join([*GROUPS, *WAYS])}")
        for module, package in NEEDS.get(way, {}).items():
            if importlib.util.find_spec(module) is None:
                raise UserError(f"peers={way}: {module} is not installed; python -m pip install {package}")
        if way.startswith("torchtitan"):
            try:
                importlib.import_module(module_of(way))
            except ImportError as error:
                raise UserError(
                    f"peers={way}: torchtitan does not open with torch {torch.__version__} ({first_line(error)}); "
                    "install what it lacks, or another version of it"
                ) from error


def refuse_apart(options: dict[str, str], found: dict[str, list[dict[str, Any]]]) -> None:
    """All trained on the same from the same weights: else the times say nothing."""
    results = {way: each[0] for way, each in found.items() if each and "losses" in each[0]}
    if "ours" not in results:
        return
    mine = results["ours"]
    for way, other in results.items():
        pairs = zip(mine["losses"], other["losses"], strict=True)
        apart = max(abs(a - b) / abs(a) for a, b in pairs)
        if not apart <= TOLERANCE[options["precision"]]:
            sys.exit(f"the first losses differ by {apart:.1e}: ours {mine['losses']}, {way} {other['losses']}")
        if other["targets"] != mine["targets"]:
            sys.exit(f"targets of a step differ: ours {mine['targets']}, {way} {other['targets']}")


def main(arguments: list[str]) -> None:
    options = read_all_options(arguments, DEFAULTS)
    if options["way"]:
        return one_side(options)
    checkpointing = options["activation_checkpointing"]
    options, said = settle(options)
    options["activation_checkpointing"] = checkpointing
    if int(options["warmup"]) < COMPARED:
        raise UserError(f"warmup={options['warmup']}: at least the {COMPARED} steps whose losses are compared")
    threads = set_threads(options["threads"])
    named = [way for peer in options["peers"].split(",") for way in GROUPS.get(peer, [peer]) if way]
    ways = list(dict.fromkeys(["ours", *named]))
    refuse_what_is_missing(ways)
    if said:
        print(said, flush=True)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        cost = flops.Cost(**prepare(options, work))
        for number in range(int(options["rounds"])):
            for way in ways[:: -1 if number % 2 else 1]:
                if any("why_not" in each for each in found[way]):
                    continue
                result = run(options, way, work)
                found[way].append(result)
                took = result.get("why_not") or f"median {statistics.median(result['seconds']):.3f} s a step"
                print(f"round {number + 1}/{options['rounds']} {way}: {took}", flush=True)
            refuse_apart(options, found)
            report(options, found, cost, said, device_name(threads))


def report(
    options: dict[str, str], found: dict[str, list[dict[str, Any]]], cost: flops.Cost, said: str, device: str
) -> None:
    """Show what has been found so far."""
    seq_len, rows = int(options["seq_len"]), []
    medians = {way: [statistics.median(each["seconds"]) for each in results if "seconds" in each]
               for way, results in found.items()}  # fmt: skip
    for way, results in found.items():
        whole = [each for each in results if "seconds" in each]
        if not whole:
            rows.append((way, results[0]["why_not"] if results else "-", *[""] * (len(COLUMNS) - 2)))
            continue
        seconds = [value for each in whole for value in each["seconds"]]
        by_round = [mine / its for mine, its in zip(medians["ours"], medians[way], strict=False)]
        ratio = f"{statistics.median(by_round):.2f}x" if by_round else "-"
        cells = rates(whole[0]["targets"], seconds, cost, seq_len, device)
        rows.append((
            way, *cells, f"{max(each['peak'] for each in whole) / 1e9:.2f}",
            " ".join(f"{each:.2f}" for each in by_round), ratio, " ".join(f"{each:.4f}" for each in whole[0]["losses"]),
        ))  # fmt: skip
    title = (
        f"{said or options['shape']}; seq {seq_len}, {options['micro_batch_size']} x {options['accumulation']}, "
        f"{options['precision']}; {device}, torch {torch.__version__}, {options['rounds']} x {options['steps']} steps"
    )
    versions = [f"{name} {_version(name)}" for name in ("transformers", "torchtitan", "liger_kernel", "flash_attn")]
    versions = [each for each in versions if not each.endswith(" None")]
    show(title, COLUMNS, rows, [formula(options["shape"], cost, seq_len), ", ".join(versions)], options["save"])


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    answer(main)
