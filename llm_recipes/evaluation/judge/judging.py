"""Answers judged, and the result: each part as far as it is not there already.

What judges have said lies beside the result, in `<suite>/judgements.jsonl`.
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from rich.console import Console

from llm_recipes.evaluation import models, results, suites
from llm_recipes.evaluation.judge import asking, kept, prompts, questions, scores
from llm_recipes.evaluation.judge.answering import JUDGEMENTS, Session, digest
from llm_recipes.evaluation.judge.asking import Asking, Open
from llm_recipes.evaluation.judge.kept import Row
from llm_recipes.evaluation.judge.questions import Conversation
from llm_recipes.evaluation.results import Result
from llm_recipes.models.topology import Topology
from llm_recipes.telemetry.meter import Meter

log = logging.getLogger(__name__)

MEETS_EVERY = 2.0
"""Seconds between two meetings of the processes while the first one waits for judges."""
TOKENS_PER_CHARACTER, REPLY_TOKENS = 1.0, 300.0
"""Of a judge that has not been asked yet: how its cost is estimated."""
NOT_JUDGED = "not judged yet (judges.NAME.url=..., judges.NAME.model=...)"


def key_of(judge: Mapping[str, Any], messages: Sequence[prompts.Message]) -> str:
    """What a judgement is known by: who is asked, and every word. The same answer of another model has the same."""
    return digest([judge["url"], judge["model"], judge["temperature"], list(messages)])


def judge(session: Session, place: Topology, beat: Callable[[str], None] = lambda doing: None) -> Result:
    """Ask the judges for what they have not said yet, and write the result; on every rank. The first rank asks.

    A judge that fails leaves its judgements open, and says so in the result (`problem`).
    """
    work: _Work | None = place.together(lambda: _Work(session) if place.is_first else None)
    try:
        while not place.on_first(lambda: work is None or work.ended()):
            beat("judging")
    finally:
        if work is not None:
            work.stop()
    problems = work.say() if work is not None else {}
    result: Result = place.on_first(lambda: _result(session, place, problems))
    path = place.on_first(partial(results.write, session.subject.results, result))
    log.info("%s: %s", session.subject.name, path)
    for line in lines(result):
        log.info("%s", line)
    return result


def lines(result: Result) -> list[str]:
    """What a result's answers are like, and what each judge has said of them, in words."""
    seen = result["judged"]
    japanese = "" if seen["japanese"] is None else f"{seen['japanese']:.1%} of their letters Japanese, "
    told = [
        f"{seen['answers']} answers: {japanese}{seen['repeating']} repeat themselves, {seen['cut']} cut off, "
        f"{seen['empty']} empty"
    ]
    for name, each in seen["judges"].items():
        error = f" ± {each['standard_error']:.2f}" if each["standard_error"] is not None else ""
        mean = f"{each['mean']:.2f}{error}" if each["mean"] is not None else "no rating"
        turns = [f"turn {turn} {own['mean']:.2f}" for turn, own in each["turns"].items() if own["mean"] is not None]
        without = [f"{row['question_id']} (turn {row['turn']})" for row in each["no_rating"]]
        used = ""
        if each["input_tokens"] is not None and each["output_tokens"] is not None:
            used = f"; {each['input_tokens']:,} tokens in, {each['output_tokens']:,} out"
        told.append(
            f"judges.{name} ({each['model']}): {', '.join([mean, *turns])}, {each['ratings']} of {each['of']} answers "
            f"rated{used}"
            + (f", {each['cost']:,.4f} by its prices" if each["cost"] is not None else "")
            + (f"; no rating: {', '.join(without)}" if without else "")
        )
    return told if seen["judges"] else [*told, NOT_JUDGED]


def problems_of(measured: Sequence[Result]) -> list[str]:
    """What judges have left open in some results, and why; each in a line."""
    said = (each["problem"] for one in measured for each in one.get("judged", {}).get("judges", {}).values())
    return [each for each in said if each]


class _Work:
    """What is asked of the judges, on the first rank."""

    def __init__(self, session: Session) -> None:
        path = session.folder / JUDGEMENTS
        there = {row["key"]: row for row in kept.read(path)}
        answers = session.answers()
        self.askings: list[Asking] = []
        self.session = session
        self._bar: Meter | None = None
        for name, judge in session.judges.items():
            left = _open(answers, dataclasses.asdict(judge), there)
            if left and session.elsewhere:
                copied = _copied(session, name, left)
                if copied:
                    kept.append(path, copied)
                    log.info("judges.%s: %d judgements of the same answers are there already, in %s", name, len(copied),
                             ", ".join(sorted({row["copied_from"] for row in copied})[:3]))  # fmt: skip
                left = [each for each in left if each.key not in {row["key"] for row in copied}]
            if left:
                self.askings.append(Asking(name, judge, left))
                log.info("%s", estimate(self.askings[-1], list(there.values())))
        self._total = sum(len(each.left) for each in self.askings)
        self._meter = Meter(f"{session.suite.name}: judging", self._total, Console(file=sys.stderr), rate=False)
        self._thread = asking.Thread(self.askings, lambda row: kept.append(path, [row])) if self.askings else None
        if self._thread is not None:
            self._meter.__enter__()

    def ended(self) -> bool:
        if self._thread is None:
            return True
        ended = self._thread.ended(MEETS_EVERY)
        self._meter.show(sum(each.done for each in self.askings), "")
        return ended

    def stop(self) -> None:
        if self._thread is not None:
            self._meter.__exit__()
            self._thread.stop()

    def say(self) -> dict[str, str]:
        """Why a judge has left something open, by its name."""
        found = {}
        for each in self.askings:
            if each.done < len(each.left):
                left = len(each.left) - each.done
                found[each.name] = f"{each.problem}; {left} of {len(each.left)} judgements are open"
                log.warning("%s", found[each.name])
        return found


