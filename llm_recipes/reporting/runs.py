"""Any runs, wherever below a folder: as a table for other programs, and on the terminal."""

import csv
import io
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from llm_recipes.errors import UserError
from llm_recipes.reporting.reading import Run, base_results, number, read_run, run_folders
from llm_recipes.reporting.rule import better
from llm_recipes.reporting.scores import Score, full_name
from llm_recipes.reporting.search import base_scores, model_of, models_of, setting
from llm_recipes.reporting.texts import Texts, amount, figure, shown
from llm_recipes.telemetry.progress import show_whole

KEY_SETTINGS = (
    "optim.lr", "optim.min_lr", "optim.min_lr_ratio", "optim.weight_decay", "schedule.name", "schedule.warmup_steps",
    "train.steps", "train.stop_at", "train.global_batch_size", "train.trainable", "data.seq_len", "data.seed",
    "parallel.precision", "parallel.fp8",
)  # fmt: skip
"""What a run is told by, besides what its search has varied."""


@dataclass
class Runs:
    """Runs in the order that they were started in.

    Attributes:
        scores: by run, each score as it was measured last, and at which step.
        bases: scores of the untouched models, by `model.path`.
        best: full name of the score that counts, if any is there.
    """

    folder: Path
    runs: list[Run]
    scores: list[dict[str, tuple[int, Score]]]
    bases: dict[str, dict[str, Score]]
    best: str | None

    @cached_property
    def examples(self) -> dict[str, Score]:
        """Of each score any model's."""
        found = {name: score for base in self.bases.values() for name, score in base.items()}
        return found | {name: score for each in self.scores for name, (_, score) in each.items()}

    @cached_property
    def means(self) -> list[str]:
        return [name for name, score in self.examples.items() if score.is_mean]

    @cached_property
    def model_names(self) -> dict[str, str]:
        """Each base model's shortest ending that no other has; `model` alone would say nothing."""
        found = {}
        for model in self.bases:
            parts = Path(model).parts
            for count in range(1, len(parts) + 1):
                ending = parts[-count:]
                same = [other for other in self.bases if Path(other).parts[-count:] == ending]
                if len(same) == 1 and ending != ("model",):
                    break
            found[model] = "/".join(parts[-count:]) if parts else model
        return found

    @property
    def leader(self) -> int | None:
        """The number of the run that is best in `best`."""
        found: int | None = None
        for at, scores in enumerate(self.scores):
            if self.best in scores and (
                found is None or better(scores[self.best][1], self.scores[found][self.best][1])
            ):
                found = at
        return found

    def texts(self, language: str) -> Texts:
        return Texts(language, self.examples.values())


def read_runs(folder: Path, best: str | None) -> Runs:
    """Read all runs below a folder.

    Args:
        best: a score's name; None: Japanese, or the first group's mean.

    Raises:
        UserError: there is no run, a file is damaged, or there is no such score.
    """
    if not folder.is_dir():
        raise UserError(f"runs={folder}: no such folder")
    runs = [read_run(each, each.relative_to(folder).as_posix()) for each in run_folders(folder)]
    if not runs:
        raise UserError(f"runs={folder}: no run in it (folders with metrics.jsonl), however deep")
    if len(runs) == 1 and runs[0].folder == folder:
        runs[0].name = folder.resolve().name
    runs.sort(key=lambda run: (run.started, run.name))
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for root in dict.fromkeys(above for run in runs for above in (run.folder.parent, run.folder.parent.parent)):
        results |= base_results(root)
    found = Runs(
        folder, runs, [_latest(run) for run in runs],
        {model: base_scores(results, runs, model) for model in models_of(runs)}, None,
    )  # fmt: skip
    japanese = [name for name in found.means if found.examples[name].group == "japanese"]
    known = found.examples
    found.best = full_name(best, known, f"best={best}") if best else next(iter([*japanese, *found.means]), None)
    return found


def _latest(run: Run) -> dict[str, tuple[int, Score]]:
    return {
        name: (step, score) for step in sorted(run.scored_steps() - {0}) for name, score in run.scores(step).items()
    }


def columns_of(runs: Runs) -> list[str]:
    """The settings that the table has: those that tell runs, and those that a search has varied, where any is there."""
    varied = dict.fromkeys(key for run in runs.runs for key in run.overrides)
    keys = dict.fromkeys([*KEY_SETTINGS, *varied])
    return [key for key in keys if any(setting(run, key) is not None for run in runs.runs)]


def csv_of(runs: Runs) -> str:
    """One row per run; an empty cell where nothing is known. Times are UTC, scores in full precision."""
    keys = columns_of(runs)
    names = list(runs.examples)
    heads = ["run", "base_model", "status", "error", "started", *keys, "step", "loss", "consumed_tokens"]
    heads += ["training_seconds", "device_hours", "tokens_per_second_per_device", "devices", "left_out", "rollbacks"]
    text = io.StringIO()
    table = csv.DictWriter(text, [*heads, *(each for name in names for each in (name, f"{name} at step"))])
    table.writeheader()
    for run, scores in zip(runs.runs, runs.scores, strict=True):
        last: Mapping[str, Any] = run.at(None)
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.started)) if math.isfinite(run.started) else None
        row: dict[str, Any] = {
            "run": run.name, "base_model": model_of(run), "status": run.status, "error": run.error,
            "started": began,
            "step": run.last_step if run.steps else None, "loss": number(last.get("loss")),
            "consumed_tokens": last.get("consumed_tokens"),
            "training_seconds": sum(each.training_seconds for each in run.launches) or None,
            "device_hours": run.device_hours, "tokens_per_second_per_device": run.tokens_per_second,
            "devices": run.launches[-1].ranks if run.launches else run.job.get("ranks"),
            "left_out": run.count("left_out"), "rollbacks": run.count("rollback"),
        }  # fmt: skip
        row |= {key: setting(run, key) for key in keys}
        for name, (step, score) in scores.items():
            row |= {name: score.value, f"{name} at step": step}
        table.writerow(row)
    return text.getvalue()


def show_runs(runs: Runs) -> None:
    """A short table on the terminal; the whole of it is in the CSV."""
    say = runs.texts("en")
    table = Table(title=str(runs.folder), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("run", "base model", "status"):
        table.add_column(name)
    heads = ["lr", "step", "loss", "tokens", *(say.score(runs.examples[name]) for name in runs.means)]
    for name in heads:
        table.add_column(escape(name), justify="right")
    for run, scores in zip(runs.runs, runs.scores, strict=True):
        loss, lr = number(run.at(None).get("loss")), setting(run, "optim.lr")
        cells = [
            run.name,
            runs.model_names[model_of(run)],
            run.status,
            "-" if lr is None else shown(lr),
            f"{run.last_step:,}",
        ]
        cells += ["-" if loss is None else figure(loss), amount(number(run.at(None).get("consumed_tokens")))]
        cells += [figure(scores[name][1].value) if name in scores else "-" for name in runs.means]
        table.add_row(*map(escape, cells))
    show_whole(table)
