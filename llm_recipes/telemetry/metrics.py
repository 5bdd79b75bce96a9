"""`metrics.jsonl`: one object per logged step, in the run's folder, always.

After a resume a step may stand there twice: its last row holds.
"""

import json
import math
from pathlib import Path
from typing import Any


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return value


class Metrics:
    """Appends rows to a run's `metrics.jsonl`; floats in full precision."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # A crash may have cut the last row off: the next one begins on a line of its own.
        self._torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")

    def write(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" if self._torn else "")
            self._torn = False
            file.write(json.dumps(_plain(row), ensure_ascii=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows that hold, in the order of their steps: training rows and validation rows apart.

    A line that a crash cut off is left out.
    """
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[(row["step"], "validation" in row)] = row
    return [rows[key] for key in sorted(rows)]
