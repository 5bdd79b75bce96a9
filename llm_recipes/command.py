"""How a verb starts: Hydra composes the configuration, errors become one line, status 2.

Importing this module, and `--help`, import no torch.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from llm_recipes.config import SCHEMAS, check
from llm_recipes.errors import EXIT_STATUS, UserError, did_you_mean

PACKAGE = Path(__file__).parent


def conf_folder() -> Path:
    """`conf/`: inside the package in a wheel, beside it in a checkout."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"


def known_keys(verb: str) -> list[str]:
    """Every dotted key of a verb's schema."""
    keys: list[str] = []

    def walk(node: Any, where: str) -> None:
        if not isinstance(node, DictConfig) or node._is_none():
            return
        for name, value in node.items_ex(resolve=False):
            keys.append(f"{where}{name!s}")
            walk(value, f"{where}{name!s}.")

    walk(OmegaConf.structured(SCHEMAS[verb]), "")
    return keys


def explain(error: BaseException, verb: str) -> str:
    """One line for what Hydra or OmegaConf refused."""
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    text = str(error)
    unknown = re.search(r"Could not (?:override|append to config\. An item is already at) '([^']+)'", text)
    key = unknown.group(1) if unknown and "override" in text else getattr(cause, "full_key", None)
    first = str(cause).splitlines()[0]
    if key and ("not in" in first or "not in" in text or "not in struct" in text):
        group = key.rpartition(".")[0]
        keys = known_keys(verb)
        keys = [known for known in keys if known.rpartition(".")[0] == group] or keys
        return f"unknown key '{key}', {did_you_mean(_nearest_form(key, keys), keys)}"
    if isinstance(cause, MissingMandatoryValue):
        name = key or first.rsplit(" ", 1)[-1]
        return f"{name}: needed, and not given"
    missing = re.search(r"Could not find '([^']+)'", text)
    if missing:
        group, _, name = missing.group(1).rpartition("/")
        names = [path.stem for path in (conf_folder() / group).glob("*.yaml")]
        return f"no configuration '{missing.group(1)}', {did_you_mean(name, names)}"
    where = f"{key}: " if key and key not in first else ""
    return where + " ".join(first.split())


def _nearest_form(key: str, keys: list[str]) -> str:
    """A long last name often stands for a short one: compare within the key's own group."""
    group, _, name = key.rpartition(".")
    full = {"learning_rate": "lr", "batch_size": "micro_batch_size", "max_steps": "steps", "max_length": "seq_len"}
    candidate = f"{group}.{full.get(name, name)}" if group else full.get(name, name)
    return candidate if candidate in keys else key


def fail(error: UserError) -> None:
    """Print a user's mistake from rank 0, or from the rank it happened on, and exit."""
    from llm_recipes.models.topology import launched_rank

    rank = launched_rank()
    if rank in (None, 0) or not error.everywhere:
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # A peer may wait in a collective that this rank will never join: leave without its teardown.
    os._exit(EXIT_STATUS) if rank is not None and "torch" in sys.modules else sys.exit(EXIT_STATUS)


def run_verb(verb: str, function: Callable[[Any], None]) -> None:
    """Compose `conf/<verb>.yaml` with the command line, check it, and call the verb with typed configuration."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors to us, in place of printing them itself.
    ConfigStore.instance().store(name=f"{verb}_schema", node=SCHEMAS[verb])

    def task(composed: DictConfig) -> None:
        try:
            OmegaConf.resolve(composed)
            missing = sorted(OmegaConf.missing_keys(composed))
            if missing:
                raise UserError(f"{', '.join(missing)}: needed, and not given (see --help)")
            config = OmegaConf.to_object(composed)
            check(verb, config)
            function(config)
        except UserError as error:
            fail(error)  # here already: Hydra would print a line of its own on the way

    main = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=verb)(task)
    try:
        main()
    except UserError as error:
        fail(error)
    except (HydraException, OmegaConfBaseException) as error:
        fail(UserError(explain(error, verb)))
