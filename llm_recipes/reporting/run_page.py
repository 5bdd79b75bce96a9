"""One run as a page: how it goes, its course, what it can do, what it is made of."""

import json
from pathlib import Path
from typing import Any

from llm_recipes.folders import read_json
from llm_recipes.reporting import run_figures
from llm_recipes.reporting.course import goodput, what
from llm_recipes.reporting.judge import judge_section
from llm_recipes.reporting.page import Cell, Page, now, numeral, text
from llm_recipes.reporting.reading import Run, base_results, number
from llm_recipes.reporting.scores import Score, scores_in
from llm_recipes.reporting.tasks import task_table
from llm_recipes.reporting.texts import Texts, amount, figure, shown
from llm_recipes.telemetry.progress import duration

CUT = "max_new_tokens"
"""How an answer ended that had not ended; `evaluation.answers` imports torch."""
SHOWN_EVENTS, SHOWN_PROMPTS = 200, 400
SHOWN_ANSWERS = 8
"""Steps whose answers stand side by side."""
FOLDED = 160
"""Characters of an answer, past which it is folded."""
QUIET = ("checkpoint", "first_step")
"""Events that come again and again and mean that all is well."""


def run_page(run: Run, language: str) -> Page:
    """The page of a run.

    Raises:
        UserError: one of its files is damaged.
    """
    say = Texts(language)
    page = Page(say, run.name)
    ranks = run.launches[-1].ranks if run.launches else None
    facts = [say.named("base", run.settings.get("model.path", say("not_known")))]
    facts += [say.named("devices", ranks)] if ranks else []
    page.head(say("run"), [*facts, say("made", time=now(), folder=run.folder)])
    _answer(page, run)
    page.section(say("loss_curves"))
    loss = run_figures.loss(run, say)
    page.figures([(say("loss_curves"), loss, say("thinned"))] if loss else [], wide=True)
    named, missing = run_figures.course(run, say)
    page.figures(named)
    if missing:
        page.note(say("no_figure", names=say.list(missing)))
    results = {0: _base(run)} | run.results
    scored = run_figures.scores(_course(run, results), say)
    if scored:
        page.section(say("scores_over_steps"))
        page.figures(scored)
    for suite in dict.fromkeys(suite for each in results.values() for suite in each):
        columns = [
            (say("base") if step == 0 else f"{say('step')} {step:,}", results[step][suite])
            for step in sorted(results) if suite in results[step]
        ]  # fmt: skip
        task_table(page, suite, columns)
        judge_section(page, suite, columns)
        _completions(page, columns)
    _answers(page, run)
    _events(page, run)
    _made_of(page, run)
    return page


def _base(run: Run) -> dict[str, dict[str, Any]]:
    """Result files of the untouched model: beside the run, or beside the search that it is of."""
    for root in (run.folder.parent, run.folder.parent.parent):
        found = base_results(root).get(str(run.settings.get("model.path")))
        if found:
            return found
    return {}


def _course(run: Run, results: dict[int, dict[str, dict[str, Any]]]) -> dict[int, dict[str, Score]]:
    steps = sorted({*run.scored_steps(), *results})
    return {
        step: scores_in(
            run.evaluations.get(step, {}), results.get(step, {}), run.validations.get(step, {}), run.groups
        )
        for step in steps
    }  # fmt: skip


def _answer(page: Page, run: Run) -> None:
    say, last = page.say, run.at(None)
    status = say.status(run.status)
    line = say("run_headline", name=run.name, status=status, step=f"{run.last_step:,}")
    launches, got_on, done = goodput(run.rows)
    loss, hours = number(last.get("loss")), run.device_hours
    facts = {
        "loss": None if loss is None else figure(loss),
        "tokens": amount(number(last.get("consumed_tokens"))) if last else None,
        "device_hours": None if hours is None else f"{hours:,.2f}",
        "rate": amount(run.tokens_per_second) if run.tokens_per_second else None,
        "goodput": f"{got_on / done:.1%}" if done else None,
        "launches": str(launches),
        "left_out": str(run.count("left_out")),
        "rollbacks": str(run.count("rollback")),
    }
    notes = [run.error] if run.error else []
    page.answer(line, notes, None, run.status == "done")
    page.facts([(say(key), value) for key, value in facts.items() if value is not None])


