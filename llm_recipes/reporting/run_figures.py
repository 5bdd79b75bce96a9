"""The figures of one run: everything that it has written down, over its steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_recipes.reporting import figures
from llm_recipes.reporting.figures import Figure, Trace
from llm_recipes.reporting.reading import Run, number
from llm_recipes.reporting.scores import VALIDATION, Score
from llm_recipes.reporting.texts import Texts

Named = tuple[str, Figure, str]
"""A heading, a figure, and a note under it."""
LOGARITHMIC_FROM = 30.0
"""A figure whose highest is so many times its lowest gets a logarithmic axis."""


def event_marks(runs: Sequence[Run], say: Texts) -> list[Trace]:
    """Updates that were left out and rollbacks, on the curves where they happened."""
    traces = []
    for event, symbol, colour in (("left_out", "x", figures.VERMILION), ("rollback", "triangle-left", figures.PURPLE)):
        name = say("left_out" if event == "left_out" else "rollbacks")
        xs, ys, texts = [], [], []
        for run in runs:
            rows = [row for row in run.events if row["event"] == event] if run.steps else []
            losses = {row["step"]: number(row["loss"]) for row in run.steps} if rows else {}
            for row in rows:
                nearest = min(losses, key=lambda step: abs(step - row["step"]))
                xs.append(row["step"])
                ys.append(losses[nearest])
                texts.append(f"{say('left_out' if event == 'left_out' else 'rollbacks')}: {run.name}, {row['step']}")
        if xs:
            traces.append(figures.points(xs, ys, name, texts, {"symbol": symbol, "size": 8, "color": colour}))
    return traces


def course(run: Run, say: Texts) -> tuple[list[Named], list[str]]:
    """Loss, learning rate, gradient norm, speed and memory over steps; and what is not there to be drawn."""
    wanted: list[tuple[str, str, list[tuple[str, Callable[[dict[str, Any]], Any]]]]] = [
        ("loss_by_source", "loss", [(name, _of_source(name)) for name in _names(run, "loss_by_source")]),
        ("learning_rate", "", [("", _of("lr"))]),
        ("grad_norm", "", [("", _of("grad_norm"))]),
        ("throughput", "rate", [("", _of("tokens_per_second_per_device"))]),
        ("mfu", "", [("", _of("mfu"))]),
        ("memory", "", [(key, _of(key)) for key in _memory_keys(run)]),
    ]
    made, missing = [], []
    for heading, unit, lines in wanted:
        traces = []
        for place, (name, read) in enumerate(lines):
            ys = [number(read(row)) for row in run.steps]
            there = [at for at, y in enumerate(ys) if y is not None or heading != "loss_by_source"]  # not in each batch
            if any(y is not None for y in ys):
                colour = figures.PALETTE[place % len(figures.PALETTE)]
                steps = [run.steps[at]["step"] for at in there]
                traces.append(figures.curve(steps, [ys[at] for at in there], name, colour))
        if traces:
            made.append((say(heading), _frame(traces, say("step"), say(unit) if unit else "", heading), ""))
        else:
            missing.append(say(heading))
    return made, missing


def loss(run: Run, say: Texts) -> Figure | None:
    """The loss, with what the guard did on it."""
    if not run.steps:
        return None
    xs, ys = [row["step"] for row in run.steps], [number(row["loss"]) for row in run.steps]
    traces = [figures.curve(xs, ys, say("overall"), figures.BLUE), *event_marks([run], say)]
    return {"data": traces, "layout": figures.layout(say("step"), say("loss"), 380, showlegend=len(traces) > 1)}


def scores(course: Mapping[int, Mapping[str, Score]], say: Texts) -> list[Named]:
    """Scores over steps: a figure for all held-out texts, and one for the groups of each suite.

    Args:
        course: scores by step and name; step 0 is the untouched model.
    """
    every = {name: score for step in sorted(course) for name, score in course[step].items()}
    kinds: dict[tuple[str | None, str], list[Score]] = {}
    for score in every.values():
        if score.is_mean or score.group == VALIDATION:
            kinds.setdefault((score.suite, score.unit), []).append(score)
    made = []
    for (suite, unit), those in kinds.items():
        traces = []
        for place, score in enumerate(those):
            found = [(step, course[step][score.name]) for step in sorted(course) if score.name in course[step]]
            colour = figures.PALETTE[place % len(figures.PALETTE)]
            name = say.word(score.group) if score.is_mean else str(score.task)
            line = figures.curve([step for step, _ in found], [each.value for _, each in found], name, colour)
            if len(found) <= figures.BUCKETS_MANY and any(each.standard_error for _, each in found):
                errors = [each.standard_error or 0.0 for _, each in found]
                line["error_y"] = {"type": "data", "array": errors, "thickness": 1.2, "width": 4}
            traces.append(line)
        heading = say("validation_curves", name=say(unit)) if suite is None else say("evaluation_curves", name=suite)
        drawn = {
            "data": traces,
            "layout": figures.layout(say("step"), "" if unit == "score" else say(unit), showlegend=True),
        }
        made.append((heading, drawn, say("error_bars") if any("error_y" in each for each in traces) else ""))
    return made


def _of(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda row: row.get(key)


def _of_source(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda row: (row.get("loss_by_source") or {}).get(name)


def _names(run: Run, key: str) -> list[str]:
    return list(dict.fromkeys(name for row in run.steps for name in row.get(key) or {}))


def _memory_keys(run: Run) -> list[str]:
    """What a row says of memory, whatever its unit: the key has it."""
    last = run.steps[-1] if run.steps else {}
    return [key for key, value in last.items() if "memory" in key and number(value) is not None]


def _frame(traces: list[Trace], x: str, y: str, heading: str) -> Figure:
    known = [value for trace in traces for value in trace["y"] if value is not None]
    axis: dict[str, Any] = {"tickformat": ".0%"} if heading == "mfu" else {}
    if heading in ("throughput", "mfu", "memory"):
        axis["rangemode"] = "tozero"
    elif min(known) > 0 and max(known) / min(known) >= LOGARITHMIC_FROM:
        axis |= {"type": "log", "exponentformat": "power", "dtick": 1}
    shown = len(traces) > 1 or bool(traces[0]["name"])
    return {"data": traces, "layout": figures.layout(x, y, showlegend=shown, yaxis=axis)}
