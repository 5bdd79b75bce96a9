"""A suite: tasks whose figures stand side by side. A file of `conf/suite/`, the user's own first."""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from llm_recipes.checks import check_values
from llm_recipes.config import SuiteConfig, TaskConfig
from llm_recipes.data.token_file import checksum
from llm_recipes.errors import UserError, did_you_mean
from llm_recipes.evaluation import definitions
from llm_recipes.evaluation.rows import files_of
from llm_recipes.folders import OWN_CONF, conf_folder

DATA_KEY = "data.{}"


@dataclass(frozen=True)
class Suite:
    """A suite by its name, and what it holds."""

    name: str
    config: SuiteConfig


def load(name: str) -> Suite:
    """The suite of that name: `./conf/suite/NAME.yaml` if there is one, else ours. `like`, `shots` and `items` are
    worked into its tasks.

    Raises:
        UserError: there is none, with the nearest name; a key or value in it is wrong, with the file's name.
    """
    return Suite(name, _resolve(name, ()))


def load_all(
    names: Any, shots: int | None = None, items: int | None = None, data: Mapping[str, Any] | None = None
) -> list[Suite]:
    """The suites of a name or a list of names, with options for all of them (see `with_options`).

    Raises:
        UserError: as of `load`; a name twice; local data for a task that is in none of them.
    """
    listed = [str(each) for each in ([names] if isinstance(names, str) else list(names))]
    if not listed:
        raise UserError(f"suite: none is given, {did_you_mean('', known())}")
    twice = next((name for name in listed if listed.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"suite={twice}: named twice")
    suites = [load(name) for name in listed]
    data = dict(data or {})
    for name in data:
        if not any(_takes(suite, name) for suite in suites):
            raise UserError(_no_such_task(name, listed, {task for suite in suites for task in suite.config.tasks}))
    named = {name for suite in suites for name in suite.config.tasks}

    def own(suite: Suite) -> dict[str, Any]:
        """A task of another suite is no new text for this one."""
        return {
            name: path
            for name, path in data.items()
            if name in suite.config.tasks or (name not in named and _takes(suite, name))
        }

    return [with_options(suite, shots, items, own(suite)) for suite in suites]


def with_options(
    suite: Suite, shots: int | None = None, items: int | None = None, data: Mapping[str, Any] | None = None
) -> Suite:
    """A suite with other shots, at most so many items, and local data.

    Args:
        data: a path by task. A suite that holds nothing but texts (`bits_per_byte`) also takes new names.

    Raises:
        UserError: a task that is not in the suite, with the nearest name; a number that cannot be meant.
    """
    _check_numbers("", shots, items)
    tasks = {name: _limited(task, shots, items) for name, task in suite.config.tasks.items()}
    for name, path in (data or {}).items():
        if not _takes(suite, name):
            raise UserError(_no_such_task(name, [suite.name], tasks))
        task = tasks.get(name) or TaskConfig(kind="bits_per_byte", group="bits_per_byte")
        tasks[name] = dataclasses.replace(task, path=path)
    return Suite(suite.name, dataclasses.replace(suite.config, tasks=tasks))


def digest(suite: Suite) -> str:
    """SHA-256 of everything that a score of the suite depends on but the model: its tasks and seed, the definitions
    and local data that they name (by their checksums), and lm-eval's version."""
    try:
        harness = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        harness = ""
    files = {}
    for task_name, task in suite.config.tasks.items():
        if task.path is not None:
            files[task_name] = [checksum(path) for path in files_of(task.path, DATA_KEY.format(task_name))]
        elif task.kind == "lm_eval":
            files[task_name] = [checksum(path) for path in definitions.files_of(task.task or task_name)]
        elif task.kind == "judge":
            files[task_name] = [checksum(definitions.QUESTIONS)]
    tasks = {
        name: dataclasses.asdict(dataclasses.replace(task, path=None)) for name, task in suite.config.tasks.items()
    }
    for task_name, task in suite.config.tasks.items():
        if task.kind != "judge":
            del tasks[task_name]["answers"]  # which came later: what was measured before stays measured
    said = {"name": suite.name, "tasks": tasks, "seed": suite.config.seed, "files": files, "harness": harness}
    return hashlib.sha256(json.dumps(said, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def known() -> list[str]:
    """Names of all suites, ours and the user's."""
    return sorted({path.stem for root in (OWN_CONF, conf_folder()) for path in (root / "suite").glob("*.yaml")})


def _check_numbers(where: str, shots: int | None, items: int | None) -> None:
    for key, value, least in (("shots", shots, 0), ("items", items, 1)):
        if value is not None and value < least:
            raise UserError(f"{where}{key}={value}: must be at least {least}")


def _takes(suite: Suite, name: str) -> bool:
    return name in suite.config.tasks or all(task.kind == "bits_per_byte" for task in suite.config.tasks.values())


def _no_such_task(name: str, suites: Sequence[str], tasks: Any) -> str:
    return f"{DATA_KEY.format(name)}: no such task in suite {', '.join(suites)}, {did_you_mean(name, tasks)}"


def _limited(task: TaskConfig, shots: int | None, items: int | None) -> TaskConfig:
    """A task with other shots and at most so many items."""
    if task.kind not in ("lm_eval", "judge"):
        return task
    fewest = min((each for each in (task.items, items) if each is not None), default=None)
    own = shots if shots is not None and task.kind == "lm_eval" else task.shots
    return dataclasses.replace(task, shots=own, items=fewest)


def _resolve(name: str, above: tuple[str, ...]) -> SuiteConfig:
    """A suite's file with that of `like` below it."""
    file = next(
        (path for root in (OWN_CONF, conf_folder()) if (path := root / "suite" / f"{name}.yaml").is_file()), None
    )
    if file is None or "/" in name:
        raise UserError(f"suite={name}: no such suite, {did_you_mean(name, known())}")
    config = _read(file)
    if config.like is None:
        tasks = config.tasks
    else:
        if config.like in (*above, name):
            raise UserError(f"{file}: like: {' -> '.join([*above, name, config.like])} is a circle")
        tasks = {**_resolve(config.like, (*above, name)).tasks, **config.tasks}
    tasks = {each: _limited(task, config.shots, config.items) for each, task in tasks.items()}
    return dataclasses.replace(config, like=None, shots=None, items=None, tasks=tasks)


def _read(file: Path) -> SuiteConfig:
    """One file, typed.

    Raises:
        UserError: it is no YAML, or a key, type or value in it is wrong.
    """
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{file}{line}: not YAML, {error.problem}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not YAML, {' '.join(str(error).split())[:200]}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file}: not a suite, which has 'tasks: {{NAME: {{...}}}}'")
    try:
        config = cast(SuiteConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SuiteConfig), raw)))
        check_values(config)
        _check_numbers("", config.shots, config.items)
        for name, task in config.tasks.items():
            _check_numbers(f"tasks.{name}.", task.shots, task.items)
            if task.answers != 1 and task.kind != "judge":
                raise UserError(
                    f"tasks.{name}.answers={task.answers}: only a task of kind judge is asked several times"
                )
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{file}: {_explain(error)}") from error
    return config


def _explain(error: OmegaConfBaseException) -> str:
    """What OmegaConf refused, in one line."""
    key = error.full_key or ""
    if isinstance(error, ConfigKeyError) and dataclasses.is_dataclass(error.object_type):
        names = get_type_hints(error.object_type)
        return f"unknown key '{key}', {did_you_mean(key.rpartition('.')[2], names)}"
    first = " ".join(str(error).splitlines()[0].split())
    return first if key in first else f"{key}: {first}"
