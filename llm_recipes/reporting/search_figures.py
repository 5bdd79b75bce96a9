"""The figures of a search: scores by setting, what is gained against what is lost, losses, held-out text, cost."""

import math
from collections.abc import Sequence
from typing import Any

from llm_recipes.reporting import figures
from llm_recipes.reporting.figures import Figure, Trace
from llm_recipes.reporting.reading import Run, number
from llm_recipes.reporting.rule import loss_of, pareto_front
from llm_recipes.reporting.run_figures import Named, event_marks
from llm_recipes.reporting.scores import Score
from llm_recipes.reporting.search import Search, setting
from llm_recipes.reporting.texts import Texts, figure, shown, signed

PALE = "#c3ccd6"
FEW_SCORES = 4
MARKS: dict[str, dict[str, Any]] = {
    "taken": {"symbol": "star", "size": 17, "color": figures.VERMILION},
    "kept": {"symbol": "circle", "color": figures.BLUE},
    "not_kept": {"symbol": "circle-open", "color": figures.FAINT, "line": {"width": 2}},
    "run": {"symbol": "circle", "color": figures.BLUE},
}


def standing(search: Search, at: int) -> str:
    """How a run stands to the rule: a key of `MARKS`; `run` where nobody can say."""
    if search.problem is not None:
        return "run"
    if search.verdict.winner == at:
        return "taken"
    why = {each.key for each in search.verdict.reasons[at]}
    return "run" if why == {"undecided"} else "kept" if why <= {"worse", "equal"} else "not_kept"


def line_colours(search: Search) -> list[str]:
    return figures.colours(len(search.runs))


def score_figures(search: Search, say: Texts) -> list[Named]:
    """Each group's mean (or, where there are none, each held-out text) by what was searched."""
    names = search.means or search.names
    return [_score_figure(search, say, name) for name in names]


def _score_figure(search: Search, say: Texts, name: str) -> Named:
    one = len(search.keys) == 1
    keyed = [setting(run, search.keys[0]) for run in search.runs] if one else []
    begun = [value for run, value in zip(search.runs, keyed, strict=False) if run.steps or run.scored_steps()]
    axis: dict[str, Any] = figures.value_axis(begun or keyed) if one else {"type": "linear"}
    if axis.get("type") == "category":
        keyed = [figures.escape(shown(value)) for value in keyed]
    places: list[Any] = keyed if one else [search.trials[run.name] for run in search.runs]
    traces: list[Trace] = []
    scored = [at for at in range(len(search.runs)) if name in search.scores[at]]
    if one and axis["type"] != "category":
        heights = [search.scores[at][name].value for at in scored]
        line = figures.curve([places[at] for at in scored], heights, "", PALE)
        traces.append(line | {"mode": "lines", "showlegend": False, "hoverinfo": "skip"})
    for kind, mark in MARKS.items():
        those = [at for at in scored if standing(search, at) == kind]
        if not those:
            continue
        scores = [search.scores[at][name] for at in those]
        texts = [f"{search.label(search.runs[at])}: {_with_error(search.scores[at][name])}" for at in those]
        trace = figures.points([places[at] for at in those], [each.value for each in scores], say(kind), texts, mark)
        if any(each.standard_error for each in scores):
            errors = [each.standard_error or 0 for each in scores]
            trace["error_y"] = {"type": "data", "array": errors, "color": figures.FAINT, "thickness": 1.2, "width": 4}
        traces.append(trace)
    bases = {base[name].value for base in search.bases.values() if name in base}
    spread = begun or places
    ends = [places[0], places[-1]] if axis["type"] == "category" else [min(spread), max(spread)]
    if len(spread) == 1 and axis["type"] == "linear":
        ends = [0.9 * ends[0], 1.1 * ends[0]]
    if "range" in axis:
        ends = [10.0**each for each in axis["range"]]
    for value in sorted(bases):
        traces.append(figures.level(ends, value, say("base")))
    score = search.examples.get(name)
    title = figures.escape(search.keys[0] if one else say("trial"))
    without = [search.label(run) for at, run in enumerate(search.runs) if at not in scored]
    notes = [say("error_bars")] if any("error_y" in trace for trace in traces) else []
    if without:
        few = without[: figures.FEW]
        more = [say("and_more", count=len(without) - len(few))] if len(without) > len(few) else []
        notes.append(say("no_score_of", names="; ".join([*few, *more])))
    unit = "" if score is None or score.unit == "score" else say(score.unit)
    return say.score(score, name), {"data": traces, "layout": figures.layout(title, unit, xaxis=axis)}, " ".join(notes)


def _with_error(score: Score) -> str:
    error = f" ± {score.standard_error:.4f}" if score.standard_error else ""
    return figure(score.value) + error


def pareto_figures(search: Search, say: Texts) -> list[Named]:
    """What is gained in the score that counts, against what changes in each that is to be kept."""
    best = search.rule.best
    others = list(search.rule.keep) or [name for name in search.means if name != best]
    return [found for other in others if other != best and (found := _pareto_figure(search, say, best, other))]