def _completions(page: Page, columns: list[tuple[str, dict[str, Any]]]) -> None:
    """What each prompt was continued with, step by step."""
    say = page.say
    by_prompt: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for step, result in columns:
        for name, entries in (result.get("prompts") or {}).items():
            for entry in entries:
                by_prompt.setdefault((name, str(entry.get("prompt"))), []).append((step, entry))
    if not by_prompt:
        return
    page.section(say("completions"))
    rows: list[list[Cell | str | None]] = []
    for (_, prompt), entries in by_prompt.items():
        for place, (step, entry) in enumerate(entries):
            rows.append(
                [
                    Cell(text(prompt) if place == 0 else "", "long name"), step,
                    Cell(text(entry.get("completion", "")), "long"), *_per_byte(entry),
                ]
            )  # fmt: skip
    names = [say("perplexity"), say("bits_per_byte")]
    page.table([say("prompt"), say("step"), say("completion"), *names], rows[:SHOWN_PROMPTS])
    if len(rows) > SHOWN_PROMPTS:
        page.note(say("and_more", count=len(rows) - SHOWN_PROMPTS))


def _answers(page: Page, run: Run) -> None:
    """What the model answered to each of the run's prompts, its steps side by side."""
    if not run.answers:
        return
    say, there = page.say, sorted(run.answers)
    most = min(SHOWN_ANSWERS, len(there))
    steps = [there[round(at * (len(there) - 1) / max(most - 1, 1))] for at in range(most)]
    prompts = dict.fromkeys(str(row.get("prompt")) for step in steps for row in run.answers[step])
    rows: list[list[Cell | str | None]] = []
    for prompt in prompts:
        said = [next((row for row in run.answers[step] if str(row.get("prompt")) == prompt), None) for step in steps]
        rows.append([Cell(text(prompt), "long narrow name"), *(_said(say, row) for row in said)])
    page.section(say("answers"))
    names = [say("base") if step == 0 else f"{say('step')} {step:,}" for step in steps]
    page.table([say("prompt"), *names], rows[:SHOWN_PROMPTS])
    if len(rows) > SHOWN_PROMPTS:
        page.note(say("and_more", count=len(rows) - SHOWN_PROMPTS))
    if len(there) > most:
        page.note(say("answers_between", count=len(there) - most, path=run.folder / "answers"))


def _said(say: Texts, row: dict[str, Any] | None) -> Cell | None:
    """An answer, folded where it is long, and how long it was."""
    if row is None:
        return None
    answer, count = str(row.get("answer", "")), row.get("tokens", 0)
    whole = text(answer)
    if len(answer) > FOLDED:
        whole = f"<details><summary>{text(answer[:FOLDED])} …</summary>{whole}</details>"
    ended = say("answer_cut" if row.get("ended") == CUT else "answer_tokens", count=count)
    return Cell(f"{whole}<small>{text(ended)}</small>", "long answered")


def _per_byte(entry: dict[str, Any]) -> list[Cell | None]:
    """Perplexity per byte, which is 2 to the bits, and bits per byte."""
    bits = number(entry.get("bits_per_byte"))
    both = (None, None) if bits is None else (2**bits, bits)
    return [numeral(None if value is None else figure(value)) for value in both]


def _events(page: Page, run: Run) -> None:
    told = [row for row in run.events if row["event"] not in QUIET]
    if not told:
        return
    say = page.say
    page.section(say("events"))
    start = number(told[0].get("time")) or 0.0
    rows: list[list[Cell | str | None]] = [
        [
            duration((number(row.get("time")) or start) - start), numeral(f"{row['step']:,}"), str(row["event"]),
            Cell(text(what(row)), "long"),
        ]
        for row in told[:SHOWN_EVENTS]
    ]  # fmt: skip
    page.table([say("when"), say("step"), say("event"), say("what")], rows)
    if len(told) > SHOWN_EVENTS:
        page.note(say("and_more", count=len(told) - SHOWN_EVENTS))


def _made_of(page: Page, run: Run) -> None:
    """Mixture, configuration, environment, each as the run has kept it."""
    say = page.say
    page.section(say("details"))
    plan = _kept(run.folder / "plan.json", list)
    if plan:
        columns = ("name", "language", "share", "tokens_wanted", "tokens_there", "epochs", "documents")
        rows: list[list[Cell | str | None]] = [[_plan_cell(entry.get(key)) for key in columns] for entry in plan]
        with page.fold(say("plan")):
            page.table([say("source" if key == "name" else key) for key in columns], rows)
    if run.settings:
        page.block(say("settings"), "\n".join(f"{key}: {shown(value)}" for key, value in run.settings.items()))
    environment = _kept(run.folder / "environment.json", dict)
    if environment:
        packages = environment.get("packages") or {}
        lines = [f"{key}: {environment[key]}" for key in ("python", "git_commit") if environment.get(key)]
        lines += [f"{name} {version}" for name, version in packages.items()]
        page.block(say("environment"), "\n".join(lines))
        if environment.get("git_diff"):
            page.block("git diff", str(environment["git_diff"]))


def _kept(path: Path, kind: type) -> Any:
    return read_json(path, kind) if path.is_file() else None


def _plan_cell(value: Any) -> Cell | str | None:
    if isinstance(value, int | float):
        return numeral(f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
    return value if value is None or isinstance(value, str) else json.dumps(value)
