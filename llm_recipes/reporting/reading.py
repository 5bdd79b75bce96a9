"""A run's folder as figures: its settings, its rows by kind, its scores. Nothing of it imports torch.

What is not there is absent, never 0: an unmeasured score, an unfinished job's last step.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from llm_recipes.errors import UserError, first_line
from llm_recipes.folders import read_json
from llm_recipes.reporting.scores import Score, scores_in
from llm_recipes.telemetry import metrics
from llm_recipes.training.folder import flat

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where PyYAML has it: a hundred configurations would else take seconds."""
NOT_RUNS = {"checkpoints", "evaluations", "answers", "prepared", "base", "wandb"}
"""Folders below a run, or beside one, that hold no runs."""


def number(value: Any) -> float | None:
    """A finite number, or None: `metrics.jsonl` has NaN and infinity by their names."""
    if type(value) is float:  # nearly all of them
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def results_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The result files in a folder, by suite."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        result = read_json(path)
        if not isinstance(result.get("tasks"), dict):
            raise UserError(f"{path}: damaged (no tasks in it); measure it again, or remove it")
        found[str(result.get("suite", path.stem))] = result
    return found


@dataclass
class Launch:
    """One start of a run.

    Attributes:
        ranks: processes, one per device.
        training_seconds: in steps, also in those that were done again later.
        wall_seconds: from the process's start to the last that is known of it.
    """

    ranks: int
    training_seconds: float = 0.0
    wall_seconds: float = 0.0


@dataclass
class Run:
    """What a run's folder says.

    Attributes:
        name: below the folder that was asked for.
        settings: configuration by dotted key; of a job that has failed before its start as its mark has it.
        job: `job.json` of a search's run; empty for a run by itself.
        steps: the training rows that hold, in order.
        events: all, as they were written.
        validations: by step and set, `bits_per_byte` and `nats_per_token`.
        evaluations: by step and suite, as `metrics.jsonl` has them.
        results: by step and suite, the result files.
        answers: by step, to the run's prompts (`evaluation.answers`).
        rows: all of `metrics.jsonl` as it was written.
    """

    folder: Path
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    validations: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    evaluations: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    results: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    answers: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def overrides(self) -> dict[str, Any]:
        return dict(self.job.get("overrides") or {})

    @property
    def last_step(self) -> int:
        """The step that the run has logged last; 0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def stop(self) -> int | None:
        """Where the run is to end."""
        planned = self.settings.get("train.stop_at") or self.settings.get("train.steps")
        return int(planned) if planned is not None else None

    @cached_property
    def status(self) -> str:
        """`done`, `failed`, `stopped` or `running`: as the search wrote it, or as the run's own word has it where that
        came later (its command may have been given alone since)."""
        said = self.job.get("status")
        marked = self.job.get("ended") or self.job.get("started") or math.inf
        if said and not any(each["event"] in ("start", "finish") and each["time"] > marked for each in self.events):
            return str(said)
        if not self.events and self.stop is not None and self.last_step >= self.stop:
            return "done"
        words = {"finish": "done", "error": "failed", "stop": "stopped", "stall": "failed"}
        last = next((each["event"] for each in reversed(self.events) if each["event"] in {*words, "start"}), None)
        return words.get(str(last), "running")

    @property
    def error(self) -> str | None:
        """Why it failed, in one line."""
        said = self.job.get("error")
        if not said and self.status == "failed":
            said = next((each.get("message") for each in reversed(self.events) if each.get("message")), None)
        return " ".join(str(said).split())[:400] if said else None

    @property
    def device_hours(self) -> float | None:
        """Of all launches, from start to end, loading and saving included."""
        total = sum(each.ranks * max(each.wall_seconds, each.training_seconds) for each in self.launches) / 3600
        return total or None

    @cached_property
    def tokens_per_second(self) -> float | None:
        """Per device: the median over the logged rows, which no slow first step bends."""
        rates = sorted(rate for row in self.steps if (rate := number(row.get("tokens_per_second_per_device"))))
        return rates[len(rates) // 2] if rates else None

    @property
    def started(self) -> float:
        """When it was first started; infinity where nobody has written that down."""
        first = next((time for row in self.events if (time := number(row.get("time"))) is not None), None)
        return first or number(self.job.get("started")) or math.inf

    def count(self, event: str) -> int:
        return sum(each["event"] == event for each in self.events)

    def at(self, step: int | None) -> dict[str, Any]:
        """The training row of a step, or the last; empty where there is none."""
        if step is None:
            return self.steps[-1] if self.steps else {}
        return next((row for row in reversed(self.steps) if row["step"] == step), {})

    def scored_steps(self) -> set[int]:
        return {*self.validations, *self.evaluations, *self.results}

    def scores(self, step: int) -> dict[str, Score]:
        """All scores of a step by their full names (see `scores.py`)."""
        return scores_in(
            self.evaluations.get(step, {}), self.results.get(step, {}), self.validations.get(step, {}), self.groups
        )

    @cached_property
    def groups(self) -> dict[tuple[str, str], str]:
        """The group of a suite's task; rows in `metrics.jsonl` do not have it."""
        return {
            (suite, task): str(entry.get("group"))
            for by_suite in self.results.values()
            for suite, result in by_suite.items()
            for task, entry in result["tasks"].items()
        }


