"""What is asked of a plan."""

from dataclasses import dataclass, field
from typing import Any

from llm_recipes.config.fields import REQUIRED
from llm_recipes.config.pretrain import PretrainConfig


@dataclass
class PlanConfig(PretrainConfig):
    """A run, and what it is to run on."""

    devices: Any = REQUIRED
    """How many, or a list of candidates."""
    device: Any = "h100"
    """Its kind, or a list of candidates."""
    mfu: float = 0.4
    """Share of the device's peak that is expected of the run."""
    days: float | None = None
    """Instead of the run's own length: which tokens fit into so many days?"""
    candidates: dict[str, Any] = field(default_factory=dict)
    """Overrides by name: rows of the table beside the run itself."""
