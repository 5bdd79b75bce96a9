"""Tasks of ours, in lm-eval's YAML: `NAME.yaml`, and beside it `NAME.jsonl` where the items are ours too.

`python -m lm_eval --include_path llm_recipes/evaluation/definitions` knows them as well.
"""

import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
QUESTIONS = FOLDER / "judge" / "questions.jsonl"
"""Of `suite=judge`, where no others are given."""


def path_of(name: str) -> Path | None:
    """The definition of a task of ours, or None."""
    return next(iter(sorted(FOLDER.rglob(f"{name}.yaml"))), None) if name and "/" not in name else None


def files_of(name: str) -> list[Path]:
    """Every file that a score of a task of ours depends on; none for a task of lm-eval's."""
    path = path_of(name)
    if path is None:
        return []
    own = re.search(r"^dataset_kwargs: \{items: (\w+)\}$", path.read_text(encoding="utf-8"), re.MULTILINE)
    beside = [path, path.parent / "common.yaml", path.parent / f"{own[1] if own else name}.jsonl"]
    return [*(each for each in beside if each.is_file()), FOLDER.parent / "metrics.py", FOLDER.parent / "documents.py"]


def items(items: str, **metadata: Any) -> dict[str, Any]:
    """The items of a task of ours, as lm-eval's `custom_dataset`.

    Args:
        items: the task's name.
        metadata: what else stands in the definition, which lm-eval hands over.
    """
    import datasets

    from llm_recipes.evaluation.rows import read_rows

    path = path_of(items)
    assert path is not None
    return {"test": datasets.Dataset.from_list(read_rows([str(path.with_suffix(".jsonl"))]))}
