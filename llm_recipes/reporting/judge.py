"""Answers that were judged: categories as a radar chart, what each judge says, and every answer with its ratings.

A chart, a column and a row are of one judge: figures of different judges are never put together.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llm_recipes.reporting import figures
from llm_recipes.reporting.figures import Figure
from llm_recipes.reporting.page import Cell, Page, numeral, text
from llm_recipes.reporting.reading import number
from llm_recipes.reporting.texts import Texts, share

Column = tuple[str, dict[str, Any]]
"""A model or a step by its name, and its result file."""
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""MT-Bench's, in its order; a chart's axes are in it, whatever order a model was asked in."""
HIGHEST = 10
DRAWN_AT_FIRST = 8
"""Polygons of a chart; the others are shown by a click on their names."""
SHOWN_MODELS, SHOWN_ANSWERS = 4, 400
HEAD = 90
"""Characters of a text that is folded."""
REPEATED = 0.5
"""As `evaluation.judge.marks` has it."""


def judge_section(page: Page, suite: str, columns: Sequence[Column]) -> None:
    """Everything of a suite that is judged; nothing where it is not.

    Args:
        columns: in the order that they are shown in, the untouched model first.
    """
    say = page.say
    judged = [(name, result["judged"]) for name, result in columns if isinstance(result.get("judged"), dict)]
    if not judged:
        return
    page.section(say("judged", suite=suite))
    judges = list(dict.fromkeys(judge for _, each in judged for judge in each["judges"]))
    charts = [(judge, chart) for judge in judges if (chart := _radar(judge, judged, say)) is not None]
    page.figures([(say("radar", judge=judge), chart, say("radar_note")) for judge, chart in charts])
    if judges:
        _judges_table(page, judges, judged)
        page.note(say("judges_apart"))
    else:
        page.note(say("not_judged"))
    _answers_table(page, judged)
    shown = judged if len(judged) <= SHOWN_MODELS else [judged[0], *judged[1 - SHOWN_MODELS :]]
    for name, each in shown:
        with page.fold(say("all_answers", suite=suite, name=name)):
            _questions_table(page, judges, each)
    if len(judged) > len(shown):
        page.note(say("and_more", count=len(judged) - len(shown)))


