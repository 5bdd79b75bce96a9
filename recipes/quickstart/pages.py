"""HTML manuals to clean text: what a reader reads, in paragraphs, without navigation and boilerplate."""

import re
import textwrap
from dataclasses import dataclass
from html.parser import HTMLParser

# Elements and classes whose whole content is not the page's own text. The classes are those of the LibreOffice
# help (its "how to get" boxes are pasted into hundreds of pages; MAC is the other half of a pair of alternatives)
# and of DocBook (the Debian reference).
LEFT_OUT = {"head", "script", "style", "noscript", "nav", "header", "footer", "aside", "button", "svg"}
LEFT_OUT_CLASSES = {"howtoget", "relatedtopics", "noteicon", "MAC", "navheader", "navfooter", "toc", "footnotes"}
LEFT_OUT_CLASSES |= {"footnote", "legalnotice", "debug"}
BLOCKS = {"p", "div", "li", "ul", "ol", "dl", "dt", "dd", "table", "tr", "pre", "br", "blockquote", "body"}
HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}

JAPANESE = re.compile(r"[぀-ヿ㐀-鿿]")
SENTENCE = 40
"""Characters from which a line without any Japanese letter is taken for an untranslated sentence."""


@dataclass
class Block:
    """One paragraph, heading, table row or listing."""

    tag: str
    text: str
    anchor: str
    """The last anchor seen at or before this block, which names the section that it heads."""


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self.open: list[tuple[str, bool]] = []  # each open element, and whether it hides its content
        self.tables: list[bool] = []  # each open table, and whether its rows are lines (else it is layout)
        self.hidden = 0
        self.pre = 0
        self.words: list[str] = []
        self.tag = "p"
        self.anchor = ""

    @property
    def in_row(self) -> bool:
        return bool(self.tables) and self.tables[-1]

    def flush(self, tag: str = "p") -> None:
        """End the block that is being gathered; the next one is a `tag`."""
        text = "".join(self.words)
        if self.tag == "pre":
            text = textwrap.dedent("\n".join(line.rstrip() for line in text.expandtabs(4).splitlines())).strip("\n")
        else:
            text = " ".join(text.split()).strip("| ")
        if text.strip():
            self.blocks.append(Block(self.tag, text, self.anchor))
        self.words, self.tag = [], tag

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "a" and not self.hidden and (given.get("id") or given.get("name")):
            self.anchor = given.get("id") or given["name"]
        if tag in VOID:
            if tag == "br" and not self.hidden:
                self.words.append("\n")
            return
        hides = tag in LEFT_OUT or bool(LEFT_OUT_CLASSES.intersection(given.get("class", "").split()))
        self.open.append((tag, hides))
        self.hidden += hides
        if self.hidden:
            return
        if tag == "table":
            self.flush()
            self.tables.append(given.get("border") != "0" and "icontable" not in given.get("class", ""))
        elif tag == "pre":
            self.flush("pre")
            self.pre += 1
        elif tag == "tr" or (tag in BLOCKS | HEADINGS and not self.in_row):
            self.flush("tr" if tag == "tr" and self.in_row else tag if tag in HEADINGS else "p")
        elif tag in {"td", "th"} and self.in_row:
            self.words.append(" | ")
        elif tag in BLOCKS:
            self.words.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag not in [name for name, _ in self.open]:
            return
        while self.open:  # elements that were never closed end with the one around them
            name, hides = self.open.pop()
            if not self.hidden and name == "table":
                self.flush()
                self.tables.pop()
            elif not self.hidden and name == "pre":
                self.flush()
                self.pre -= 1
            elif not self.hidden and name in BLOCKS | HEADINGS and (name == "tr" or not self.in_row):
                self.flush()
            self.hidden -= hides
            if name == tag:
                break

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.words.append(data)


def read_page(html: str) -> list[Block]:
    """The blocks of a page's own text, in reading order."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    reader.flush()
    return reader.blocks


def is_untranslated(block: Block) -> bool:
    """Whether a Japanese page has this sentence in English still. Listings and short names are no sentences."""
    return block.tag != "pre" and len(block.text) >= SENTENCE and not JAPANESE.search(block.text)


def split_sections(blocks: list[Block], tags: set[str]) -> list[list[Block]]:
    """Parts that begin at each heading of these levels; what stands before the first heading is a part too."""
    parts: list[list[Block]] = [[]]
    for block in blocks:
        if block.tag in tags and parts[-1]:
            parts.append([])
        parts[-1].append(block)
    return [part for part in parts if part]


def as_text(blocks: list[Block]) -> str:
    """Paragraphs with an empty line between them; the rows of a table are lines."""
    text = ""
    for before, block in zip([None, *blocks], blocks, strict=False):
        rows = before is not None and before.tag == block.tag == "tr"
        text += ("" if before is None else "\n" if rows else "\n\n") + block.text
    return text
