"""`hydra/launcher=torchrun`, where Hydra looks for plugins; what it does stands in `llm_recipes.search.torchrun`.

Hydra imports this module at the start of every program of the environment that uses it: it is light.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class TorchrunConfig:
    """`hydra.launcher` of `hydra/launcher=torchrun`."""

    _target_: str = "hydra_plugins.llm_recipes_launcher.TorchrunLauncher"
    nproc_per_node: int | None = None
    """Processes of a job. None: one for each device."""
    devices: list[int] | None = None
    """Of this machine. None: all that are visible."""
    at_once: int | None = None
    """Jobs side by side. None: as many as there are devices for; without devices one."""
    arguments: list[str] = field(default_factory=list)
    """Further ones of torchrun."""


class TorchrunLauncher(Launcher):
    """Each job is a torchrun of its own on this machine's devices."""

    jobs: ClassVar[Any] = None
    """A `llm_recipes.search.torchrun.TorchrunJobs`: who runs them."""

    def __init__(self, **options: Any) -> None:
        if self.jobs is None:
            raise RuntimeError("hydra/launcher=torchrun starts the verbs of llm_recipes, and no other program")
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader, self.config = hydra_context.config_loader, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        composed = [self.loader.load_sweep_config(self.config, list(overrides)) for overrides in job_overrides]
        self.jobs.run(composed, **self.options)
        done = JobReturn(status=JobStatus.COMPLETED)
        done.return_value = None  # what became of each stands in its folder
        return [done] * len(composed)


ConfigStore.instance().store(group="hydra/launcher", name="torchrun", node=TorchrunConfig, provider="llm_recipes")
