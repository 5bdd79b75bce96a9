"""A suite's tasks as a table, for any models side by side."""

from typing import Any

from llm_recipes.reporting.page import Cell, Page, numeral, text
from llm_recipes.reporting.reading import number
from llm_recipes.reporting.texts import Texts, figure, share


def task_table(page: Page, suite: str, results: list[tuple[str, dict[str, Any]]]) -> None:
    """A suite's tasks: what they are, and each model's score with its standard error and the share parsed."""
    say = page.say
    rows: list[list[Cell | str | None]] = []
    names = dict.fromkeys(name for _, result in results for name in [*result["tasks"], *(result.get("missing") or {})])
    for name in names:
        entries = [result["tasks"].get(name) for _, result in results]
        first: dict[str, Any] = next((entry for entry in entries if entry), {})
        items, every = first.get("items"), first.get("items_of")
        some = say("items_of", items=items, all=every) if every and every != items else items
        row: list[Cell | str | None] = [
            Cell(text(name), "name"), say.word(str(first.get("group") or "")), str(first.get("metric") or ""),
            numeral(None if first.get("shots") is None else str(first["shots"])),
            numeral(None if some is None else str(some)),
        ]  # fmt: skip
        for (_, result), entry in zip(results, entries, strict=True):
            why = (result.get("missing") or {}).get(name)
            row.append(_task_cell(entry, why, say))
        rows.append(row)
    for group in dict.fromkeys(group for _, result in results for group in (result.get("groups") or {})):
        means = [number((result.get("groups") or {}).get(group)) for _, result in results]
        shown_means = [numeral(None if mean is None else figure(mean), "", "best") for mean in means]
        rows.append([Cell(text(f"{say('mean')}: {say.word(group)}"), "name"), "", "", "", "", *shown_means])
    if not rows:  # prompts alone
        return
    page.section(say("tasks_of", suite=suite))
    columns = [say(each) for each in ("task", "group", "metric", "shots", "items")] + [name for name, _ in results]
    page.table(columns, rows)


def _task_cell(entry: dict[str, Any] | None, why: str | None, say: Texts) -> Cell | None:
    score = number(entry.get("score")) if entry else None
    if entry is None or score is None:
        return Cell(f"{text(say('missing'))}<small>{text(why)}</small>", "number missing") if why else None
    error, parsed = number(entry.get("standard_error")), number(entry.get("parsed"))
    below = [f"± {error:.4f}"] if error is not None else []
    below += [say("parsed", share=share(parsed))] if parsed is not None else []
    return numeral(figure(score), ", ".join(below))
