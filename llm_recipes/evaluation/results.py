"""A suite's scores of one model: a file that holds them with everything that they depend on, and how they are shown.

A score that is not there is missing, with the reason: never 0, never -1, and no mean stands over it.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_recipes.checkpoints import manifest
from llm_recipes.config import SuiteConfig
from llm_recipes.errors import UserError
from llm_recipes.folders import make_folder, write_json
from llm_recipes.telemetry.progress import show_table

Result = dict[str, Any]
NEEDED = ("suite", "suite_digest", "model_fingerprint", "groups", "tasks", "missing")
OTHER_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "adapter_config.json", "base.json",
)  # fmt: skip


def group_means(config: SuiteConfig, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The plain mean of each group's tasks: the suite's score in that group. None where one of them is missing. Bits
    per byte and prompts are in no mean."""
    groups: dict[str, list[float | None]] = {}
    for name, entry in config.tasks.items():
        if entry.kind == "lm_eval":
            groups.setdefault(entry.group, []).append(tasks[name]["score"] if name in tasks else None)
    return {
        group: None if None in scores else math.fsum(each for each in scores if each is not None) / len(scores)
        for group, scores in groups.items()
    }


def fingerprint(folder: Path) -> str:
    """16 hexadecimal digits over a model folder's weights, configuration and tokenizer, or an adapter's and its base's.

    Raises:
        UserError: no weights in it.
    """
    return manifest.fingerprint(folder, OTHER_FILES)


def path_of(folder: Path, suite: str) -> Path:
    return folder / f"{suite}.json"


def refuse_folder(folder: Path, key: str) -> None:
    """Find out before the work whether results can be written.

    Raises:
        UserError: they cannot.
    """
    try:
        make_folder(folder)
        trial = folder / f".{os.getpid()}.partial"
        trial.write_text("")
        trial.unlink()
    except OSError as error:
        raise UserError(f"{key}={folder}: results cannot be written there ({error.strerror}); give output=") from error


def write(folder: Path, result: Result) -> Path:
    """Write a result as a whole, or not at all."""
    make_folder(folder)
    path = path_of(folder, result["suite"])
    write_json(path, result)
    return path


def read(path: Path) -> Result:
    """A result as it was written.

    Raises:
        UserError: it is none.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a result that can be read ({error}); remove it, and measure again") from error
    lacking = [key for key in NEEDED if not isinstance(result, dict) or key not in result]
    if lacking:
        raise UserError(f"{path}: not a result of evaluate (no '{lacking[0]}'); remove it, and measure again")
    return dict(result)


def known(folder: Path, suite: str, digest: str, model: str, dtype: str, chat_template: bool = False) -> Result | None:
    """The result that is there already for this suite as it is now, and this model, asked in the same way; None where
    there is none.

    Args:
        dtype: that computes, as a result names it.
        chat_template: whether it is asked through the tokenizer's.
    """
    path = path_of(folder, suite)
    if not path.is_file():
        return None
    result = read(path)
    asked = (
        result["suite_digest"],
        result["model_fingerprint"],
        result.get("dtype"),
        result.get("chat_template", False),
    )
    return result if asked == (digest, model, dtype, chat_template) else None


def metrics_row(result: Result, step: int, consumed_tokens: int | None) -> dict[str, Any]:
    """A result as a row of a run's `metrics.jsonl`."""
    tasks = result["tasks"]
    scores = {
        "groups": result["groups"],
        "tasks": {name: each["score"] for name, each in tasks.items()},
        "standard_errors": {
            name: each["standard_error"] for name, each in tasks.items() if each["standard_error"] is not None
        },
    }
    return {"step": step, "consumed_tokens": consumed_tokens, "evaluation": {result["suite"]: scores}}


def show(results: Sequence[Result]) -> None:
    """One suite's results of one or several models as a table, a model to a column; and prompts side by side."""
    first = results[0]
    title, names = f"suite {first['suite']}", [str(each["model"]) for each in results]
    if len(names) == 1:
        title, names = f"{title}: {names[0]}", ["score"]
    tasks = list(dict.fromkeys(name for each in results for name in (*each["tasks"], *each["missing"])))
    rows = []
    for name in tasks:
        there = next((each["tasks"][name] for each in results if name in each["tasks"]), None)
        row = {"task": name, "metric": there["metric"] if there else "", "group": there["group"] if there else ""}
        rows.append(row | {model: _score(each, name) for model, each in zip(names, results, strict=True)})
        if there:
            rows[-1] |= {"items": _items(there), "shots": there["shots"], "parsed": there["parsed"]}
        else:
            rows[-1] |= {"items": "", "shots": None, "parsed": None}
    for group in first["groups"]:
        row = {"task": f"mean of {group}", "metric": "", "group": group}
        means = {model: _mean(each, group) for model, each in zip(names, results, strict=True)}
        rows.append(row | means | {"items": "", "shots": None, "parsed": None})
    if rows:
        show_table(title, rows, names)
    for task, prompts in first.get("prompts", {}).items():
        sides = [each.get("prompts", {}).get(task, []) for each in results]
        if any(len(side) != len(prompts) for side in sides):
            continue
        show_table(
            f"{title}: {task}",
            [
                {"prompt": prompt["prompt"]}
                | {
                    name: f"{side[number]['completion']}\n({side[number]['bits_per_byte']:.3f} bits per byte)"
                    for name, side in zip(names, sides, strict=True)
                }
                for number, prompt in enumerate(prompts)
            ],
            names,
        )


def _score(result: Result, name: str) -> str:
    task = result["tasks"].get(name)
    if task is None:
        return f"missing: {result['missing'].get(name, 'not measured')}"
    error = task["standard_error"]
    return f"{task['score']:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _mean(result: Result, group: str) -> str:
    mean = result["groups"].get(group)
    return "missing" if mean is None else f"{mean:.4f}"


def _items(task: Mapping[str, Any]) -> str:
    if task["items"] is None:
        return ""
    return f"{task['items']:,}" + (f" of {task['items_of']:,}" if task["items_of"] != task["items"] else "")
