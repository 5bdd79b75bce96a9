"""A search on the terminal and as a page: the answer first, then figures, then everything."""

from collections import Counter
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from llm_recipes.reporting import search_figures
from llm_recipes.reporting.judge import judge_section
from llm_recipes.reporting.page import Cell, Page, now, numeral, text
from llm_recipes.reporting.reading import Run, number
from llm_recipes.reporting.scores import VALIDATION, Score
from llm_recipes.reporting.search import Search, model_of, results_of, setting
from llm_recipes.reporting.tasks import task_table
from llm_recipes.reporting.texts import Texts, amount, figure, share, shown
from llm_recipes.telemetry.progress import console, show_whole


def columns_of(search: Search) -> list[str]:
    """Full names of the scores that stand in the table: the groups' means, then held-out texts."""
    return search.means + [name for name in search.names if name.startswith(f"{VALIDATION}.")]


def headline(search: Search, say: Texts) -> tuple[str, list[str]]:
    """The answer in a line, and what must be said beside it."""
    rule, verdict = search.rule, search.verdict
    kept = "".join(
        say("rule_keep", limit=share(limit), score=say.score(search.examples.get(name), name))
        for name, limit in rule.keep.items()
    )
    best = say.score(search.examples.get(rule.best), rule.best)
    notes = [say("rule", best=best, keep=kept)]
    if search.step is not None:
        notes.append(say("compared_at", step=search.step))
    notes += [say("unlike", suite=suite) for suite in search.unlike]
    if search.problem is not None:
        return say("rule_problem", problem=search.problem), notes
    if verdict.winner is not None:
        facts = _facts(search, verdict.winner, say)
        notes += [note for note in (_without_base(search, say, best), _by_chance(search, say)) if note]
        name = search.label(search.runs[verdict.winner])
        return (say("take_facts", winner=name, facts=facts) if facts else say("take", winner=name)), notes
    if verdict.best is None:
        return say("no_scores_yet"), notes
    name = search.label(search.runs[verdict.best])
    if verdict.undecided:
        missing = say.score(search.examples.get(verdict.undecided[0]), verdict.undecided[0])
        return say("cannot_judge", score=missing, best=best, name=name), notes
    return say("nearest", score=best, name=name, facts=_facts(search, verdict.best, say)), notes


def _facts(search: Search, at: int, say: Texts) -> str:
    """`Japanese +3.2 points, English −7.0%`."""
    own, base = search.scores[at], search.base_of(search.runs[at])
    said = []
    for name in (search.rule.best, *search.rule.keep):
        if name in own and name in base:
            write = say.change if name == search.rule.best else say.relative
            said.append(write(own[name], base[name]))
    return say.list(said)


def _without_base(search: Search, say: Texts, best: str) -> str:
    winner = search.winner
    assert winner is not None
    return "" if search.rule.best in search.base_of(winner) else say("best_without_base", score=best)


def _by_chance(search: Search, say: Texts) -> str:
    """Whether another run that keeps the rule is as good, as far as the items can tell."""
    at, best = search.verdict.winner, search.rule.best
    assert at is not None
    first = search.scores[at][best]
    near = [
        other for other in range(len(search.runs))
        if other != at and search_figures.standing(search, other) == "kept"
        and (error := max(first.standard_error or 0, search.scores[other][best].standard_error or 0))
        and abs(search.scores[other][best].value - first.value) <= error
    ]  # fmt: skip
    names = ", ".join(search.label(search.runs[other]) for other in near[:3])
    return say("within_error", name=names, score=say.score(first)) if near else ""


def verdict_of(search: Search, at: int, say: Texts) -> str:
    """Why a run is not taken, or that it is."""
    if search.problem is None and search.verdict.winner == at:
        return say("taken")
    if search.problem is not None and search.verdict.reasons[at][:1] and search.runs[at].status == "done":
        return ""
    return ("；" if say.language == "ja" else "; ").join(map(say.reason, search.verdict.reasons[at]))


def spikes(run: Run) -> str:
    return f"{run.count('left_out')} / {run.count('rollback')}"


def minimum(run: Run) -> float | None:
    """The learning rate that a run ends at."""
    own, lr = number(setting(run, "optim.min_lr")), number(setting(run, "optim.lr"))
    ratio = number(setting(run, "optim.min_lr_ratio"))
    if own is not None or lr is None or ratio is None:
        return own
    return lr * ratio


