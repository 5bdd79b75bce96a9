"""The figures by which a size is chosen, and the page that shows them."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import bases
import pytest
from bases import quiet

from llm_recipes.vocab import measure, report
from llm_recipes.vocab.measure import Figures, Findings
from llm_recipes.vocab.pieces import Pieces
from llm_recipes.vocab.scripts import Scripts

SCRIPTS = Scripts(["hiragana", "katakana", "kanji", "fullwidth"])


class Page(HTMLParser):
    """What is written in a page, and whether each of its tags is closed in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.said: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data.strip())


def read(page: str) -> list[str]:
    parser = Page()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return parser.said


def findings(**changes: Any) -> Findings:
    figures = {"<ja>&": Figures(2, 100, 280, 90, 60, 210), "$x\\q$": Figures(1, 10, 10, 3, 3, 0)}
    own: dict[str, Any] = {
        "base": "a & <b>", "kind": "byte-level BPE", "tokens_before": 300, "tokens_after": 303, "figures": figures,
        "curve": {name: [(300, 1.0), (303, 1.5)] for name in figures}, "most_used": [("<は>", 9), ("&amp;", 3)],
        "unused": ["<script>", "»&«"],
    }  # fmt: skip
    return Findings(**(own | changes))


def test_the_page_is_well_formed_and_escapes_what_it_shows(tmp_path: Path) -> None:
    report.write(findings(), tmp_path, ["<は>", "&amp;", "<script>"])
    page = (tmp_path / "vocabulary.html").read_text(encoding="utf-8")
    said = read(page)
    assert {"<は>", "&amp;", "<script>", "»&«"} <= {each.splitlines()[0] for each in said if each}
    assert "<script>" not in page and "a & <b>, byte-level BPE; 3 new pieces." in said
    start, end = page.index("<svg"), page.index("</svg>") + len("</svg>")
    drawn = "".join(ElementTree.fromstring(page[start:end]).itertext())
    assert "<ja>&" in drawn and "$x\\q$" in drawn
    kept = json.loads((tmp_path / "vocabulary.json").read_text(encoding="utf-8"))
    assert kept["pieces"] == ["<は>", "&amp;", "<script>"]


def test_the_page_is_the_same_each_time(tmp_path: Path) -> None:
    pages = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        report.write(findings(), tmp_path / name, ["は"])
        pages.append((tmp_path / name / "vocabulary.html").read_bytes())
    assert pages[0] == pages[1]


def test_shares_are_of_tokens_and_of_bytes() -> None:
    figures = Figures(2, 100, 280, 90, 60, 210)
    assert (figures.saved, figures.covered) == (pytest.approx(1 / 3), 0.75)
    head, rows = report.rows(findings())
    assert dict(zip(head, rows[0], strict=True)) == {
        "text": "<ja>&", "characters": "100", "tokens before": "90", "after": "60", "fewer": "33.3%",
        "characters/token": "1.11 → 1.67", "bytes/token": "3.11 → 4.67", "by new pieces": "75.0%",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "own file"])
def test_figures_are_what_one_counts_by_hand(name: str, extended: Callable[[str], Any]) -> None:
    one = extended(name)
    texts = ["学生は電車を見る。", "the cat", "東京、　ABC"]
    first = one.findings.tokens_before
    old, new = one.before.backend_tokenizer, one.plain
    pieces = Pieces(json.loads(old.to_str()), one.findings.kind, SCRIPTS)
    found, used = measure.measure(texts, old, new, pieces, first)
    after = [number for text in texts for number in new.encode(text, add_special_tokens=False).ids]
    before = [number for text in texts for number in old.encode(text, add_special_tokens=False).ids]
    assert (found.documents, found.characters, found.bytes) == (3, 9 + 7 + 7, 27 + 7 + 15)
    assert (found.tokens_before, found.tokens_after) == (len(before), len(after)) and len(after) < len(before)
    by_new = [new.id_to_token(number) for number in after if number >= first]
    # In byte-level BPE a letter stands for a byte.
    assert found.new_bytes == sum(len(each) if name == "gpt2" else len(each.encode()) for each in by_new)
    assert used.total() == len(by_new) >= 3 and 0 < found.covered < 1


@pytest.mark.parametrize("name", [*bases.BYTE_LEVEL, *bases.SENTENCEPIECE])
def test_the_curve_begins_at_the_old_tokenizer_and_only_climbs(name: str, extended: Callable[[str], Any]) -> None:
    found = extended(name).findings
    for text, points in found.curve.items():
        figures = found.figures[text]
        assert points[0] == (found.tokens_before, pytest.approx(figures.characters / figures.tokens_before, rel=1e-9))
        assert all(size < more for (size, _), (more, _) in pairwise(points))
    rates = [rate for _, rate in found.curve["ja"]]
    assert rates == sorted(rates) and rates[-1] > rates[0]
    assert len({rate for _, rate in found.curve["en"]}) == 1


@pytest.mark.parametrize("name", ["gpt2", "mistral and more", "own file"])
def test_the_curves_point_at_the_size_written_is_the_figure(name: str, extended: Callable[[str], Any]) -> None:
    found = extended(name).findings
    for text, figures in found.figures.items():
        here = dict(found.curve[text])[found.tokens_after]
        assert here == pytest.approx(figures.characters / figures.tokens_after, rel=1e-9)


def test_truncation_and_padding_do_not_bend_the_figures(corpus: str, tmp_path: Path) -> None:
    def bent(state: dict[str, Any]) -> None:
        state["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
        state["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                            "pad_type_id": 0, "pad_token": "<s>"}  # fmt: skip

    straight = bases.byte_level(tmp_path / "straight")
    other = bases.change(bases.byte_level(tmp_path / "bent"), bent)
    found = [
        quiet(corpus=corpus, output=str(tmp_path / f"{each.name}.new"), vocab_size=340, tokenizer=str(each))
        for each in (straight, other)
    ]
    assert found[0].figures == found[1].figures and found[0].curve == found[1].curve


@pytest.mark.parametrize("name", ["gpt2", "llama3", "mistral and more", "a file"])
def test_the_folder_keeps_the_pieces_in_their_order(name: str, extended: Callable[[str], Any]) -> None:
    one = extended(name)
    numbers = one.numbers
    names = {number: token for token, number in one.after.get_vocab().items()}
    shown = Pieces(one.state, one.findings.kind, SCRIPTS).shown
    first = numbers["tokens_before"]
    assert numbers["pieces"] == [shown(names[number]) for number in range(first, numbers["tokens_after"])]
    assert set(numbers["unused"]) | {piece for piece, _ in numbers["most_used"]} <= set(numbers["pieces"])
    assert len(numbers["unused"]) + min(50, len(numbers["pieces"]) - len(numbers["unused"])) >= len(
        numbers["most_used"]
    )
    read((one.folder / "vocabulary.html").read_text(encoding="utf-8"))