def _radar(judge: str, judged: Sequence[tuple[str, Mapping[str, Any]]], say: Texts) -> Figure | None:
    """One judge's means by category, a polygon for each model or step. A category that is not there is a gap."""
    traces: list[dict[str, Any]] = []
    there = {name for _, each in judged for name in each["judges"].get(judge, {}).get("categories", {})}
    names = [*(name for name in CATEGORIES if name in there), *sorted(there - {*CATEGORIES})]
    for name, each in judged:
        found = each["judges"].get(judge, {}).get("categories", {})
        whole = {category: own for category, own in found.items() if not own.get("open")}
        means = [number(whole.get(category, {}).get("mean")) for category in names]
        if all(mean is None for mean in means):
            continue
        axes = [figures.escape(say.word(category)) for category in names]
        place = len(traces)
        colour = figures.PALETTE[place % len(figures.PALETTE)]
        dash = figures.DASHES[place // len(figures.PALETTE) % len(figures.DASHES)]
        traces.append(
            {
                "type": "scatterpolar", "mode": "lines+markers", "name": figures.escape(name),
                "r": [*means, means[0]], "theta": [*axes, axes[0]], "connectgaps": False,
                "line": {"color": colour, "width": 2, "dash": dash}, "marker": {"size": 6, "color": colour},
                "hovertemplate": f"{figures.escape(name)}<br>%{{theta}}: %{{r:.2f}}<extra></extra>",
                "visible": True if place < DRAWN_AT_FIRST else "legendonly",
            }
        )  # fmt: skip
    if not traces:
        return None
    frame = figures.layout("", "", 440, showlegend=True)
    del frame["xaxis"], frame["yaxis"]
    radial = {"range": [0, HIGHEST], "dtick": 2, "gridcolor": figures.GRID, "linecolor": figures.GRID, "angle": 90}
    frame["polar"] = {
        "bgcolor": "rgba(0,0,0,0)", "radialaxis": radial | {"tickangle": 90},
        "angularaxis": {"gridcolor": figures.GRID, "linecolor": figures.FAINT, "direction": "clockwise"},
    }  # fmt: skip
    frame["margin"] = {"l": 70, "r": 70, "t": 40, "b": 30}
    frame["legend"] = {"orientation": "h", "x": 0, "y": -0.08, "xanchor": "left", "yanchor": "top"}
    return {"data": traces, "layout": frame}


def _judges_table(page: Page, judges: Sequence[str], judged: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """A row for each judge and model: means over everything and by turn, what could not be rated, what it cost."""
    say = page.say
    turns = sorted({turn for _, each in judged for own in each["judges"].values() for turn in own["turns"]}, key=int)
    rows: list[list[Cell | str | None]] = []
    for judge in judges:
        for name, each in judged:
            own = each["judges"].get(judge)
            if own is None:
                continue
            asked = ", ".join(own.get("answered_as") or [str(own.get("model"))])
            tokens = [number(own.get(key)) for key in ("input_tokens", "output_tokens")]
            used = None if None in tokens else f"{tokens[0]:,.0f} / {tokens[1]:,.0f}"
            cost, left = number(own.get("cost")), int(own.get("open") or 0)
            rated = say("items_of", items=own["ratings"], all=own["of"])
            rows.append(
                [
                    Cell(f"{text(judge)}<small>{text(asked)}</small>", "name"), name, _mean(own),
                    *(_mean(own["turns"].get(turn, {})) for turn in turns),
                    numeral(rated, say("judgements_open", count=left) if left else ""),
                    numeral(str(len(own.get("no_rating") or []))), numeral(used),
                    numeral(None if cost is None else f"{cost:,.4f}"),
                ]
            )  # fmt: skip
    columns = [say("judge"), say("model"), say("overall"), *(say("turn", turn=turn) for turn in turns)]
    page.table([*columns, *(say(key) for key in ("rated", "no_rating", "judge_tokens", "judge_cost"))], rows)


def _mean(own: Mapping[str, Any]) -> Cell | None:
    mean, error = number(own.get("mean")), number(own.get("standard_error"))
    return numeral(None if mean is None else f"{mean:.2f}", "" if error is None else f"± {error:.2f}")


def _answers_table(page: Page, judged: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """What is seen of the answers without a judge."""
    say = page.say
    rows: list[list[Cell | str | None]] = []
    for name, each in judged:
        japanese = number(each.get("japanese"))
        counts = [numeral(str(each.get(key))) for key in ("answers", "repeating", "cut", "empty")]
        rows.append([name, counts[0], numeral(None if japanese is None else share(japanese)), *counts[1:]])
    page.table([say(key) for key in ("model", "judged_answers", "japanese_share", "repeating", "cut", "empty")], rows)
    page.note(say("repeating_note"))


def _questions_table(page: Page, judges: Sequence[str], judged: Mapping[str, Any]) -> None:
    """Every answer of a model: what was asked, what it wrote, each judge's rating with its reason, and what is seen."""
    say = page.say
    rows: list[list[Cell | str | None]] = []
    for each in judged["conversations"]:
        for turn, own in enumerate(each["turns"], 1):
            trial = f" ({each['trial'] + 1})" if each["trial"] else ""
            below = f"{text(say.word(each['category']))}<br>{text(say('turn', turn=turn) + trial)}"
            ratings = [_rating(own["scores"].get(judge), say) for judge in judges]
            rows.append(
                [
                    Cell(f"{text(each['question_id'])}<small>{below}</small>", "name"),
                    Cell(_folded(own["question"]), "long"), Cell(_folded(own["answer"]), "long"),
                    *ratings, Cell(_flags(own, say), "long narrow"),
                ]
            )  # fmt: skip
    columns = [say(key) for key in ("question", "prompt", "answer")]
    page.table([*columns, *judges, say("noticed")], rows[:SHOWN_ANSWERS])
    if len(rows) > SHOWN_ANSWERS:
        page.note(say("and_more", count=len(rows) - SHOWN_ANSWERS))


def _folded(whole: str) -> str:
    """A long text behind its beginning."""
    plain = " ".join(whole.split())
    if len(plain) <= HEAD:
        return f'<div class="whole">{text(whole)}</div>'
    return f'<details><summary>{text(plain[:HEAD])} …</summary><div class="whole">{text(whole)}</div></details>'


def _rating(own: Mapping[str, Any] | None, say: Texts) -> Cell | None:
    if own is None:
        return None
    score = number(own.get("score"))
    shown = say("no_rating") if score is None else f"{score:g}"
    reason = str(own.get("reason") or "")
    if not reason:
        return Cell(text(shown), "long narrow")
    folded = f'<details><summary>{text(shown)}</summary><div class="whole">{text(reason)}</div></details>'
    return Cell(folded, "long narrow")


def _flags(own: Mapping[str, Any], say: Texts) -> str:
    """What is noticed of an answer."""
    japanese, repeated = number(own.get("japanese")), number(own.get("repetition"))
    found = [] if japanese is None else [f"{say('japanese')} {share(japanese)}"]
    found += [say("empty")] if not own["answer"] else []
    found += [say("cut")] if own.get("cut") else []
    found += [say("repeats_itself")] if repeated is not None and repeated > REPEATED else []
    return "<br>".join(map(text, found))
