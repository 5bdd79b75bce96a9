"""Runs that are hurt. What is marked `faults` takes long: `make test-faults`."""

import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from launched import Place
from omegaconf import OmegaConf

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "faults.md"
SECTIONS = ["Kills", "Goodput", "Time lost per fault", "Preemption", "Hangs", "Damaged checkpoints"]
HEAD = """# Faults

`make test-faults` writes this page: real processes under torchrun, hurt from outside. Measured on {machine}.
"""


def machine() -> str:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} {platform.machine()} cores and {memory:.0f} GiB, {platform.system()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, gloo"
    )


@pytest.fixture
def place(tmp_path: Path, corpora: Path, tiny_models: dict[str, Path]) -> Iterator[Callable[..., Place]]:
    """A user's folder with a run in it, by changes to `tiny.pretrain_config`; what still runs at the end is killed."""
    made: list[Place] = []

    def make(name: str = "place", model: Path | None = None, **changes: Any) -> Place:
        config = tiny.pretrain_config(
            corpora, model or tiny_models["mistral"], run__dir=str(tmp_path / name), **changes
        )
        (tmp_path / name).mkdir()
        made.append(Place(tmp_path / name, config))
        return made[-1]

    yield make
    for each in made:
        each.end()


def uninterrupted(config: Any) -> None:
    """A run on this rank, to its end."""
    from llm_recipes.training.run import pretrain

    pretrain(config)


@pytest.fixture
def straight(ranks: Any, tmp_path: Path) -> Callable[..., Place]:
    """The same run on two ranks that nobody hurts, in a folder of its own."""

    def run(hurt: Place, stop: int | None = None) -> Place:
        folder = tmp_path / "straight"
        folder.mkdir()
        changed = {"run": {"dir": str(folder)}, "train": {"stop_at": stop}}
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(hurt.config), changed))
        ranks(2, uninterrupted, config)
        return Place(folder, config)

    return run


SAID: dict[str, str] = {}
"""Sections of the report, by title."""


@pytest.fixture
def report() -> Callable[[str, str], None]:
    """Add a section, by title and text, to what is printed at the end; where all tests that have one have passed, it
    is `benchmarks/results/faults.md`."""
    return SAID.__setitem__


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int) -> None:
    if not SAID:
        return
    sections = [f"## {title}\n\n{SAID[title]}\n" for title in SECTIONS if title in SAID]
    text = "\n".join([HEAD.format(machine=machine()), *sections])
    terminalreporter.write_line(f"\n{text}")
    if len(sections) == len(SECTIONS) and exitstatus == 0:
        RESULTS.write_text(text, encoding="utf-8")
        terminalreporter.write_line(f"written: {RESULTS}")
