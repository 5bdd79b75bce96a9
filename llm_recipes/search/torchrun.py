"""What Hydra's launcher `hydra/launcher=torchrun` does: each job is a torchrun of its own on this machine's devices.

Jobs run one after another, or side by side on devices of their own. What they print is kept in their folders, and
shown.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from llm_recipes.errors import UserError
from llm_recipes.search import jobs
from llm_recipes.search.launch import DONE_BEFORE, Launch
from llm_recipes.telemetry import metrics
from llm_recipes.telemetry.progress import duration
from llm_recipes.training.lock import Lock

OUTPUT = "output.log"
"""What a job has printed, in its folder."""
LOOKS_EVERY = 0.3
"""Seconds."""
SECONDS_TO_SAVE = "600"
"""That torchrun leaves its processes after it was asked to end (torch 2.12 and later)."""
KEPT_LINES = 200
"""In which a job's error is looked for."""


def register(launch: Launch) -> None:
    """Make the launcher known to Hydra, which does not find a plugin that is installed as an editable checkout."""
    plugins = Plugins.instance()  # what it finds by itself it loads anew: only then is it known which class that is
    from hydra_plugins.llm_recipes_launcher import TorchrunLauncher

    TorchrunLauncher.jobs = TorchrunJobs(launch)
    plugins.register(TorchrunLauncher)


class TorchrunJobs:
    """The jobs of a search, given to Hydra's plugin."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.asked: str | None = None

    def run(
        self,
        composed: Sequence[DictConfig],
        nproc_per_node: int | None,
        devices: Sequence[int] | None,
        at_once: int | None,
        arguments: Sequence[str],
    ) -> None:
        """Run the jobs that are not done yet; every folder and configuration is judged before the first one starts.

        Args:
            composed: each job's configuration, with Hydra's own.
            nproc_per_node, devices, at_once, arguments: see the plugin.
        """
        self.ranks, self.slots = slots(nproc_per_node, devices, at_once)
        self.arguments = list(arguments)
        found = [self.launch.job(each) for each in composed]
        with self._listening():
            self._go([job for job in found if self._is_to_run(job)])

    def _is_to_run(self, job: jobs.Job) -> bool:
        """What needs no process to be seen is seen here."""
        if job.config.dry_run:
            raise UserError("dry_run=true: shows one run; leave -m and the searched values out")
        jobs.write_down(job, job.config, self.launch.command(self.launch.line))
        if job.is_done():
            self.launch.add(job, DONE_BEFORE)
            return False
        if Lock(job.folder).is_taken():
            self.launch.add(job, jobs.RUNNING, "another process is writing there")
            return False
        try:
            self.launch.check(job.config)
        except UserError as error:
            job.mark(jobs.FAILED, error=str(error), **self.launch.facts(job, self.ranks))
            print(f"== {job.name}: {self.launch.add(job, jobs.FAILED, str(error))}", flush=True)
            return False
        return True

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Ask the jobs to save and stop where this process is asked to."""

        def hear(number: int, frame: Any) -> None:
            self.asked = signal.Signals(number).name

        before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _go(self, waiting: list[jobs.Job]) -> None:
        running: dict[int, Torchrun] = {}
        total, ended, started, told = len(waiting), 0, time.monotonic(), False
        print(f"{total} jobs to run, {len(self.slots)} at once" if total else "nothing to run", flush=True)
        while running or (waiting and self.asked is None):
            for slot, devices in enumerate(self.slots):
                while slot not in running and waiting and self.asked is None:
                    job = waiting.pop(0)
                    if not self._is_to_run(job):  # by now another launch may have come to it
                        total -= 1
                        continue
                    running[slot] = Torchrun(self.launch, job, self.ranks, devices, self.arguments)
                    running[slot].prefix = f"[{running[slot].job.name}] " if len(self.slots) > 1 else ""
            if self.asked is not None and not told:
                told = True
                print(f"{self.asked}: the jobs save and stop", flush=True)
                for each in running.values():
                    each.process.send_signal(signal.SIGTERM)
            time.sleep(LOOKS_EVERY)
            for slot, each in list(running.items()):
                each.show()
                if each.process.poll() is not None:
                    outcome = each.end(self.asked)
                    del running[slot]
                    ended += 1
                    left = duration((time.monotonic() - started) / ended * (total - ended))
                    more = f", about {left} left" if ended < total and self.asked is None else ""
                    print(f"== {each.job.name}: {outcome} ({ended} of {total}{more})", flush=True)


