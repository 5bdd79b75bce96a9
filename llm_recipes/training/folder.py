"""A run's folder: it belongs to one configuration, and the same command continues the run in it."""

import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from llm_recipes.checkpoints import manifest
from llm_recipes.config import InstructConfig, PretrainConfig, TrainingConfig
from llm_recipes.errors import UserError
from llm_recipes.folders import make_folder, remove_folders, write_json, write_whole
from llm_recipes.telemetry import metrics

log = logging.getLogger(__name__)

MAY_CHANGE = (
    "train.stop_at", "train.micro_batch_size", "logging", "profile", "checkpoint", "validation", "evaluation", "search",
    "guard", "run", "dry_run",
    "data.workers", "data.verify", "data.validation", "data.accept_tokenizer", "data.preview", "data.preview_rows",
    "data.prepared",
    "parallel.sharding", "parallel.replicas", "parallel.reduce", "parallel.prefetch",
    "parallel.cpu_offload", "parallel.timeout_seconds",
    "model.activation_checkpointing", "model.activation_memory_budget", "model.compile", "model.attention",
    "model.shape",
)  # fmt: skip
"""Keys that do not decide what a run learns, or only how fast."""


DECIDE_SAMPLES = (
    "data.seq_len", "data.mask_documents", "data.packing", "data.template", "data.train_on", "data.on_rewrite",
    "data.too_long",
)  # fmt: skip
"""Keys that decide what a sample is: with another value, no position means what it meant."""


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested configuration as dotted keys."""
    if isinstance(value, dict) and value:
        result: dict[str, Any] = {}
        for key, each in value.items():
            result |= flat(each, f"{prefix}{key}.")
        return result
    return {prefix.rstrip("."): value}


def is_of(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of these, or lies below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def may_change(key: str) -> bool:
    return is_of(key, MAY_CHANGE)


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


def _saved(path: Path) -> Any:
    """A run's `config.yaml`. Keys that the run did not know yet have their default values.

    Raises:
        UserError: it cannot be read.
    """
    try:
        said = OmegaConf.load(path)
        return OmegaConf.merge(OmegaConf.structured(_schema(said)), said)
    except Exception as error:
        reason = f"cannot be read ({type(error).__name__})"
        raise UserError(f"{path}: {reason}; bring it back, or give another run.name") from error


def _schema(said: Any) -> type[TrainingConfig]:
    """A run's verb is known by its data."""
    return InstructConfig if "train_on" in said["data"] else PretrainConfig


