"""The benchmarks ask for what there is: a key that the configuration does not know would be left out of a table."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def levers() -> Iterator[Any]:
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import levers

        yield levers
    finally:
        sys.path.remove(folder)


def test_every_lever_is_known_to_the_configuration(levers: Any) -> None:
    options = {"seq_len": "64", "micro_batch_size": "1", "accumulation": "1", "documents": "4"} | levers.NOTHING
    assert len(levers.LEVERS) > 10
    for lever in levers.LEVERS:
        config = levers.configure(options | lever.changes, Path(), 1, 1)
        assert lever.changes.get("parallel.fp8", "none") == config.parallel.fp8
