"""Where the time of a step goes: data, forward, backward, optimizer, and the rest."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

REST = "rest"
"""What lies in no phase: counting targets, clipping, the guard."""


class Phases:
    """Names the parts of a step for a profiler, and measures them while it is on; off, it costs microseconds.

    A GPU is measured by its own events, so that nothing waits for it before `stop`: a phase there is what lies between
    two moments of its main stream, whatever other streams do meanwhile. (That path has never run on a GPU yet.)
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device is not None and device.type == "cuda"
        self._began: Any = None
        self._spans: list[tuple[str, Any, Any]] = []

    def start(self) -> None:
        self._spans, self._began = [], self._now()

    def stop(self) -> dict[str, float]:
        """Seconds of each phase since `start`, in the order in which they came; REST is what is left of them all."""
        ended, began, self._began = self._now(), self._began, None
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for name, start, end in self._spans:
            seconds[name] = seconds.get(name, 0.0) + self._between(start, end)
        return seconds | {REST: max(0.0, self._between(began, ended) - sum(seconds.values()))}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with torch.profiler.record_function(name):
            start = self._now() if self._began is not None else None
            yield
            if start is not None:
                self._spans.append((name, start, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3 if self._cuda else float(end - start)
