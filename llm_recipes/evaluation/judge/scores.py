"""Judgements as figures: per judge, category and turn. No judge's figures meet another's."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from llm_recipes.evaluation.judge import marks
from llm_recipes.evaluation.judge.kept import Row
from llm_recipes.evaluation.judge.questions import Conversation

Answers = Mapping[Conversation, Sequence[Row]]
Judgements = Mapping[tuple[Conversation, int], Row]
"""By conversation and turn, counted from 0."""
Rating = tuple[Conversation, int, float]


def mean(ratings: Iterable[Rating]) -> dict[str, Any]:
    """The mean of some ratings, each question and turn weighing the same however often it was asked, and its standard
    error.

    A question's turns and trials hang together, so the error is of the questions' means: their deviation over the root
    of their number. None with fewer than two questions.
    """
    cells: dict[tuple[str, int], list[float]] = {}
    for conversation, turn, rating in ratings:
        cells.setdefault((conversation.question.id, turn), []).append(rating)
    questions: dict[str, list[float]] = {}
    for (question, _), found in cells.items():
        questions.setdefault(question, []).append(fmean(found))
    means = [fmean(found) for found in questions.values()]
    return {
        "mean": fmean(each for found in questions.values() for each in found) if questions else None,
        "standard_error": stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
        "ratings": sum(map(len, cells.values())),
    }


def of_judge(answers: Answers, judgements: Judgements) -> dict[str, Any]:
    """One judge's figures.

    Returns:
        `mean`, `standard_error`, `ratings` over everything; the same by turn (`turns`), by category (`categories`, with
        their own `turns` and `of`, how many answers there are); `of`; `open`, how many answers it has not judged yet;
        `no_rating`, the answers that it has named no rating for.
    """
    every = [(conversation, turn) for conversation, rows in answers.items() for turn in range(len(rows))]
    rated: list[Rating] = []
    unrated = []
    for conversation, turn in every:
        row = judgements.get((conversation, turn))
        if row is not None and row["score"] is not None:
            rated.append((conversation, turn, float(row["score"])))
        elif row is not None:
            where = {"question_id": conversation.question.id, "turn": turn + 1, "trial": conversation.trial}
            unrated.append(where)
    turns = sorted({turn for _, turn in every})

    def figures(ratings: Sequence[Rating]) -> dict[str, Any]:
        by_turn = {str(turn + 1): mean(each for each in ratings if each[1] == turn) for turn in turns}
        return mean(ratings) | {"turns": by_turn}

    categories = {}
    for category in dict.fromkeys(conversation.question.category for conversation in answers):
        own = [each for each in rated if each[0].question.category == category]
        those = [each for each in every if each[0].question.category == category]
        left = sum(each not in judgements for each in those)
        categories[category] = figures(own) | {"of": len(those), "open": left}
    left = sum(each not in judgements for each in every)
    return figures(rated) | {"of": len(every), "open": left, "no_rating": unrated, "categories": categories}


def of_answers(answers: Answers) -> dict[str, Any]:
    """What is seen of answers without a judge."""
    rows = [row for each in answers.values() for row in each]
    shares = [share for row in rows if (share := marks.japanese_share(row["answer"])) is not None]
    return {
        "answers": len(rows),
        "japanese": fmean(shares) if shares else None,
        "repeating": sum(marks.repetition(row["answer"]) > marks.REPEATED for row in rows),
        "cut": sum(bool(row["cut"]) for row in rows),
        "empty": sum(not row["answer"] for row in rows),
    }


def conversations(answers: Answers, judgements: Mapping[str, Judgements]) -> list[dict[str, Any]]:
    """Every conversation with its answers, what is seen of them, and each judge's rating and reason."""
    found = []
    for conversation, rows in answers.items():
        question = conversation.question
        turns = [
            {
                "question": question.turns[turn],
                "answer": row["answer"],
                "tokens": row["tokens"],
                "cut": bool(row["cut"]),
                "japanese": marks.japanese_share(row["answer"]),
                "repetition": marks.repetition(row["answer"]),
                "scores": {
                    name: {"score": own[conversation, turn]["score"], "reason": own[conversation, turn]["reason"]}
                    for name, own in judgements.items()
                    if (conversation, turn) in own
                },
            }
            for turn, row in enumerate(rows)
        ]
        about = {"question_id": question.id, "category": question.category, "trial": conversation.trial}
        found.append(about | {"turns": turns})
    return found


def tasks_of(name: str, figures: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """One judge's categories as tasks of a result, a group of their own, and why others are missing."""
    tasks: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for category, each in figures["categories"].items():
        if each["open"]:
            missing[f"{name}.{category}"] = f"{each['of'] - each['open']} of {each['of']} answers judged"
        elif each["mean"] is None:
            missing[f"{name}.{category}"] = "no judgement has a rating"
        else:
            tasks[f"{name}.{category}"] = {
                "group": name,
                "score": each["mean"],
                "metric": "rating",
                "higher_is_better": True,
                "standard_error": each["standard_error"],
                "items": each["ratings"],
                "items_of": each["of"],
                "shots": None,
                "parsed": each["ratings"] / each["of"],
                "version": None,
                "figures": {f"turn_{turn}": those["mean"] for turn, those in each["turns"].items()},
                "kind": "judge",
            }
    return tasks, missing
