"""A suite's tasks, opened: lm-eval's task objects with shots and seed set, local data in place of a hub's, subsets."""

import contextlib
import functools
import importlib.util
import logging
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_recipes.config import TaskConfig
from llm_recipes.errors import UserError, did_you_mean, first_line
from llm_recipes.evaluation import definitions
from llm_recipes.evaluation.rows import Row, read_rows, split_files
from llm_recipes.evaluation.subsets import subset
from llm_recipes.evaluation.suites import DATA_KEY, Suite

INVALID = "[invalid]"
"""What lm-eval's filters give for an answer that they cannot find."""
PARSED = "parsed"
NAMED = re.compile(r"^['\"]?(?:task|group)['\"]?: *['\"]?([^\s'\"\[]+)['\"]? *(?:#.*)?$", re.MULTILINE)
"""A definition's name, as it stands in its file."""


@dataclass
class OpenTask:
    """A task, ready for lm-eval's `evaluate`."""

    task: Any
    """lm-eval's object; its few-shot examples are drawn anew for each item, so it is good for one evaluation."""
    samples: list[int] | None
    """Numbers of the items to take, ascending, or None for all."""
    items_of: int
    """Items that the task has."""
    metric: str
    """The figure that is its score, as lm-eval calls it: `acc,none`."""
    parsed: str | None
    """The figure that is the share of answers that could be parsed, or None where nothing is generated."""
    higher_is_better: bool


def open_tasks(
    suite: Suite, tokenizer: Any = None, max_length: int | None = None
) -> tuple[dict[str, OpenTask], dict[str, str]]:
    """Open a suite's tasks, by the suite's names of them.

    Args:
        tokenizer: the model's; with `max_length` a task whose questions may be too long shortens their texts.
        max_length: tokens that the model takes.

    Returns:
        The tasks of lm-eval's and ours; and, by name, why one is missing (of any kind): one line, with what to put
        where.

    Raises:
        UserError: a task or figure of an unknown name, with the nearest; local data that is not as it must be; lm-eval
            is not installed.
    """
    _need_lm_eval()
    opened: dict[str, OpenTask] = {}
    missing: dict[str, str] = {}
    with _quiet():
        for name, entry in suite.config.tasks.items():
            if entry.kind != "lm_eval":
                if entry.path is None and entry.kind in NEEDED:
                    missing[name] = f"no data: {DATA_KEY.format(name)}=PATH, {NEEDED[entry.kind]}"
                continue
            settings = _settings(suite, name, entry)
            task = _build(suite, name, entry, settings, missing)
            if task is None:
                continue
            task.set_fewshot_seed(suite.config.seed)
            if hasattr(task, "fit"):
                task.fit(tokenizer, max_length)
            parsed = _add_parsed(task) if task.OUTPUT_TYPE == "generate_until" else False
            metric = _metric(suite, name, entry, task)
            opened[name] = OpenTask(
                task=task,
                samples=subset(task, entry.items, suite.config.seed),
                items_of=len(task.eval_docs),
                metric=metric,
                parsed=f"{PARSED},{metric.partition(',')[2]}" if parsed else None,
                higher_is_better=bool(task.higher_is_better()[metric.partition(",")[0]]),
            )
    return opened, missing


NEEDED = {
    "bits_per_byte": "JSONL or Parquet with a column 'text', or a token file",
    "prompts": "a text file with a prompt a line, or JSONL with 'prompt'",
}


def needs_generation(suite: Suite) -> list[str]:
    """Names of the suite's tasks for which a model has to write, not only to judge.

    Raises:
        UserError: as of `open_tasks`.
    """
    _need_lm_eval()
    found = []
    with _quiet():
        for name, entry in suite.config.tasks.items():
            if entry.kind in ("prompts", "judge"):
                found.append(name)
            elif entry.kind == "lm_eval":
                settings = _settings(suite, name, entry)
                kind = settings.get("output_type", getattr(settings.get("class"), "OUTPUT_TYPE", None))
                if kind is None or kind == "generate_until":
                    found.append(name)
    return found


