"""The rows of a plan: the run on each kind and number of devices, and with some keys changed."""

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from llm_recipes import checks
from llm_recipes.config import PlanConfig
from llm_recipes.errors import UserError, did_you_mean
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
    for key, value in _flat(changes):
        try:
            OmegaConf.update(merged, key, value, merge=True)
        except (ConfigAttributeError, ConfigKeyError) as error:
            above, _, name = key.rpartition(".")
            known = OmegaConf.select(merged, above) if above else merged
            hint = f", {did_you_mean(name, map(str, known))}" if isinstance(known, DictConfig) else ""
            raise UserError(f"{where}.{key}: no such key{hint}") from error
        except OmegaConfBaseException as error:
            raise UserError(f"{where}.{key}={value}: {str(error).splitlines()[0]}") from error
    result = OmegaConf.to_object(merged)
    assert isinstance(result, PlanConfig)
    try:
        checks.check_values(result)
        checks.check_plan(result)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return result


def _flat(changes: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Nested keys as dotted ones."""
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
            raise UserError(f"candidates.{name}={changes}: give keys to change, as candidates.{name}.data.seq_len=8192")
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
