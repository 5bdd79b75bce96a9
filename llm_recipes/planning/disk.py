"""What a run keeps on disk."""

from dataclasses import dataclass

from llm_recipes.checkpoints.shards import NAMED_DTYPES
from llm_recipes.config import PlanConfig
from llm_recipes.models.sharding import PRECISIONS
from llm_recipes.planning.sizes import Sizes
from llm_recipes.training.evaluating import due


@dataclass(frozen=True)
class Disk:
    """Bytes; headers, tokenizer and manifest, some megabytes, left out.

    Attributes:
        model, optimizer: of one checkpoint.
        kept_for_good: how many checkpoints keep their weights (`checkpoint.keep_every`, `evaluation`).
        kept_weights: of one of these.
        most: what the run has on disk at most, while its last checkpoint is written.
        seconds: to write a checkpoint.
    """

    model: int
    optimizer: int
    kept_for_good: int
    kept_weights: int
    most: int
    seconds: float

    @property
    def checkpoint(self) -> int:
        return self.model + self.optimizer


def disk(config: PlanConfig, sizes: Sizes, steps: int) -> Disk:
    """The checkpoints of a run of so many steps. Each weight has its dtype, and two moments if it trains."""
    stored = PRECISIONS[config.parallel.precision].storage.itemsize
    model, optimizer = stored * sizes.numbers, sizes.whole(config).moments
    keeping = config.checkpoint
    evaluated = [each for each in range(1, steps) if due(config.evaluation, each, steps)]
    saved = sorted({*range(keeping.every, steps, keeping.every), *evaluated, steps})
    newest = len(saved) if keeping.keep is None else min(keeping.keep, len(saved))
    old = saved[: len(saved) - newest]
    every = keeping.keep_every
    good = len([each for each in old if (every and each % every == 0) or due(config.evaluation, each, steps)])
    dtype = keeping.keep_every_dtype
    weights = sizes.numbers * (stored if dtype is None else NAMED_DTYPES[dtype].itemsize)
    # A new one is written before the oldest of the newest goes.
    whole = newest + (1 if len(saved) > newest else 0)
    most = whole * (model + optimizer) + good * weights
    seconds = (model + optimizer) / (config.storage_gb_per_second * 1e9)
    return Disk(model, optimizer, good, weights, most, seconds)
