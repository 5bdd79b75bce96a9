"""How a verb starts: Hydra composes the configuration, errors become one line, status 2.

Importing this module, and `--help`, import no torch.
"""

import dataclasses
import logging
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from llm_recipes.checks import check
from llm_recipes.config import SCHEMAS
from llm_recipes.errors import EXIT_STATUS, UserError, as_user_error, did_you_mean, first_line
from llm_recipes.folders import OWN_CONF, conf_folder

SECONDS_FOR_RANK_0 = 20
SYNONYMS = {
    "learning_rate": "lr", "batch_size": "global_batch_size", "max_steps": "steps", "num_steps": "steps",
    "max_length": "seq_len", "sequence_length": "seq_len", "max_grad_norm": "grad_clip_norm", "name_or_path": "path",
    "gradient_checkpointing": "activation_checkpointing", "attn_implementation": "attention",
}  # fmt: skip
"""What others call some of our keys."""
NOT_ASCII = re.compile(r"[^\s,:{}\[\]()]*[^\x00-\x7f][^\s,:{}\[\]()]*(?!\s*:)(?=[\s,}\]()]|$)")
"""A word with letters beyond ASCII, and no key of a dictionary."""
FOREIGN_KEY = re.compile(r"[{,]\s*[^\s,:{}]*[^\x00-\x7f][^\s,:{}]*\s*:")
"""A key of a dictionary with such letters, for which Hydra has no words."""
FLAGS = (
    "--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--info",
    "--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun",
    "-h", "-c", "-p", "-r", "-m", "-sc", "-cp", "-cn", "-cd", "-i",
)  # fmt: skip
"""Hydra's. Everything else is given as KEY=VALUE."""


def find_key(verb: str, key: str) -> tuple[str | None, int]:
    """What is wrong with a dotted key of a verb, or None; and how many of its names lead to a dictionary whose
    entries the user names (`data.sources.ja.path`: 2), or 0."""
    kind: Any = SCHEMAS[verb]
    names, free = key.split("."), 0
    for depth, name in enumerate(names):
        where = "".join(f"{each}." for each in names[:depth])
        members = [each for each in get_args(kind) if each is not type(None)] if isinstance(kind, UnionType) else []
        kind = members[0] if members else kind
        if dataclasses.is_dataclass(kind):
            known = get_type_hints(kind)
            if name not in known:
                near = SYNONYMS.get(name, name)
                hint = did_you_mean(where + near, [where + each for each in known])
                return f"unknown key '{key}', {hint}", free
            kind = known[name]
        elif get_origin(kind) is dict:
            kind, free = get_args(kind)[1], depth
        elif kind is not Any:
            return f"unknown key '{key}', {where.rstrip('.')} has nothing below it", free
    return None, len(names) if get_origin(kind) is dict else free


