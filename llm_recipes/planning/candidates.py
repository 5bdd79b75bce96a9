"""The rows of a plan: the run on each kind and number of devices, and with some keys changed."""

from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llm_recipes import checks
from llm_recipes.config import PlanConfig
from llm_recipes.errors import UserError
from llm_recipes.planning.devices import Device, find


@dataclass(frozen=True)
class Candidate:
    """A row: a configuration on so many of one kind of device."""

    name: str
    config: PlanConfig
    devices: int
    device: Device


def changed(config: PlanConfig, changes: dict[str, Any], where: str) -> PlanConfig:
    """A configuration with some keys changed, nested or dotted, checked as the run's own.

    Raises:
        UserError: a key that does not exist, or what cannot run; names `where`.
    """
    merged = OmegaConf.structured(config)
    try:
        for key, value in _flat(changes):
            OmegaConf.update(merged, key, value, merge=True)
        result = OmegaConf.to_object(merged)
        checks.check_values(result)
        checks.check_plan(result)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or key
        raise UserError(f"{where}.{key}: {str(error).splitlines()[0]}") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    assert isinstance(result, PlanConfig)
    return result


def _flat(changes: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in changes.items():
        found += _flat(value, f"{before}{name}.") if isinstance(value, dict) else [(f"{before}{name}", value)]
    return found


def candidates(config: PlanConfig) -> list[Candidate]:
    """The run on each number and kind of devices, and after it each of `candidates`.

    Raises:
        UserError: a device that is not known, or a change that is none.
    """
    rows = [("the run", config)]
    for name, changes in config.candidates.items():
        if not isinstance(changes, dict):
            raise UserError(
                f"candidates.{name}={changes}: give keys to change, as candidates.{name}.train.micro_batch_size=1"
            )
        rows.append((name, changed(config, changes, f"candidates.{name}")))
    return [
        Candidate(name, each, devices, find(device, each))
        for name, each in rows
        for device in listed(each.device)
        for devices in listed(each.devices)
    ]


def listed(value: Any) -> list[Any]:
    """One or a list, as a list."""
    return list(value) if isinstance(value, list) else [value]
