"""Does a lever change what is learned? Its loss curve on real text, beside the spread of seeds without it.

    make quickstart                                             # brings the model and the text
    python benchmarks/curves.py [levers='optim.state=8bit;optim.state=bf16'] [steps=32] [seeds=0,1,2] [exp=swallow_mini]
        [root=outputs/curves] [processes=1] [save=...]

`levers` lists sets of overrides separated by `;`, each some KEY=VALUE separated by `,`. The plain run is taken once
with each seed, which draws another order of the text; each lever with the first seed, so that it sees the same batches
as the plain run of that seed. Shown of each: bits per byte of the held-out text at the end, how far that lies from the
plain run of the same seed, and the mean difference of the losses of single steps. The claim: the distance is no larger
than the spread (largest - smallest) of the plain runs. Runs that are there are kept; the same command goes on.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from loop_overhead import read_options
from rich.console import Console
from rich.table import Table

from llm_recipes.telemetry import metrics

DEFAULTS = {
    "levers": "optim.state=8bit;optim.state=bf16", "steps": "32", "seeds": "0,1,2", "exp": "swallow_mini",
    "root": "outputs/curves", "processes": "1", "save": "",
}  # fmt: skip


def run(options: dict[str, str], lever: str, seed: str) -> list[dict[str, Any]]:
    """The rows of a whole run, which is taken now where it has not been."""
    steps = int(options["steps"])
    name = "-".join(filter(None, (lever.replace(",", "+").replace("/", "_"), f"seed={seed}", f"{steps}-steps")))
    processes = int(options["processes"])
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", options["processes"],
        "-m", "llm_recipes.pretrain", f"+exp={options['exp']}", f'run.name="{name}"', f"run.dir={options['root']}",
        f"data.seed={seed}", f"train.seed={seed}", f"train.steps={steps}", "evaluation.suites=[]", "logging.every=1",
        f"checkpoint.every={max(1, steps // 2)}", "checkpoint.keep=1", *filter(None, lever.split(",")),
    ]  # fmt: skip
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
    print(f"$ {shlex.join(command)}", flush=True)
    ended = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": threads}, check=False)
    if ended.returncode:
        sys.exit(f"{name}: the run failed (status {ended.returncode})")
    return metrics.read(Path(options["root"]) / name / "metrics.jsonl")


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def held_out(rows: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Bits per byte at the end, by validation set."""
    [row] = [row for row in rows if "validation" in row and row["step"] == steps]
    return {name: float(each["bits_per_byte"]) for name, each in row["validation"].items()}


def main(arguments: list[str]) -> None:
    options = read_options(arguments, DEFAULTS)
    steps, seeds = int(options["steps"]), options["seeds"].split(",")
    if len(seeds) < 2:
        sys.exit("seeds: two at least, or there is no spread")
    plain = [run(options, "", seed) for seed in seeds]
    levers = options["levers"].split(";")
    found = {lever: run(options, lever, seeds[0]) for lever in levers}

    ends = [held_out(rows, steps) for rows in plain]
    sets = list(ends[0])
    spread = {name: max(each[name] for each in ends) - min(each[name] for each in ends) for name in sets}
    columns = [
        "",
        *(f"{name}, bits/byte" for name in sets),
        *(f"{name}, from plain" for name in sets),
        "loss of a step",
    ]
    table = [
        [f"plain, seed {seed}", *(f"{each[name]:.5f}" for name in sets), *(["-"] * len(sets)), "-"]
        for seed, each in zip(seeds, ends, strict=True)
    ]
    table.append(["their spread", *(f"{spread[name]:.5f}" for name in sets), *(["-"] * len(sets)), "-"])
    for lever, rows in found.items():
        end = held_out(rows, steps)
        apart = {name: end[name] - ends[0][name] for name in sets}
        by_step = statistics.fmean(abs(a - b) for a, b in zip(losses(rows), losses(plain[0]), strict=True))
        row = [lever, *(f"{end[name]:.5f}" for name in sets), *(f"{apart[name]:+.5f}" for name in sets)]
        table.append([*row, f"{by_step:.5f}"])
        print(
            f"{lever}: {'inside' if all(abs(apart[name]) <= spread[name] for name in sets) else 'OUTSIDE'} the spread"
        )
    on = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    title = f"{options['exp']}, {steps} steps, {options['processes']} x {on}, torch {torch.__version__}"
    shown = Table(*columns, title=title)
    for row in table:
        shown.add_row(*row)
    Console(width=140).print(shown)
    if options["save"]:
        lines = [f"# {title}", "", *(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *table])]
        (Path(__file__).parent / "results" / f"{options['save']}.md").write_text("\n".join(lines) + "\n")
    (Path(options["root"]) / "curves.json").write_text(
        json.dumps({"plain": [losses(each) for each in plain], **{name: losses(each) for name, each in found.items()}})
    )


if __name__ == "__main__":
    main(sys.argv[1:])
