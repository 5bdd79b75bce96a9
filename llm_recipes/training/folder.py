"""A run's folder: it belongs to one configuration, and the same command continues the run in it."""

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from llm_recipes.checkpoints import manifest
from llm_recipes.config import PretrainConfig
from llm_recipes.errors import UserError
from llm_recipes.telemetry import metrics

log = logging.getLogger(__name__)

MAY_CHANGE = (
    "train.stop_at", "train.micro_batch_size", "logging", "checkpoint", "validation", "run", "dry_run",
    "data.workers", "data.verify", "data.validation", "data.accept_tokenizer",
    "parallel.sharding", "parallel.replicas", "parallel.reduce", "parallel.cpu_offload", "parallel.timeout_seconds",
    "model.activation_checkpointing", "model.compile", "model.attention",
)  # fmt: skip
"""Keys that do not decide what a run learns, or only how fast."""


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested configuration as dotted keys."""
    if isinstance(value, dict) and value:
        result: dict[str, Any] = {}
        for key, each in value.items():
            result |= flat(each, f"{prefix}{key}.")
        return result
    return {prefix.rstrip("."): value}


def may_change(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE)


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys whose values differ, and on which the run depends."""
    before, after = flat(old), flat(new)
    keys = {key for key in before | after if before.get(key) != after.get(key)}
    return sorted(key for key in keys if not may_change(key))


def git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def environment() -> dict[str, Any]:
    """Code and packages that a run used: git commit and diff, and every installed package."""
    commit = git("rev-parse", "HEAD")
    packages = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    return {
        "git_commit": commit.strip() if commit else None,
        "git_diff": git("diff", "HEAD") if commit else None,
        "python": platform.python_version(),
        "packages": {name: packages[name] for name in sorted(packages, key=str.lower)},
    }


class RunFolder:
    """The folder of one run. Only rank 0 opens it for writing.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.path = Path(config.run.dir) / config.run.name
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.yaml = OmegaConf.to_yaml(OmegaConf.structured(config))
        self.settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[assignment]

    def open(self) -> None:
        """Make the folder, or check that it is this run's.

        Raises:
            UserError: it cannot be written, belongs to another configuration, or has lost its checkpoints.
        """
        saved = self.path / "config.yaml"
        if saved.exists():
            self._refuse_another_run(saved)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            manifest.clean(self.checkpoints)
            self._write("config.yaml", self.yaml)
            self._write("environment.json", json.dumps(environment(), ensure_ascii=False, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: the run's folder cannot be written ({error}); see run.dir") from error

    def _refuse_another_run(self, saved: Path) -> None:
        if self.config.checkpoint.resume == "never":
            raise UserError(f"{self.path}: there is a run in it, and checkpoint.resume=never; give another run.name")
        try:
            # Keys that the run did not know yet have their default values.
            known = OmegaConf.merge(OmegaConf.structured(PretrainConfig), OmegaConf.load(saved))
            old: dict[str, Any] = OmegaConf.to_container(known)  # type: ignore[assignment]
        except Exception as error:
            raise UserError(f"{saved}: cannot be read ({type(error).__name__}); give another run.name") from error
        changed = changed_keys(old, self.settings)
        before, after = flat(old), flat(self.settings)
        shown = ", ".join(f"{key} ({before.get(key)} -> {after.get(key)})" for key in changed[:6])
        if changed and not self.config.run.allow_changes:
            raise UserError(
                f"{self.path} belongs to another configuration: {shown}; give another run.name, or "
                "run.allow_changes=true to go on with these"
            )
        if changed:
            log.warning("going on with a changed configuration: %s", shown)
        if not manifest.checkpoints(self.checkpoints) and self.metrics.exists():
            reached = max((row["step"] for row in metrics.read(self.metrics)), default=0)
            if reached >= self.config.checkpoint.every:
                raise UserError(
                    f"{self.checkpoints}: empty, though the run has reached step {reached}; bring its checkpoints "
                    "back, or start anew under another run.name"
                )

    def _write(self, name: str, text: str) -> None:
        beside = self.path / f"{name}.partial"
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, self.path / name)

    def stage_starts(self, wanted: list[int]) -> list[int]:
        """The curriculum's stages as sample positions: settled when the run first starts, and kept with it."""
        path = self.path / "stages.json"
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if len(kept) == len(wanted):
                return [int(start) for start in kept]
        self._write("stages.json", json.dumps(wanted) + "\n")
        return wanted

    def write_plan(self, rows: list[dict[str, Any]]) -> None:
        """Keep the mixture's plan with the run."""
        self._write("plan.json", json.dumps(rows, ensure_ascii=False, indent=2) + "\n")

    def files_for_checkpoint(self) -> dict[str, str]:
        """What each checkpoint takes along of its run."""
        names = ("config.yaml", "environment.json", "plan.json", "licences.json")
        return {name: (self.path / name).read_text(encoding="utf-8") for name in names if (self.path / name).exists()}

    def write_licences(self, base: str | None, sources: dict[str, str | None]) -> None:
        """Keep what model and corpora say of their licences, for the model card."""
        stated = {"base": base, "sources": sources}
        self._write("licences.json", json.dumps(stated, ensure_ascii=False, indent=2) + "\n")
