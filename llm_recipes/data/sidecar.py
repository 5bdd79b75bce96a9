"""`NAME.json` beside a token file: what the file itself does not say."""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Sidecar:
    """What `NAME.json` says about a token file."""

    tokenizer: str
    """Fingerprint of the tokenizer's vocabulary, merges and normalizer."""
    tokenizer_name: str
    vocab_size: int
    largest_token_id: int
    eod_token_id: int
    bos_token_id: int | None
    """The token that starts each document, or None where there is none."""
    documents: int
    tokens: int
    bytes: int
    """UTF-8 bytes of the raw text."""
    licence: str | None = None
    language: str | None = None
    sources: list[dict[str, Any]] = field(default_factory=list)
    """What was tokenized: `path`, `bytes`, `xxh3_128` of each input file."""
    skipped_rows: int = 0
    checksums: dict[str, str] = field(default_factory=dict)
    """xxh3-128 of the `.bin`, `.idx` and `.bytes` files."""
    version: int = 1


def from_json(content: Any) -> Sidecar:
    """A sidecar from what JSON gave; keys that are not known are left out.

    Raises:
        TypeError, AttributeError: it is none.
    """
    known = {item.name for item in dataclasses.fields(Sidecar)}
    sidecar = Sidecar(**{key: value for key, value in content.items() if key in known})
    for name, kind in typing.get_type_hints(Sidecar).items():
        if not _is_a(getattr(sidecar, name), kind):
            raise TypeError(f"{name} is {getattr(sidecar, name)!r}")
    return sidecar


def _is_a(value: Any, kind: Any) -> bool:
    """Whether what JSON gave is of a field's type; `True` is no number."""
    if kind is Any:
        return True
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, each) for each in typing.get_args(kind))
    if type(value) is not (typing.get_origin(kind) or kind):
        return False
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(_is_a(each, typing.get_args(kind)[-1]) for each in inside)
