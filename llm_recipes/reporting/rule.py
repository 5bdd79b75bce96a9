"""Which run to take: the best in one score, of those that keep others; and why each of the rest is not it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_recipes.reporting.scores import Score

ROUNDING = 1e-9
"""A run that loses exactly its share keeps the rule."""


@dataclass(frozen=True)
class Rule:
    """Full names of scores; see `config.RuleConfig`."""

    best: str
    keep: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """A run as the rule sees it.

    Attributes:
        scores: at the step that is compared, by full name.
        base: the scores of the untouched model that it started from.
        trouble: why it is out whatever its scores (`failed`), a key of `texts.py`; and what goes into that text.
    """

    name: str
    scores: Mapping[str, Score]
    base: Mapping[str, Score]
    trouble: tuple[str, dict[str, Any]] | None = None


@dataclass(frozen=True)
class Reason:
    """A key of `texts.py`, and what goes into that text."""

    key: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What the rule says.

    Attributes:
        winner: the number of the candidate to take, or None.
        undecided: scores of `keep` that no base model has: without them nobody can say who keeps the rule.
        best: the number of the best in `rule.best` alone, whatever it loses; None where nobody has a score.
        reasons: by candidate, why it is not taken; none for the winner.
    """

    winner: int | None
    undecided: list[str]
    best: int | None
    reasons: list[list[Reason]]


def loss_of(score: Score, base: Score) -> float | None:
    """The share of the base's score that is lost; negative where it was gained; None where the base's is 0."""
    if base.value == 0:
        return None
    change = (score.value - base.value) / abs(base.value)
    return -change if score.higher else change


def better(one: Score, other: Score) -> bool:
    return one.value > other.value if one.higher else one.value < other.value


def judge(candidates: Sequence[Candidate], rule: Rule) -> Verdict:
    """Take the best in `rule.best` of those that are better in it than their base and lose no more than `rule.keep`.

    Where a score of `rule.keep` is missing in a base, nobody is taken: the rule cannot be judged. Where only
    `rule.best` is missing there, the runs are compared with one another alone.
    """
    undecided = [name for name in rule.keep if not all(name in each.base for each in candidates if each.scores)]
    reasons = [_own_reasons(each, rule) for each in candidates]
    scored = [at for at, each in enumerate(candidates) if rule.best in each.scores and each.trouble is None]
    best = _best(candidates, scored, rule.best)
    left = [at for at in scored if not reasons[at]]
    winner = None if undecided else _best(candidates, left, rule.best)
    if winner is not None:
        first = candidates[winner].scores[rule.best]
        for at in left:
            own = candidates[at].scores[rule.best]
            if at != winner:
                key = "worse" if better(first, own) else "equal"
                facts = {"score": rule.best, "value": own, "best": first, "winner": candidates[winner].name}
                reasons[at].append(Reason(key, facts))
    elif undecided:
        for at in left:
            reasons[at].append(Reason("undecided", {"score": undecided[0]}))
    return Verdict(winner, undecided, best, reasons)


def _best(candidates: Sequence[Candidate], among: Sequence[int], name: str) -> int | None:
    """The first of the best."""
    found: int | None = None
    for at in among:
        if found is None or better(candidates[at].scores[name], candidates[found].scores[name]):
            found = at
    return found


def _own_reasons(candidate: Candidate, rule: Rule) -> list[Reason]:
    """Why a run is out, whatever the others have."""
    if candidate.trouble is not None:
        return [Reason(*candidate.trouble)]
    missing = [name for name in (rule.best, *rule.keep) if name not in candidate.scores]
    if missing:
        return [Reason("no_score", {"score": name}) for name in missing]
    reasons = []
    for name, limit in rule.keep.items():
        score, base = candidate.scores[name], candidate.base.get(name)
        lost = None if base is None else loss_of(score, base)
        if lost is not None and lost > limit + ROUNDING:
            reasons.append(Reason("loses", {"score": name, "value": score, "base": base, "lost": lost, "limit": limit}))
    score, base = candidate.scores[rule.best], candidate.base.get(rule.best)
    if base is not None and not better(score, base):
        reasons.append(Reason("not_above_base", {"score": rule.best, "value": score, "base": base}))
    return reasons


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The numbers of the points that no other beats in both, by the first coordinate; higher is better in both.

    A point is beaten by one that is at least as good in both and better in one.
    """
    front: list[int] = []
    highest = float("-inf")
    for at in sorted(range(len(points)), key=lambda at: (-points[at][0], -points[at][1])):
        x, y = points[at]
        same = bool(front) and points[front[-1]] == (x, y)
        if y > highest or same:
            front.append(at)
            highest = max(highest, y)
    return front[::-1]