class Torchrun:
    """A job that runs."""

    prefix = ""
    """Before each line that it prints."""

    def __init__(self, launch: Launch, job: jobs.Job, ranks: int, devices: str, arguments: list[str]) -> None:
        self.launch, self.job, self._facts = launch, job, launch.facts(job, ranks)
        job.mark(jobs.RUNNING, **self._facts)
        print(f"== {job.name}" + (f" on devices {devices}" if devices else ""), flush=True)
        own = {"CUDA_VISIBLE_DEVICES": devices} if devices else {}
        own |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS_TO_SAVE)}
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]
        with open(job.folder / OUTPUT, "ab") as file:
            self._read = file.tell()
            self.process = subprocess.Popen(
                [sys.executable, *torchrun, "-m", f"llm_recipes.{launch.verb}", *job.arguments],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=os.environ | own,
                start_new_session=True,  # a terminal's Ctrl-C is for us: torchrun would end its workers at once
            )  # fmt: skip
        self._rest, self._began = b"", time.time()
        self._said: list[str] = []

    def show(self) -> None:
        """What it has printed since it was last shown."""
        with open(self.job.folder / OUTPUT, "rb") as file:
            file.seek(self._read)
            more = file.read()
        self._read += len(more)
        *lines, self._rest = (self._rest + more).split(b"\n")
        for line in (each.decode(errors="replace") for each in lines):
            print(f"{self.prefix}{line}", flush=True)
            self._said = [*self._said[-KEPT_LINES:], line.strip()]

    def end(self, asked: str | None) -> str:
        """Mark what became of it, and say it.

        Args:
            asked: the signal by which it was asked to stop, if it was.
        """
        self.show()
        status = self.process.returncode
        outcome, why = jobs.DONE, _why_stopped(self.job, self._began)
        if why is not None:
            outcome = jobs.STOPPED  # whatever its status: a torchrun that is asked to end has 1
        elif status != 0 and asked is not None:
            outcome, why = jobs.STOPPED, f"{asked}, before it could save"
        elif status != 0:
            mistakes = [line.removeprefix("error: ") for line in self._said if line.startswith("error: ")]
            bugs = [line for line in self._said if "Error: " in line and "ChildFailedError" not in line]
            why = next(iter(mistakes or bugs[-1:]), f"exit status {status}, see {OUTPUT}")
            outcome = jobs.FAILED
        self.job.mark(outcome, error=why, **self._facts)
        return self.launch.add(self.job, outcome, why)


def _why_stopped(job: jobs.Job, since: float) -> str | None:
    """Why a run saved and left before its end; None where it did not."""
    path = job.folder / "metrics.jsonl"
    rows = metrics.lines(path) if path.is_file() else []
    events = [row for row in rows if "event" in row and row["time"] >= since]
    last = next((row for row in reversed(events) if row["event"] in ("start", "stop", "finish")), None)
    return str(last["reason"]) if last is not None and last["event"] == "stop" else None


def slots(ranks: int | None, devices: Sequence[int] | None, at_once: int | None) -> tuple[int, list[str]]:
    """Processes of a job, and for each job that runs at once the devices it has, as CUDA_VISIBLE_DEVICES names them.

    Raises:
        UserError: there are not so many.
    """
    for key, value in {"nproc_per_node": ranks, "at_once": at_once}.items():
        if value is not None and value < 1:
            raise UserError(f"hydra.launcher.{key}={value}: must be more than 0")
    here = visible_devices() if devices is None else [str(each) for each in devices]
    if len(set(here)) < len(here):
        raise UserError(f"hydra.launcher.devices={list(devices or [])}: one stands there twice")
    ranks = ranks or len(here) or 1
    if here and ranks > len(here):
        raise UserError(f"hydra.launcher.nproc_per_node={ranks}: there are {len(here)} devices")
    most = len(here) // ranks if here else at_once or 1
    if at_once is not None and at_once > most:
        raise UserError(f"hydra.launcher.at_once={at_once}: {len(here)} devices are enough for {most} jobs of {ranks}")
    return ranks, [",".join(here[at * ranks : (at + 1) * ranks]) for at in range(at_once or most)]


def visible_devices() -> list[str]:
    """The GPUs of this machine that a job may have."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each.strip() for each in named.split(",") if each.strip() not in ("", "-1")]
    import torch  # which counts them without taking one

    return [str(number) for number in range(torch.cuda.device_count())]
