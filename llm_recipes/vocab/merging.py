"""The merged tokenizer.json."""

from collections.abc import Sequence
from typing import Any

from llm_recipes.vocab.pieces import SENTENCEPIECE, Added, Pieces
from llm_recipes.vocab.spm import splits


def merged_json(state: dict[str, Any], kind: str, added: Sequence[Added], first: int) -> dict[str, Any]:
    """A tokenizer.json with the added pieces, numbered from `first` on; all else is as it was."""
    vocab = state["model"]["vocab"] | {new.piece: first + number for number, new in enumerate(added)}
    as_strings = bool(state["model"]["merges"]) and isinstance(state["model"]["merges"][0], str)
    pairs: list[Sequence[str]] = []
    for new in added:
        # SentencePiece joins any two neighbours whose joint text is a piece.
        pairs += splits(new.piece, vocab) if kind == SENTENCEPIECE else [new.parts] if new.parts else []
    merges = state["model"]["merges"] + [" ".join(pair) if as_strings else list(pair) for pair in pairs]
    return state | {"model": state["model"] | {"vocab": vocab, "merges": merges}}


def reopened(old: Sequence[str], added: Sequence[Added], before: Pieces) -> str | None:
    """An old piece that nothing made, and that new ones would make, or None.

    A piece that its own text gave stays as it is: wherever its characters are joined with one another alone, they are
    joined before any new piece is.

    SentencePiece would take it at the old piece's rank, tokenizer.json at none. No trainer leaves such pieces behind.
    """
    new = {each.piece for each in added}
    known = before.known | new
    for piece in old:
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if (left in new or right in new) and left in known and right in known and before.cut(piece) != [piece]:
                return piece
    return None
