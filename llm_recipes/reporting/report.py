"""What is asked for of a run, of a search, or of any runs: on the terminal, and as a page."""

import contextlib
import gc
import json
from collections.abc import Iterator
from pathlib import Path

from llm_recipes.config import ReportConfig
from llm_recipes.errors import UserError
from llm_recipes.reporting.course import show_course
from llm_recipes.reporting.page import Page, refuse_place, write
from llm_recipes.reporting.reading import read_run
from llm_recipes.reporting.run_page import run_page
from llm_recipes.reporting.runs import csv_of, read_runs, show_runs
from llm_recipes.reporting.runs_page import runs_page
from llm_recipes.reporting.search import read_search
from llm_recipes.reporting.search_page import search_page, show_search
from llm_recipes.telemetry import metrics
from llm_recipes.telemetry.progress import console

PAGE, TABLE = "report.html", "runs.csv"


def report(config: ReportConfig) -> None:
    """Print what was asked for, and write its page.

    Raises:
        UserError: there is no such thing, a file of it is damaged, or the page cannot be written.
    """
    if config.step is not None:
        _step(config, config.step)
        return
    folder = Path(config.run or config.sweep or config.runs or "")
    output = Path(config.output or folder / PAGE)
    if config.output is not None or folder.is_dir():
        refuse_place(output)
    with _no_collection():
        _report(config, folder, output)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Rows by the hundred thousand, which all stay: to look for garbage among them takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _report(config: ReportConfig, folder: Path, output: Path) -> None:
    if config.sweep is not None:
        search = read_search(folder, config)
        show_search(search)
        _write(search_page(search, config.language), output)
    elif config.runs is not None:
        runs = read_runs(folder, config.best)
        show_runs(runs)
        _write(runs_page(runs, config.language, TABLE), output)
        write(output.with_name(TABLE), csv_of(runs))
        console.print(str(output.with_name(TABLE)), markup=False)
    else:
        run = read_run(_one(folder), folder.resolve().name)
        show_course(folder, run.rows)
        _write(run_page(run, config.language), output)


def _write(page: Page, output: Path) -> None:
    write(output, page.html())
    console.print(f"\n{output}", markup=False)


def _one(folder: Path) -> Path:
    """The folder, where it is a run's."""
    if (folder / "metrics.jsonl").is_file():
        return folder
    if (folder / "search.json").is_file():
        raise UserError(f"run={folder}: that is a search, not one run; give sweep={folder}")
    raise UserError(f"run={folder}: no run there (a folder with metrics.jsonl)")


def _step(config: ReportConfig, step: int) -> None:
    """All that is written down of a step, and with `samples` its text."""
    folder = _one(Path(config.run or ""))
    rows = metrics.read(folder / "metrics.jsonl")
    found = [row for row in rows if row["step"] == step]
    if not found:
        near = min((row["step"] for row in rows), key=lambda known: abs(known - step), default=None)
        raise UserError(f"step={step}: nothing is written down of it; the nearest step is {near}")
    for row in found:
        console.print_json(json.dumps(row, ensure_ascii=False))
    if config.samples:
        from llm_recipes.reporting.samples import show_samples  # imports torch

        show_samples(folder, found, config)
