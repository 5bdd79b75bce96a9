"""The two libraries that make ids out of text, behind one door. Imports no torch.

`tokenizers` is what transformers uses, and is right by definition; `fastokens` is an order of magnitude faster.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

METASPACE = "▁"


class Disagreement(Exception):
    """`fastokens` gave other ids than `tokenizers`, or none."""


def prepared_json(tokenizer_json: str, bos: int | None, eod: int) -> tuple[str, dict[int, str]]:
    """A tokenizer.json made fit for whole documents, and the control tokens in it.

    Truncation, padding and dropout are switched off; BOS and end-of-document count as special.
    """
    state = json.loads(tokenizer_json)
    state["truncation"] = state["padding"] = None
    model = state["model"]
    if model.get("dropout") is not None:
        model["dropout"] = None
    control: dict[int, str] = {}
    for token in state.get("added_tokens") or []:
        token["special"] = token["special"] or token["id"] in (bos, eod)
        # An unknown-word token is special too, but it is what strange characters honestly give.
        if token["special"] and token["content"] != _unknown(model):
            control[token["id"]] = token["content"]
    return json.dumps(state, ensure_ascii=False), control


def _unknown(model: dict[str, Any]) -> str | None:
    number = model.get("unk_id")
    return model["vocab"][number][0] if number is not None else model.get("unk_token")


class Backend(Protocol):
    """One of the two libraries."""

    def encode(self, texts: Sequence[str], plain: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end (any unsigned type) and the length of each, int64.

        Args:
            texts: none of them empty.
            plain: special tokens' strings are ordinary text.
        """


class TokenizersBackend:
    """Hugging Face's `tokenizers`."""

    def __init__(self, tokenizer_json: str) -> None:
        import tokenizers

        self._tokenizer: Any = tokenizers.Tokenizer.from_str(tokenizer_json)

    def encode(self, texts: Sequence[str], plain: bool) -> tuple[np.ndarray, np.ndarray]:
        self._tokenizer.encode_special_tokens = plain
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        return np.concatenate(ids), np.array([len(each) for each in ids], dtype=np.int64)


class FastokensBackend:
    """`fastokens`. A text that it refuses (a byte for which the vocabulary has no token) goes to the referee.

    Raises:
        Disagreement: it does not open this tokenizer.
    """

    def __init__(self, tokenizer_json: str, referee: TokenizersBackend) -> None:
        self.referee = referee
        self.referred: Counter[str] = Counter()
        """Texts that went to the referee, by fastokens' reason."""
        try:
            import fastokens
        except ImportError as error:
            raise Disagreement("fastokens is not installed") from error

        state = json.loads(tokenizer_json)
        self._prefixes_space = _opens_with_space(state)
        self._only_plain = False
        if self._prefixes_space is not None:
            self._only_plain = True
            state["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": METASPACE}
            state["pre_tokenizer"] = None
            tokenizer_json = json.dumps(state, ensure_ascii=False)
        try:
            self._tokenizer = fastokens.Tokenizer.from_json_str(tokenizer_json)
        except Exception as error:
            raise Disagreement(f"fastokens does not open this tokenizer ({error})") from error

    def encode(self, texts: Sequence[str], plain: bool) -> tuple[np.ndarray, np.ndarray]:
        if self._only_plain and not plain:
            raise Disagreement("fastokens does not know this tokenizer's way with special tokens inside a text")
        given = texts
        if self._prefixes_space:
            given = [text if text[0] in (" ", METASPACE) else " " + text for text in texts]
        try:
            return self._encode(given, plain)
        except ValueError:
            pass  # one of these texts is refused: find it
        parts = []
        for text, changed in zip(texts, given, strict=True):
            try:
                parts.append(self._encode([changed], plain))
            except ValueError as error:
                parts.append(self.referee.encode([text], plain))
                self.referred[str(error)] += 1
        return np.concatenate([ids for ids, _ in parts]), np.concatenate([counts for _, counts in parts])

    def _encode(self, texts: Sequence[str], plain: bool) -> tuple[np.ndarray, np.ndarray]:
        try:
            ids, offsets = self._tokenizer.encode_batch_flat(list(texts), split_special_tokens=plain)
        except BaseException as error:  # a panic of its Rust code is no Exception
            if type(error).__name__ == "PanicException":
                raise Disagreement(f"fastokens failed on a text ({error})") from error
            raise
        return np.frombuffer(ids, "<u4"), np.diff(np.frombuffer(offsets, "<u8").astype(np.int64))


def _opens_with_space(state: dict[str, Any]) -> bool | None:
    """For a tokenizer of SentencePiece's make whose Metaspace step `fastokens` lacks: does it put a space
    before a text? Such a step is the same as replacing spaces, as long as nothing but special tokens could
    cut the text in pieces. None: not such a tokenizer."""
    step = state.get("pre_tokenizer") or {}
    alike = (
        step.get("type") == "Metaspace"
        and step.get("replacement") == METASPACE
        and step.get("split") is False
        and state.get("normalizer") is None
        and all(token["special"] for token in state.get("added_tokens") or [])
    )
    return step["prepend_scheme"] != "never" if alike else None
