"""Weights & Biases, when asked for. Its absence or failure never stops a run: metrics are on disk anyway."""

import logging
import os
from pathlib import Path
from typing import Any

from llm_recipes.config import WandbConfig

log = logging.getLogger(__name__)


def flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures under names with slashes."""
    result: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}/")
        elif value is not None:
            result[f"{prefix}{key}"] = value
    return result


class Tracker:
    """One W&B run per run folder, under a stable id, so that a resumed run goes on in it.

    Args:
        config: what was asked for. The environment's WANDB_* variables are honoured where it says nothing.
        folder: the run's folder; project and group default to the names of the folders above it.
        settings: the configuration, to be shown with the run.
        run_id: the run's own, stable one.
    """

    def __init__(self, config: WandbConfig, folder: Path, settings: dict[str, Any], run_id: str) -> None:
        self._run: Any = None
        if config.mode == "disabled":
            return
        above = folder.resolve().parent
        try:
            import wandb

            self._run = wandb.init(
                id=run_id,
                resume="allow",
                mode=config.mode,  # type: ignore[arg-type]
                entity=config.entity or os.environ.get("WANDB_ENTITY"),
                project=config.project or os.environ.get("WANDB_PROJECT") or above.parent.name or "llm_recipes",
                group=config.group or os.environ.get("WANDB_RUN_GROUP") or above.name,
                name=config.name or os.environ.get("WANDB_NAME") or folder.name,
                tags=config.tags or None,
                dir=str(folder),
                config=settings,
            )
            self._run.define_metric("*", step_metric="consumed_tokens")
        except Exception as error:  # whatever it is, the run is worth more than its picture
            log.warning("W&B is off: %s", error)
            self._run = None

    def write(self, row: dict[str, Any]) -> None:
        """Send one row; the x-axis is `consumed_tokens`."""
        if self._run is None:
            return
        try:
            self._run.log(flat(row))
        except Exception as error:
            log.warning("W&B failed, and is off from here on: %s", error)
            self._run = None

    def close(self) -> None:
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                log.warning("W&B did not close: %s", error)