def saved_config(run: Path) -> TrainingConfig:
    """The configuration of the run in a folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: no run there (a folder with config.yaml)")
    config = OmegaConf.to_object(_saved(path))
    assert isinstance(config, TrainingConfig)
    return config


class RunFolder:
    """The folder of one run. Only rank 0 opens it for writing.

    Args:
        config: the run's configuration.
        model_files: text of further files for each checkpoint's model folder, by name.
    """

    def __init__(self, config: TrainingConfig, model_files: Mapping[str, str] | None = None) -> None:
        self.config, self.model_files = config, dict(model_files or {})
        self.path = Path(config.run.dir) / config.run.name
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.rollbacks = self.path / "rollbacks.json"
        self.id = uuid.uuid4().hex[:8]
        """Names the run for good: in its checkpoints' manifests, and at W&B."""
        self.yaml = OmegaConf.to_yaml(OmegaConf.structured(config))
        self.settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[assignment]

    def refuse_place(self) -> None:
        """Raise `UserError` where no folder can be made."""
        there = next(path for path in (self.path, *self.path.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"{self.path}: the run's folder cannot be written ({there}); see run.dir and run.name")

    def known_id(self) -> str:
        """The run's, if it has one by now; else the one that it will have."""
        path = self.path / "run_id"
        return path.read_text(encoding="utf-8").strip() if path.exists() else self.id

    def open(self, contents: dict[str, Any]) -> None:
        """Check that the folder is this run's, or can become so. Nothing is written yet; what a crash left half-written
        among the run's checkpoints is removed.

        Args:
            contents: what each source holds (`sources.contents`).

        Raises:
            UserError: it belongs to another configuration or other corpora, or has lost its checkpoints.
        """
        saved = self.path / "config.yaml"
        if saved.exists():
            self._refuse_another_run(saved)
            self._refuse_other_corpora(contents)
            manifest.clean(self.checkpoints)  # before one is chosen: it may give the newest its name
            self._refuse_lost_checkpoints()

    def begin(self, kept: dict[str, Any]) -> None:
        """Make the folder this run's: its configuration, its environment, and `kept` by name as JSON.

        Raises:
            UserError: it cannot be written.
        """
        try:
            make_folder(self.checkpoints)
            for name, content in (kept | {"environment": environment()}).items():
                write_json(self.path / f"{name}.json", content)
            write_whole(self.path / "run_id", self.id + "\n")
            write_whole(self.path / "config.yaml", self.yaml)
        except OSError as error:
            raise UserError(f"{self.path}: the run's folder cannot be written ({error}); see run.dir") from error

    @contextmanager
    def trial(self) -> Iterator[Path]:
        """A folder beside the run's own that goes again, and all that was made for it.

        Raises:
            UserError: it cannot be made.
        """
        try:
            made = make_folder(self.path.parent)
            root = Path(tempfile.mkdtemp(prefix="dry-run-", dir=self.path.parent))
        except OSError as error:
            raise UserError(f"{self.path.parent}: cannot be written ({error}); see run.dir") from error
        try:
            yield root
        finally:
            shutil.rmtree(root, ignore_errors=True)
            remove_folders(made)

    def _kept(self, name: str, kind: type) -> Any:
        """What the run has kept as JSON; None where nothing is kept."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            content = None
        if not isinstance(content, kind):
            raise UserError(f"{path}: damaged; bring it back, or give another run.name")
        return content

    def _refuse_other_corpora(self, contents: dict[str, Any]) -> None:
        """The same path may hold another corpus by now, and every position another sample."""
        if self.config.run.allow_changes:
            return
        before = self._kept("sources.json", dict) or {}
        for name, now in contents.items():
            if name in before and before[name] != now:
                raise UserError(
                    f"data.sources.{name}: not the corpus that the run began with ({_short(before[name])} then, "
                    f"{_short(now)} now); bring it back, give another run.name, or run.allow_changes=true"
                )

    def _refuse_another_run(self, saved: Path) -> None:
        if self.config.checkpoint.resume == "never":
            raise UserError(f"{self.path}: there is a run in it, and checkpoint.resume=never; give another run.name")
        old: dict[str, Any] = OmegaConf.to_container(_saved(saved))  # type: ignore[assignment]
        changed = changed_keys(old, self.settings)
        before, after = flat(old), flat(self.settings)
        shown = ", ".join(f"{key} ({before.get(key)} -> {after.get(key)})" for key in changed[:6])
        samples = [key for key in changed if key in DECIDE_SAMPLES]
        if samples and manifest.checkpoints(self.checkpoints):
            raise UserError(
                f"{self.path}: {samples[0]} decides what a sample is, and the run has seen some ({shown}); give "
                "another run.name (a checkpoint's model/ folder can be its model.path)"
            )
        if changed and not self.config.run.allow_changes:
            raise UserError(
                f"{self.path} belongs to another configuration: {shown}; give another run.name, or "
                "run.allow_changes=true to go on with these"
            )
        if changed:
            log.warning("going on with a changed configuration: %s", shown)

    def _refuse_lost_checkpoints(self) -> None:
        """A run that has had a checkpoint does not start anew. One that was killed before its first one does."""
        if manifest.checkpoints(self.checkpoints) or not self.metrics.exists():
            return
        rows = metrics.read(self.metrics)
        reached = max((row["step"] for row in rows if "event" not in row), default=0)
        events = [row for row in rows if "event" in row]
        if any(row["event"] == "checkpoint" or (row["event"] == "start" and row["step"] > 0) for row in events) or (
            reached > 0 and not events  # nothing is known of its checkpoints
        ):
            raise UserError(
                f"{self.checkpoints}: empty, though the run has reached step {reached}; bring its checkpoints "
                "back, or start anew under another run.name"
            )
        if reached > 0:
            log.warning(
                "%s ended at step %d, before its first checkpoint was whole: it begins again", self.path, reached
            )

    def stage_starts(self, wanted: list[int]) -> list[int]:
        """The curriculum's stages as sample positions: settled when the run first starts, and kept with it."""
        kept = self._kept("stages.json", list)
        return kept if kept is not None and len(kept) == len(wanted) else wanted

    def files_for_checkpoint(self) -> dict[str, str]:
        """What each checkpoint takes along of its run: JSON, like all that is in it."""
        names = ("environment.json", "plan.json", "licences.json")
        kept = {name: (self.path / name).read_text(encoding="utf-8") for name in names if (self.path / name).exists()}
        kept |= {f"model/{name}": text for name, text in self.model_files.items()}
        return kept | {"config.json": json.dumps(self.settings, ensure_ascii=False, indent=2) + "\n"}


def _short(content: Any) -> str:
    if not isinstance(content, dict) or not {"documents", "tokens", "files"} <= content.keys():
        return "another"
    return f"{content['documents']:,} documents and {content['tokens']:,} tokens in {len(content['files'])} files"
