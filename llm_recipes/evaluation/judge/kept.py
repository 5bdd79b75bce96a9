"""Rows that cost time or money, appended to a file as they come: what is written stays, however the work is cut off."""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm_recipes.folders import make_folder

log = logging.getLogger(__name__)

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """All rows of a file, in order; none where there is no file. The last line may have been cut off; another that
    cannot be read is named, and what it held is made again."""
    if not path.is_file():
        return []
    found: list[Row] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "key" not in row:
                raise ValueError("not a row of ours")
            found.append(row)
        except ValueError as error:
            if number < len(lines):
                log.warning("%s: line %d is damaged (%s) and left out", path, number, str(error)[:80])
    return found


def append(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to a file's end, and wait until the disk has them."""
    make_folder(path.parent)
    with open(path, "ab+") as file:
        end = file.tell()
        file.seek(max(0, end - 1))
        # A line that was cut off must not take the next one with it.
        torn = file.read(1) not in (b"", b"\n")
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        file.write((b"\n" if torn else b"") + text.encode())
        file.flush()
        os.fsync(file.fileno())
