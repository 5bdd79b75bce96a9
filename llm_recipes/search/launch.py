"""One command that runs many jobs: which they are, and what became of each."""

import copy
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write

from llm_recipes.config import TrainingConfig
from llm_recipes.errors import UserError
from llm_recipes.models import topology
from llm_recipes.search import jobs
from llm_recipes.telemetry.progress import show_table

DONE_BEFORE = "done before"
NOT_STARTED = "not started"


class Begun(Callback):
    """Hears from Hydra where the search is, also where its jobs run in other processes (conf/pretrain.yaml)."""

    folder: ClassVar[Path | None] = None

    def on_multirun_start(self, config: DictConfig, **more: Any) -> None:
        type(self).folder = Path(config.hydra.sweep.dir)


class Launch:
    """The jobs of one command.

    Args:
        verb: what runs them.
        line: the command line as it was typed.
        check: refuses a configuration that cannot run.
        work: runs one; returns why it was asked to stop, if it was.
        typed: makes a configuration of what Hydra composed.
        afterwards: keys that the command line gives, and that Hydra does not hear of, with their values' texts.
    """

    def __init__(
        self,
        verb: str,
        line: list[str],
        check: Callable[[Any], None],
        work: Callable[[Any], str | None],
        typed: Callable[[DictConfig], Any],
        afterwards: dict[str, str],
    ) -> None:
        self.verb, self.line, self.check, self.work, self.typed = verb, line, check, work, typed
        self.afterwards = afterwards
        self.swept = jobs.swept_keys(line)
        self._began = time.time()
        self.root: Path | None = None
        self.outcomes: dict[str, str] = {}

    def command(self, arguments: list[str], ranks: int | None = None) -> str:
        """The line that a user types, under the launcher that this process has, or under a torchrun of so many."""
        return f"{launcher(ranks)} -m llm_recipes.{self.verb} {shlex.join(arguments)}"

    def facts(self, job: jobs.Job, ranks: int | None = None) -> dict[str, Any]:
        """What a job's mark says of how it is run; `ranks` as in `command`."""
        return {
            "launcher": launcher(ranks), "ranks": ranks or topology.launch().ranks,
            "command": self.command(job.arguments, ranks),
        }  # fmt: skip

    def job(self, composed: DictConfig | None = None, config: TrainingConfig | None = None) -> jobs.Job:
        """The job that a configuration is, as Hydra has composed it; without one the job that runs now.

        Raises:
            UserError: a job of this name is there already, or the folder is another search's.
        """
        hydra = HydraConfig.get() if composed is None else composed.hydra
        config = config or self.typed(_without_hydra(composed))
        overrides = [each for each in hydra.overrides.task if not each.startswith("search.swept=")]
        given = dict(each.lstrip("+~").partition("=")[::2] for each in overrides)
        arguments = overrides + [f"{key}={text}" for key, text in self.afterwards.items()]
        params = hydra.sweeper.get("params") or {}
        job = jobs.place(config, given, arguments, [*self.swept, *(str(key) for key in params)])
        if job.name in self.outcomes:
            raise UserError(f"two jobs of the folder {job.folder}: they differ in nothing that names them")
        self.root = job.root
        self.outcomes[job.name] = NOT_STARTED
        return job

    def add(self, job: jobs.Job, outcome: str, why: str | None = None) -> str:
        """Note what became of a job."""
        self.outcomes[job.name] = f"{outcome}: {why}" if why else outcome
        return self.outcomes[job.name]

    def _read(self) -> None:
        """What became of jobs that ran as jobs of a cluster."""
        for path in sorted((self.root or Path()).glob(f"*/{jobs.JOB}"), key=lambda each: each.stat().st_mtime):
            found = jobs.known(path)
            if path.stat().st_mtime >= self._began:
                self.outcomes[path.parent.name] = ": ".join(filter(None, (found.get("status"), found.get("error"))))

    def end(self) -> None:
        """Show what became of all.

        Raises:
            UserError: some failed.
        """
        if topology.launched_rank() not in (None, 0):
            return
        if not self.outcomes:
            self.root = Begun.folder
            self._read()
        if not self.outcomes:
            print(f"{self.root}: nothing to do, every job was done before", flush=True)
            return
        show_table(str(self.root), [{"job": name, "": outcome} for name, outcome in self.outcomes.items()])
        print(f"side by side: python -m llm_recipes.report sweep={shlex.quote(str(self.root))}", flush=True)
        failed = [name for name, outcome in self.outcomes.items() if outcome.startswith(jobs.FAILED)]
        if failed:
            raise UserError(
                f"{len(failed)} of {len(self.outcomes)} jobs failed ({', '.join(failed)}); the same command tries them "
                "again"
            )


def launcher(ranks: int | None = None) -> str:
    """What starts processes like this one; or a torchrun of so many."""
    if ranks is not None:
        return f"torchrun --nproc_per_node {ranks}"
    me = topology.launch()
    if me.launcher is None:
        return "python"
    if me.launcher in ("srun", "mpirun"):
        return f"{me.launcher} -n {me.ranks} python"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", me.ranks))
    hosts = f"--nnodes {me.ranks // here} " if me.ranks > here else ""
    return f"torchrun {hosts}--nproc_per_node {here}"


def _without_hydra(composed: DictConfig | None) -> DictConfig:
    plain = copy.deepcopy(composed)
    assert plain is not None
    with read_write(plain), open_dict(plain):
        del plain["hydra"]
    return plain
