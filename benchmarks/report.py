"""A finished search of many runs becomes a table and a page: the claim is under 5 s for 100 runs of 2,000 rows each.

    python benchmarks/report.py [runs=100] [rows=2000] [rounds=3] [folder=]

Writes such a search (as pretrain and evaluate would leave it, without weights), then times the whole command, Python's
start included, each time as a process of its own. `bare` is what reading alone must cost: `json.loads` of every line.
"""

import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEFAULTS = {"runs": "100", "rows": "2000", "rounds": "3", "folder": ""}
GROUPS = ("japanese", "english", "mathematics")
TASKS = 8


def result(best: float, away: float, step: int | None) -> dict[str, object]:
    """A suite's result, `away` decades from the best learning rate."""
    means = dict(zip(GROUPS, (best - 0.08 * away**2, 0.55 - 0.1 * max(0.0, away), 0.17 - 0.04 * away**2), strict=True))
    tasks = {
        f"{group}_{number}": {
            "kind": "lm_eval", "group": group, "score": mean, "metric": "acc", "higher_is_better": True,
            "standard_error": 0.01, "items": 200, "items_of": 1000, "shots": 4, "parsed": 0.98, "version": "1.0",
        }
        for group, mean in means.items() for number in range(TASKS)
    }  # fmt: skip
    return {"suite": "mini", "model": "models/base", "step": step, "groups": means, "tasks": tasks, "missing": {}}


def rows(count: int, seed: int, rate: float) -> list[dict[str, object]]:
    noise = random.Random(seed)
    made: list[dict[str, object]] = [{"step": 0, "event": "start", "time": 1e9 + seed, "ranks": 8, "seconds": 20.0}]
    for step in range(1, count + 1):
        loss = 2 + math.exp(-step / count) + noise.gauss(0, 0.03)
        made.append(
            {
                "step": step, "loss": loss, "loss_by_source": {"ja": loss + 0.1, "en": loss - 0.4, "code": loss - 1},
                "lr": rate * (1 - step / count), "grad_norm": noise.random(), "targets": 4194304,
                "tokens_per_second_per_device": 3000 * noise.random(), "model_tflops_per_device": 430 * noise.random(),
                "mfu": 0.4 + 0.01 * noise.random(), "seconds": 1.4 * noise.random(), "seconds_for_data": 0.001,
                "skipped_updates": {}, "consumed_samples": 1024 * step, "consumed_tokens": 4194304 * step,
            }
        )  # fmt: skip
        if step % 500 == 0:
            sets = {name: {"bits_per_byte": loss / 2, "nats_per_token": loss} for name in ("ja", "en")}
            made.append({"step": step, "validation": sets})
    made.append({"step": count, "event": "finish", "time": 1e9 + seed + 2 * count})
    return made


def write_search(folder: Path, runs: int, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "search.json").write_text(json.dumps({"keys": ["optim.lr"], "commands": ["pretrain -m"]}))
    write(folder / "base" / "f" / "mini.json", result(0.37, 0.0, None))
    for number in range(runs):
        away = -1.5 + 3 * number / max(1, runs - 1)
        rate = float(f"{2e-5 * 10**away:.3g}")
        run = folder / f"optim.lr={rate:g}"
        write(run / "job.json", {"status": "done", "overrides": {"optim.lr": rate}, "command": "pretrain", "ranks": 8})
        write(run / "evaluations" / f"step-{count:08d}" / "mini.json", result(0.41, away, count))
        settings = ["model:", "  path: models/base", "optim:", f"  lr: {rate!r}", "  min_lr_ratio: 0.1"]
        settings += ["data:", "  sources:", *(f"    s{each}: {{path: t/{each}, weight: 1.0}}" for each in range(40))]
        (run / "config.yaml").write_text("\n".join(settings) + "\n")
        lines = "".join(json.dumps(row) + "\n" for row in rows(count, number, rate))
        (run / "metrics.jsonl").write_text(lines)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def main() -> None:
    given = DEFAULTS | dict(word.split("=", 1) for word in sys.argv[1:])
    with tempfile.TemporaryDirectory() as own:
        folder = Path(given["folder"] or own) / "search"
        write_search(folder, int(given["runs"]), int(given["rows"]))
        size = sum(path.stat().st_size for path in folder.rglob("metrics.jsonl"))
        taken, used = [], []
        for _ in range(int(given["rounds"])):
            began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, "-m", "llm_recipes.report", f"sweep={folder}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            taken.append(time.perf_counter() - began)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        began = time.process_time()
        for path in folder.rglob("metrics.jsonl"):
            for line in path.read_text().splitlines():
                json.loads(line)
        bare = time.process_time() - began
        page = (folder / "report.html").stat().st_size
        print(f"{given['runs']} runs of {given['rows']} rows, {size / 1e6:.0f} MB of metrics")
        print(f"report {statistics.median(taken):.2f} s (median of {given['rounds']}), page {page / 1e6:.1f} MB")
        print(f"       {statistics.median(used):.2f} s of it on a core; the rest is waiting for one")
        print(f"bare   {bare:.2f} s on a core")


if __name__ == "__main__":
    main()
