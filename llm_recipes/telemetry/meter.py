"""Progress over so many bytes of input, with time left: a bar on a terminal, now and then a line elsewhere."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0
"""How often progress is a line, where it cannot be a bar."""


def say(console: Console, line: str) -> None:
    """A line as it is: no markup, no wrapping."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


class Meter:
    """Shows how far a work is.

    Args:
        name: what is being done.
        total: bytes of input.
        console: where to show it.
        rate: show megabytes a second.
    """

    def __init__(self, name: str, total: int, console: Console, rate: bool = True) -> None:
        self._name, self._rate = name, rate
        self._total = max(1, total)
        self._console = console
        self._started = self._last = time.monotonic()
        self._bar: Progress | None = None
        self.seconds = 0.0
        """From the start until the end, or until now."""
        if console.is_terminal:
            columns = (
                TextColumn(name),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[said]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=self._total, said="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int, said: str, treated: int = 0, total: int | None = None) -> None:
        """Show how far the work is.

        Args:
            done: bytes of input that are done with.
            said: what came of them.
            treated: bytes by which the rate is measured, where they are not those of the input.
            total: where it was not known before.
        """
        self._total = max(1, total or self._total)
        now = time.monotonic()
        self.seconds = max(now - self._started, 1e-9)
        if self._rate:
            said = f"{said}, {(treated or done) / 1e6 / self.seconds:,.1f} MB/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self._total, said=said)
        elif now - self._last >= LINE_SECONDS:
            self._last = now
            left = self.seconds * (self._total - done) / max(1, done)
            parts = [f"{100 * done / self._total:.0f}%", *([said] if said else []), f"{left:.0f} s left"]
            say(self._console, f"{self._name}: {', '.join(parts)}")
