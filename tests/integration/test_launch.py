"""The verbs as a user types them: real processes, from text to an exported model, under each launcher."""

import json
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typed import TORCHRUN, run, start, verb

pytestmark = pytest.mark.slow


def rows(folder: Path, kind: str = "loss") -> list[Any]:
    lines = (folder / "outputs" / "mine" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if kind in row]


def test_the_road_from_text_to_an_exported_model(place: Path) -> None:
    """torchrun, interrupted and resumed; export; plain transformers."""
    command = [*TORCHRUN, *verb("pretrain"), "+exp=mine"]
    status, out, err = run(place, [*command, "train.stop_at=2"])
    assert status == 0, err
    assert "step 2/2" in out and "Traceback" not in err and "Warning" not in err
    status, out, err = run(place, command)
    assert status == 0 and "resumed from outputs/mine/checkpoints/step-00000002: step 2, next sample 8" in out, err
    assert [row["step"] for row in rows(place)] == [1, 2, 3, 4]
    assert [row["step"] for row in rows(place, "validation")] == [0, 4]
    last = "outputs/mine/checkpoints/step-00000004"
    export = [sys.executable, *verb("export"), f"checkpoint={last}", "output=exported", "dtype=bfloat16"]
    status, out, err = run(place, export)
    assert (status, out, err) == (0, "exported exported\n", "")
    code = "from transformers import AutoModelForCausalLM as A; print(A.from_pretrained('exported').dtype)"
    status, out, _ = run(place, [sys.executable, "-c", code])
    assert (status, out) == (0, "torch.bfloat16\n")


def test_a_mistake_is_printed_once_however_many_processes_there_are(place: Path) -> None:
    mistake = "data.sources.ja.path=tokens/jp"
    status, out, err = run(place, [*TORCHRUN, *verb("pretrain"), "+exp=mine", mistake])
    assert status != 0 and out == ""
    assert err.count("error: tokens/jp.idx: no such token file") == 1
    assert not (place / "outputs").exists()


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return str(listener.getsockname()[1])


@pytest.mark.parametrize(
    "names",
    [
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ],
    ids=["srun", "mpirun"],
)
def test_ranks_come_from_srun_and_mpirun_too(place: Path, names: tuple[str, ...]) -> None:
    port = free_port()
    command = [sys.executable, *verb("pretrain"), "+exp=mine", "train.stop_at=1"]
    processes = [
        start(place, command, MASTER_PORT=port, SLURM_STEP_NODELIST="localhost",
              **dict(zip(names, (str(rank), "2", str(rank), "2"), strict=True)))
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "step 1/1" in said[0][0] and said[1][0] == ""
    assert rows(place)[0]["consumed_samples"] == 4


def test_one_process_without_a_launcher_and_control_c(place: Path) -> None:
    process = start(place, [sys.executable, *verb("pretrain"), "+exp=mine", "train.steps=100000"])
    deadline = time.monotonic() + 120
    while not (place / "outputs" / "mine" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.rstrip().endswith("stopped") and "Traceback" not in err, err
