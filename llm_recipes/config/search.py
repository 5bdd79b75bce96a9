"""What a search over many runs is, and how its winner is picked."""

from dataclasses import dataclass, field

USUAL_KEEP = {"english": 0.05}


@dataclass
class RuleConfig:
    """Which run is the best: the best in one score, of those that keep others.

    A score is named `SUITE.GROUP` (the mean of a group of a suite's tasks), `SUITE.GROUP.TASK`, or
    `bits_per_byte.SET` (the run's own validation; lower is better). `GROUP` alone will do where one suite has it.
    """

    best: str = "japanese"
    keep: dict[str, float] = field(default_factory=dict)
    """Share of the base model's score that a run may lose in it, at most. Empty: of `english` 0.05, which is 5%."""


@dataclass
class SearchConfig:
    """With Hydra's multirun (`-m`): each job is a run in `<run.dir>/<run.name>-<search.name>/<job>`."""

    name: str = "search"
    keys: list[str] = field(default_factory=list)
    """Keys that name a job besides those that are given several values."""
    swept: list[str] = field(default_factory=list)
    """Filled in by the launch: those that are."""
    rule: RuleConfig = field(default_factory=RuleConfig)
