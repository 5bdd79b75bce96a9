"""Conversations as a reader wants to see them before they are trained on: what became of the rows, how long they are,
and a few of them with what trains marked. Needs no model, and imports no torch.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from llm_recipes.chat.encoding import Recipe
from llm_recipes.chat.packs import Packs
from llm_recipes.folders import make_folder, write_whole

ROWS = 3
"""Conversations that are shown, one of each source as far as they go."""
HEAD, TAIL = 1000, 500
"""Characters of a long row's two ends; what lies between is left out, and said to be."""
FIRST, LAST = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"
"""Around what trains, so that it is seen where there is no colour."""
TRAINED, CONTROL, CUT = "green", "bold", "italic magenta"
LEGEND = Text.assemble(
    "Of each row ", (f"{FIRST}this{LAST}", TRAINED), " is what trains, and ", ("<this>", CONTROL), " a special token."
)
WIDTH = 120
"""Characters in a line of the page."""
BAR, SPARKS = 40, "▁▂▃▄▅▆▇█"


def conversations(packs: Mapping[str, Packs], recipes: Mapping[str, Recipe]) -> list[RenderableType]:
    """All that is shown of the sources without a model.

    Args:
        packs, recipes: by the source's name.
    """
    reports = {name: each.report for name, each in packs.items()}
    parts: list[RenderableType] = [_kept(reports)]
    if any(report["left_out"] or report["changed"] for report in reports.values()):
        parts.append(_gone(reports))
    parts.append(_lengths(reports))
    # Lines above and below alone: in a browser's fonts a Japanese letter is not as wide as two others.
    shown = [
        Panel(row_text(row["text"], row["answers"], _controls(recipes[name])), box.HORIZONTALS, title=f"row of {name}")
        for name, row in _chosen(reports)
    ]
    return [*parts, LEGEND, *shown]


def show(parts: Sequence[RenderableType], console: Console, page: Path) -> None:
    """On the terminal, where no table loses a figure however narrow it is; and as a page.

    Raises:
        OSError: the page cannot be written.
    """
    wide = console.options.update(width=10_000)
    widths = [Measurement.get(console, wide, each).maximum if isinstance(each, Table) else 0 for each in parts]
    for each, own in zip(parts, widths, strict=True):
        Console(width=max(own, console.width), highlight=False).print(each)
    width = max(widths, default=0)
    paper = Console(
        record=True, file=io.StringIO(), width=max(width, WIDTH), force_terminal=True, color_system="truecolor",
        highlight=False,
    )  # fmt: skip
    paper.print(Group(*parts))
    make_folder(page.parent)
    write_whole(page, paper.export_html(inline_styles=True))


def row_text(text: str, answers: Sequence[Sequence[int]], controls: Sequence[str] = ()) -> Text:
    """A rendered conversation with what trains of it marked, the middle of a long one left out.

    Args:
        answers: characters from, to, in order, of what trains.
        controls: strings of special tokens.
    """
    special = re.compile("|".join(re.escape(each) for each in sorted(controls, key=len, reverse=True)) or r"(?!)")
    result = Text()
    last = len(text) - TAIL if len(text) > HEAD + TAIL else 0
    for start, end in ((0, HEAD), (last, len(text))) if last else ((0, len(text)),):
        if start:
            trained = sum(max(0, min(to, last) - max(at, HEAD)) for at, to in answers)
            gap = f"… {last - HEAD:,} characters, {trained:,} of them trained, are left out here …"
            result.append(f"\n{gap}\n", CUT)
        at = start
        for begin, stop in answers:
            begin, stop = max(begin, start), min(stop, end)
            if begin >= stop:
                continue
            _append(result, text[at:begin], "", special)
            _append(result, FIRST + text[begin:stop] + LAST, TRAINED, special)
            at = stop
        _append(result, text[at:end], "", special)
    return result


def _append(result: Text, piece: str, style: str, special: re.Pattern[str]) -> None:
    at = 0
    for found in special.finditer(piece):
        result.append(piece[at : found.start()], style)
        result.append(found[0], f"{style} {CONTROL}".strip())
        at = found.end()
    result.append(piece[at:], style)


def shortened(text: str, most: int = 200) -> str:
    """A text on one line, its middle left out where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most // 2]} … {line[-most // 2 :]}"


def _chosen(reports: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """One row of each source, then a second of each, until there are enough."""
    most = max((len(report["shown"]) for report in reports.values()), default=0)
    rows = [
        (name, report["shown"][at])
        for at in range(most)
        for name, report in reports.items()
        if at < len(report["shown"])
    ]
    return rows[:ROWS]


def _controls(recipe: Recipe) -> Sequence[str]:
    return recipe.template.controls if recipe.template is not None else ()


def table_of(title: str, texts: Sequence[str], numbers: Sequence[str], last: Sequence[str] = ()) -> Table:
    """An empty table with columns of these names: texts, numbers, and texts again."""
    table = Table(title=title, title_justify="left")
    for name in (*texts, *numbers, *last):
        table.add_column(name, justify="right" if name in numbers else "left")
    return table


def _kept(reports: Mapping[str, Mapping[str, Any]]) -> Table:
    numbers = ("rows", "kept", "tokens", "trained", "windows", "padding", "longest")
    table = table_of("conversations", ("source", "shape"), numbers, ("lengths",))
    for name, report in reports.items():
        table.add_row(
            Text(name), report["shape"], f"{report['rows']:,}", f"{report['conversations']:,}",
            f"{report['tokens']:,}", f"{report['trained_tokens'] / max(report['tokens'], 1):.1%}",
            f"{report['windows']:,}", f"{report['padding']:.2%}", f"{report['longest']:,}",
            _sparks(report["lengths"]),
        )  # fmt: skip
    return table


def _sparks(counts: Sequence[int]) -> str:
    """A bar of one character for each count."""
    most = max([*counts, 1])
    return "".join(SPARKS[(len(SPARKS) - 1) * count // most] if count else "·" for count in counts)


def _gone(reports: Mapping[str, Mapping[str, Any]]) -> Table:
    table = table_of("not used as they are", ("source", "reason"), ("rows", "share"))
    for name, report in reports.items():
        for kind, of in (("left_out", "left out"), ("changed", "changed")):
            for reason, count in sorted(report[kind].items(), key=lambda each: -each[1]):
                share = count / max(report["rows"], 1)
                table.add_row(Text(name), Text(f"{of}: {reason}"), f"{count:,}", f"{share:.2%}")
    return table


def _lengths(reports: Mapping[str, Mapping[str, Any]]) -> Table:
    """How many conversations take up how much of a window."""
    (window,) = {report["seq_len"] for report in reports.values()}
    counts = [sum(bars) for bars in zip(*(report["lengths"] for report in reports.values()), strict=True)]
    table = table_of(f"lengths, in a window of {window:,} tokens", (), ("up to", "conversations"), ("",))
    most = max([*counts, 1])
    for at, count in enumerate(counts):
        bar = "█" * (BAR * count // most) or ("▏" if count else "")
        table.add_row(f"{-(-(at + 1) * window // len(counts)):,}", f"{count:,}", bar)
    return table
