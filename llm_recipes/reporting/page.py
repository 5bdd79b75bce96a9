"""One HTML file that needs nothing else: its figures, its style and plotly.js are in it."""

import html
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llm_recipes.errors import UserError
from llm_recipes.folders import make_folder, remove_folders, write_whole
from llm_recipes.reporting.figures import Figure
from llm_recipes.reporting.texts import Texts

HERE = Path(__file__).parent


def text(value: Any) -> str:
    """Anything of a user's, safe between tags and in attributes."""
    return html.escape(str(value), quote=True)


def embedded(value: Any) -> str:
    """JSON for a script tag: nothing in it ends the tag, or opens a comment."""
    return (
        json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: a figure leaves them out."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def plotly_script() -> str:
    """plotly.js, from the package that carries it; the package itself is not imported.

    Raises:
        UserError: it is not installed.
    """
    found = importlib.util.find_spec("plotly")
    if found is None or not found.origin:
        raise UserError("plotly: not installed, and the page's figures need it: pip install plotly")
    return (Path(found.origin).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


class Cell:
    """A table's cell: what is in it (HTML), and how it stands."""

    def __init__(self, content: str, kind: str = "") -> None:
        self.content, self.kind = content, kind


class Page:
    """Sections, one below another.

    Args:
        texts: in the language of the page.
        title: of the page; plain text, like every text that is given to the methods here.
    """

    def __init__(self, texts: Texts, title: str) -> None:
        self.say, self.title = texts, title
        self._parts: list[str] = []
        self._figures: list[Figure] = []

    def add(self, markup: str) -> None:
        """HTML of ours."""
        self._parts.append(markup)

    def head(self, kind: str, facts: Iterable[str]) -> None:
        """The page's name, and a line of facts about it."""
        shown = "".join(f"<li>{text(fact)}</li>" for fact in facts if fact)
        self.add(f'<header><p class="kind">{text(kind)}</p><h1>{text(self.title)}</h1><ul>{shown}</ul></header>')

    def answer(self, line: str, notes: Sequence[str], command: str | None, good: bool) -> None:
        """What the reader came for."""
        said = "".join(f"<p>{text(note)}</p>" for note in notes)
        block = ""
        if command:
            copy = f'<button type="button" class="copy">{text(self.say("copy"))}</button>'
            block = (
                f"<h3>{text(self.say('command_of_winner'))}</h3>"
                f'<div class="command"><pre><code>{text(command)}</code></pre>{copy}</div>'
            )
        kind = "answer good" if good else "answer open"
        self.add(f'<section class="{kind}"><h2>{text(line)}</h2>{said}{block}</section>')

    def facts(self, named: Sequence[tuple[str, str]]) -> None:
        """Figures that say most, each over its name."""
        self.add('<dl class="facts">')
        self.add("".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in named) + "</dl>")

    def section(self, heading: str) -> None:
        self.add(f"<h2>{text(heading)}</h2>")

    def note(self, line: str) -> None:
        self.add(f'<p class="note">{text(line)}</p>')

    def figures(self, figures: Sequence[tuple[str, Figure, str]], wide: bool = False) -> None:
        """Figures side by side as there is room: heading, figure, a note under it."""
        cards = []
        for heading, figure, note in figures:
            number = len(self._figures)
            self._figures.append(figure)
            height = int(figure["layout"]["height"])
            cards.append(
                f'<figure><figcaption>{text(heading)}</figcaption><div class="plot" id="plot-{number}" '
                f'style="min-height:{height}px" role="img" aria-label="{text(heading)}"></div>'
                + (f'<p class="note">{text(note)}</p>' if note else "")
                + "</figure>"
            )
        if cards:
            self.add(f'<div class="cards{" wide" if wide else ""}">{"".join(cards)}</div>')

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[Cell | str | None]], kinds: Sequence[str] = ()
    ) -> None:
        """A table that scrolls by itself where it is too wide.

        Args:
            rows: plain text, a `Cell`, or None where there is nothing.
            kinds: by row, a class of its own.
        """
        self.add('<div class="scroll"><table><thead><tr>')
        for at, name in enumerate(columns):
            right = any(isinstance(cell := row[at], Cell) and "number" in cell.kind for row in rows)
            shown = re.sub(r"([._])", r"\1<wbr>", text(name))
            self.add(f'<th class="number">{shown}</th>' if right else f"<th>{shown}</th>")
        self.add("</tr></thead><tbody>")
        for number, row in enumerate(rows):
            kind = kinds[number] if number < len(kinds) else ""
            self.add(f'<tr class="{kind}">' + "".join(_cell(each) for each in row) + "</tr>")
        self.add("</tbody></table></div>")

    def block(self, heading: str, content: str, opened: bool = False) -> None:
        """Long plain text, folded."""
        state = " open" if opened else ""
        self.add(f"<details{state}><summary>{text(heading)}</summary><pre>{text(content)}</pre></details>")

    def fold(self, heading: str) -> "Fold":
        """What is added inside is folded."""
        return Fold(self, heading)

    def html(self) -> str:
        style, script = (HERE / "page.css").read_text("utf-8"), (HERE / "page.js").read_text("utf-8")
        language = self.say.language
        return (
            f'<!doctype html>\n<html lang="{language}"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="icon" href="data:,"><title>{text(self.title)}</title><style>{style}</style></head>\n'
            f"<body><main>{''.join(self._parts)}</main>\n"
            f'<script type="application/json" id="figures">{embedded(self._figures)}</script>\n'
            f"<script>{plotly_script()}</script>\n<script>{script}</script></body></html>\n"
        )


class Fold:
    """See `Page.fold`."""

    def __init__(self, page: Page, heading: str) -> None:
        self._page, self._heading = page, heading

    def __enter__(self) -> None:
        self._page.add(f"<details><summary>{text(self._heading)}</summary>")

    def __exit__(self, *error: object) -> None:
        self._page.add("</details>")


def _cell(value: Cell | str | None) -> str:
    if value is None:
        return '<td class="none">\N{EN DASH}</td>'
    if isinstance(value, Cell):
        return f'<td class="{value.kind}">{value.content}</td>'
    return f"<td>{text(value)}</td>"


def numeral(value: str | None, below: str = "", kind: str = "") -> Cell | None:
    """A figure, right-aligned, with a smaller line under it."""
    if value is None:
        return None
    small = f"<small>{text(below)}</small>" if below else ""
    return Cell(f"{text(value)}{small}", f"number {kind}".strip())


def refuse_place(path: Path) -> None:
    """Raise `UserError` where no file can be written, before the work for it is done."""
    if path.is_dir():
        raise UserError(f"output={path}: a folder; give a file's name, such as {path / 'report.html'}")
    there = next((above for above in path.absolute().parents if above.exists()), Path("/"))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written ({there}); give output=FILE")


def write(path: Path, content: str) -> None:
    """Write a file beside its place and rename it into it.

    Raises:
        UserError: it cannot be written there.
    """
    made: list[Path] = []
    try:
        made = make_folder(path.parent)
        write_whole(path, content)
    except OSError as error:
        remove_folders(made)
        raise UserError(f"{path}: cannot be written ({error.strerror}); give output=FILE") from error


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M")
