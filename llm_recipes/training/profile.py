"""A trace of some steps of a run, and where their time went (`profile.steps`)."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from llm_recipes.config import ProfileConfig
from llm_recipes.folders import make_folder, write_json, write_whole
from llm_recipes.models.topology import Topology
from llm_recipes.telemetry import progress as terminal
from llm_recipes.training.phases import Phases

log = logging.getLogger(__name__)

OPERATORS = 40
"""In the table of those that took longest."""


class Profile:
    """Watches the steps from `profile.steps[0]` to `profile.steps[1]`, on the ranks asked for.

    Into the run's folder, for each of them: `profile/steps-A-B-rank-R.json.gz`, a trace for ui.perfetto.dev or
    chrome://tracing; `.txt`, the operators that took longest; `.phases.json`, seconds of each phase.

    Args:
        run: its folder.
    """

    def __init__(self, config: ProfileConfig, phases: Phases, place: Topology, run: Path) -> None:
        self.first, self.last = config.steps or (0, 0)
        self._wanted = place.rank in config.ranks
        self._phases, self._place, self._folder = phases, place, run / "profile"
        self._profiler: Any = None
        self._done = 0

    def before(self, done: int) -> None:
        """Another step begins, `done` are done: begin with the first one wanted."""
        if not self._wanted or done != self.first - 1 or self._profiler is not None:
            return
        on_cuda = self._place.device.type == "cuda"
        self._profiler = torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
        )
        self._profiler.start()
        self._phases.start()

    def after(self, done: int) -> None:
        """A step is done, and `done` are in all: write after the last one wanted."""
        self._done = done
        if done >= self.last:
            self.close()

    def close(self) -> None:
        """Write down what there is, if anything: a run may end before the last step wanted."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        seconds = self._phases.stop()
        profiler.stop()
        steps = self._done - self.first + 1
        if steps < 1:
            return
        try:
            self._write(profiler, seconds, steps)
        except OSError as error:  # a full disk ends no run for the sake of a trace
            log.warning("%s: the trace cannot be written (%s)", self._folder, error.strerror)

    def _write(self, profiler: Any, seconds: dict[str, float], steps: int) -> None:
        name = f"steps-{self.first}-{self._done}-rank-{self._place.rank}"
        make_folder(self._folder)
        by = "self_cuda_time_total" if self._place.device.type == "cuda" else "self_cpu_time_total"
        operators = profiler.key_averages().table(sort_by=by, row_limit=OPERATORS, max_name_column_width=80)
        write_whole(self._folder / f"{name}.txt", operators)
        write_json(self._folder / f"{name}.phases.json", {"steps": steps, "seconds": seconds})
        trace = self._folder / f"{name}.json.gz"
        profiler.export_chrome_trace(str(trace))
        if self._place.is_first:
            whole = sum(seconds.values())
            terminal.show_table(
                f"Where the time of steps {self.first} to {self._done} went",
                [
                    {"phase": phase, "ms a step": round(1e3 * each / steps, 1), "share": f"{each / whole:.1%}"}
                    for phase, each in seconds.items()
                ],
            )
        log.info("a trace of steps %d to %d: %s (ui.perfetto.dev opens it)", self.first, self._done, trace)