def _settings(suite: Suite, name: str, entry: TaskConfig) -> dict[str, Any]:
    """A task's definition, ours or lm-eval's.

    Raises:
        UserError: there is none of that name, with the nearest.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    wanted = entry.task or name
    path = definitions.path_of(wanted) or _of_lm_eval().get(wanted)
    if path is None:
        known = {*_of_lm_eval(), *(each.stem for each in definitions.FOLDER.rglob("*.yaml"))} - {"common"}
        raise UserError(f"suite {suite.name}: tasks.{name}: no task '{wanted}', {_nearest(wanted, known)}")
    settings: dict[str, Any] = load_yaml(path)
    if "group" in settings and isinstance(settings.get("task"), list):
        raise UserError(f"suite {suite.name}: tasks.{name}: '{wanted}' is a group of lm-eval's; name its tasks instead")
    for key in ("tag", "group", "task_list"):
        settings.pop(key, None)
    return settings


def _nearest(word: str, names: set[str]) -> str:
    """The nearest name; of 13,000 names no list."""
    said = did_you_mean(word, names)
    return said if said.startswith("did") else "neither ours nor lm-eval's (python -m lm_eval ls tasks)"


@functools.cache
def _of_lm_eval() -> dict[str, Path]:
    """The file of each task and group of lm-eval's. Its own index, which parses them all, takes ten seconds."""
    import lm_eval.tasks

    found: dict[str, Path] = {}
    for path in sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"), key=lambda each: each.as_posix()):
        for name in NAMED.findall(path.read_text(encoding="utf-8", errors="replace")):
            found.setdefault(name, path)
    return found


def _build(suite: Suite, name: str, entry: TaskConfig, settings: dict[str, Any], missing: dict[str, str]) -> Any:
    """lm-eval's object, or None where its data is not there: then `missing` says so."""
    import jinja2
    from lm_eval.api.task import ConfigurableTask

    key = DATA_KEY.format(name)
    metadata = settings.get("metadata") or {}
    described = metadata.get("rows") or _columns_of(settings)
    settings["task"] = name
    settings["metadata"] = metadata
    if entry.shots is not None:
        settings["num_fewshot"] = entry.shots
    if entry.max_new_tokens is not None:
        settings["generation_kwargs"] = {**settings.get("generation_kwargs", {}), "max_gen_toks": entry.max_new_tokens}
    absent = [package for package in metadata.get("packages", []) if importlib.util.find_spec(package) is None]
    if absent:
        missing[name] = f"{absent[0]} is not installed: pip install {absent[0].replace('_', '-')}"
        return None
    if entry.path is not None:
        settings |= _local(split_files(entry.path, key), settings, f"{key}={entry.path}", described)
    elif not settings.get("dataset_path") and "custom_dataset" not in settings and "class" not in settings:
        missing[name] = f"no data: {key}=PATH, {described}"
        return None
    built: Callable[..., Any] = settings.pop("class", ConfigurableTask)
    try:
        with _hub_or_cache() if entry.path is None and "custom_dataset" not in settings else contextlib.nullcontext():
            task = built(config=settings)
        if settings.get("num_fewshot"):
            _check_shots(task, settings["num_fewshot"], f"suite {suite.name}: tasks.{name}")
        return task
    except (jinja2.UndefinedError, KeyError, IndexError, TypeError) as error:
        if entry.path is None:
            raise
        raise UserError(f"{key}={entry.path}: not {described} ({type(error).__name__}: {error})") from error
    except (OSError, ValueError, ImportError) as error:
        if entry.path is not None:
            raise
        missing[name] = f"no data ({first_line(error)[:120]}): {key}=PATH, {described}"
        return None


def _columns_of(settings: Mapping[str, Any]) -> str:
    """What rows a definition of lm-eval's needs, as far as it can be told."""
    import jinja2.meta

    said = f"rows as of '{settings.get('dataset_path')}' on the hub"
    templates = [settings.get(key) for key in ("doc_to_text", "doc_to_target", "doc_to_choice")]
    if settings.get("process_docs") or any(callable(each) for each in templates):
        return said
    names: set[str] = set()
    for template in (each for each in templates if isinstance(each, str)):
        found = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(template))
        names |= found or ({template} if template.isidentifier() else set())
    return f"{said} ({', '.join(sorted(names))})" if names else said


def _check_shots(task: Any, shots: int, where: str) -> None:
    """Refuse more shots than there are examples."""
    there = len(task.sampler.df) if hasattr(task, "sampler") else shots
    from_items = task.fewshot_cfg.split == task.config.test_split  # an item is no example for itself
    if shots > there - from_items:
        raise UserError(f"{where}.shots={shots}: there are only {there - from_items} examples to take them from")


