"""Fixtures that every room's tests share."""

import os
from collections.abc import Iterator

import pytest
from ranks import Ranks

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Call a function on every rank of a small world: see `tests/ranks.py`."""
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()
