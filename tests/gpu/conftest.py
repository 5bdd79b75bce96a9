"""What only a GPU can show. None of it has run on one yet.

`GPU_TESTS_ON_CPU=1` runs the bodies without one, as far as they go: it finds mistakes of typing, and shows nothing.
"""

import os
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = not torch.cuda.is_available() and "GPU_TESTS_ON_CPU" not in os.environ
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none here"))
