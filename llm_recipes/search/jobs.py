"""A search's folder, and in it one run's folder a job: named by its values, so that the same command finds them again.

`search.json` says what the search is; `job.json`, beside each run, what has become of it.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from llm_recipes.config import TrainingConfig
from llm_recipes.config.search import USUAL_KEEP
from llm_recipes.errors import UserError, as_user_error, first_line
from llm_recipes.folders import read_json, write_json
from llm_recipes.training.folder import flat, is_of, may_change

SEARCH, JOB = "search.json", "job.json"
RUNNING, DONE, STOPPED, FAILED = "running", "done", "stopped", "failed"
LONGEST_NAME = 120
"""Bytes of a job's name."""
MEASURES = ("train.stop_at", "validation", "evaluation", "data.validation")
"""Keys that a run may change, and that give a finished one something to do."""


def shown(value: Any) -> str:
    """A value as it stands in a job's name: the same for 1e-5, 1.0e-5 and 0.00001."""
    if isinstance(value, str | QuotedString):
        return value if isinstance(value, str) else value.text
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def name_of(values: Mapping[str, Any]) -> str:
    """A job's name: `optim.lr=1e-05,schedule.warmup_steps=10`, in the order of the keys."""
    name = ",".join(f"{key}={shown(values[key])}" for key in sorted(values))
    plain = re.sub(r"[/\s\x00-\x1f]", "-", name)
    if plain == name and len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{plain.encode()[:LONGEST_NAME].decode(errors='ignore')}~{digest}"


def swept_keys(arguments: Iterable[str]) -> list[str]:
    """Keys to which a command line gives several values.

    Raises:
        UserError: twice the same value, or a key that is the search's own.
    """
    parser, found = OverridesParser.create(), []
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except HydraException:  # a flag, or what Hydra itself will refuse
            continue
        if not override.is_sweep_override():
            continue
        key = override.get_key_element().lstrip("+~")
        if key.startswith(("hydra.", "hydra/")):
            continue
        if key.startswith(("run.", "search.")):
            raise UserError(f"{key}: names the search itself; it cannot have several values")
        if override.is_discrete_sweep():
            seen = set()
            for text in override.sweep_string_iterator():
                value = shown(parser.parse_override(f"a={text}").value())
                if value in seen:
                    raise UserError(f"{key}={value}: stands there twice, and both jobs would have one folder")
                seen.add(value)
        found.append(key)
    return found


