"""What the speed benchmarks measure with: steps, memory, and the table that is shown and kept."""

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from loop_overhead import read_options
from rich.console import Console
from rich.table import Table

from llm_recipes.errors import UserError
from llm_recipes.models import flops
from llm_recipes.models.flops import Cost


class Stopwatch:
    """Times steps: by the GPU's own events, without waiting for it in between, or by the clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.marks = device.type == "cuda", []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between one mark and the next."""
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks[:-1], self.marks[1:], strict=True)]
        return [b - a for a, b in zip(self.marks[:-1], self.marks[1:], strict=True)]


COMPARED = 3
"""Steps whose losses are read where sides are compared."""


def let_go(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak since `reset_peak`: allocated on the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def read_all_options(arguments: Sequence[str], defaults: dict[str, str]) -> dict[str, str]:
    """KEY=VALUE arguments over their defaults; a key with a dot in it is one of a run's configuration."""
    dotted = [each for each in arguments if "." in each.partition("=")[0]]
    given = read_options([each for each in arguments if each not in dotted], defaults)
    return given | dict(each.partition("=")[::2] for each in dotted)


def device_name(threads: int) -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads} threads a process"


def rates(tokens: float, seconds: Sequence[float], cost: Cost, seq_len: int, device: str) -> list[str]:
    """Cells of a row: seconds a step (median, quartiles), tokens/s, TFLOPs and MFU of a device.

    Args:
        tokens: targets of a step, on one device.
    """
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median,) * 3
    rate = tokens / median
    operations = rate * cost.per_token(seq_len)
    peak = flops.peak_flops(device)
    mfu = f"{operations / peak:.1%}" if peak else "-"
    return [f"{median:.3f}", f"{low:.3f}-{high:.3f}", f"{rate:,.0f}", f"{operations / 1e12:.3f}", mfu]


def formula(name: str, cost: Cost, seq_len: int) -> str:
    """What a token costs, and how many parameters it meets."""
    return (
        f"{name}, seq {seq_len}: {cost.parameters:,} parameters ({cost.active_parameters:,} active), "
        f"6 * {cost.matrix_parameters:,} + 12 * {cost.attention_width:,} * {seq_len} = "
        f"{cost.per_token(seq_len) / 1e9:.3f} GFLOPs a token"
    )


def show(title: str, columns: list[str], rows: list[Any], notes: list[str], save: str, left: int = 1) -> None:
    """Print a table, and keep it as `benchmarks/results/<save>.md`.

    Args:
        left: columns that are words.
    """
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)
    print(*notes, sep="\n", flush=True)
    if save:
        path = Path(__file__).parent / "results" / f"{save}.md"
        path.parent.mkdir(exist_ok=True)
        body = "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows])
        path.write_text(f"# {title}\n\n{body}\n\n" + "\n".join(f"- {note}" for note in notes) + "\n")
        print(f"saved as {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}", flush=True)


def answer(main: Callable[[list[str]], None]) -> None:
    """Run a script; a mistake of its user is one line and status 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
