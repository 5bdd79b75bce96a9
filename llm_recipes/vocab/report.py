"""What a larger vocabulary is worth: a table for the terminal, and one page with a plot."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_recipes.vocab.base import write_json
from llm_recipes.vocab.measure import Findings

PAGE, NUMBERS = "vocabulary.html", "vocabulary.json"
SOME = 12

HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Vocabulary of {{ found.base }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .8rem; text-align: right }
th { border-bottom: 1px solid #888; font-weight: 600 } td:first-child, th:first-child { text-align: left }
.pieces span { display: inline-block; margin: .15rem; padding: .05rem .4rem; background: #eef3fa; border-radius: .3rem }
.pieces small { color: #667 } svg { max-width: 100%; height: auto } p.note { color: #556 }
</style></head><body>
<h1>{{ "{:,}".format(found.tokens_before) }} → {{ "{:,}".format(found.tokens_after) }} tokens</h1>
<p>{{ found.base }}, {{ found.kind }}; {{ "{:,}".format(found.tokens_after - found.tokens_before) }} new pieces.
{% if found.tables %}The model's embeddings grow by {{ memory }}.{% endif %}</p>
<h2>Texts held out</h2>
<table><tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
<p class="note">Tokens per text are comparable between vocabularies; loss or perplexity per token is not. Compare models
with different vocabularies by bits per byte.</p>
<h2>Compression by size of the vocabulary</h2>
<p class="note">With the first so many of the pieces that were learned, in their order. The dashed line is the size that
was written; where a curve has gone flat, further pieces cost memory and bring little. The curves end with
half as many pieces again as were asked for: to choose, ask first for the most that you would consider.</p>
{{ plot|safe }}
<h2>The {{ found.most_used|length }} most used new pieces</h2>
<p class="pieces">{% for piece, count in found.most_used %}<span>{{ piece }}
<small>{{ "{:,}".format(count) }}</small></span>{% endfor %}</p>
<h2>{{ "{:,}".format(found.unused|length) }} new pieces that stand nowhere in these texts</h2>
<details><summary>all of them</summary>
<p class="pieces">{% for piece in found.unused %}<span>{{ piece }}</span>{% endfor %}</p></details>
{% if found.tables %}<h2>Tables of the model</h2>
<table><tr><th>tensor</th><th>rows before</th><th>rows after</th><th>dtype</th><th>added</th></tr>
{% for each in found.tables %}<tr><td>{{ each.key }}</td><td>{{ "{:,}".format(each.old_rows) }}</td>
<td>{{ "{:,}".format(each.new_rows) }}</td><td>{{ each.dtype }}</td><td>{{ size(each.bytes_added) }}</td></tr>
{% endfor %}</table>{% endif %}
</body></html>
"""


def size(count: int) -> str:
    """Bytes, to read."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def rows(found: Findings) -> tuple[list[str], list[list[str]]]:
    """The table of the held-out texts: head and rows."""
    head = ["text", "characters", "tokens before", "after", "fewer", "characters/token", "bytes/token", "by new pieces"]
    table = []
    for name, each in found.figures.items():
        per = [(total / max(count, 1)) for total in (each.characters, each.bytes)
               for count in (each.tokens_before, each.tokens_after)]  # fmt: skip
        table.append([
            name, f"{each.characters:,}", f"{each.tokens_before:,}", f"{each.tokens_after:,}", f"{each.saved:.1%}",
            f"{per[0]:.2f} → {per[1]:.2f}", f"{per[2]:.2f} → {per[3]:.2f}", f"{each.covered:.1%}",
        ])  # fmt: skip
    return head, table


def table(found: Findings, output: Path) -> str:
    """For the terminal."""
    from rich.console import Console
    from rich.table import Table

    head, body = rows(found)
    shown = Table(box=None, pad_edge=False)
    for number, name in enumerate(head):
        shown.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in body:
        shown.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=160).print(shown)
    new = found.tokens_after - found.tokens_before
    used = ", ".join(piece for piece, _ in found.most_used[:SOME])
    lines = [
        f"{found.tokens_before:,} → {found.tokens_after:,} tokens ({new:,} new pieces, {len(found.unused):,} of them "
        "in none of these texts)",
        f"most used: {used or 'none'}",
    ]
    if found.tables:
        grown = ", ".join(f"{each['key']} {each['old_rows']:,} → {each['new_rows']:,}" for each in found.tables)
        lines.append(f"embeddings: {grown}, {size(found.memory_added)} more")
    lines.append(f"{output}, {output / PAGE}")
    return text.getvalue() + "\n".join(lines)


def plot(found: Findings) -> str:
    """Tokens for the same text over the size of the vocabulary, a line for each text, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Text stays text: the reader's browser has the letters, whatever the texts are called.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llm_recipes"}):
        figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
        for points in found.curve.values():
            sizes, per_token = zip(*points, strict=True)
            axes.plot(sizes, [per_token[0] / each for each in per_token], marker="o", markersize=3)
        # By hand: of a name that begins with an underscore matplotlib takes no notice.
        legend = axes.legend(axes.lines, list(found.curve))
        axes.axvline(found.tokens_after, linestyle="--", color="#888", linewidth=1)
        axes.set_xlabel("tokens in the vocabulary")
        axes.set_ylabel("tokens for the same text, of those before")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.grid(alpha=0.3)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a `$` in a name is a `$`
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return written.getvalue().partition("<svg")[1] + written.getvalue().partition("<svg")[2]


def write(found: Findings, target: Path, pieces: Sequence[str]) -> None:
    """The page, and its numbers with all the new pieces in their order, into the new folder."""
    import jinja2

    head, body = rows(found)
    page: Any = jinja2.Environment(autoescape=True).from_string(HTML)
    text = page.render(found=found, head=head, rows=body, plot=plot(found), memory=size(found.memory_added), size=size)
    (target / PAGE).write_text(text, encoding="utf-8")
    write_json(target / NUMBERS, found.as_json() | {"pieces": list(pieces)})
