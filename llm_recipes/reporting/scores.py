"""Scores by name: `SUITE.GROUP` (a group's mean), `SUITE.GROUP.TASK`, `bits_per_byte.SET` (a run's own validation).

Figures of different suites stand side by side and are never put together.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_recipes.errors import UserError, did_you_mean

VALIDATION = "bits_per_byte"
SHOWN_NAMES = 12


@dataclass(frozen=True)
class Score:
    """A figure that was measured.

    Attributes:
        suite: None of a run's own validation.
        group: of tasks; of a run's own validation `bits_per_byte`.
        task: a task or a validation set; None of a group's mean.
        higher: whether higher is better.
        unit: `score`, `bits_per_byte`, or `nats_per_token` where the bytes are not known.
    """

    value: float
    suite: str | None
    group: str
    task: str | None = None
    standard_error: float | None = None
    higher: bool = True
    unit: str = "score"

    @property
    def name(self) -> str:
        return ".".join(part for part in (self.suite, self.group, self.task) if part is not None)

    @property
    def is_mean(self) -> bool:
        return self.task is None


def _finite(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def scores_in(
    rows: Mapping[str, Mapping[str, Any]],
    results: Mapping[str, Mapping[str, Any]],
    validation: Mapping[str, Mapping[str, Any]],
    groups: Mapping[tuple[str, str], str],
) -> dict[str, Score]:
    """All scores of a model at a step, by name. A result file says more than a row of `metrics.jsonl`: it goes first.

    Args:
        rows: by suite, `groups`, `tasks` and `standard_errors`.
        results: by suite, result files.
        validation: by set.
        groups: the group of (suite, task), where only a row is there.
    """
    found: list[Score] = []
    for suite in [*results, *(suite for suite in rows if suite not in results)]:
        if suite in results:
            tasks, means = results[suite]["tasks"], results[suite].get("groups") or {}
        else:
            means, errors = rows[suite].get("groups") or {}, rows[suite].get("standard_errors") or {}
            tasks = {
                task: {"group": groups[suite, task], "score": value, "standard_error": errors.get(task)}
                for task, value in (rows[suite].get("tasks") or {}).items()
                if (suite, task) in groups
            }
        for group, mean in means.items():
            if (value := _finite(mean)) is not None:
                found.append(Score(value, suite, group, None, _of_mean(tasks, group)))
        for task, entry in tasks.items():
            if (value := _finite(entry.get("score"))) is None:
                continue
            per_byte = VALIDATION in (entry.get("group"), entry.get("metric"))
            error, higher = _finite(entry.get("standard_error")), bool(entry.get("higher_is_better", not per_byte))
            unit = VALIDATION if per_byte else "score"
            found.append(Score(value, suite, str(entry.get("group")), task, error, higher, unit))
    for name, entry in validation.items():
        for unit in (VALIDATION, "nats_per_token"):
            if (value := _finite(entry.get(unit))) is not None:
                found.append(Score(value, None, VALIDATION, name, None, False, unit))
                break
    return {score.name: score for score in found}


def _of_mean(tasks: Mapping[str, Mapping[str, Any]], group: str) -> float | None:
    """The standard error of a plain mean over independent tasks: the root of the sum of squares, over their number."""
    errors = [_finite(entry.get("standard_error")) for entry in tasks.values() if entry.get("group") == group]
    known = [each for each in errors if each is not None]
    if not errors or len(known) != len(errors):
        return None
    return math.sqrt(sum(each * each for each in known)) / len(known)


def full_name(name: str, known: Mapping[str, Score], where: str) -> str:
    """A score's full name from what the user wrote; a group or a task alone will do where one suite has it.

    Args:
        known: any model's scores, by full name.
        where: the key and what was written, for the message.

    Raises:
        UserError: there is none, or there are several.
    """
    if name in known:
        return name
    means = {full: score for full, score in known.items() if score.is_mean}
    found = [full for full, score in means.items() if score.group == name]
    found = found or [full for full, score in known.items() if name in (score.task, f"{score.group}.{score.task}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{where}: several have that name; give one of {_some(found)}")
    if not known:
        raise UserError(f"{where}: nothing has been measured yet, no score is there; see evaluate")
    hint = did_you_mean(name, {*known, *(score.group for score in means.values())})
    near = f"{hint} There are" if hint.startswith("did") else "there are"
    rest = (each for each in known if each not in means)
    raise UserError(f"{where}: no such score, {near} {_some([*means, *rest])}")


def _some(names: list[str]) -> str:
    left = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {left} more" if left > 0 else "")