def _pareto_figure(search: Search, say: Texts, best: str, other: str) -> Named | None:
    places: dict[int, tuple[float, float]] = {}
    in_points = True
    for at, run in enumerate(search.runs):
        own, base = search.scores[at], search.base_of(run)
        if not all(name in each for name in (best, other) for each in (own, base)):
            continue
        kept, gained = loss_of(own[other], base[other]), loss_of(own[best], base[best])
        if kept is None or gained is None:
            continue
        in_points = own[best].unit == "score" and max(abs(own[best].value), abs(base[best].value)) <= 1
        gain = 100 * (own[best].value - base[best].value) if in_points else -100 * gained
        places[at] = (-100 * kept, gain)
    if not places:
        return None
    traces: list[Trace] = []
    numbers = list(places)
    reached = [(0.0, 0.0), *places.values()]  # taking the base as it is, is one of the choices
    front = [reached[each] for each in pareto_front(reached)]
    if len(front) > 1:
        traces.append(
            {
                "type": "scatter", "mode": "lines", "x": [x for x, _ in front],
                "y": [y for _, y in front], "name": say("front"), "hoverinfo": "skip",
                "line": {"color": figures.GREEN, "width": 2, "shape": "vh"},
            }
        )  # fmt: skip
    for kind, mark in MARKS.items():
        those = [at for at in numbers if standing(search, at) == kind]
        if not those:
            continue
        texts = [
            f"{search.label(search.runs[at])}: {signed(places[at][1], '', 1)}, {signed(places[at][0], '%', 1)}"
            for at in those
        ]
        xs, ys = [places[at][0] for at in those], [places[at][1] for at in those]
        traces.append(figures.points(xs, ys, say(kind), texts, mark))
    base_mark = {"symbol": "diamond", "size": 11, "color": figures.INK}
    traces.append(figures.points([0], [0], say("base"), [say("untouched_base")], base_mark))
    labelled = [at for at in numbers if len(numbers) <= 8 or places[at] in front[:8]]
    score, limit = search.examples.get(other), search.rule.keep.get(other)
    names = say.score(search.examples.get(best), best), say.score(score, other)
    y = say("gain_of" if in_points else "change_of", name=figures.escape(names[0]))
    frame = figures.layout(say("change_of", name=figures.escape(names[1])), y, 400)
    frame["annotations"] = [
        {
            "x": places[at][0], "y": places[at][1], "text": figures.escape(search.short_label(search.runs[at])),
            "showarrow": False, "yshift": 14, "font": {"size": 11, "color": figures.INK},
        }
        for at in labelled
    ]  # fmt: skip
    for axis, values in (("xaxis", [x for x, _ in reached]), ("yaxis", [y for _, y in reached])):
        room = 0.12 * (max(values) - min(values) or 1)
        frame[axis]["range"] = [min(values) - room, max(values) + room]
    if limit is not None:
        frame["shapes"] = [
            {
                "type": "rect", "xref": "x", "yref": "paper", "x0": -100 * limit, "x1": 1000, "y0": 0, "y1": 1,
                "fillcolor": figures.GREEN, "opacity": 0.07, "line": {"width": 0}, "layer": "below",
            }
        ]  # fmt: skip
        traces.append(
            {
                "type": "scatter", "mode": "markers", "x": [None], "y": [None], "name": say("allowed"),
                "marker": {"symbol": "square", "size": 12, "color": "rgba(0,158,115,0.25)"},
            }
        )  # fmt: skip
    return say("pareto", best=names[0], other=names[1]), {"data": traces, "layout": frame}, ""


def loss_figure(search: Search, say: Texts) -> Figure | None:
    """All training losses; the taken run is thick. Of a few runs the mean over a stretch stands before the losses,
    which are pale: curves of different learning rates lie close."""
    traces = []
    few = len(search.runs) <= figures.SHOWN_IN_LEGEND
    buckets = figures.BUCKETS_ALONE if len(search.runs) <= figures.FEW else figures.BUCKETS_MANY
    for run, colour in zip(search.runs, line_colours(search), strict=True):
        if run.steps:
            xs, ys = [row["step"] for row in run.steps], [number(row["loss"]) for row in run.steps]
            line = figures.curve(xs, ys, search.short_label(run), colour, buckets, **_thick(search, run))
            stretch = len(xs) // figures.STRETCHES
            if few and stretch > 1:
                pale = {
                    "opacity": 0.22,
                    "showlegend": False,
                    "hoverinfo": "skip",
                    "line": {"width": 1, "color": colour},
                }
                traces.append(line | pale)
                means = figures.running_mean(ys, stretch)
                line = figures.curve(xs, means, search.short_label(run), colour, buckets, **_thick(search, run))
            traces.append(line)
    traces += event_marks(search.runs, say)
    return _of_runs(traces, search, say("step"), say("loss")) if traces else None


