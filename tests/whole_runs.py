"""A whole run in this process, for tests that start one on every rank (`ranks`), and what it has written down."""

from pathlib import Path
from typing import Any

import torch

from llm_recipes.errors import UserError
from llm_recipes.telemetry import metrics


def run(config: Any) -> str | None:
    """`pretrain`; the user's mistake that ended it, or None."""
    from llm_recipes.training.run import pretrain

    torch.use_deterministic_algorithms(False)  # a run before this one may have asked for them
    try:
        pretrain(config)
    except UserError as error:
        return str(error)
    return None


def losses(folder: Path) -> list[float]:
    """Of each step of the run called `run` in a folder."""
    return [row["loss"] for row in metrics.read(folder / "run" / "metrics.jsonl") if "loss" in row]
