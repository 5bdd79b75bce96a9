"""What rank 0 shows on the terminal: a bar with time left, or a line per logged step where there is no terminal."""

import logging
import sys
from collections.abc import Collection
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(soft_wrap=True, highlight=False)


def start_logging(first: bool) -> None:
    """Rank 0's log to the terminal; the other ranks speak only of trouble."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="%H:%M:%S")
    else:
        handler = logging.StreamHandler(sys.stdout)  # with the tables and the steps, in their order
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("llm_recipes")
    ours.handlers = [handler]
    ours.setLevel(logging.INFO if first else logging.ERROR)
    ours.propagate = False


def duration(seconds: float) -> str:
    """`1 d 02:03:04` or `02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours:02d}:{minutes:02d}:{rest:02d}" if days or hours else f"{minutes:02d}:{rest:02d}"
    return f"{days} d {clock}" if days else clock


class StepProgress:
    """Progress over a run's steps.

    Args:
        start, stop: steps done already, and where this launch stops.
        show: only rank 0 does.
    """

    def __init__(self, start: int, stop: int, show: bool) -> None:
        self._bar: Progress | None = None
        self._show = show
        self._stop = stop
        if show and console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("", total=stop, completed=start)

    def __enter__(self) -> "StepProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, step: int) -> None:
        """A step is done."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def row(self, row: dict[str, Any], seconds_per_step: float) -> None:
        """A logged step's figures."""
        if not self._show:
            return
        parts = [f"loss {row['loss']:.4f}", f"lr {row['lr']:.3g}", f"norm {row['grad_norm']:.3g}"]
        parts.append(f"{row['tokens_per_second_per_device']:,.0f} tokens/s/device")
        if row.get("mfu") is not None:
            parts.append(f"MFU {row['mfu']:.1%}")
        text = "  ".join(parts)
        if self._bar:
            self._bar.update(self._task, description=text)
        else:
            left = duration((self._stop - row["step"]) * seconds_per_step)
            print(f"step {row['step']}/{self._stop}  {text}  left {left}", flush=True)


def show_table(title: str, rows: list[dict[str, Any]], names: Collection[str] = ()) -> None:
    """Plain values as a table.

    Args:
        names: columns that are called so by the user, and shown as they are.
    """
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        heading = escape(name) if name in names else name.replace("_", " ")
        table.add_column(heading, justify="right" if isinstance(rows[0][name], int | float) else "left")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    if console.is_terminal:
        console.print(table)
    else:
        table.min_width = cell_len(title)  # which else is broken where the table ends
        show_whole(table)


def show_whole(table: Table) -> None:
    """A table of ours that loses no figure where the terminal is narrow: its lines are then broken by the terminal."""
    width = Measurement.get(console, console.options.update(width=10_000), table).maximum
    Console(width=max(width, console.width), highlight=False).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
