"""How a field of the schema is written."""

from dataclasses import field
from typing import Any

REQUIRED: Any = "???"


def choice(default: str | None, *others: str | bool) -> Any:
    """A field that takes only these values."""
    return field(default=default, metadata={"choices": (default, *others)})
