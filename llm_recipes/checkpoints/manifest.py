"""A checkpoint's folder: its name, what must be in it, and whether it is whole.

`manifest.json` is written last and lists size and checksum of every other file; a folder gets its final name only
after that. What has another name, or no manifest, is no checkpoint.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from llm_recipes.data.token_file import checksum
from llm_recipes.models.topology import Topology

NAME = re.compile(r"step-(\d{8,})")
MANIFEST = "manifest.json"
PARTIAL = ".partial"


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name, or -1."""
    match = NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints in a folder, newest first. What a crash left half-written is not among them."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if path.is_dir() and step_of(path) >= 0), key=step_of, reverse=True)


def sync(path: Path) -> None:
    """Bring a file's or folder's bytes to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def files_in(folder: Path) -> list[str]:
    """Every file below a checkpoint but its manifest, as relative paths in order."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST)


def complete_safetensors(path: Path) -> bool:
    """Whether a safetensors file is as long as its own header says."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or 8 + length > size:
            return False
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)


def describe(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and checksum of some of a checkpoint's files. Each is brought to the disk first.

    Raises:
        OSError: a safetensors file is shorter than its header says.
    """
    found = {}
    for name in names:
        path = folder / name
        sync(path)
        if path.suffix == ".safetensors" and not complete_safetensors(path):
            raise OSError(f"{path}: shorter than its header says")
        found[name] = {"bytes": path.stat().st_size, "xxh3_128": checksum(path)}
    return found


def damage(folder: Path, topology: Topology | None = None) -> str | None:
    """What is wrong with a checkpoint, or None where every file is there with its size and checksum.

    The ranks share the reading out; all get the same answer. Without a topology this process reads everything.
    """
    rank, ranks = (topology.rank, topology.ranks) if topology else (0, 1)
    mine: str | None = None
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = sorted(manifest["files"].items())
        for name, entry in entries[rank::ranks]:
            path = folder / name
            if not path.is_file():
                mine = f"{name} is missing"
            elif path.stat().st_size != entry["bytes"]:
                mine = f"{name} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}"
            elif checksum(path) != entry["xxh3_128"]:
                mine = f"{name} does not match its checksum"
            if mine:
                break
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        mine = f"its manifest cannot be read ({type(error).__name__}: {error})"
    return next((found for found in (topology.gather(mine) if topology else [mine]) if found), None)


def retain(root: Path, keep: int | None, keep_every: int | None) -> None:
    """Remove old checkpoints: all but the newest `keep`, and those at multiples of `keep_every`."""
    if keep is None:
        return
    for folder in checkpoints(root)[keep:]:
        if keep_every is not None and step_of(folder) % keep_every == 0:
            continue
        # Under its final name a half-deleted folder would look like a damaged checkpoint.
        doomed = folder.with_name(folder.name + ".deleted")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def clean(root: Path) -> None:
    """Remove what crashes left half-written or half-deleted."""
    if root.is_dir():
        for path in root.iterdir():
            if path.name.endswith((PARTIAL, ".deleted")):
                shutil.rmtree(path)
