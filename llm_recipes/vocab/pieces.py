"""A tokenizer's pieces and merges, to which new ones are added behind all the old ones.

Byte pair encoding joins, again and again, the neighbours whose merge has the lowest rank. A new piece's merges rank
behind every old one, so a text is first cut into old pieces exactly as before, and only then are these joined. Hence

- a text in which no new piece stands keeps its ids;
- a piece that is two pieces when it is added is one piece from then on, whatever is added later: all its merges come
  before the later ones. That is what `Pieces.add` sees to, so every new piece can be produced.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from llm_recipes.errors import UserError
from llm_recipes.vocab.scripts import Scripts

BYTE_LEVEL, SENTENCEPIECE = "byte-level BPE", "SentencePiece BPE"
UNKNOWN_RANK = 1 << 62


def byte_alphabet() -> dict[int, str]:
    """The character by which byte-level BPE writes each byte (Radford et al., 2019): itself where it can be printed,
    else the next one free from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


BYTE_OF = {character: byte for byte, character in byte_alphabet().items()}


def as_bytes(piece: str) -> bytes:
    """The bytes that a piece of byte-level BPE stands for."""
    return bytes(BYTE_OF[character] for character in piece)


def steps(state: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder of a tokenizer.json, those of its sequences too."""
    if not state:
        return
    yield state
    for key in ("normalizers", "pretokenizers", "decoders", "processors"):
        for each in state.get(key) or []:
            yield from steps(each)


def kind_of(state: dict[str, Any], where: str) -> str:
    """The family of a tokenizer.json.

    Raises:
        UserError: it is of neither, naming its kind.
    """
    model = state["model"]
    kind = model.get("type") or "a model without a type"
    if kind == "BPE":
        affixes = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
        if not affixes and any(step["type"] == "ByteLevel" for step in steps(state.get("pre_tokenizer"))):
            return BYTE_LEVEL
        if not affixes and any("▁" in str(state.get(key)) for key in ("normalizer", "pre_tokenizer")):
            return SENTENCEPIECE
        kind = f"BPE with {' and '.join(affixes)}" if affixes else "BPE over characters, without ▁ for spaces"
    raise UserError(
        f"{where}: its tokenizer is {kind}, which cannot be extended; what can be is {BYTE_LEVEL} (as of Llama-3 or "
        f"Qwen) and {SENTENCEPIECE} (as of Mistral or Llama-2)"
    )


@dataclass(frozen=True)
class Added:
    """A new piece, in the model's own letters, and what it is made of (nothing: a character of its own)."""

    piece: str
    parts: tuple[str, str] | None


class Pieces:
    """The pieces of a tokenizer.json, and those added.

    Args:
        state: of a BPE tokenizer of one of the two families.
        kind: which.
        scripts: a new piece holds, or begins, a character of these.
    """

    def __init__(self, state: dict[str, Any], kind: str, scripts: Scripts) -> None:
        self.kind = kind
        self.scripts = scripts
        self.known = set(state["model"]["vocab"])
        # An added token is cut out of a text before anything is joined: no piece that holds it can be produced.
        held = [token["content"] for token in state.get("added_tokens") or [] if scripts.has(token["content"])]
        self._cut_out = [token if kind == SENTENCEPIECE else token.encode() for token in held]
        self.added: list[Added] = []
        merges = [tuple(each.split(" ") if isinstance(each, str) else each) for each in state["model"]["merges"]]
        # SentencePiece has no list of merges: any two neighbours are joined whose joint text is a piece, best first.
        self._rank: dict[Any, int] = {}
        for number, (left, right) in enumerate(merges):
            self._rank.setdefault(self._key(left, right), number)
        self._next = len(merges)

    def _key(self, left: str, right: str) -> Any:
        return left + right if self.kind == SENTENCEPIECE else (left, right)

    def cut(self, piece: str) -> list[str]:
        """The pieces into which the tokenizer, as it is now, cuts a text written in the model's letters."""
        parts = list(piece)
        while len(parts) > 1:
            ranks = [self._rank.get(self._key(*pair), UNKNOWN_RANK) for pair in pairwise(parts)]
            best = min(ranks)
            if best == UNKNOWN_RANK:
                break
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return parts

    def add(self, piece: str) -> None:
        """Add a piece, and the pieces on the way to it that are not there yet.

        Nothing is added that would be found in texts of other scripts too, nor anything for the sake of such a piece.
        """
        while piece not in self.known:
            parts = self.cut(piece)
            if len(piece) == 1 and self.kind == SENTENCEPIECE:
                return self._take(Added(piece, None))
            joints = [left + right for left, right in pairwise(parts)]
            at = next((at for at, joint in enumerate(joints) if joint not in self.known and self.admits(joint)), None)
            if at is None or not self.known.issuperset(parts):
                return
            self._take(Added(joints[at], (parts[at], parts[at + 1])))

    def _take(self, new: Added) -> None:
        self.known.add(new.piece)
        self.added.append(new)
        if new.parts is not None:
            self._rank[self._key(*new.parts)] = self._next
            self._next += 1

    def admits(self, piece: str) -> bool:
        """Whether a piece begins with a character, and can only stand in texts that hold one of the scripts.

        A piece of bytes may end amid a character. With its first two bytes or more, the character is one of so many
        neighbours: all of them must be of the scripts.
        """
        data = piece if self.kind == SENTENCEPIECE else as_bytes(piece)
        if any(token in data for token in self._cut_out):
            return False
        if isinstance(data, str):
            return self.scripts.has(data)
        if data[0] & 0xC0 == 0x80:
            return False
        tail = unfinished(data)
        if self.scripts.has(data[: len(data) - len(tail)].decode(errors="replace")):
            return True
        return len(tail) >= 2 and self.scripts.owns(*completions(tail))

    def characters(self, piece: str) -> int:
        """How many characters a piece holds or begins."""
        return len(piece) if self.kind == SENTENCEPIECE else sum((byte & 0xC0) != 0x80 for byte in as_bytes(piece))

    def bytes(self, piece: str) -> int:
        """How many bytes of text a piece stands for."""
        return len(piece.encode()) if self.kind == SENTENCEPIECE else len(piece)

    def shown(self, piece: str) -> str:
        """A piece as a text to look at; of a part of a character, its bytes."""
        return piece if self.kind == SENTENCEPIECE else as_bytes(piece).decode(errors="backslashreplace")

    def texts(self, piece: str) -> Iterator[str]:
        """Texts that may give a new piece: itself, or, where it ends amid a character, with each of those that begin
        so."""
        if self.kind == SENTENCEPIECE:
            yield piece
            return
        data = as_bytes(piece)
        tail = unfinished(data)
        if not tail:
            yield data.decode()
            return
        whole = data[: len(data) - len(tail)].decode()
        first, last = completions(tail)
        yield from (whole + chr(point) for point in range(first, last + 1) if not 0xD800 <= point < 0xE000)


def unfinished(data: bytes) -> bytes:
    """The bytes at the end that begin a character of UTF-8 and do not end it."""
    for size in range(1, min(3, len(data)) + 1):
        lead = data[-size]
        if lead >= 0xC0:
            needed = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return data[-size:] if size < needed else b""
        if lead < 0x80:
            return b""
    return b""


def completions(head: bytes) -> tuple[int, int]:
    """First and last code point whose UTF-8 begins with these bytes (one to three of them)."""
    needed = 2 if head[0] < 0xE0 else 3 if head[0] < 0xF0 else 4
    missing = needed - len(head)
    value = head[0] & (0xFF >> needed + 1)
    for byte in head[1:]:
        value = value << 6 | (byte & 0x3F)
    first, last = value << 6 * missing, ((value + 1) << 6 * missing) - 1
    # What would be written shorter, the surrogates, and what lies past Unicode is no character.
    least = {2: 0x80, 3: 0x800, 4: 0x10000}[needed]
    return max(first, least), min(last, 0x10FFFF)
