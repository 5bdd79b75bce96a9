"""Fixtures that every room's tests share."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from ranks import Ranks

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked `faults` takes half an hour: only where `-m` names it (`make test-faults`)."""
    if "faults" not in config.option.markexpr:
        long = [item for item in items if item.get_closest_marker("faults")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Call a function on every rank of a small world: see `tests/ranks.py`."""
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by name. `gpt2` has dropout; `mixtral` has an auxiliary loss."""
    root = tmp_path_factory.mktemp("models")
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.0}
    return {
        "mistral": tiny.save_model(root / "mistral"),
        "tied": tiny.save_model(root / "tied", "qwen3_tied"),
        "mixtral": tiny.save_model(root / "mixtral", "mixtral", output_router_logits=True, router_aux_loss_coef=0.1),
        "gpt2": tiny.save_model(root / "gpt2", "gpt2", **dropout),
    }


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the token files `ja`, `en` and `held_out`."""
    return tiny.write_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture
def workplace(corpora: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A folder of its own, by name, with the corpora in it."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(corpora, tmp_path / name))

    return make