def _thick(search: Search, run: Run) -> dict[str, Any]:
    return {"line": {"width": 3.2}} if run is search.winner else {}


def _of_runs(traces: Sequence[Trace], search: Search, x: str, y: str, height: int = 400) -> Figure:
    drawn = figures.layout(x, y, height, showlegend=len(search.runs) <= figures.SHOWN_IN_LEGEND)
    if len(search.keys) == 1:
        drawn["legend"] |= {"title": {"text": f"{figures.escape(search.keys[0])} ", "side": "left"}}
    return {"data": list(traces), "layout": drawn}


def validation_figures(search: Search, say: Texts) -> list[Named]:
    """Bits per byte over steps, a figure for each held-out text."""
    names = dict.fromkeys(name for run in search.runs for by_set in run.validations.values() for name in by_set)
    made = []
    for name in names:
        traces, unit = [], "bits_per_byte"
        for run, colour in zip(search.runs, line_colours(search), strict=True):
            course = [(step, score) for step in sorted(run.validations) if (score := _of_set(run, step, name))]
            if course:
                unit = course[-1][1].unit
                xs, ys = [step for step, _ in course], [score.value for _, score in course]
                traces.append(figures.curve(xs, ys, search.short_label(run), colour, **_thick(search, run)))
        if traces:
            made.append(
                (say("validation_curves", name=name), _of_runs(traces, search, say("step"), say(unit), 320), "")
            )
    return made


def _of_set(run: Run, step: int, name: str) -> Score | None:
    return run.scores(step).get(f"bits_per_byte.{name}")


def cost_figure(search: Search, say: Texts) -> Figure | None:
    """Device hours of each run."""
    known = [run for run in search.runs if run.device_hours is not None]
    if not known:
        return None
    colour = [figures.VERMILION if run is search.winner else figures.SKY for run in known]
    hours = [run.device_hours or 0.0 for run in known]
    return figures.bars([search.label(run) for run in known], hours, say("device_hours"), colour)


def parallel_figure(search: Search, say: Texts) -> Figure | None:
    """Several settings: each run a line over an axis for each setting and for each score, all from low to high."""
    axes: list[tuple[str, list[float | None], list[str]]] = []
    for key in search.keys:
        values = [setting(run, key) for run in search.runs]
        axes.append((key, *_places(values)))
    for name in search.means or search.names[:FEW_SCORES]:
        values = [scores[name].value if name in scores else None for scores in search.scores]
        axes.append((say.score(search.examples.get(name), name), *_places(values)))
    best = [scores[search.rule.best].value if search.rule.best in scores else None for scores in search.scores]
    order = _places(best)[0]
    traces: list[Trace] = []
    for at, run in enumerate(search.runs):
        colour = figures.FAINT if order[at] is None else figures.scale_colour(order[at] or 0.0)
        ys = [places[at] for _, places, _ in axes]
        trace = figures.curve(list(range(len(axes))), ys, search.label(run), colour, **_thick(search, run))
        texts = [f"{figures.escape(name)}: {figures.escape(texts[at])}" for name, _, texts in axes]
        hover = f"{figures.escape(search.label(run))}<br>%{{text}}<extra></extra>"
        traces.append(trace | {"mode": "lines+markers", "text": texts, "hovertemplate": hover})
    frame = figures.layout("", "", 380, showlegend=False)
    frame["xaxis"] |= {
        "tickvals": list(range(len(axes))), "ticktext": [figures.escape(name) for name, _, _ in axes],
        "range": [-0.3, len(axes) - 0.7],
    }  # fmt: skip
    frame["yaxis"] |= {"showticklabels": False, "ticks": "", "range": [-0.12, 1.12], "showgrid": False}
    frame["annotations"] = [
        {
            "x": at, "y": end, "text": figures.escape(texts[places.index(end)]), "showarrow": False,
            "yshift": 12 if end else -12, "font": {"size": 11},
        }
        for at, (_, places, texts) in enumerate(axes) for end in (0.0, 1.0) if end in places
    ]  # fmt: skip
    return {"data": traces, "layout": frame}


def _places(values: Sequence[Any]) -> tuple[list[float | None], list[str]]:
    """Values between 0 and 1, decades evenly; texts each at their place in order."""
    texts = [shown(value) for value in values]
    known = [value for value in values if value is not None]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in known)
    if not numeric:
        order = {each: float(at) for at, each in enumerate(dict.fromkeys(texts))}
        scaled: list[float | None] = [order[each] for each in texts]
    elif figures.is_logarithmic(known):
        scaled = [None if value is None else math.log10(value) for value in values]
    else:
        scaled = [None if value is None else float(value) for value in values]
    there = [each for each in scaled if each is not None]
    if not there:
        return scaled, texts
    low, high = min(there), max(there)
    if low == high:
        return [None if each is None else 0.5 for each in scaled], texts
    return [None if each is None else (each - low) / (high - low) for each in scaled], texts
