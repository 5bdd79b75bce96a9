"""Some of a task's items, for a quick look that still looks at everything."""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from llm_recipes.evaluation.rows import Row

QUANTILES = 4


def subset(task: Any, items: int | None, seed: int) -> list[int] | None:
    """Numbers of so many items, ascending, the same each time; None for all.

    Stratified: items are sorted into strata by their answer's class (multiple choice) or by the quartile of their
    answer's length, and by the quartile of their question's length. Each stratum gives its share, largest remainders
    first; who is taken within it is drawn with the seed.
    """
    docs = list(task.eval_docs)
    if items is None or items >= len(docs):
        return None
    questions = [len(str(_question(task, doc))) for doc in docs]
    answers = [_answer(task, doc) for doc in docs]
    strata = defaultdict(list)
    for number, key in enumerate(zip(_classes(answers), _quartiles(questions), strict=True)):
        strata[key].append(number)
    generator = random.Random(f"{seed}-{task.task_name}")
    keys = sorted(strata)
    shares = {key: len(strata[key]) * items / len(docs) for key in keys}
    counts = {key: int(shares[key]) for key in keys}
    for key in sorted(keys, key=lambda each: (counts[each] - shares[each], each))[: items - sum(counts.values())]:
        counts[key] += 1
    return sorted(number for key in keys for number in generator.sample(strata[key], counts[key]))


def _question(task: Any, doc: Row) -> Any:
    text = task.doc_to_text(doc)
    return task.doc_to_choice(doc) if isinstance(text, int) else text


def _answer(task: Any, doc: Row) -> int | str:
    """The number of the right choice, or the answer's text."""
    if getattr(task, "multiple_input", 0):
        return int(task.doc_to_text(doc))
    target = task.doc_to_target(doc)
    if isinstance(target, list):
        target = target[0] if target else ""
    return target if isinstance(target, int) else str(target)


def _classes(answers: Sequence[int | str]) -> list[int]:
    """A class of each answer: which choice is right, or the quartile of its length."""
    if all(isinstance(answer, int) for answer in answers):
        return [int(answer) for answer in answers]
    return _quartiles([len(str(answer)) for answer in answers])


def _quartiles(sizes: Sequence[int]) -> list[int]:
    """The quartile that each size lies in, by its rank; equal sizes lie in the same."""
    ordered = sorted(sizes)
    first = {size: rank for rank, size in reversed(list(enumerate(ordered)))}
    return [first[size] * QUANTILES // len(sizes) for size in sizes]