def _open(answers: scores.Answers, judge: Mapping[str, Any], there: Mapping[str, Row]) -> list[Open]:
    """What a judge has not judged yet: the same words once."""
    found: dict[str, Open] = {}
    for conversation, rows in answers.items():
        for turn in range(len(rows)):
            messages = prompts.messages(conversation.question, [row["answer"] for row in rows[: turn + 1]])
            key = key_of(judge, messages)
            about = {"question_id": conversation.question.id, "turn": turn + 1, "trial": conversation.trial}
            if key not in there:
                found.setdefault(key, Open(key, messages, about))
    return list(found.values())


def _copied(session: Session, name: str, left: Sequence[Open]) -> list[Row]:
    """Judgements that other models' results beside this one have of the very same words."""
    wanted = {each.key: each for each in left}
    found: dict[str, Row] = {}
    for path in sorted(session.subject.results.parent.glob(f"*/{session.suite.name}/{JUDGEMENTS}")):
        if path.parent != session.folder:
            for row in kept.read(path):
                if row["key"] in wanted:
                    here = {"judge": name, "copied_from": path.parent.parent.name, **wanted[row["key"]].about}
                    found.setdefault(row["key"], row | here)
    return list(found.values())


def estimate(open_: Asking, there: Sequence[Row]) -> str:
    """What is about to be asked of a judge, and what it will cost, by what it has cost so far."""
    judge = open_.judge
    known = [row for row in there if row["model"] == judge.model and row.get("input_characters")]
    known = [row for row in known if row["input_tokens"] is not None and row["output_tokens"] is not None]
    characters = sum(len(each["content"]) for one in open_.left for each in one.messages)
    rate, reply = TOKENS_PER_CHARACTER, REPLY_TOKENS
    if known:
        rate = sum(row["input_tokens"] for row in known) / sum(row["input_characters"] for row in known)
        reply = fmean(row["output_tokens"] for row in known)
    tokens = characters * rate, reply * len(open_.left)
    money = asking.cost(judge, *tokens)
    price = f", about {money:,.2f} by its prices" if money is not None else ""
    return (
        f"judges.{open_.name} ({judge.model} at {judge.url}): {len(open_.left)} answers to judge, "
        f"about {tokens[0]:,.0f} tokens in and {tokens[1]:,.0f} out{price}"
    )


def _result(session: Session, place: Topology, problems: Mapping[str, str]) -> Result:
    """Everything that is known, in the format of every suite's result."""
    rows = kept.read(session.folder / JUDGEMENTS)
    by_key = {row["key"]: row for row in rows}
    answers = session.answers()
    given = {name: _who(dataclasses.asdict(judge)) for name, judge in session.judges.items()}
    # Who has judged before is not forgotten, but for one that has another name now.
    before = {row["judge"]: _who(row) for row in rows}
    judges = {name: who for name, who in before.items() if who not in given.values()} | given
    said: dict[str, Any] = {}
    judgements: dict[str, dict[tuple[Conversation, int], Row]] = {}
    tasks: dict[str, Any] = {}
    missing: dict[str, str] = {}
    groups: dict[str, float | None] = {}
    for name, judge in judges.items():
        own = judgements.setdefault(name, {})
        for conversation, found in answers.items():
            for turn in range(len(found)):
                messages = prompts.messages(conversation.question, [row["answer"] for row in found[: turn + 1]])
                row = by_key.get(key_of(judge, messages))
                if row is not None:
                    own[conversation, turn] = row
        if not own and name not in session.judges:
            continue  # of answers that are no longer asked for
        figures = scores.of_judge(answers, own)
        spent = {row["key"]: row for row in own.values() if "copied_from" not in row}.values()
        said[name] = figures | {
            "url": judge["url"],
            "model": judge["model"],
            "temperature": judge["temperature"],
            "answered_as": sorted({row["answered_as"] for row in own.values()}),
            "input_tokens": _sum(spent, "input_tokens"),
            "output_tokens": _sum(spent, "output_tokens"),
            "cost": _sum(spent, "cost"),
            "copied": len({row["key"] for row in own.values() if "copied_from" in row}),
            "problem": problems.get(name),
        }
        judged, lacking = scores.tasks_of(name, figures)
        tasks |= judged
        missing |= lacking
        groups[name] = None if figures["open"] else figures["mean"]
    if not said:
        missing[questions.task_of(session.suite)[0]] = NOT_JUDGED
    named = {name: {"model": each["model"], "temperature": each["temperature"]} for name, each in said.items()}
    shown = {name: judgements[name] for name in said}
    return {
        "suite": session.suite.name,
        "suite_digest": digest([suites.digest(session.suite), prompts.SYSTEM, named]),
        **models.about(session.subject, session.fingerprint),
        "groups": groups,
        "tasks": tasks,
        "missing": missing,
        "prompts": {},
        "judged": scores.of_answers(answers) | {"judges": said, "conversations": scores.conversations(answers, shown)},
        "harness": "llm_recipes",
        "engine": ", ".join(sorted({row["engine"] for rows in answers.values() for row in rows})),
        "dtype": session.dtype,
        "chat_template": True,
        "seconds": time.time() - session.started,
        "time": time.time(),
        "devices": place.ranks,
        "configuration": dataclasses.asdict(session.suite.config),
    }


def _who(judge: Mapping[str, Any]) -> dict[str, Any]:
    return {key: judge[key] for key in ("url", "model", "temperature")}


def _sum(rows: Any, key: str) -> float | None:
    """What rows add up to; None where one of them does not say."""
    values = [row[key] for row in rows]
    return None if None in values else sum(values)
