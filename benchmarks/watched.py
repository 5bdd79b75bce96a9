"""What a run loses while another process evaluates its checkpoints: less than 2% of its throughput, is the claim.

    python benchmarks/watched.py [rounds=3] [steps=12] [seq_len=64] [suite=mini] [folder=outputs/quickstart]

It trains the quickstart's model (`make quickstart`, or `python recipes/quickstart/prepare.py`) with one process on one
core, in turn alone and while `python -m llm_recipes.evaluate watch=<run>` measures base and checkpoint on another core,
in an order that is reversed from round to round. On a machine with GPUs each has one of its own (not run yet).

    tokens/s   median over the logged steps (the first two left out), during all of which the other process ran: it is
               ended with the training, and one that has ended before is an error
    lost       1 - tokens/s so / tokens/s alone, of the same round

Cores share memory and caches, so on a CPU the loss is that of two processes side by side, whatever the second one does;
the third way shows it: a process beside training that multiplies matrices and has nothing to do with the run.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

DEFAULTS = {"rounds": "3", "steps": "12", "seq_len": "64", "suite": "mini", "folder": "outputs/quickstart"}
ALONE, WATCHED, BESIDE = "alone", "watched", "beside matrices"
BURN = "import torch\ntorch.set_num_threads(1)\na = torch.randn(1024, 1024)\nwhile True: a @ a"
console = Console(highlight=False, width=110)


def options() -> dict[str, str]:
    given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown or len(given) != len(sys.argv) - 1:
        raise SystemExit(f"{' '.join(unknown) or 'arguments'}: KEY=VALUE, with {', '.join(DEFAULTS)}")
    return DEFAULTS | given


def start(command: list[str], core: int, log: Path) -> subprocess.Popen[bytes]:
    """A process on one core, or on one GPU where there are some."""
    own = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    if Path("/dev/nvidia0").exists():
        own["CUDA_VISIBLE_DEVICES"] = str(core)
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=os.environ | own,
            preexec_fn=lambda: os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]}),
        )  # fmt: skip


def one(way: str, folder: Path, given: dict[str, str]) -> float:
    """Tokens per second of a run."""
    root = Path(given["folder"])
    run = folder / "run"
    keys = {
        "run.name": "run", "run.dir": folder, "model.path": root / "models/smollm2-135m",
        "data.seq_len": given["seq_len"],
        "train.steps": given["steps"], "train.micro_batch_size": 4, "evaluation.suites": f"[{given['suite']}]",
        "evaluation.where": "elsewhere", "checkpoint.every": given["steps"], "data.validation": {}, "logging.every": 1,
        "schedule.warmup_steps": 0, "data.sources.ja.path": root / "tokens/ja",
        "data.sources.en.path": root / "tokens/en",
    }  # fmt: skip
    words = ["-m", "llm_recipes.pretrain", "+exp=swallow_mini", *(f"{key}={value}" for key, value in keys.items())]
    training = start(words, 0, folder / "training.log")
    while not (run / "metrics.jsonl").exists():
        if training.poll() is not None:
            raise SystemExit((folder / "training.log").read_text())
        time.sleep(0.1)
    beside = None
    if way == WATCHED:
        command = ["-m", "llm_recipes.evaluate", f"watch={run}", f"suite={given['suite']}"]
        beside = start(command, 1, folder / "watch.log")
    elif way == BESIDE:
        beside = start(["-c", BURN], 1, folder / "beside.log")
    training.wait()
    if beside is not None:
        if beside.poll() is not None:
            raise SystemExit(f"{way}: it ended before the training did\n{(folder / 'watch.log').read_text()}")
        beside.kill()
        beside.wait()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["tokens_per_second_per_device"] for row in rows if "lr" in row and row["step"] > 2]
    return statistics.median(speeds)


def main() -> None:
    given = options()
    ways = [ALONE, WATCHED, BESIDE]
    found: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(int(given["rounds"])):
        for way in ways if number % 2 == 0 else ways[::-1]:
            folder = Path(tempfile.mkdtemp(prefix="watched-"))
            try:
                found[way].append(one(way, folder, given))
            finally:
                shutil.rmtree(folder)
            console.print(f"round {number + 1}: {way} {found[way][-1]:,.1f} tokens/s")
    table = Table(title="A run while its checkpoints are evaluated elsewhere, medians", title_justify="left")
    for name in ("", "tokens/s", "lost"):
        table.add_column(name, justify="right" if name else "left")
    for way in ways:
        lost = [1 - mine / alone for mine, alone in zip(found[way], found[ALONE], strict=True)]
        table.add_row(way, f"{statistics.median(found[way]):,.1f}", f"{statistics.median(lost):.1%}")
    console.print(table)


if __name__ == "__main__":
    main()