def read_run(folder: Path, name: str) -> Run:
    """Read a run's folder.

    Raises:
        UserError: a file in it is damaged.
    """
    run = Run(folder, name)
    if (folder / "job.json").is_file():
        run.job = read_json(folder / "job.json")
    config = folder / "config.yaml"
    if config.is_file():
        try:
            run.settings = flat(yaml.load(config.read_text(encoding="utf-8"), Loader))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{config}: damaged ({type(error).__name__}); bring it back") from error
    run.settings = run.settings or flat(run.job.get("settings") or {})
    if (folder / "metrics.jsonl").is_file():
        run.rows = metrics.lines(folder / "metrics.jsonl")
        _sort(run)
    for path in sorted((folder / "evaluations").glob("step-*")):
        if path.is_dir() and path.name[5:].isdecimal() and (results := results_in(path)):
            run.results[int(path.name[5:])] = results
    for path in sorted((folder / "answers").glob("step-*.jsonl")):
        if path.stem[5:].isdecimal():
            run.answers[int(path.stem[5:])] = _lines(path)
    return run


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{path}: damaged ({first_line(error)}); remove it") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: damaged (a line of it is no JSON object); remove it")
    return rows


def _sort(run: Run) -> None:
    """Rows by kind; of a step that stands there twice the last holds."""
    steps: dict[int, dict[str, Any]] = {}
    began = 0.0
    for row in run.rows:
        step = row["step"]
        if isinstance(validation := row.get("validation"), dict):
            run.validations[step] = validation
        elif isinstance(evaluation := row.get("evaluation"), dict):
            run.evaluations.setdefault(step, {}).update(evaluation)
        elif "event" in row:
            run.events.append(row)
            time = number(row.get("time"))
            if row["event"] == "start":
                run.launches.append(Launch(int(row.get("ranks") or 1)))
                began = (time or 0.0) - (number(row.get("seconds")) or 0.0)
            if run.launches and time is not None:
                run.launches[-1].wall_seconds = max(run.launches[-1].wall_seconds, time - began)
        elif "loss" in row:
            steps[step] = row
            if not run.launches:
                run.launches.append(Launch(1))
            run.launches[-1].training_seconds += number(row.get("seconds")) or 0.0
    run.steps = [steps[step] for step in sorted(steps)]


def run_folders(root: Path) -> Iterator[Path]:
    """The folders of runs and of failed jobs below a folder, in order."""
    for where, below, files in os.walk(root):
        if "metrics.jsonl" in files or "job.json" in files:
            yield Path(where)
        below[:] = sorted(name for name in below if name not in NOT_RUNS and not name.startswith("."))


def base_results(root: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Results of untouched base models beside runs (`base/<fingerprint>/<suite>.json`): by model, by suite."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for folder in sorted(path for path in root.glob("base/*") if path.is_dir()):
        for suite, result in results_in(folder).items():
            found.setdefault(str(result.get("model")), {})[suite] = result
    return found
