"""What a larger vocabulary is worth, in the numbers by which its size is chosen."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import tokenizers

from llm_recipes.config import ExtendVocabConfig
from llm_recipes.errors import UserError
from llm_recipes.vocab.base import Base
from llm_recipes.vocab.merging import merged_json
from llm_recipes.vocab.pieces import Added, Pieces
from llm_recipes.vocab.words import all_texts

MOST_CHARACTERS = 10_000_000
"""Of each text held out, as much is measured."""
CURVE_CHARACTERS = 300_000
CURVE_POINTS = 12
TEXTS_AT_ONCE = 256
SHOWN = 50


@dataclass(frozen=True)
class Figures:
    """One held-out text before and after."""

    documents: int
    characters: int
    bytes: int
    """UTF-8."""
    tokens_before: int
    tokens_after: int
    new_bytes: int
    """Bytes that new pieces stand for."""

    @property
    def saved(self) -> float:
        """Share of the tokens that are no longer needed."""
        return 1 - self.tokens_after / max(self.tokens_before, 1)

    @property
    def covered(self) -> float:
        """Share of the text that new pieces stand for."""
        return self.new_bytes / max(self.bytes, 1)


@dataclass
class Findings:
    """All that the report shows."""

    base: str
    kind: str
    tokens_before: int
    tokens_after: int
    figures: dict[str, Figures]
    curve: dict[str, list[tuple[int, float]]]
    """By text: (tokens in the vocabulary, characters per token)."""
    most_used: list[tuple[str, int]]
    unused: list[str]
    """New pieces that stand nowhere in the texts held out."""
    tables: list[dict[str, Any]] = field(default_factory=list)
    """The model's tables that grew; none for a tokenizer alone."""
    memory_added: int = 0
    """Bytes, in the model's own dtype."""

    def as_json(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def held_out_texts(config: ExtendVocabConfig) -> dict[str, list[str]]:
    """The texts that `held_out` names.

    Raises:
        UserError: a file is missing, empty or broken.
    """
    found = {}
    for name, paths in config.held_out.items():
        key = f"held_out.{name}"
        found[name] = list(islice_characters(all_texts(paths, config, key), MOST_CHARACTERS))
        if not any(found[name]):
            raise UserError(f"{key}={paths}: no text in it")
    return found


def islice_characters(texts: Iterator[str], most: int) -> Iterator[str]:
    """Texts, until there are so many characters."""
    for text in texts:
        if most <= 0:
            return
        most -= len(text)
        yield text


def measure(texts: Sequence[str], old: Any, new: Any, pieces: Pieces, first: int) -> tuple[Figures, Counter[int]]:
    """One held-out text by both tokenizers (of `tokenizers`), and how often each new token stands in it."""
    before = after = new_bytes = 0
    used: Counter[int] = Counter()
    for some in _groups(texts):
        before += sum(len(each.ids) for each in old.encode_batch_fast(some, add_special_tokens=False))
        for each in new.encode_batch_fast(some, add_special_tokens=False):
            after += len(each.ids)
            used.update(number for number in each.ids if number >= first)
    for number, count in used.items():
        new_bytes += count * pieces.bytes(new.id_to_token(number))
    figures = Figures(
        len(texts), sum(map(len, texts)), sum(len(text.encode()) for text in texts), before, after,
        new_bytes,
    )  # fmt: skip
    return figures, used


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    supply = iter(texts)
    while some := list(islice(supply, TEXTS_AT_ONCE)):
        yield some


def curve(
    base: Base, learned: Sequence[Added], added: int, texts: Mapping[str, Sequence[str]]
) -> dict[str, list[tuple[int, float]]]:
    """Characters per token by the size of the vocabulary, from the old one to all that was learned."""
    samples = {name: list(islice_characters(iter(some), CURVE_CHARACTERS)) for name, some in texts.items()}
    result: dict[str, list[tuple[int, float]]] = {name: [] for name in texts}
    # The first pieces are worth most: there the points lie closer.
    sizes = {round(len(learned) * (point / CURVE_POINTS) ** 2) for point in range(CURVE_POINTS + 1)}
    for number in sorted(sizes | {added}):
        state = merged_json(base.state, base.kind, learned[:number], base.first)
        state |= {"truncation": None, "padding": None}
        tokenizer: Any = tokenizers.Tokenizer.from_str(json.dumps(state))
        for name, some in samples.items():
            count = sum(len(each.ids) for each in tokenizer.encode_batch_fast(some, add_special_tokens=False))
            result[name].append((base.first + number, sum(map(len, some)) / max(count, 1)))
    return result


def findings(
    base: Base, merged: Any, pieces: Pieces, added: Sequence[Added], learned: Sequence[Added],
    texts: Mapping[str, Sequence[str]],
) -> Findings:  # fmt: skip
    """Everything about a merged tokenizer that its texts can tell.

    Args:
        merged: as transformers opens it.
        added: the new pieces.
        learned: these and the further ones that were learned, for the curve.
    """
    old, new = base.tokenizer.backend_tokenizer, merged.backend_tokenizer
    figures, used = {}, Counter[int]()
    for name, some in texts.items():
        figures[name], here = measure(some, old, new, pieces, base.first)
        used.update(here)
    name_of = {base.first + number: pieces.shown(each.piece) for number, each in enumerate(added)}
    return Findings(
        base=base.where,
        kind=base.kind,
        tokens_before=base.first,
        tokens_after=base.first + len(added),
        figures=figures,
        curve=curve(base, learned, len(added), texts),
        most_used=[(name_of[number], count) for number, count in used.most_common(SHOWN)],
        unused=[name for number, name in name_of.items() if not used[number]],
    )