def loss_of(search: Search, run: Run) -> float | None:
    """At the step that is compared, or where the run is."""
    return number((run.at(search.step) or run.at(None)).get("loss"))


def show_search(search: Search) -> None:
    """The table and the answer on the terminal."""
    say = Texts("en", search.examples.values())
    scores = columns_of(search)
    table = Table(title=f"{search.folder}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    has_minimum, several = "optim.lr" in search.keys, len(search.keys) > 1
    if several:
        table.add_column("#", justify="right")
    for key in search.keys or [say("run")]:
        table.add_column(escape(key))
    for name in [
        *(["minimum"] if has_minimum else []), *(say.score(search.examples.get(name), name) for name in scores),
        "loss", "left out", "rolled back",
    ]:  # fmt: skip
        table.add_column(escape(name).replace(" ", "\n"), justify="right")
    for model, base in search.bases.items():
        first = say("base") if len(search.bases) == 1 else f"{say('base')} {Path(model).name}"
        cells = [*([""] if several else []), first, *[""] * (len(search.keys) - 1), *(["-"] if has_minimum else [])]
        cells += [figure(base[name].value) if name in base else "-" for name in scores]
        table.add_row(*map(escape, [*cells, "-", "-", "-"]))
    for at, run in enumerate(search.runs):
        own, low, loss = search.scores[at], minimum(run), loss_of(search, run)
        cells = [f"{search.trials[run.name]}"] if several else []
        cells += [shown(setting(run, key)) for key in search.keys] or [run.name]
        if has_minimum:
            cells.append("-" if low is None else f"{low:.3g}")
        cells += [figure(own[name].value) if name in own else "-" for name in scores]
        cells += ["-" if loss is None else f"{loss:.4f}", str(run.count("left_out")), str(run.count("rollback"))]
        table.add_row(*map(escape, cells), style="bold" if run is search.winner else None)
    show_whole(table)
    for at, run in enumerate(search.runs):
        if run is not search.winner and (why := verdict_of(search, at, say)):
            console.print(f"{search.label(run)}: {why}", markup=False)
    line, notes = headline(search, say)
    console.print(f"\n{line}", markup=False, style="bold")
    for note in notes:
        console.print(note, markup=False)
    if search.winner is not None:
        console.print(search.winner.job.get("command") or say("command_unknown"), markup=False)


def search_page(search: Search, language: str) -> Page:
    say = Texts(language, search.examples.values())
    page = Page(say, search.folder.name)
    statuses = Counter(run.status for run in search.runs)
    counts = say.list(f"{say.status(status)} {count}" for status, count in statuses.items())
    facts = [f"{say.runs(len(search.runs))} ({counts})", say.named("base", say.list(search.bases))]
    page.head(say("search"), [*facts, say("made", time=now(), folder=search.folder)])
    line, notes = headline(search, say)
    winner = search.winner
    command = winner.job.get("command") if winner else None
    if winner is not None and not command:
        notes.append(say("command_unknown"))
    page.answer(line, notes, command, winner is not None)
    page.section(say("all_runs"))
    _runs_table(page, search)
    one = len(search.keys) == 1
    page.section(say("scores_by_key", key=search.keys[0]) if one else say("scores_by_trial"))
    page.figures(search_figures.score_figures(search, say))
    if len(search.keys) > 1 and (parallel := search_figures.parallel_figure(search, say)):
        best = say.score(search.examples.get(search.rule.best), search.rule.best)
        page.figures([(say("parallel"), parallel, say("parallel_colour", score=best))], wide=True)
    page.figures(search_figures.pareto_figures(search, say))
    loss = search_figures.loss_figure(search, say)
    page.section(say("loss_curves"))
    page.figures([(say("loss_curves"), loss, say("thinned"))] if loss else [], wide=True)
    page.figures(search_figures.validation_figures(search, say))
    page.section(say("cost"))
    _cost_table(page, search)
    cost = search_figures.cost_figure(search, say)
    page.figures([(say("device_hours"), cost, "")] if cost else [], wide=True)
    _task_tables(page, search)
    page.section(say("details"))
    with page.fold(say("commands")):
        rows: list[list[Cell | str | None]] = [
            [say("search"), _long(each)] for each in search.said.get("commands") or []
        ]
        rows += [[search.label(run), _long(run.job.get("command"))] for run in search.runs]
        page.table([say("run"), say("commands")], rows)
    shared = {
        key: value for key, value in search.runs[0].settings.items()
        if all(shown(run.settings.get(key)) == shown(value) for run in search.runs)
    }  # fmt: skip
    page.block(say("settings_shared"), "\n".join(f"{key}: {shown(value)}" for key, value in sorted(shared.items())))
    return page


def _long(value: Any) -> Cell | None:
    return Cell(text(value), "long") if value else None


def _runs_table(page: Page, search: Search) -> None:
    """The published table: settings, scores, loss, spikes; the untouched base model first."""
    say, names = page.say, columns_of(search)
    has_minimum = "optim.lr" in search.keys
    several = len(search.keys) > 1
    columns = ["#"] if several else []
    columns += [*(search.keys or [say("run")]), *([say("minimum")] if has_minimum else [])]
    columns += [say.score(search.examples.get(name), name) for name in names]
    columns += [say("loss"), say("spikes"), say("verdict")]
    rows: list[list[Cell | str | None]] = []
    kinds = []
    blank = [""] * (max(1, len(search.keys)) - 1 + has_minimum)
    for model, base in search.bases.items():
        name = say("untouched_base") if len(search.bases) == 1 else f"{say('base')}: {model}"
        cells = [_score_cell(base.get(each), None, say) for each in names]
        rows.append([*([""] if several else []), Cell(text(name), "name"), *blank, *cells, None, None, ""])
        kinds.append("base")
    for at, run in enumerate(search.runs):
        own, base, low, loss = search.scores[at], search.base_of(run), minimum(run), loss_of(search, run)
        values = [shown(setting(run, key)) for key in search.keys] or [run.name]
        row: list[Cell | str | None] = [numeral(str(search.trials[run.name]))] if several else []
        row += [Cell(text(value), "name") for value in values]
        if has_minimum:
            row.append(numeral(None if low is None else f"{low:.3g}"))
        row += [_score_cell(own.get(name), base.get(name), say) for name in names]
        row += [numeral(None if loss is None else f"{loss:.4f}"), Cell(spikes(run), "number")]
        rows.append([*row, Cell(text(verdict_of(search, at, say)), "long")])
        kinds.append({"taken": "taken", "not_kept": "out"}.get(search_figures.standing(search, at), ""))
    page.table(columns, rows, kinds)
    page.note(say("suites_apart"))


def _score_cell(score: Score | None, base: Score | None, say: Texts) -> Cell | None:
    """A score, and under it how far it is from the base's."""
    if score is None:
        return None
    if base is None:
        return numeral(figure(score.value))
    below = say.change(score, base).rsplit(say.score(score), 1)[-1].strip()
    same = figure(score.value) == figure(base.value)
    kind = "" if same else "up" if (score.value > base.value) == score.higher else "down"
    return numeral(figure(score.value), below, kind)


def _cost_table(page: Page, search: Search) -> None:
    say = page.say
    rows: list[list[Cell | str | None]] = []
    for run in search.runs:
        last, hours = run.at(None), run.device_hours
        ranks = run.launches[-1].ranks if run.launches else run.job.get("ranks")
        rows.append(
            [
                Cell(text(search.label(run)), "name"), numeral(None if ranks is None else str(ranks)),
                numeral(None if hours is None else f"{hours:,.2f}"),
                numeral(f"{run.last_step:,}" if run.steps else None),
                numeral(amount(number(last.get("consumed_tokens"))) if last else None),
                numeral(amount(run.tokens_per_second) if run.tokens_per_second else None),
                numeral(str(len(run.launches)) if run.launches else None),
            ]
        )  # fmt: skip
    columns = [say(each) for each in ("run", "devices", "device_hours", "steps", "tokens", "rate", "launches")]
    page.table(columns, rows, ["taken" if run is search.winner else "" for run in search.runs])


def _task_tables(page: Page, search: Search) -> None:
    """Suite by suite, what each task was and what every model got in it."""
    say = page.say
    models: list[tuple[str, dict[str, dict[str, Any]]]] = []
    for model in search.bases:
        results = dict(results_of(search.base_results, search.runs, model))
        for run in search.runs:
            if model_of(run) == model:
                results = results or run.results.get(0, {})
        models.append((say("base") if len(search.bases) == 1 else f"{say('base')} {Path(model).name}", results))
    ordered = sorted(search.runs, key=lambda run: run is not search.winner)
    models += [(search.label(run), run.results.get(search.step or -1, {})) for run in ordered]
    for suite in dict.fromkeys(suite for _, results in models for suite in results):
        columns = [(name, results[suite]) for name, results in models if suite in results]
        task_table(page, suite, columns)
        judge_section(page, suite, columns)
