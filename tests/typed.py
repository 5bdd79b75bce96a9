"""Verbs as a user types them, in processes of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

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
