"""`metrics.jsonl`: one object per logged step, in the run's folder, always; and one per event.

After a resume or a rollback a step may stand there twice: its last row holds. Events all hold.
"""

import contextlib
import json
import logging
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MOST_WAITING = 100_000
"""Rows."""


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


class Metrics:
    """Appends rows to a run's `metrics.jsonl`; floats in full precision.

    A disk that refuses does not stop a run: rows wait until it takes them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []
        self._lock = threading.Lock()
        self._torn: bool | None = None

    def write(self, row: dict[str, Any]) -> None:
        with self._lock:
            self._waiting.append(json.dumps(_plain(row), ensure_ascii=False))
            try:
                self._flush()
            except OSError as error:
                if len(self._waiting) == 1:
                    log.warning("%s cannot be written (%s): its rows wait", self.path, error)
                del self._waiting[:-MOST_WAITING]

    def close(self) -> None:
        """Try once more, and say what is lost."""
        with self._lock:
            try:
                if self._waiting:
                    self._flush()
            except OSError as error:
                log.warning("%s cannot be written (%s): %d rows are lost", self.path, error, len(self._waiting))

    def _flush(self) -> None:
        if self._torn is None:
            # A crash, or a full disk, may have cut the last row off: the next one begins on a line of its own.
            with open(self.path, "ab+") as file:
                end = file.tell()
                file.seek(max(0, end - 1))
                self._torn = file.read(1) not in (b"", b"\n")
        text = ("\n" if self._torn else "") + "\n".join(self._waiting) + "\n"
        self._torn = None
        with open(self.path, "ab", buffering=0) as file:
            left = memoryview(text.encode())
            while left:
                left = left[file.write(left) :]
        self._torn, self._waiting = False, []


def lines(path: Path) -> list[dict[str, Any]]:
    """All rows as they were written. A line that a crash cut off is left out."""
    written = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    try:
        rows = json.loads(f"[{','.join(written)}]")  # one call for all: three times as fast as one for each
    except ValueError:
        rows = []
    if len(rows) != len(written):
        rows = list(_one_by_one(written))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def _one_by_one(written: list[str]) -> Iterator[Any]:
    for line in written:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows that hold, in the order of their steps: training rows, validation rows, evaluation rows of each suite
    and events apart."""
    rows: dict[tuple[int, str, int], dict[str, Any]] = {}
    for number, row in enumerate(lines(path)):
        kind = next((each for each in ("event", "validation", "evaluation") if each in row), "step")
        name = f"evaluation {','.join(row[kind])}" if kind == "evaluation" else kind
        rows[(row["step"], name, number if kind == "event" else 0)] = row
    return [rows[key] for key in sorted(rows)]