def read_overrides(verb: str, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Check the keys of `KEY=VALUE` arguments, and let an entry of a dictionary be given like any other key.

    Returns:
        Arguments for Hydra, and what is to be set after it has composed, because it has no words for it: a dictionary
        that is emptied (`data.validation={}`), a key of a folder's name (`suite=mini`).

    Raises:
        UserError: an unknown key, with the nearest known one.
    """
    # In Hydra a new entry needs a `+`, and cannot be made key by key.
    result: list[str] = []
    afterwards: dict[str, str] = {}
    switches = {f"--{name}": f"{name}=true" for name, kind in get_type_hints(SCHEMAS[verb]).items() if kind is bool}
    arguments = [switches.get(each, each) for each in arguments]
    for before, argument in pairwise(["", *arguments]):
        key, equals, value = argument.lstrip("+~").partition("=")
        groups = [key] if "@" in key or key.startswith(("hydra.", "hydra/", "-")) else _groups(verb, key)
        if not (equals or argument.startswith(("-", "~")) or before.startswith("-")):
            raise UserError(f"{argument}: expected KEY=VALUE")
        if argument.startswith("-") and argument.partition("=")[0] not in FLAGS:
            raise UserError(f"{argument}: no such flag; keys are given as KEY=VALUE, without dashes (see --help)")
        if argument.startswith("-") or groups or not (equals or argument.startswith("~")):
            result.append(argument)
            continue
        if "=" in value and re.fullmatch(r"[^'\"\[\]{}()\s]+", value):
            argument = f'{argument.partition("=")[0]}="{value}"'  # a folder of a search: outputs/mine-lr/optim.lr=1e-05
        if not value.isascii() and not {"'", '"'} & set(value):
            argument = f"{argument.partition('=')[0]}={NOT_ASCII.sub(_quoted, value)}"  # Hydra's bare words are ASCII
        try:
            sweeps = OverridesParser.create().parse_override(argument).is_sweep_override()
        except HydraException:
            if not re.fullmatch(r"[\w.@:/$-]+", key, re.ASCII):
                raise UserError(f"{argument}: such a key can only stand in a file of conf/exp") from None
            if FOREIGN_KEY.search(value):
                raise UserError(f"{argument}: a key beyond ASCII can only stand in a file of conf/exp") from None
            quoted = shlex.quote(f'{key}="{value}"')
            raise UserError(f"{argument}: the value cannot be read; if it is a text, quote it: {quoted}") from None
        problem, free = find_key(verb, key)
        if problem is not None:
            raise UserError(problem)
        searches = {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments)
        if sweeps and not searches and not _is_folder(key):
            raise UserError(f"{argument}: several values, each a run of its own, need -m; a list is {key}=[{value}]")
        if free == key.count(".") + 1 and (argument.startswith("~") or value == "{}"):
            afterwards[key] = "{}"
        elif _is_folder(key):
            if sweeps:
                raise UserError(f"{argument}: several at once are given as a list, {key}=[{value}]")
            afterwards[key] = value
        elif not argument.startswith("~"):
            plain = argument.lstrip("+")
            result.append(plain if not free else f"++{plain}" if sweeps else _as_entry(plain, free))
        elif free:
            result.append(argument)
        else:
            raise UserError(f"{argument}: cannot be left out; give it another value")
    return result, afterwards


def _quoted(word: re.Match[str]) -> str:
    return f'"{word[0]}"'


def _as_entry(argument: str, free: int) -> str:
    """`data.sources.ja.path=x` as `++data.sources={ja:{path:x}}`, which adds to the dictionary or changes it."""
    key, _, value = argument.partition("=")
    names = key.split(".")
    nested = value or "''"
    for name in reversed(names[free:]):
        nested = f"{{{name}:{nested}}}"
    return f"++{'.'.join(names[:free])}={nested}"


def _groups(verb: str, key: str) -> list[str]:
    """A key that is a folder of configurations (`exp`), ours or the user's. A plain value of the verb's is none,
    whatever folders there are (`suite`)."""
    if not key or "." in key or not dataclasses.is_dataclass(get_type_hints(SCHEMAS[verb]).get(key, SCHEMAS[verb])):
        return []
    return [key] if _is_folder(key) else []


def _is_folder(key: str) -> bool:
    """Whether Hydra takes a key for a folder of configurations."""
    return "." not in key and any((root / key).is_dir() for root in (conf_folder(), OWN_CONF))


def explain(error: BaseException, verb: str) -> str:
    """One line for what Hydra or OmegaConf refused."""
    cause: BaseException = error
    while not isinstance(cause, OmegaConfBaseException) and (before := cause.__cause__ or cause.__context__):
        cause = before
    text = str(error)
    key = getattr(cause, "full_key", None)
    if key and "[" not in key and isinstance(cause, ConfigKeyError | ConfigAttributeError):
        if _groups(verb, key.partition(".")[0]):
            return f"{key}: an experiment's first line must be '# @package _global_'"
        kind = cause.object_type
        if "." not in key and dataclasses.is_dataclass(kind) and kind is not SCHEMAS[verb]:  # an entry of a list
            return f"unknown key '{key}', {did_you_mean(key, get_type_hints(kind))}"
        problem, _ = find_key(verb, key)
        if problem is not None:
            return problem
    first = str(cause).splitlines()[0]
    if isinstance(cause, MissingMandatoryValue):
        return f"{key or first.rsplit(' ', 1)[-1]}: needed, and not given"
    missing = re.search(r"Could not find '([^']+)'", text)
    if missing:
        group, _, name = missing.group(1).rpartition("/")
        names = [path.stem for root in (conf_folder(), OWN_CONF) for path in (root / group).glob("*.yaml")]
        return f"no configuration '{missing.group(1)}', {did_you_mean(name, names)}"
    where = f"{key}: " if key and key not in first else ""
    return where + " ".join(first.split())


def empty_keys(composed: DictConfig) -> set[str]:
    """Paths and names that were given as nothing (`model.path=`)."""
    named = (
        "model", "corpus", "model.path", "run.name", "run.dir", "tokenizer", "input", "output", "checkpoint", "suite",
        "run", "sweep", "runs", "watch",
    )  # fmt: skip
    given = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(given, dict)
    return {key for key in named if _value(given, key) == ""}


def _value(given: Any, key: str) -> Any:
    for name in key.split("."):
        given = given.get(name) if isinstance(given, dict) else None
    return given


def _is_text(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def fail(error: UserError) -> None:
    """Print a user's mistake from rank 0, or from the rank it happened on, and exit."""
    from llm_recipes.models.topology import forbid_restart, launched_rank

    rank = launched_rank()
    if rank in (None, 0) or not error.everywhere:
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr, flush=True)
    else:
        # A launcher ends everybody when the first rank leaves: rank 0 may still be on its way to say why.
        time.sleep(SECONDS_FOR_RANK_0)
        print(f"error: rank {rank}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)  # it had not met it
    sys.stdout.flush()
    forbid_restart()
    # A peer may wait in a collective that this rank will never join: leave without its teardown.
    os._exit(EXIT_STATUS) if "torch" in sys.modules else sys.exit(EXIT_STATUS)


def add_override(word: str) -> None:
    """Beside the others on the command line: argparse does not take them from both sides of a flag."""
    first = next((at for at, each in enumerate(sys.argv) if at and "=" in each and each[0] != "-"), 1)
    sys.argv.insert(first, word)


def typed(composed: DictConfig, afterwards: dict[str, str]) -> Any:
    """What Hydra has composed, as the schema's dataclasses.

    Args:
        afterwards: as of `read_overrides`.

    Raises:
        UserError, OmegaConfBaseException: something is missing, or cannot be resolved.
    """
    for key, text in afterwards.items():
        value: Any = OverridesParser.create().parse_override(f"{key}={text}").value()
        plain = value.text if isinstance(value, QuotedString) else value
        OmegaConf.update(composed, key, plain, merge=False)
    OmegaConf.resolve(composed)
    missing = sorted(OmegaConf.missing_keys(composed) | empty_keys(composed))
    if missing:
        raise UserError(f"{', '.join(missing)}: needed, and not given (see --help)")
    return OmegaConf.to_object(composed)


def run_verb(verb: str, function: Callable[[Any], Any]) -> None:
    """Compose `conf/<verb>.yaml` with the command line, check it, and call the verb with typed configuration."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors to us, in place of printing them itself.
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, which speaks of kernels it lacks
        logging.getLogger(name).setLevel(logging.ERROR)
    ConfigStore.instance().store(name=f"{verb}_schema", node=SCHEMAS[verb])
    OmegaConf.register_new_resolver("first", lambda items: items[0] if items else None, replace=True)
    afterwards: dict[str, str] = {}
    line = sys.argv[1:]
    launch: Any = None

    def task(composed: DictConfig) -> None:
        try:
            config = typed(composed, afterwards)
            if launch is not None:
                from llm_recipes.search import multirun

                multirun.run(launch, config)
            else:
                check(verb, config)
                function(config)
        except OmegaConfBaseException as error:
            fail(UserError(explain(error, verb)))  # here already: Hydra would print a line of its own on the way
        except Exception as error:
            mistake = as_user_error(error)
            if mistake is None:
                raise
            fail(mistake)

    main = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=verb)(task)
    try:
        if OWN_CONF.is_dir():
            add_override(f"hydra.searchpath=[file://{OWN_CONF}]")
        words, afterwards = read_overrides(verb, sys.argv[1:])
        sys.argv[1:] = sorted(words, key=lambda word: word not in ("-m", "--multirun"))  # as `add_override` says
        if "search" in get_type_hints(SCHEMAS[verb]) and {"-m", "--multirun"} & set(line):
            from llm_recipes.search import torchrun
            from llm_recipes.search.launch import Launch

            launch = Launch(
                verb, line, partial(check, verb), function, partial(typed, afterwards=afterwards), afterwards
            )
            torchrun.register(launch)
            add_override(f"search.swept=[{','.join(launch.swept)}]")
        main()
        if launch is not None:
            launch.end()
    except UserError as error:
        fail(error)
    except (HydraException, OmegaConfBaseException) as error:
        fail(UserError(explain(error, verb)))
    except yaml.MarkedYAMLError as error:
        place = (
            f"{error.problem_mark.name}:{error.problem_mark.line + 1}" if error.problem_mark else "the configuration"
        )
        fail(UserError(f"{place}: not YAML, {error.problem}"))
    except UnicodeDecodeError as error:
        broken = next((path for path in OWN_CONF.rglob("*.yaml") if path.is_file() and not _is_text(path)), None)
        if broken is None:
            raise
        fail(UserError(f"{broken}: not UTF-8 ({error.reason} at byte {error.start + 1})"))
    except Exception as error:
        if not type(error).__module__.startswith("submitit"):
            raise
        fail(UserError(f"a job's processes have died ({first_line(error)}); see .submitit in the search's folder"))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
