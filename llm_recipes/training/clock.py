"""Throughput between logged steps."""

import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llm_recipes.models import flops
from llm_recipes.models.causal import CausalLM
from llm_recipes.training.loop import Step

log = logging.getLogger(__name__)


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process so far: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Clock:
    """Throughput between logged steps; validation and saving do not count."""

    def __init__(self, lm: CausalLM, seq_len: int, step: int) -> None:
        self._ranks = lm.topology.ranks
        self._seq_len = seq_len
        self._per_token = lm.cost.per_token(seq_len)
        self._device = lm.topology.device
        self._cuda = self._device.type == "cuda"
        name = torch.cuda.get_device_name(lm.topology.device) if self._cuda else "CPU"
        self._peak = flops.peak_flops(name)
        if self._peak is None:
            log.info("MFU: none, the peak of %s is not known", name)
        self.seconds_per_step = 0.0
        self.restart(step)

    def restart(self, step: int) -> None:
        self._from, self._start = step, time.perf_counter()
        self._targets: list[torch.Tensor] = []
        self._data = 0.0

    def add(self, step: Step) -> None:
        self._targets.append(step.targets)
        self._data += step.seconds_for_data

    def row(self, step: int) -> dict[str, Any]:
        """Figures since the last logged step. Targets count, padding does not."""
        targets = int(torch.stack(self._targets).sum())  # waits for the device, before the clock is read
        seconds = max(time.perf_counter() - self._start, 1e-9)
        self.seconds_per_step = seconds / max(1, step - self._from)
        rate = targets / seconds / self._ranks
        row = {
            "tokens_per_second_per_device": rate,
            "model_tflops_per_device": rate * self._per_token / 1e12,
            "mfu": rate * self._per_token / self._peak if self._peak else None,
            "seconds": seconds,
            "seconds_for_data": self._data,
            "peak_memory_gb": peak_memory(self._device) / 1e9,
        }
        self.restart(step)
        return row

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count."""
        if self._cuda:
            torch.cuda.synchronize()  # steps that are still on their way are not part of the pause
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began
