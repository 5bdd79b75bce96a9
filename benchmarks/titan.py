"""What both generations of torchtitan need to be timed by compare.py; imported before anything else of it.

For a CPU torchtitan has no place: what it asks of a device's module is answered here.
"""

import importlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from measuring import COMPARED, Stopwatch, reset_peak

from llm_recipes.errors import UserError

ON_GPU = torch.cuda.is_available()


class NoDevice:
    """A CPU, where torchtitan asks for a device's module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def get_device_name(self, *_: Any) -> str:
        return "CPU"

    def get_device_properties(self, *_: Any) -> Any:
        return SimpleNamespace(total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def current_device(self) -> int:
        return 0

    def memory_stats(self, *_: Any) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self, *_: Any) -> None:
        pass

    def empty_cache(self) -> None:
        pass


# While its modules are opened they keep what they are told of the device.
told = torch._utils._get_available_device_type, torch._utils._get_device_module
if not ON_GPU:
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda kind: NoDevice()
importlib.import_module("torchtitan.tools.utils")
torch._utils._get_available_device_type, torch._utils._get_device_module = told
if not hasattr(dist, "set_timeout"):
    dist.set_timeout = dist.distributed_c10d._set_pg_timeout  # type: ignore[attr-defined]


def windows(work: Path, rows: int) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """The micro-batches that all sides train on, from memory."""
    arrays = (torch.from_numpy(np.load(work / f"{key}.npy")) for key in ("input_ids", "targets"))
    for ids, targets in zip(*(each.split(rows) for each in arrays), strict=True):
        yield {"input": ids}, targets


def refuse_other_families(own: dict[str, Any]) -> None:
    """Raise `UserError` where a Hugging Face configuration is of no Llama."""
    if own["model_type"] not in ("llama", "mistral") or own.get("sliding_window"):
        raise UserError(f"torchtitan's Llama 3 is no {own['model_type']}; shapes that it knows are 1b, 3b, 7b and tiny")


def one_process() -> None:
    """What torchrun would say to a single process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port}


class Timed:
    """Put before its Trainer: a look at the clock after each step, and the first losses."""

    warmup = 0

    def train(self: Any) -> None:
        self.watch, self.losses = Stopwatch(self.device), []
        self.metrics_processor.should_log = lambda step: step <= COMPARED
        self.metrics_processor.log = lambda step, loss, *_, **__: self.losses.append(float(loss))
        super().train()

    def train_step(self: Any, data_iterator: Any) -> None:
        if not self.watch.marks:
            self.watch.mark()
        super().train_step(data_iterator)
        self.watch.mark()
        if self.step == self.warmup:
            reset_peak(self.device)


def times(trainer: Any, options: dict[str, str]) -> dict[str, Any]:
    """Train, and give what compare.py asks for."""
    trainer.warmup = int(options["warmup"])
    trainer.train()
    rows = int(options["micro_batch_size"]) * int(options["accumulation"])
    found = {"seconds": trainer.watch.seconds(), "losses": trainer.losses, "targets": rows * int(options["seq_len"])}
    trainer.close()
    return found
