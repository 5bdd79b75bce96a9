"""Questions in FastChat's format, and the conversations that are held over them.

How MT-Bench asks: Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", 2023 (arXiv:2306.05685).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from llm_recipes.config import TaskConfig
from llm_recipes.errors import UserError
from llm_recipes.evaluation import definitions
from llm_recipes.evaluation.rows import Row, files_of, read_rows
from llm_recipes.evaluation.suites import DATA_KEY, Suite

NEW_TOKENS = 1024
"""Of an answer, where the suite names no number."""
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1,
    "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
}  # fmt: skip
"""MT-Bench's, by category."""
OTHER_TEMPERATURE = 0.7
"""Of a category that MT-Bench does not have."""
NEEDED = "rows with question_id, category, turns (a list of texts), and where there is one reference (a list)"


@dataclass(frozen=True)
class Question:
    """What a user says, turn by turn, and what a good answer would be (empty where nothing is known)."""

    id: str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()

    @property
    def temperature(self) -> float:
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


@dataclass(frozen=True)
class Conversation:
    """One of the times that a question is asked."""

    question: Question
    trial: int
    seed: int

    def seed_of(self, turn: int) -> int:
        """Of the draws of one answer: no other's change with it.

        Args:
            turn: counted from 0.
        """
        told = f"{self.seed} {self.question.id} {self.trial} {turn}"
        return int.from_bytes(hashlib.sha256(told.encode()).digest()[:4], "big") >> 1


def is_judged(suite: Suite) -> bool:
    """Whether a suite's answers are scored by judges.

    Raises:
        UserError: only a part of it is.
    """
    kinds = [task.kind for task in suite.config.tasks.values()]
    if "judge" not in kinds:
        return False
    if len(kinds) > 1:
        raise UserError(
            f"suite={suite.name}: a task of kind judge stands alone in its suite; give the others their own"
        )
    return True


def task_of(suite: Suite) -> tuple[str, TaskConfig]:
    """The name and the task of a suite that is judged."""
    ((name, task),) = suite.config.tasks.items()
    return name, task


def conversations(suite: Suite) -> list[Conversation]:
    """All that a suite asks. A question whose category has the temperature 0 is asked once: it has one answer.

    Raises:
        UserError: the questions cannot be read.
    """
    name, task = task_of(suite)
    if task.answers < 1:
        raise UserError(f"suite={suite.name}: tasks.{name}.answers={task.answers}: must be at least 1")
    questions = read(task.path, DATA_KEY.format(name), task.items)
    return [
        Conversation(question, trial, suite.config.seed)
        for question in questions
        for trial in range(task.answers if question.temperature else 1)
    ]


def read(path: object, where: str, items: int | None = None) -> list[Question]:
    """The questions of a file, ours where none is given.

    Args:
        where: the key that the path was given as.
        items: only so many, from one category after the other.

    Raises:
        UserError: there is no such file, or a row in it is no question.
    """
    file = str(definitions.QUESTIONS) if path is None else path
    rows = read_rows(files_of(file, where))
    found = [_question(row, f"{where}={file}: row {number}") for number, row in enumerate(rows, 1)]
    seen: set[str] = set()
    for question in found:
        if question.id in seen:
            raise UserError(f"{where}={file}: question_id {question.id} stands there twice")
        seen.add(question.id)
    return found if items is None else _some(found, items)


def _question(row: Row, where: str) -> Question:
    turns, reference = row.get("turns"), row.get("reference")
    good = isinstance(turns, list) and turns and all(isinstance(each, str) and each.strip() for each in turns)
    known = reference is None or (isinstance(reference, list) and all(isinstance(each, str) for each in reference))
    if row.get("question_id") is None or not isinstance(row.get("category"), str) or not good or not known:
        raise UserError(f"{where}: not a question; needed: {NEEDED}")
    assert isinstance(turns, list)
    return Question(str(row["question_id"]), row["category"], tuple(turns), tuple(reference or ()))


def _some(questions: Sequence[Question], items: int) -> list[Question]:
    """The first of each category, then the second of each ...; in their own order."""
    categories: dict[str, list[Question]] = {}
    for question in questions:
        categories.setdefault(question.category, []).append(question)
    taken = [each for row in zip_longest(*categories.values()) for each in row if each is not None][:items]
    return [question for question in questions if question in taken]
