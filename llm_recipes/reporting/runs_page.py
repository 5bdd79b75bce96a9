"""Any runs as a page: what each came to, in the order that they were started in."""

from typing import Any

from llm_recipes.reporting import figures
from llm_recipes.reporting.figures import Trace
from llm_recipes.reporting.judge import judge_section
from llm_recipes.reporting.page import Cell, Page, now, numeral, text
from llm_recipes.reporting.reading import number
from llm_recipes.reporting.rule import better
from llm_recipes.reporting.run_figures import Named
from llm_recipes.reporting.runs import Runs
from llm_recipes.reporting.scores import VALIDATION, Score
from llm_recipes.reporting.search import model_of, setting
from llm_recipes.reporting.texts import Texts, amount, figure, shown

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "pentagon", "hexagon2")
"""With the colours: base models are told apart without them too."""


def runs_page(runs: Runs, language: str, table: str) -> Page:
    """The page of all runs.

    Args:
        table: the CSV's name.
    """
    say = runs.texts(language)
    page = Page(say, runs.folder.resolve().name)
    page.head(say("runs"), [say("made", time=now(), folder=runs.folder), say("with_csv", path=table)])
    bases = say("count_bases", count=len(runs.bases)) if len(runs.bases) > 1 else next(iter(runs.model_names.values()))
    leader, best = runs.leader, runs.best
    if leader is not None and best is not None:
        value = figure(runs.scores[leader][best][1].value)
        name, score = runs.runs[leader].name, say.score(runs.examples[best])
        line = say("runs_headline", runs=say.runs(len(runs.runs)), bases=bases, score=score, name=name, value=value)
    else:
        line = say("runs_headline_plain", runs=say.runs(len(runs.runs)), bases=bases)
    page.answer(line, [], None, True)
    page.section(say("scores_by_trial"))
    names = runs.means or [name for name, score in runs.examples.items() if score.group == VALIDATION]
    page.figures([each for name in names if (each := _by_trial(runs, say, name))])
    if not names:
        page.note(say("no_scores_yet"))
    page.section(say("loss_curves"))
    losses = _losses(runs)
    if losses:
        drawn = figures.layout(say("step"), say("loss"), 400, showlegend=len(losses) <= figures.SHOWN_IN_LEGEND)
        page.figures([(say("loss_curves"), {"data": losses, "layout": drawn}, say("thinned"))], wide=True)
    page.section(say("all_runs"))
    _table(page, runs)
    last = [(run.name, run.results[max(run.results)]) for run in runs.runs if run.results]
    for suite in dict.fromkeys(suite for _, results in last for suite in results):
        judge_section(page, suite, [(name, results[suite]) for name, results in last if suite in results])
    return page


def _colour(runs: Runs, model: str) -> tuple[str, str]:
    place = list(runs.bases).index(model)
    return figures.PALETTE[place % len(figures.PALETTE)], SYMBOLS[place % len(SYMBOLS)]


def _by_trial(runs: Runs, say: Texts, name: str) -> Named | None:
    scored = [at for at, scores in enumerate(runs.scores) if name in scores]
    if not scored:
        return None
    traces: list[Trace] = [_best_so_far(runs, say, name, scored)]
    ends = [0.5, len(runs.runs) + 0.5]
    for model, base in runs.bases.items():
        colour, symbol = _colour(runs, model)
        those = [at for at in scored if model_of(runs.runs[at]) == model]
        if those:
            scores = [runs.scores[at][name] for at in those]
            texts = [
                f"{runs.runs[at].name}: {figure(score.value)} ({say('step')} {step:,})"
                for at, (step, score) in zip(those, scores, strict=True)
            ]
            heights = [score.value for _, score in scores]
            mark: dict[str, Any] = {"color": colour, "symbol": symbol}
            traces.append(figures.points([at + 1 for at in those], heights, runs.model_names[model], texts, mark))
        if name in base:
            level = figures.level(ends, base[name].value, f"{say('base')}: {runs.model_names[model]}")
            traces.append(level | {"line": {**level["line"], "color": colour}, "showlegend": False})
    score = runs.examples[name]
    unit = "" if score.unit == "score" else say(score.unit)
    axis = {"range": ends} | ({"dtick": 1} if len(runs.runs) <= 10 else {})
    frame = figures.layout(say("trial"), unit, xaxis=axis, showlegend=True)
    without = len(runs.runs) - len(scored)
    notes = [say("dashed_base")] if any(name in base for base in runs.bases.values()) else []
    notes += [say("no_score_of", names=say.runs(without))] if without else []
    return say("score_by_trial_of", name=say.score(score)), {"data": traces, "layout": frame}, " ".join(notes)


def _best_so_far(runs: Runs, say: Texts, name: str, scored: list[int]) -> Trace:
    best: Score | None = None
    ys = []
    for at in scored:
        score = runs.scores[at][name][1]
        best = score if best is None or better(score, best) else best
        ys.append(best.value)
    line = figures.curve([at + 1 for at in scored], list(ys), say("best_so_far"), figures.FAINT)
    return line | {"mode": "lines", "hoverinfo": "skip", "line": {"color": figures.FAINT, "width": 1.5, "shape": "hv"}}


def _losses(runs: Runs) -> list[Trace]:
    buckets = figures.BUCKETS_ALONE if len(runs.runs) <= figures.FEW else figures.BUCKETS_MANY
    return [
        figures.curve(
            [row["step"] for row in run.steps], [number(row["loss"]) for row in run.steps], run.name,
            _colour(runs, model_of(run))[0], buckets,
            line={"dash": figures.DASHES[at % len(figures.DASHES)]},
        )
        for at, run in enumerate(runs.runs) if run.steps
    ]  # fmt: skip


def _table(page: Page, runs: Runs) -> None:
    say = page.say
    varied = [
        key for key in dict.fromkeys(["optim.lr", *(key for run in runs.runs for key in run.overrides)])
        if any(setting(run, key) is not None for run in runs.runs)
    ]  # fmt: skip
    names = [*runs.means, *(name for name, score in runs.examples.items() if score.suite is None)]
    columns = ["#", say("run"), say("base"), say("status"), *varied, say("steps"), say("loss"), say("tokens")]
    columns += [say("device_hours"), *(say.score(runs.examples[name]) for name in names)]
    rows: list[list[Cell | str | None]] = []
    for at, (run, scores) in enumerate(zip(runs.runs, runs.scores, strict=True)):
        last, hours = run.at(None), run.device_hours
        loss = number(last.get("loss"))
        state = say.status(run.status)
        row: list[Cell | str | None] = [
            numeral(str(at + 1)), Cell(text(run.name), "name"), runs.model_names[model_of(run)],
            Cell(f"{text(state)}<small>{text(run.error)}</small>", "long narrow") if run.error else state,
        ]  # fmt: skip
        row += [numeral(None if setting(run, key) is None else shown(setting(run, key))) for key in varied]
        row += [
            numeral(f"{run.last_step:,}" if run.steps else None), numeral(None if loss is None else figure(loss)),
            numeral(amount(number(last.get("consumed_tokens"))) if last else None),
            numeral(None if hours is None else f"{hours:,.2f}"),
        ]  # fmt: skip
        row += [numeral(figure(scores[name][1].value)) if name in scores else None for name in names]
        rows.append(row)
    page.table(columns, rows, ["taken" if at == runs.leader else "" for at in range(len(rows))])
