"""A checkpoint's folder: its name, what must be in it, and whether it is whole.

`manifest.json` is written last and lists size and checksum of every other file, and its own; a folder gets its final
name only after that. What has another name, or no manifest, is no checkpoint.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from llm_recipes.data.token_file import checksum
from llm_recipes.folders import weight_files
from llm_recipes.models.topology import Topology

NAME = re.compile(r"step-(\d{8,})")
MANIFEST = "manifest.json"
PARTIAL = ".partial"
DELETED = ".deleted"


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


def describe(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and checksum of some of a checkpoint's files. Each is brought to the disk first."""
    found = {}
    for name in names:
        path = folder / name
        sync(path)
        found[name] = {"bytes": path.stat().st_size, "xxh3_128": checksum(path)}
    return found


def _own_checksum(content: dict[str, Any]) -> str:
    """Of all that a manifest says but this."""
    others = {key: value for key, value in content.items() if key != "checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(others, sort_keys=True).encode())


def write(folder: Path, content: dict[str, Any]) -> None:
    """Write a folder's manifest, the last of its files, and bring the folder's own entries to the disk."""
    path = folder / MANIFEST
    content = content | {"checksum": _own_checksum(content)}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for each in (path, *(below for below in folder.iterdir() if below.is_dir()), folder):
        sync(each)


def read(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        ValueError, OSError: it cannot be read, or is none.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ValueError("it lists no files")
    if "checksum" in content and content["checksum"] != _own_checksum(content):
        raise ValueError("it does not match its own checksum")
    return content


def weights_only(folder: Path) -> bool:
    """Whether a checkpoint is kept for evaluation, without what a run needs to go on."""
    try:
        return bool(read(folder).get("weights_only"))
    except (OSError, ValueError):
        return False


def damage(folder: Path, topology: Topology | None = None, run_id: str | None = None, below: str = "") -> str | None:
    """What is wrong with a checkpoint, or None where every file is there with its size and checksum.

    The ranks share the reading out; all get the same answer. Without a topology this process reads everything.

    Args:
        run_id: the run that it must be of, where that matters.
        below: only the files whose names begin so.
    """
    rank, ranks = (topology.rank, topology.ranks) if topology else (0, 1)
    step = step_of(folder.with_name(folder.name.removesuffix(PARTIAL)))
    mine: str | None = None
    try:
        content = read(folder)
        if run_id is not None and content.get("run", run_id) != run_id:
            mine = f"its manifest is of another run ({content['run']}, not {run_id})"
        elif step >= 0 and content.get("step", step) != step:  # a copy may have any name
            mine = f"its manifest is of step {content['step']}"
        entries = sorted(each for each in content["files"].items() if each[0].startswith(below))
        for name, entry in entries[rank::ranks] if mine is None else ():
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                mine = f"its manifest names {name}, which is not in it"
            elif not path.is_file():
                mine = f"{name} is missing"
            elif path.stat().st_size != entry["bytes"]:
                mine = f"{name} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}"
            elif checksum(path) != entry["xxh3_128"]:
                mine = f"{name} does not match its checksum"
            if mine:
                break
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        mine = f"its manifest cannot be read ({type(error).__name__}: {error})"
    return next((found for found in (topology.gather(mine) if topology else [mine]) if found), None)


def fingerprint(folder: Path, others: Iterable[str]) -> str:
    """16 hexadecimal digits over a model folder's weights, and those of some other files that are there. A checkpoint's
    manifest has their checksums; elsewhere each file is read.

    Raises:
        UserError: no weights in it.
    """
    names = [*map(Path, weight_files(str(folder))), *(folder / name for name in others)]
    known = {}
    if (folder.parent / MANIFEST).is_file():
        known = {name: entry["xxh3_128"] for name, entry in read(folder.parent)["files"].items()}
    sums = {
        path.name: known.get(f"{folder.name}/{path.name}") or checksum(path) for path in sorted(names) if path.is_file()
    }
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


def clean(root: Path) -> None:
    """Remove what crashes left half-written or half-deleted; what was whole but for its name gets it."""
    if not root.is_dir():
        return
    for path in root.iterdir():
        final = path.with_name(path.name.removesuffix(PARTIAL))
        if path.name.endswith(PARTIAL) and not final.exists() and damage(path) is None:
            path.rename(final)
    for path in root.iterdir():
        if path.name.endswith((PARTIAL, DELETED)):
            shutil.rmtree(path)
