"""Chat formats, each as its template and once more by hand, and conversations to write in them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Message = dict[str, Any]
Piece = tuple[str, bool]
"""Text, and whether the assistant says it."""

ROOT = Path(__file__).parents[1]
OURS = ROOT / "conf" / "template"
PUBLISHED = ROOT / "tests" / "chat" / "templates"


@dataclass(frozen=True)
class Format:
    """A chat format.

    Attributes:
        place: its template.
        write: a conversation, BOS and EOS to pieces, by hand.
        special: tokens that a tokenizer made for it has.
        system: whether it has a place for a system prompt.
        rewrites: whether earlier turns are written otherwise when later ones follow: in conversations with a system
            prompt, or in all.
    """

    place: Path
    write: Callable[[list[Message], str, str], list[Piece]]
    special: tuple[str, ...] = ()
    system: bool = True
    rewrites: str = "never"

    @property
    def template(self) -> str:
        return self.place.read_text(encoding="utf-8")


def turns(
    messages: list[Message], bos: str, eos: str, header: str, trim: bool = False, end: str = "", names: Any = None
) -> list[Piece]:
    """Formats in which every message is a header, its content, and an end."""
    pieces = [(bos, False)]
    for each in messages:
        content = each["content"].strip() if trim else each["content"]
        speaks = each["role"] == "assistant"
        pieces.append((header.format((names or {}).get(each["role"], each["role"])), False))
        stop, rest = (end or eos).rstrip(), (end or eos)[len((end or eos).rstrip()) :]
        pieces += [(content + stop, speaks), (rest, False)]
    return pieces


def chatml(messages: list[Message], bos: str, eos: str, own_end: bool = True) -> list[Piece]:
    pieces = []
    for each in messages:
        speaks = each["role"] == "assistant"
        end = eos if speaks and not own_end else "<|im_end|>"
        pieces += [(f"<|im_start|>{each['role']}\n", False), (each["content"] + end, speaks), ("\n", False)]
    return pieces


def sections(messages: list[Message], bos: str, eos: str, first: str, asks: str, answers: str) -> list[Piece]:
    """Formats of sections with headings."""
    pieces = [(bos, False), ("" if messages[0]["role"] == "system" else first, False)]
    for each in messages:
        heading = {"system": "", "user": f"\n\n### {asks}:\n", "assistant": f"\n\n### {answers}:\n"}[each["role"]]
        speaks = each["role"] == "assistant"
        pieces += [(heading, False), (each["content"] + (eos if speaks else ""), speaks)]
    return pieces


def llama2(messages: list[Message], bos: str, eos: str, trim: bool) -> list[Piece]:
    pieces: list[Piece] = []
    before = ""
    for each in messages:
        content = each["content"].strip() if trim and each["role"] == "assistant" else each["content"]
        if each["role"] == "system":
            before = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif each["role"] == "user":
            asked = (before + content).strip() if trim else before + content
            pieces.append((f"{bos}[INST] {asked} [/INST]", False))
            before = ""
        else:
            pieces.append((f" {content} {eos}", True))
    return pieces


def mistral(messages: list[Message], bos: str, eos: str) -> list[Piece]:
    pieces = [(bos, False)]
    system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
    last = max(at for at, each in enumerate(messages) if each["role"] == "user")
    for at, each in enumerate(messages):
        if each["role"] == "user":
            pieces.append((f"[INST] {system if at == last else ''}{each['content']}[/INST]", False))
        elif each["role"] == "assistant":
            pieces.append((" " + each["content"].strip() + eos, True))
    return pieces


def trailing_space(messages: list[Message], bos: str, eos: str) -> list[Piece]:
    pieces = [(bos, False)]
    for each in messages:
        content = each["content"].strip()
        forms = {"system": f"<<SYS>>\n{content}\n<</SYS>>\n\n", "user": f"[INST] {content} [/INST] "}
        pieces.append((forms.get(each["role"], content + eos), each["role"] == "assistant"))
    return pieces


def qwen3(messages: list[Message], bos: str, eos: str) -> list[Piece]:
    """Of answers without reasoning."""
    pieces: list[Piece] = []
    for at, each in enumerate(messages):
        speaks = each["role"] == "assistant"
        thought = "<think>\n\n</think>\n\n" if at == len(messages) - 1 else ""
        said = (thought if speaks else "") + each["content"] + "<|im_end|>"
        pieces += [(f"<|im_start|>{each['role']}\n", False), (said, speaks), ("\n", False)]
    return pieces


def zephyr(messages: list[Message], bos: str, eos: str) -> list[Piece]:
    pieces: list[Piece] = []
    for each in messages:
        pieces += [(f"<|{each['role']}|>", False), (f"\n{each['content']}{eos}", each["role"] == "assistant")]
        pieces.append(("\n", False))
    return pieces


def plain(messages: list[Message], bos: str, eos: str) -> list[Piece]:
    forms = {"user": "", "assistant": eos}
    return [(each["content"] + forms[each["role"]], each["role"] == "assistant") for each in messages]


LLM_JP = "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。"
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
IM = ("<|im_start|>", "<|im_end|>")

FORMATS: dict[str, Format] = {
    "ours: chatml": Format(OURS / "chatml.jinja", partial(chatml, own_end=False), IM),
    "ours: llm_jp": Format(OURS / "llm_jp.jinja", partial(sections, first=LLM_JP, asks="指示", answers="応答")),
    "ours: alpaca": Format(
        OURS / "alpaca.jinja", partial(sections, first=ALPACA, asks="Instruction", answers="Response")
    ),
    "ours: llama2": Format(OURS / "llama2.jinja", partial(llama2, trim=False)),
    "ours: plain": Format(OURS / "plain.jinja", plain, system=False),
    "llama2": Format(PUBLISHED / "llama2.jinja", partial(llama2, trim=True)),
    "llama3": Format(
        PUBLISHED / "llama3.jinja",
        partial(turns, header="<|start_header_id|>{}<|end_header_id|>\n\n", trim=True, end="<|eot_id|>"),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": Format(PUBLISHED / "mistral.jinja", mistral, rewrites="system"),
    "gemma": Format(
        PUBLISHED / "gemma.jinja",
        partial(turns, header="<start_of_turn>{}\n", trim=True, end="<end_of_turn>\n", names={"assistant": "model"}),
        ("<start_of_turn>", "<end_of_turn>"),
        system=False,
    ),
    "qwen3": Format(PUBLISHED / "qwen3.jinja", qwen3, IM, rewrites="always"),
    "zephyr": Format(PUBLISHED / "zephyr.jinja", zephyr),
    "trailing space": Format(PUBLISHED / "trailing_space.jinja", trailing_space),
    "marked": Format(PUBLISHED / "marked.jinja", chatml, IM),
}
"""By name. `ours: ...` are those of conf/template; the others are written from what their makers published."""

PARTS = [
    "answer: ", "Answer:", "答え: ", "Paris", "東京です。", " ", "  ", "\n", "\n\n", "　", "\t", "The", " the",
    "👨\u200d👩\u200d👧", "🎌", "ＡＢＣ１２３", "ｶﾀｶﾅ", "é", "か\u3099", "、", "...", "x = 1;", "```\nprint(1)\n```",
    "[INST]", "###", "user", "12", "𠮷",
]  # fmt: skip
CONTENT = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("".join).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn, system: bool = True, most: int = 4) -> list[Message]:
    """One to four exchanges, now and then after a system prompt."""
    messages = [{"role": "system", "content": draw(CONTENT)}] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, most))):
        messages += [{"role": "user", "content": draw(CONTENT)}, {"role": "assistant", "content": draw(CONTENT)}]
    return messages


def rewritten(chosen: Format, messages: list[Message]) -> bool:
    """Whether a format writes earlier turns of this conversation otherwise than without the later ones."""
    several = sum(each["role"] == "user" for each in messages) > 1
    return several and (
        chosen.rewrites == "always" or (chosen.rewrites == "system" and messages[0]["role"] == "system")
    )


def kept(chosen: Format) -> st.SearchStrategy[list[Message]]:
    """Conversations of which a format rewrites nothing."""
    several = conversations(chosen.system, 1 if chosen.rewrites == "always" else 4)
    return several.filter(lambda messages: not rewritten(chosen, messages))


def spans(pieces: list[Piece]) -> tuple[str, list[tuple[int, int]]]:
    """The whole text, and characters from, to, of what the assistant says."""
    text, found = "", []
    for piece, speaks in pieces:
        if speaks:
            found.append((len(text), len(text) + len(piece)))
        text += piece
    return text, found
