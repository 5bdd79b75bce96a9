"""A run under torchrun as its user starts it, seen and hurt from outside: for the tests of faults."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from llm_recipes.telemetry import metrics

Found = TypeVar("Found")
MARK = "LLM_RECIPES_TEST_LAUNCH"
"""In the environment of all that a launch starts: also a rank whose launcher is gone is found by it."""


def wait_for(look: Callable[[], Found], what: str, seconds: float = 120, every: float = 0.02) -> Found:
    """The first answer that is true."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(every)
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def started(pid: int) -> float:
    """When a process began, in seconds since 1970."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    up = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - up + int(fields[19]) / os.sysconf("SC_CLK_TCK")


class Launch:
    """One command of a user's.

    Args:
        folder: where it is given.
        ranks: None: without a launcher.
        restarts: torchrun's `--max-restarts`.
        options: overrides.
        environment: further variables.
    """

    def __init__(
        self, folder: Path, ranks: int | None, restarts: int, options: Iterable[str], environment: dict[str, str]
    ) -> None:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [*torchrun, f"--max-restarts={restarts}"] if ranks is not None else []
        self.mark, self.wanted = uuid.uuid4().hex, ranks or 1
        self.log = folder / f"said-{self.mark}.txt"
        clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", MARK: self.mark}
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command, "-m", "llm_recipes.pretrain", "+exp=mine", *options],
                cwd=folder, env=clean | own | environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.launcher = self.process.pid if ranks is not None else None

    def processes(self) -> dict[int, dict[str, str]]:
        """All that this launch started and that still runs: process id and environment."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                environment = dict(word.split("=", 1) for word in words if "=" in word)
                if environment.get(MARK) == self.mark and alive(int(entry.name)):
                    found[int(entry.name)] = environment
        return found

    def ranks(self) -> dict[int, int]:
        """The process id of each rank that runs."""
        if self.launcher is None:
            return {0: self.process.pid} if alive(self.process.pid) else {}
        found: dict[int, int] = {}
        for pid, environment in sorted(self.processes().items()):
            with contextlib.suppress(OSError):
                # A rank asks git for its commit: what it starts has its environment too.
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if "RANK" in environment and b"llm_recipes.pretrain" in words:
                    found.setdefault(int(environment["RANK"]), pid)
        return found

    def all_ranks(self, seconds: float = 60) -> dict[int, int]:
        """Once they are all there."""

        def look() -> dict[int, int]:
            found = self.ranks()
            return found if len(found) == self.wanted else {}

        return wait_for(look, f"{self.wanted} ranks run", seconds)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds: float = 120) -> int:
        """Its exit status, once nothing of it runs any more."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds:g} s:\n{self.said()[-5000:]}") from None
        wait_for(lambda: not self.processes(), "its processes are gone", 40)
        return status

    def end(self) -> None:
        """Kill whatever of it still runs, stopped processes too."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        while there := self.processes():
            for pid in there:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


class Place:
    """A user's folder with an experiment, and the run that it describes."""

    def __init__(self, folder: Path, config: Any) -> None:
        from omegaconf import OmegaConf

        self.folder, self.config = folder, config
        self.run = Path(config.run.dir) / config.run.name
        self.checkpoints = self.run / "checkpoints"
        self.launches: list[Launch] = []
        self._rows: list[dict[str, Any]] = []
        self._read = 0
        (folder / "conf" / "exp").mkdir(parents=True)
        text = "# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.structured(config))
        (folder / "conf" / "exp" / "mine.yaml").write_text(text, encoding="utf-8")

    def launch(self, *options: str, ranks: int | None = 2, restarts: int = 0, **environment: str) -> Launch:
        self.launches.append(Launch(self.folder, ranks, restarts, options, environment))
        return self.launches[-1]

    def end(self) -> None:
        for each in self.launches:
            each.end()

    def rows(self) -> list[dict[str, Any]]:
        """Every row of `metrics.jsonl` in the order of writing, those too that hold no more."""
        path = self.run / "metrics.jsonl"
        if path.exists():
            with open(path, "rb") as file:
                file.seek(self._read)
                lines, newline, _ = file.read().rpartition(b"\n")
            self._read += len(lines) + len(newline)
            for line in lines.splitlines():
                with contextlib.suppress(ValueError):
                    self._rows.append(json.loads(line))
        return self._rows

    def steps(self) -> list[dict[str, Any]]:
        """The rows of steps, in the order in which they were done."""
        return [row for row in self.rows() if "loss" in row]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows() if row.get("event") == kind]

    def step(self) -> int:
        """The last that was done."""
        return next((row["step"] for row in reversed(self.rows()) if "loss" in row), 0)

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        """Until a launch has got so far that now lives."""

        def look() -> bool:
            assert self.launches[-1].process.poll() is None, self.launches[-1].said()[-5000:]
            return self.step() >= step

        wait_for(look, f"step {step} is done", seconds)

    def wait_for_event(self, kind: str, number: int = 1, seconds: float = 120) -> None:
        """Until there are so many of a kind, by a launch that lives."""

        def look() -> bool:
            assert self.launches[-1].process.poll() is None, self.launches[-1].said()[-5000:]
            return len(self.events(kind)) >= number

        wait_for(look, f"event '{kind}' for the {number}. time", seconds)

    def wait_for_more(self, steps: int, seconds: float = 60) -> None:
        """Until so many further ones are done, by whomever."""
        wanted = len(self.steps()) + steps
        wait_for(lambda: len(self.steps()) >= wanted, f"{steps} more steps", seconds)

    def wait_for_a_save(self, seconds: float = 120) -> None:
        """Until one is being written."""
        wait_for(lambda: self.half_written(), "a save", seconds, every=0.001)

    def half_written(self) -> list[str]:
        with contextlib.suppress(OSError):
            return [name for name in os.listdir(self.checkpoints) if name.endswith(".partial")]
        return []

    def curve(self) -> dict[int, tuple[float, float]]:
        """Loss and gradient norm of each step, by the rows that hold."""
        rows = metrics.read(self.run / "metrics.jsonl")
        return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if "loss" in row}
