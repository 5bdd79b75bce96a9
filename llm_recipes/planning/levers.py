"""What would make a run smaller, and by how much; what would make it faster, where there is room."""

from collections.abc import Iterator
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
        saved: bytes of a device; negative where it takes more.
        total: bytes of a device with it.
    """

    change: str
    saved: int
    total: int


def smaller(sizes: Sizes, config: PlanConfig, devices: int, now: Memory) -> list[Lever]:
    """Each single change that saves memory and trains the same, by how much it saves."""
    rows = config.train.micro_batch_size
    single: list[tuple[dict[str, Any], int]] = [
        ({"model.activation_checkpointing": "selective"}, devices),
        ({"model.activation_checkpointing": "full"}, devices),
        ({"train.micro_batch_size": rows // 2}, devices),
        ({"train.micro_batch_size": 1}, devices),
        ({"parallel.sharding": "full_shard", "parallel.replicas": None}, devices),
        ({"parallel.reduce": "every"}, devices),
        ({"parallel.prefetch": 1}, devices),
        ({"optim.state": "8bit"}, devices),
        ({"parallel.cpu_offload": True}, devices),
        ({}, 2 * devices),
        ({}, 4 * devices),
    ]
    found = {each.change: each for each in _tried(sizes, config, single, now) if each.saved > 0}
    return sorted(found.values(), key=lambda each: each.total)


def faster(sizes: Sizes, config: PlanConfig, devices: int, now: Memory, room: float) -> list[Lever]:
    """Each single change that computes or sends less, or multiplies more at once, and fits.

    Args:
        room: bytes of a device.
    """
    rows, parallel = config.train.micro_batch_size, config.parallel
    micro_batches = config.train.global_batch_size // (devices * rows)
    recomputing = ["full", "selective", "none"]
    less = recomputing[recomputing.index(config.model.activation_checkpointing) + 1 :]
    single: list[dict[str, Any]] = [{"model.activation_checkpointing": kind} for kind in less]
    single += [{"train.micro_batch_size": rows * times} for times in (2, 4, 8)]
    if parallel.sharding == "full_shard":
        single.append({"parallel.sharding": "shard_grad_op"})
    if parallel.reduce == "every" and micro_batches > 1 and sizes.layout(config, devices).shards > 1:
        single.append({"parallel.reduce": "last"})
    if parallel.cpu_offload:
        single.append({"parallel.cpu_offload": False})
    return [each for each in _tried(sizes, config, [(each, devices) for each in single], now) if each.total <= room]


def _tried(sizes: Sizes, config: PlanConfig, changes: list[tuple[dict[str, Any], int]], now: Memory) -> Iterator[Lever]:
    """What each change, on so many devices, makes of a run; not those that it cannot have."""
    for change, number in changes:
        try:
            other = changed(config, change, "lever")
            spans = BatchSpans(other.train.global_batch_size, other.train.batch_warmup)
            refuse_remainder(spans, number, other.train.micro_batch_size)
            total = sizes.memory(other, number).total
        except UserError:
            continue
        said = " ".join(f"{key}={str(value).lower()}" for key, value in change.items() if value is not None)
        yield Lever(said or f"devices={number}", now.total - total, total)
