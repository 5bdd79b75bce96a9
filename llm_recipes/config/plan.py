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
    """Its kind, or a list of candidates; any name with `device_memory_gb` and `device_tflops`."""
    device_memory_gb: float | None = None
    """Memory of one, in 10^9 bytes, for a kind that is not in the table."""
    device_tflops: float | None = None
    """Its dense bf16 peak in 10^12 operations a second."""
    devices_per_host: int = 8
    mfu: float = 0.4
    """Share of the device's peak that is expected of the run; recomputation is no part of it."""
    tokens_per_second_per_device: float | None = None
    """As a run has measured it, in place of `mfu`."""
    storage_gb_per_second: float = 1.0
    """What the file system takes from all processes together: how long a save is."""
    days: float | None = None
    """Instead of the run's own length: which tokens fit into so many days?"""
    candidates: dict[str, Any] = field(default_factory=dict)
    """Further rows of the table, by name: the run with some keys changed (`candidates.long.data.seq_len=8192`)."""
    output: str | None = None
    """A JSON file for all figures."""
