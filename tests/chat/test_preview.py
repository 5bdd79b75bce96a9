"""What a reader is shown of conversations: every figure, and exactly what trains marked, in colour or without."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from llm_recipes.chat import preview
from llm_recipes.chat.packs import Packs
from llm_recipes.chat.preview import FIRST, HEAD, LAST, TAIL, row_text, show
from llm_recipes.chat.sources import Chats, open_chats
from llm_recipes.data import tokenizer as tokenizers
from llm_recipes.data.sources import TokenizerFacts

Open = Callable[..., Chats]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Opens the conversations in the test's folder with some keys changed."""
    tokenizer = tiny.tokenizer()
    facts = TokenizerFacts(tokenizers.fingerprint(tokenizer), 264, 257, None, "auto", 256)
    tiny.write_chats(tmp_path)

    def open_here(**changes: Any) -> Chats:
        config = tiny.instruct_config(tmp_path, tmp_path / "model", **changes)
        return open_chats(config, str(tmp_path / "model"), tokenizer, facts)

    return open_here


def parts_of(chats: Chats) -> tuple[dict[str, Packs], list[Any]]:
    packs = {each.name: each.windows for each in chats.sources if isinstance(each.windows, Packs)}
    return packs, preview.conversations(packs, {name: chats.recipes[f"data.sources.{name}"] for name in packs})


def printed(parts: list[Any], folder: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal of this width gets, that knows no colour."""
    file = io.StringIO()
    monkeypatch.setattr("sys.stdout", file)
    monkeypatch.setenv("COLUMNS", str(width))
    show(parts, Console(width=width), folder / "page.html")
    return file.getvalue()


SPANS = st.lists(st.integers(0, 3000), max_size=8, unique=True).map(sorted)


@given(st.text(alphabet="ab<s>\n東京", max_size=60), st.integers(1, 60), SPANS)
def test_what_trains_stands_in_brackets_and_nothing_else_changes(unit: str, times: int, cuts: list[int]) -> None:
    text = unit * times
    bounds = [each for each in cuts if each <= len(text)]
    answers = [(start, end) for start, end in zip(bounds[::2], bounds[1::2], strict=False)]
    shown = row_text(text, answers, ["<s>"])
    marked = shown.plain
    trained = [text[start:end] for start, end in answers]
    if len(text) <= HEAD + TAIL:
        assert marked.replace(FIRST, "").replace(LAST, "") == text
        assert [piece.partition(LAST)[0] for piece in marked.split(FIRST)[1:]] == trained
    else:
        head, gap, tail = marked.partition(f"\n… {len(text) - HEAD - TAIL:,} characters, ")
        assert gap and head.replace(FIRST, "").replace(LAST, "") == text[:HEAD]
        count, _, rest = tail.partition(" of them trained, are left out here …\n")
        assert rest.replace(FIRST, "").replace(LAST, "") == text[-TAIL:]
        middle = sum(HEAD <= at < len(text) - TAIL for start, end in answers for at in range(start, end))
        assert int(count.replace(",", "")) == middle
    # In colour the same characters are green, and those alone.
    green = "".join(marked[span.start : span.end] for span in shown.spans if "green" in str(span.style))
    bracketed = [piece.partition(LAST)[0] for piece in marked.split(FIRST)[1:]]
    assert green == "".join(f"{FIRST}{piece}{LAST}" for piece in bracketed)


@pytest.mark.parametrize("width", [40, 200])
def test_every_figure_is_shown_on_any_terminal(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    long = {"messages": [{"role": "user", "content": "あ" * 200}, {"role": "assistant", "content": "い"}]}
    chats = opened(data__sources__ja__limit=30)
    with open(tmp_path / "ja.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(long) + "\n")
    chats = opened(data__sources__ja__limit=30)
    packs, parts = parts_of(chats)
    said = printed(parts, tmp_path, width, monkeypatch)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    report = packs["ja"].report
    (row,) = (line for line in lines if line[:2] == ["ja", "messages"])
    assert row[2:4] == ["41", "30"] and row[4] == f"{report['tokens']:,}" and row[6] == str(report["windows"])
    assert row[5] == f"{100 * report['trained_tokens'] / report['tokens']:.1f}%"
    assert ["ja", "left out: longer than the window", "1", "2.44%"] in lines
    assert ["ja", "left out: past the limit", "10", "24.39%"] in lines
    bars = [int(line[1]) for line in lines if len(line) == 3 and line[0].isdecimal()]
    assert len(bars) == 12 and sum(bars) == 30 + 24
    # A row of each source, and one more: three in all, with their special tokens and what trains.
    assert said.count("row of ") == 3 and f"{FIRST}1</s>{LAST}" in said and "<|assistant|>" in said
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("row of ") == 3 and "left out: past the limit" in page
    assert 'color: #008000; text-decoration-color: #008000">⟦1</span>' in page
    assert list(tmp_path.glob("page.html*")) == [tmp_path / "page.html"]
