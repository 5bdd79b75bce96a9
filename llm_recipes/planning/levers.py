"""What would make a run smaller, and by how much."""

from dataclasses import dataclass
from typing import Any

from llm_recipes.config import PlanConfig
from llm_recipes.errors import UserError
from llm_recipes.planning.candidates import changed
from llm_recipes.planning.memory import Memory
from llm_recipes.planning.sizes import Sizes
from llm_recipes.training.schedule import BatchSpans, refuse_remainder


@dataclass(frozen=True)
class Lever:
    """A change, and what it does.

    Attributes:
        change: as it is given on the command line.
        saved: bytes of a device.
        total: bytes of a device with it.
    """

    change: str
    saved: int
    total: int


def levers(sizes: Sizes, config: PlanConfig, devices: int, now: Memory) -> list[Lever]:
    """Each single change that saves memory and trains the same, by how much it saves."""
    rows = config.train.micro_batch_size
    single: list[tuple[dict[str, Any], int]] = [
        ({"model.activation_checkpointing": "selective"}, devices),
        ({"model.activation_checkpointing": "full"}, devices),
        ({"train.micro_batch_size": rows // 2}, devices),
        ({"train.micro_batch_size": 1}, devices),
        ({"parallel.sharding": "full_shard", "parallel.replicas": None}, devices),
        ({"parallel.reduce": "every"}, devices),
        ({"optim.state": "8bit"}, devices),
        ({"parallel.cpu_offload": True}, devices),
        ({}, 2 * devices),
        ({}, 4 * devices),
    ]
    found: dict[str, Lever] = {}
    for changes, number in single:
        try:
            other = changed(config, changes, "lever")
            spans = BatchSpans(other.train.global_batch_size, other.train.batch_warmup)
            refuse_remainder(spans, number, other.train.micro_batch_size)
            total = sizes.memory(other, number).total
        except UserError:  # not with this run
            continue
        said = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items() if value is not None)
        name = said or f"devices={number}"
        if total < now.total:
            found[name] = Lever(name, now.total - total, total)
    return sorted(found.values(), key=lambda each: each.total)
