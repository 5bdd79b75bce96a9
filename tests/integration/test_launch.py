"""The verbs as a user types them: real processes, from text to an exported model, under each launcher."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
EXPERIMENT = """# @package _global_
run: {name: mine, dir: outputs}
model: {path: model}
data:
  seq_len: 32
  sources: {ja: {path: tokens/ja, language: ja}}
  validation: {ja: {path: tokens/ja, tokens: 300}}
train: {steps: 4, global_batch_size: 4}
optim: {lr: 1.0e-2}
logging: {every: 1}
"""


def start(folder: Path, command: list[str], **environment: str) -> subprocess.Popen[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=clean | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests themselves run in the background, SIGINT is ignored, and so it would be here.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def run(folder: Path, command: list[str], **environment: str) -> tuple[int, str, str]:
    process = start(folder, command, **environment)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def verb(name: str) -> list[str]:
    return ["-m", f"llm_recipes.{name}"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A user's folder: a model, tokenized text, an experiment."""
    tiny.save_model(tmp_path / "model")
    rows = [{"text": f"{number}番目の文書です。" * (number % 5 + 1)} for number in range(80)]
    (tmp_path / "ja.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    command = [sys.executable, *verb("tokenize"), "input=ja.jsonl", "output=tokens/ja", "tokenizer=model", "workers=1"]
    status, _, said = run(tmp_path, command)
    assert status == 0, said
    (tmp_path / "conf" / "exp").mkdir(parents=True)
    (tmp_path / "conf" / "exp" / "mine.yaml").write_text(EXPERIMENT)
    return tmp_path


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
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.rstrip().endswith("stopped") and "Traceback" not in err
