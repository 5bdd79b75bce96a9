"""A search as its user types it: real runs, each a torchrun of its own, or all in the processes of one."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typed import TORCHRUN, run, start, verb

pytestmark = pytest.mark.slow

SEARCH = [*verb("pretrain"), "-m", "+exp=mine", "+search=lr", "evaluation.at_steps=[2]", "logging.every=1"]
LAUNCHER = ["hydra/launcher=torchrun", "hydra.launcher.nproc_per_node=2"]


def mark(folder: Path, job: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "outputs" / "mine-lr" / job / "job.json").read_text())
    return content


def losses(folder: Path, job: str) -> dict[int, float]:
    rows = map(json.loads, (folder / "outputs" / "mine-lr" / job / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_torchrun_jobs_are_marked_stopped_and_taken_up_again(place: Path) -> None:
    command = [sys.executable, *SEARCH, *LAUNCHER, "optim.lr=1e-2,-1,2e-2"]
    process = start(place, command)
    folder = place / "outputs" / "mine-lr" / "optim.lr=0.01"
    deadline = time.monotonic() + 100
    while not (folder / "metrics.jsonl").exists():  # the first job trains
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2 and "SIGTERM: the jobs save and stop" in out, err
    assert "1 of 3 jobs failed (optim.lr=-1.0)" in err and "Traceback" not in err
    assert mark(place, "optim.lr=0.01")["status"] in ("stopped", "done")
    assert mark(place, "optim.lr=-1.0")["error"] == "optim.lr=-1.0: must be more than 0"
    assert not (folder.parent / "optim.lr=0.02").exists()

    status, out, err = run(place, command)
    assert status == 2 and "1 of 3 jobs failed (optim.lr=-1.0)" in err, err
    assert mark(place, "optim.lr=0.01")["status"] == mark(place, "optim.lr=0.02")["status"] == "done"
    assert set(losses(place, "optim.lr=0.01")) == {1, 2}
    assert "checkpoints/step-00000002" in (folder / "output.log").read_text()

    # All in the processes of one torchrun: what is done is left alone, and the same value gives the same losses.
    status, out, err = run(place, [*TORCHRUN, *SEARCH, "optim.lr=1e-2,2e-2", "search.name=lr2"])
    assert status == 0, err
    again = folder.parent.parent / "mine-lr2"
    assert [path.name for path in sorted(again.glob("*/checkpoints"))] == ["checkpoints"] * 2
    for job in ("optim.lr=0.01", "optim.lr=0.02"):
        assert losses(place, f"../mine-lr2/{job}") == losses(place, job)
