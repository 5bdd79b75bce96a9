"""Folders that are made on the way, and go again where nothing came of it."""

import contextlib
from collections.abc import Iterable
from pathlib import Path


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it; which of them were not there before, for `remove_folders`."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        remove_folders(made)
        raise
    return made


def remove_folders(made: Iterable[Path]) -> None:
    """Remove folders, innermost first, as far as they are there and empty."""
    for each in made:
        with contextlib.suppress(OSError):
            each.rmdir()
