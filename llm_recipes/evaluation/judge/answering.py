"""A model's answers to what a suite asks: what is kept of them, and what is written anew.

They lie beside the result, in `<suite>/answers.jsonl`.
"""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.console import Console

from llm_recipes.config import EvaluateConfig, JudgeConfig
from llm_recipes.data import tokenizer as tokenizers
from llm_recipes.errors import UserError
from llm_recipes.evaluation.judge import kept, questions
from llm_recipes.evaluation.judge.kept import Row
from llm_recipes.evaluation.judge.questions import Conversation
from llm_recipes.evaluation.models import Subject
from llm_recipes.evaluation.suites import Suite
from llm_recipes.models.topology import Topology
from llm_recipes.telemetry.meter import Meter

log = logging.getLogger(__name__)

ANSWERS, JUDGEMENTS = "answers.jsonl", "judgements.jsonl"


@dataclass
class Session:
    """One model in one suite.

    Attributes:
        asked: the conversations that are held.
        dtype: that the model computes in, as a result names it.
        answer_rows: by key, what is kept; the same on every rank.
    """

    suite: Suite
    subject: Subject
    fingerprint: str
    dtype: str
    judges: Mapping[str, JudgeConfig]
    asked: Sequence[Conversation]
    answer_rows: dict[str, Row]
    elsewhere: bool
    started: float
    engine: str | None = None

    @property
    def folder(self) -> Path:
        return self.subject.results / self.suite.name

    @cached_property
    def new_tokens(self) -> int:
        return questions.task_of(self.suite)[1].max_new_tokens or questions.NEW_TOKENS

    def key_of(self, conversation: Conversation, before: Sequence[Row]) -> str:
        """What the answer that follows some others is known by: all that it depends on."""
        question, turn = conversation.question, len(before)
        drawn = (question.temperature, conversation.seed_of(turn) if question.temperature else None)
        said = (question.turns[: turn + 1], [row["answer"] for row in before])
        return digest([self.fingerprint, self.dtype, self.new_tokens, *drawn, *said])

    def answers(self) -> dict[Conversation, list[Row]]:
        """What is kept of each conversation, turn by turn."""
        found: dict[Conversation, list[Row]] = {}
        for conversation in self.asked:
            rows = found.setdefault(conversation, [])
            for _ in conversation.question.turns:
                row = self.answer_rows.get(self.key_of(conversation, rows))
                if row is None:
                    break
                rows.append(row)
        return found

    def lacks_answers(self) -> bool:
        return any(len(rows) < len(each.question.turns) for each, rows in self.answers().items())


def digest(said: Any) -> str:
    """SHA-256 of something that JSON can say, shortened."""
    return hashlib.sha256(json.dumps(said, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:32]


def begin(
    suite: Suite, subject: Subject, fingerprint: str, dtype: str, config: EvaluateConfig, place: Topology
) -> Session:
    """Read what is there.

    Raises:
        UserError: the questions cannot be read, or answers are wanting and the model has no chat template.
    """
    task, _ = questions.task_of(suite)
    asked = place.on_first(partial(questions.conversations, suite))
    session = Session(suite, subject, fingerprint, dtype, config.judges, asked, {}, not config.overwrite, time.time())

    def read() -> dict[str, Row]:
        if config.overwrite:
            for name in (ANSWERS, JUDGEMENTS):
                (session.folder / name).unlink(missing_ok=True)
        return {row["key"]: row for row in kept.read(session.folder / ANSWERS)}

    def look() -> None:
        tokenizer = tokenizers.open_tokenizer(str(subject.folder), config.trust_remote_code)
        if not tokenizer.chat_template:
            raise UserError(
                f"suite={suite.name}: the tokenizer of {subject.name} has no chat template, and questions of several "
                "turns need one; put the template that the model was tuned with into its folder as chat_template.jinja"
            )

    session.answer_rows = place.on_first(read)
    if session.lacks_answers():
        place.on_first(look)
    once = sorted({each.question.category for each in asked if not each.question.temperature})
    wanted = questions.task_of(suite)[1].answers
    if wanted > 1 and once:
        log.info("%s: tasks.%s.answers=%d, and one answer in %s, whose temperature is 0: all would be the same",
                 suite.name, task, wanted, ", ".join(once))  # fmt: skip
    return session


def answer(session: Session, model: Any, writer: Any) -> None:
    """Write the answers that are not there; on every rank.

    Args:
        model: a `LanguageModel`.
        writer: lm-eval's model over another engine, which writes in place of it, or None.
    """
    from llm_recipes.evaluation.judge import writing

    place, suite = model.topology, session.suite
    session.engine = "transformers" if writer is None else "vllm"
    longest = max(len(each.question.turns) for each in session.asked)
    for turn in range(longest):
        there = session.answers()
        lacking = [each for each, rows in there.items() if len(rows) == turn and turn < len(each.question.turns)]
        if not lacking:
            continue
        wanted = []
        for each in lacking:
            said = []
            for question, row in zip(each.question.turns, [*there[each], None], strict=False):
                said += [("user", question), *([("assistant", row["answer"])] if row is not None else [])]
            wanted.append(
                writing.Wanted(tuple(said), each.question.temperature, each.seed_of(turn), session.new_tokens)
            )
        done = 0
        writes = writing.write(model, wanted) if writer is None else writing.write_by_engine(writer, model, wanted)
        console = Console(file=sys.stderr, quiet=not place.is_first)
        with Meter(f"{suite.name}: turn {turn + 1}", len(wanted), console, rate=False) as meter:
            for written in writes:
                rows = [_answer_row(session, lacking[at], there[lacking[at]], each) for at, each in written.items()]
                place.on_first(partial(kept.append, session.folder / ANSWERS, rows))
                session.answer_rows |= {row["key"]: row for row in rows}
                done += len(rows)
                meter.show(done, "")


def _answer_row(session: Session, conversation: Conversation, before: Sequence[Row], written: Any) -> Row:
    question, turn = conversation.question, len(before)
    return {
        "key": session.key_of(conversation, before),
        "question_id": question.id,
        "category": question.category,
        "trial": conversation.trial,
        "turn": turn + 1,
        "answer": written.text,
        "tokens": written.tokens,
        "cut": written.cut,
        "temperature": question.temperature,
        "seed": conversation.seed_of(turn) if question.temperature else None,
        "max_new_tokens": session.new_tokens,
        "model_fingerprint": session.fingerprint,
        "dtype": session.dtype,
        "engine": session.engine,
        "time": time.time(),
    }