def _local(files: Mapping[str, list[str]], settings: Mapping[str, Any], where: str, described: str) -> dict[str, Any]:
    """Settings by which a task reads local rows: its items from `test` (or the split that it measures), its shots from
    `train`. A single file is both; an item is then no example for itself."""
    measured = settings.get("test_split") or settings.get("validation_split") or "test"
    order = [measured, "test", "validation", ""]
    split = next((each for each in order if each in files), None)
    if split is None:
        raise UserError(f"{where}: no {measured} rows, only {', '.join(files)}; needed: {described}")
    metadata = settings.get("metadata") or {}
    columns = metadata.get("columns", [])
    if metadata.get("train") and settings.get("num_fewshot") and "train" not in files:
        raise UserError(
            f"{where}: no train rows, which its {settings['num_fewshot']} shots come from; needed: {described}"
        )
    data = {"test": _dataset(files[split], columns, described)}
    shots = next((each for each in ("train", "validation") if each in files and each != split), None)
    if shots is not None:
        data["train"] = _dataset(files[shots], columns, described)
    fewshot = settings.get("fewshot_config")
    fixed = isinstance(fewshot, dict) and fewshot.get("samples") is not None
    return {
        "custom_dataset": lambda **_: data,
        "test_split": "test",
        "validation_split": None,
        "training_split": "train" if shots else None,
        "fewshot_split": None if fixed else "train" if shots else "test",
    }


def _dataset(files: Sequence[str], columns: Sequence[str], described: str) -> Any:
    import datasets
    import pyarrow

    rows = read_rows(files)
    for number, row in enumerate(rows, 1):
        lacking = next((column for column in columns if row.get(column) is None), None)
        if lacking is not None:
            raise UserError(f"{', '.join(files)}: row {number} has no '{lacking}'; needed: {described}")
    try:
        return datasets.Dataset.from_list(rows)
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        raise UserError(f"{', '.join(files)}: rows of different kinds ({first_line(error)})") from error


def _add_parsed(task: Any) -> bool:
    """Let a task that generates also give, for each filter, the share of answers in which the filter found one.

    A definition of ours that judges this itself (`parsed` in its metric list) is left alone.
    """
    from lm_eval.api.metrics import mean

    if PARSED in task.aggregation():
        return True
    if not isinstance(task.aggregation(), dict) or task.aggregation() is not task.aggregation():
        return False  # a class of lm-eval's that makes its own each time
    judge = task.process_results

    def process_results(doc: Row, results: Sequence[Any]) -> dict[str, Any]:
        answer = str(results[0]).strip()
        return {**judge(doc, results), PARSED: float(bool(answer) and answer != INVALID)}

    task.process_results = process_results
    task.aggregation()[PARSED] = mean
    task.higher_is_better()[PARSED] = True
    return True


def _metric(suite: Suite, name: str, entry: TaskConfig, task: Any) -> str:
    """The full name of the figure that is a task's score.

    Raises:
        UserError: the task has no such figure.
    """
    metrics = [metric for metric in task.aggregation() if metric != PARSED and not metric.endswith("_stderr")]
    filters = [each.name for each in task._filters]
    known = [f"{metric},{each}" for metric in metrics for each in filters]
    wanted = entry.metric or metrics[0]
    if wanted in metrics:
        return f"{wanted},{filters[0]}"
    if wanted not in known:
        where = f"suite {suite.name}: tasks.{name}.metric={wanted}"
        raise UserError(f"{where}: no such figure, {did_you_mean(wanted, [*metrics, *known])}")
    return wanted


def _need_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(f"suite: {error.name} is not installed; pip install 'llm_recipes[eval]'") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what lm-eval and datasets log while a task is built."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


@functools.cache
def _hub_is_there() -> bool:
    """Whether the hub's name can be looked up at all; behind a proxy it need not be."""
    import huggingface_hub.constants

    host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname
    try:
        return bool(urllib.request.getproxies()) or bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


@contextlib.contextmanager
def _hub_or_cache() -> Iterator[None]:
    """On a node without network: what the hub's cache has, at once; else each task waits half a minute for retries."""
    import datasets.config
    import huggingface_hub.constants

    places = (datasets.config, huggingface_hub.constants)
    before = [each.HF_HUB_OFFLINE for each in places]
    for each, offline in zip(places, before, strict=True):
        each.HF_HUB_OFFLINE = offline or not _hub_is_there()
    try:
        yield
    finally:
        for each, offline in zip(places, before, strict=True):
            each.HF_HUB_OFFLINE = offline