@dataclass
class Job:
    """One run of a search.

    Attributes:
        root: the search's folder.
        values: of the keys that are searched.
        config: the run's, in its folder.
        settings: the same as plain values.
        arguments: the command line's, that give this run alone.
    """

    root: Path
    values: dict[str, Any]
    config: TrainingConfig
    settings: dict[str, Any]
    arguments: list[str]

    @property
    def name(self) -> str:
        return name_of(self.values)

    @property
    def folder(self) -> Path:
        return self.root / self.name

    def read(self) -> dict[str, Any]:
        """What is marked; empty where nothing is."""
        return known(self.folder / JOB)

    def is_done(self) -> bool:
        """Whether this very run has come to its end."""
        mark = self.read()
        if mark.get("status") != DONE:
            return False
        before, now = flat(mark.get("settings", {})), flat(self.settings)
        changed = [key for key in before | now if before.get(key) != now.get(key)]
        return not any(_decides(key) for key in changed)

    def mark(self, status: str, **facts: Any) -> None:
        """Write down what has become of the job."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.read() if status != RUNNING else {"started": time.time()}
        ended = None if status == RUNNING else time.time()
        mine = {"status": status, "overrides": self.values, "arguments": self.arguments, "settings": self.settings}
        write_json(self.folder / JOB, {"error": None, **kept, **mine, "ended": ended, **facts})


def _decides(key: str) -> bool:
    """Whether a run that has ended would do something else with another value of a key."""
    return is_of(key, MEASURES) or not may_change(key)


def known(path: Path) -> dict[str, Any]:
    """What a file of a search says; nothing where there is none."""
    found: dict[str, Any] = read_json(path) if path.exists() else {}
    return found


def place(config: TrainingConfig, given: Mapping[str, Any], arguments: list[str], swept: Iterable[str]) -> Job:
    """The job that a configuration is, in the search that it belongs to; its run gets its folder there.

    Args:
        config: changed: `run.dir` and `run.name`.
        given: values of the command line's keys, for those that stand in no configuration (`exp`).
        arguments: the command line's, with this job's values.
        swept: keys that have several values in this launch.

    Raises:
        UserError: there is nothing to search, or the folder is another search's.
    """
    root = Path(config.run.dir) / f"{config.run.name}-{config.search.name}"
    said = known(root / SEARCH)
    keys = sorted({*swept, *config.search.keys}) or said.get("keys", [])
    if not keys:
        raise UserError("-m: nothing is searched; give a key several values (optim.lr=1e-5,1e-4), or name search.keys")
    before = flat(to_settings(config))
    values = {key: before[key] if key in before else given.get(key, _below(before, key)) for key in keys}
    job = Job(root, values, config, {}, arguments)
    config.run.dir, config.run.name = str(root), job.name
    job.settings = to_settings(config)
    chosen = [each for each in arguments if each.startswith("+") and not each.startswith("++")]  # whole experiments
    others = [each for each in arguments if each not in chosen]
    job.arguments = [*chosen, *others, f"run.dir={quoted(str(root))}", f"run.name={quoted(job.name)}"]
    _refuse_another_search(root, said, keys, job)
    return job


def _below(settings: dict[str, Any], key: str) -> Any:
    """A whole dictionary's entries."""
    return {name: value for name, value in settings.items() if name.startswith(f"{key}.")} or None


def quoted(text: str) -> str:
    """A text as a value that Hydra reads back."""
    if re.fullmatch(r"[A-Za-z_./-][\w./-]*", text, re.ASCII) and text.lower() not in ("null", "true", "false"):
        return text
    return QuotedString(text, Quote.double).with_quotes()


def to_settings(config: TrainingConfig) -> dict[str, Any]:
    """A configuration as plain values."""
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[assignment]
    return settings


def _refuse_another_search(root: Path, said: dict[str, Any], keys: list[str], job: Job) -> None:
    """Runs that differ in more than what is searched cannot stand side by side."""
    both = {*keys, *said.get("keys", [])}
    if not said or any("." not in key for key in both):  # whole experiments are what is searched
        return
    before, now = flat(said.get("settings", {})), flat(job.settings)
    changed = [
        key
        for key in sorted(before | now)
        if before.get(key) != now.get(key) and not (is_of(key, both) or may_change(key))
    ]
    if changed:
        shown_keys = ", ".join(f"{key} ({before.get(key)} -> {now.get(key)})" for key in changed[:6])
        raise UserError(f"{root} is another experiment's search: {shown_keys}; give another search.name")


def write_down(job: Job, config: TrainingConfig, command: str) -> None:
    """Keep what the search is; keys that come later join it."""
    path = job.root / SEARCH
    before = known(path)
    keys = sorted({*before.get("keys", []), *job.values})
    asked = config.search.rule
    rule = {"best": asked.best, "keep": dict(asked.keep) or USUAL_KEEP}
    commands = [each for each in before.get("commands", []) if each != command] + [command]
    now = {"keys": keys, "rule": rule, "settings": before.get("settings", job.settings), "commands": commands}
    job.root.mkdir(parents=True, exist_ok=True)
    if now != before:
        write_json(path, now)


def problem(error: BaseException) -> str:
    """An error as a job's mark has it."""
    mistake = as_user_error(error)
    return " ".join(str(mistake).split()) if mistake else f"{type(error).__name__}: {first_line(error)}"
