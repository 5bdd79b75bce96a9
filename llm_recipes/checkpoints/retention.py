"""Which checkpoints stay: the newest whole, for resuming; some of the older ones for good, as weights alone.

A state in fp32 with Adam's moments is 12 bytes a parameter; what is evaluated later needs two.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_recipes.checkpoints import manifest, shards


@dataclass(frozen=True)
class Retired:
    """A checkpoint that nobody will resume from."""

    folder: Path
    keep_weights: bool


def plan(
    root: Path,
    keep: int | None,
    keep_every: int | None,
    newest: int | None = None,
    is_evaluated: Callable[[int], bool] = lambda step: False,
) -> list[Retired]:
    """What becomes of the checkpoints older than the newest `keep`: those at multiples of `keep_every`, and those that
    are evaluated, keep their weights, if they have not lost the rest already; the others go.

    Args:
        newest: the step that was committed just now. What is past it was too damaged to go on from: it is left alone,
            and takes no whole one's place.
        is_evaluated: whether a step's checkpoint is.
    """
    if keep is None:
        return []
    own = (each for each in manifest.checkpoints(root) if newest is None or manifest.step_of(each) <= newest)
    old = list(own)[keep:]
    steps = {each: manifest.step_of(each) for each in old}
    every = {each for each in old if keep_every is not None and steps[each] % keep_every == 0}
    kept = every | {each for each in old if is_evaluated(steps[each])}
    return [Retired(each, each in kept) for each in old if each not in kept or not manifest.weights_only(each)]


def remove(folder: Path) -> None:
    """Remove a checkpoint; under its final name a half-deleted one would look damaged."""
    shutil.rmtree(_aside(folder))


def _aside(folder: Path) -> Path:
    """Take a checkpoint's name away."""
    doomed = folder.with_name(folder.name + manifest.DELETED)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    return doomed


def _beside(folder: Path) -> Path:
    return folder.with_name(folder.name + manifest.PARTIAL)


def begin(folder: Path, dtype: str | None) -> list[str]:
    """A copy of a checkpoint without its tensors, beside it, that says what their dtype will be; the names of the
    files of weights."""
    partial = _beside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "model").mkdir(parents=True)
    names = [name for name in manifest.files_in(folder) if not name.startswith("optimizer/")]
    weights = [name for name in names if name.endswith(".safetensors")]
    for name in set(names) - set(weights):
        shutil.copyfile(folder / name, partial / name)
    if dtype is not None:
        config = partial / "model" / "config.json"
        content = json.loads(config.read_text(encoding="utf-8")) | {"dtype": dtype}
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return weights


def convert(folder: Path, names: list[str], dtype: str | None) -> dict[str, Any]:
    """Copy files of weights in another dtype (None: as they are), a tensor at a time in memory.

    Returns:
        Their entries for the manifest.
    """
    done = {}
    saved = manifest.read(folder)["files"]
    for name in names:
        if manifest.checksum(folder / name) != saved[name]["xxh3_128"]:
            raise OSError(f"{folder / name} does not match its checksum")
        target = _beside(folder) / name
        if dtype is not None:
            done[name] = shards.rewrite(folder / name, target, shards.NAMED_DTYPES[dtype])
            continue
        try:
            os.link(folder / name, target)
            done[name] = saved[name]
        except OSError:  # not every file system has links
            shutil.copyfile(folder / name, target)
            done |= manifest.describe(_beside(folder), [name])
    return done


def commit(folder: Path, weights: dict[str, Any]) -> None:
    """Put the copy in the checkpoint's place. If it is interrupted in between, `manifest.clean` completes it."""
    partial = _beside(folder)
    content = manifest.read(folder)
    others = [name for name in manifest.files_in(partial) if name not in weights]
    files = weights | manifest.describe(partial, others)
    manifest.write(partial, content | {"files": dict(sorted(files.items())), "weights_only": True})
    doomed = _aside(folder)
    os.rename(partial, folder)
    manifest.sync(folder.parent)
    shutil.rmtree(doomed)
