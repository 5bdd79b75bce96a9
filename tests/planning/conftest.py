"""What the tests of plans share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL: dict[str, Any] = {
    "devices": 2, "optim": {"lr": 1e-4}, "run": {"name": "planned"}, "parallel": {"precision": "fp32"},
    "data": {"seq_len": 32, "mask_documents": False, "sources": {"ja": {"path": "nowhere"}}},
    "train": {"steps": 10, "global_batch_size": 12},
}  # fmt: skip


def plan_config(*changes: Any) -> Any:
    """A plan's configuration, typed and checked."""
    from omegaconf import OmegaConf

    from llm_recipes.checks import check
    from llm_recipes.config import PlanConfig

    typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PlanConfig), SMALL, *changes))
    check("plan", typed)
    return typed


@pytest.fixture(scope="session")
def planned() -> Callable[..., Any]:
    return plan_config


@pytest.fixture(scope="session")
def sizes_of() -> Callable[[Path, Any], Any]:
    """Sizes of a model folder under a small run with some changes, and the run."""

    def find(folder: Path, changes: Any) -> Any:
        from llm_recipes.planning.model import open_shape
        from llm_recipes.planning.sizes import Sizes

        config = plan_config({"model": {"path": str(folder), "attention": "eager"}}, changes)
        return Sizes(config, open_shape(config.model)[0], "cpu"), config

    return find
