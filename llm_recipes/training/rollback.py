"""Going back: to which checkpoint, past which samples, and the account of it that outlives a crash.

`rollbacks.json` in the run's folder is written before anything else is touched; each checkpoint's `state.json` holds
the account as it was when the checkpoint was made. A checkpoint that lacks a rollback to before it belongs to a course
that was given up.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from llm_recipes.checkpoints import manifest, retention
from llm_recipes.errors import UserError
from llm_recipes.evaluation.models import EVALUATIONS
from llm_recipes.training.guard import LeftOut


@dataclass(frozen=True)
class Rollback:
    """One of a run's."""

    at_step: int
    to_step: int
    skipped: tuple[int, int]
    """The samples that are passed over from then on: first, and last + 1."""
    lr_factor: float
    """By which the learning rate was multiplied."""
    reasons: dict[str, int]


def load(entries: Sequence[dict[str, Any]]) -> list[Rollback]:
    """From JSON."""
    return [Rollback(**entry | {"skipped": tuple(entry["skipped"])}) for entry in entries]


def dump(account: Sequence[Rollback]) -> list[dict[str, Any]]:
    """To JSON."""
    return [asdict(each) for each in account]


def read(path: Path) -> list[Rollback]:
    """The account so far.

    Raises:
        UserError: it is damaged.
    """
    if not path.exists():
        return []
    try:
        return load(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}); bring it back, or remove it: then the account is the newest "
            "checkpoint's"
        ) from error


def write(path: Path, account: Sequence[Rollback]) -> None:
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(dump(account), indent=2) + "\n", encoding="utf-8")
    manifest.sync(beside)
    os.replace(beside, path)
    manifest.sync(path.parent)


def lr_factor(account: Sequence[Rollback]) -> float:
    """What all of them have made of the learning rate."""
    return prod(each.lr_factor for each in account)


def past(trouble: Sequence[LeftOut]) -> tuple[int, int]:
    """The span of samples from the first update that was left out to the last."""
    return min(each.positions[0] for each in trouble), max(each.positions[1] for each in trouble)


def reasons(trouble: Sequence[LeftOut]) -> dict[str, int]:
    return dict(Counter(each.reason for each in trouble))


def given_up(root: Path, account: Sequence[Rollback]) -> list[Path]:
    """Checkpoints of a course that the account says was given up."""
    found = []
    for folder in manifest.checkpoints(root):
        try:
            known = len(json.loads((folder / "state.json").read_text(encoding="utf-8"))["rollbacks"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: that is found elsewhere, and said
        if any(manifest.step_of(folder) > each.to_step for each in account[known:]):
            found.append(folder)
    return found


def sweep(root: Path, account: Sequence[Rollback]) -> None:
    """Remove them, and what they scored: a run that crashed would go on from the newest.

    Raises:
        OSError: one cannot be removed.
    """
    for folder in given_up(root, account):
        retention.remove(folder)
        shutil.rmtree(root.parent / EVALUATIONS / folder.name, ignore_errors=True)


def target(root: Path, trouble: Sequence[LeftOut]) -> list[Path]:
    """Checkpoints to go back to, the best first: the newest from before the trouble, then the others, oldest first.
    An update that was left out has not moved the weights: a later one is second best, and none is spoiled."""
    whole = [each for each in manifest.checkpoints(root) if not manifest.weights_only(each)]
    first = min(each.step for each in trouble)
    before = [each for each in whole if manifest.step_of(each) < first]
    return before + [each for each in reversed(whole) if each not in before]
