"""The corpora that a configuration names: found, opened, checked against the model's tokenizer, and planned."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_recipes.config import DataConfig, SourceConfig
from llm_recipes.data.mixture import Mixture
from llm_recipes.data.token_file import TokenFile
from llm_recipes.data.windows import Readable, Windows
from llm_recipes.errors import UserError

ENDINGS = (".bin", ".idx", ".json", ".bytes")
LOOKED_AT = 256
"""Documents whose first token is looked at in a corpus that does not say whether it has BOS."""


@dataclass(frozen=True)
class TokenizerFacts:
    """What token files are checked against."""

    fingerprint: str
    vocab_size: int
    """Rows of the model's embedding: every token id must lie below."""
    eod: int | None
    bos: int | None
    """The token every document should start with, or None."""
    bos_policy: str
    bos_token: int | None
    """The tokenizer's BOS token, wanted or not."""


@dataclass(frozen=True)
class Source:
    """One corpus of the mixture."""

    name: str
    files: list[TokenFile]
    windows: Readable
    weight: float
    language: str | None
    max_epochs: float | None


def prefixes(path: Any, where: str) -> list[Path]:
    """The token files that a path, a list, or a glob names, in order.

    Raises:
        UserError: a glob that matches nothing.
    """
    found: list[Path] = []
    if not isinstance(path, Sequence):
        raise UserError(f"{where}={path}: expected a token file, a list of them, or a glob")
    for entry in [path] if isinstance(path, str) else list(path):
        text = str(entry)
        for ending in ENDINGS[:2]:
            text = text.removesuffix(ending)
        if not text:
            raise UserError(f"{where}: names no token file")
        if glob.has_magic(text):
            matches = sorted(Path(match).with_suffix("") for match in glob.glob(f"{text}.idx", recursive=True))
            if not matches:
                raise UserError(f"{where}={entry}: no token files match")
            found += matches
        else:
            found.append(Path(text))
    if not found:
        raise UserError(f"{where}: names no token file")
    return found


def check_file(
    file: TokenFile, where: str, facts: TokenizerFacts, accepted: Sequence[str], looked_at: int = LOOKED_AT
) -> None:
    """Refuse a token file that does not fit the model's tokenizer.

    Args:
        looked_at: documents whose first token is read where the file says nothing of BOS.

    Raises:
        UserError: another tokenizer, a token id past the vocabulary, or another BOS policy.
    """
    sidecar = file.sidecar
    if sidecar is not None:
        if sidecar.tokenizer != facts.fingerprint and sidecar.tokenizer not in accepted:
            raise UserError(
                f"{where}: {file.prefix} was written by another tokenizer ({sidecar.tokenizer_name}, "
                f"{sidecar.tokenizer}) than the model's ({facts.fingerprint}); tokenize the text again, or add "
                f"{sidecar.tokenizer} to data.accept_tokenizer"
            )
        if sidecar.largest_token_id >= facts.vocab_size:
            raise UserError(
                f"{where}: {file.prefix} holds token {sidecar.largest_token_id}, past the model's "
                f"vocabulary of {facts.vocab_size}; it was tokenized for another model"
            )
        has_bos = sidecar.bos_token_id is not None
    else:
        if facts.bos_token is None:
            return
        step = max(1, file.documents // looked_at)
        first = [int(file.read(s, s + 1)[0]) for s in map(file.document_start, range(0, file.documents, step))]
        with_bos = sum(token == facts.bos_token for token in first)
        if 0 < with_bos < len(first):
            raise UserError(f"{where}: in {file.prefix} some documents start with BOS and some do not; tokenize again")
        has_bos = with_bos > 0
    if has_bos != (facts.bos is not None):
        raise UserError(
            f"{where}: the documents of {file.prefix} start {'with' if has_bos else 'without'} BOS, but "
            f"data.bos={facts.bos_policy} means {'without' if has_bos else 'with'}; "
            f"set data.bos={'always' if has_bos else 'never'}, or tokenize again"
        )


def megatron_sources(data_path: Any) -> dict[str, SourceConfig]:
    """Sources from a Megatron `--data-path` list: weights and paths in turn, or paths alone.

    Raises:
        UserError: the list is neither.
    """
    if not isinstance(data_path, str | list):
        raise UserError(f"data.data_path={data_path}: expected a list of token files, with or without weights")
    words = data_path.split() if isinstance(data_path, str) else [str(word) for word in data_path]

    def number(word: str) -> float | None:
        try:
            return float(word)
        except ValueError:
            return None

    if not words:
        raise UserError("data.data_path: names no token file")
    weights: list[float | None]
    if words and number(words[0]) is not None:
        weights, paths = [number(word) for word in words[0::2]], words[1::2]
        if len(weights) != len(paths) or None in weights:
            raise UserError("data.data_path: expected WEIGHT PATH WEIGHT PATH ...")
        for weight, path in zip(weights, paths, strict=True):
            if not (weight is not None and 0 < weight < float("inf")):
                raise UserError(f"data.data_path: weight {weight} of {path} must be more than 0 and finite")
    else:
        weights, paths = [None] * len(words), words
    sources: dict[str, SourceConfig] = {}
    for weight, path in zip(weights, paths, strict=True):
        name = Path(path).name.removesuffix("_text_document")
        while name in sources:
            name += "_"
        sources[name] = SourceConfig(path=path, weight=weight)
    return sources


def open_files(paths: Sequence[Path], where: str, facts: TokenizerFacts, config: DataConfig) -> list[TokenFile]:
    """Open token files, and check each."""
    files = [TokenFile(path) for path in paths]
    for file in files:
        if config.verify:
            file.verify()
        # A corpus of a thousand shards is looked at as often as one of a single file, and at each shard's start.
        check_file(file, where, facts, config.accept_tokenizer, max(2, LOOKED_AT // len(files)))
    return files


def open_sources(config: DataConfig, facts: TokenizerFacts) -> list[Source]:
    """Open every source of a configuration.

    Raises:
        UserError: a file is missing or damaged, does not fit the model, or stands in the mixture twice.
    """
    configured = config.sources or megatron_sources(config.data_path)
    seen: dict[Path, str] = {}
    sources = []
    for name, source in configured.items():
        where = f"data.sources.{name}.path" if config.sources else "data.data_path"
        paths = prefixes(source.path, where)
        for path in paths:
            real = path.parent.resolve() / path.name
            real = Path(f"{real}.bin").resolve()
            if real in seen:
                raise UserError(f"{where}: {path} stands in the mixture twice (also in {seen[real]})")
            seen[real] = where
        files = open_files(paths, where, facts, config)
        windows = Windows(files, config.seq_len, config.mask_documents)
        if len(windows) == 0:
            raise UserError(f"{where}: {paths[0]} holds no document of two tokens or more; nothing to predict")
        weight = source.weight if source.weight is not None else float(windows.targets)
        sources.append(Source(name, files, windows, weight, source.language, source.max_epochs))
    return sources


def stage_starts(config: DataConfig, samples: int) -> list[int]:
    """First sample of each stage of the curriculum, for a run of that many samples."""
    starts, share = [0], 0.0
    for stage in config.stages[:-1]:
        share += stage.share
        starts.append(round(share * samples))
    return starts


def mix(sources: Sequence[Source], config: DataConfig, starts: Sequence[int]) -> Mixture:
    """The mixture of some sources, its stages starting at these samples."""
    if config.stages:
        weights = [[stage.weights.get(source.name, 0.0) for source in sources] for stage in config.stages]
    else:
        weights = [[source.weight for source in sources]]
    return Mixture(
        [source.name for source in sources],
        [len(source.windows) for source in sources],
        list(zip(starts, weights, strict=True)),
        config.seed,
    )


@dataclass(frozen=True)
class PlannedSource:
    """One line of the plan that is printed before a run and kept with it. Tokens are targets."""

    name: str
    language: str | None
    share: float
    tokens_wanted: int
    tokens_there: int
    epochs: float
    documents: int


def plan(sources: Sequence[Source], mixture: Mixture, samples: int) -> list[PlannedSource]:
    """What a run of that many samples takes from each source.

    Raises:
        UserError: a source would be repeated more often than its `max_epochs`.
    """
    rows = []
    for source, count in zip(sources, mixture.counts(samples), strict=True):
        epochs = count / len(source.windows)
        if source.max_epochs is not None and epochs > source.max_epochs:
            raise UserError(
                f"data.sources.{source.name}: the run would read it {epochs:.2f} times, max_epochs allows "
                f"{source.max_epochs:g}; lower its weight, add text, or train fewer steps"
            )
        rows.append(
            PlannedSource(
                name=source.name,
                language=source.language,
                share=count / max(samples, 1),
                tokens_wanted=count * source.windows.seq_len,
                tokens_there=source.windows.targets,
                epochs=epochs,
                documents=source.windows.documents,
            )
        )
    return rows


def contents(sources: Sequence[Source]) -> dict[str, dict[str, Any]]:
    """What each source holds, by which it is known again: its files' names, documents and tokens."""
    return {
        source.name: {
            "files": [[file.prefix.name, file.documents, file.tokens] for file in source.files],
            "documents": source.windows.documents,
            "tokens": source.windows.tokens,
        }
        for source in sources
    }


def licences(sources: Sequence[Source]) -> dict[str, str | None]:
    """The licence that each source's sidecars state."""
    stated: dict[str, str | None] = {}
    for source in sources:
        found = {file.sidecar.licence for file in source.files if file.sidecar and file.sidecar.licence}
        stated[source.name] = ", ".join(sorted(found)) or None
    return stated


def describe(rows: Sequence[PlannedSource]) -> list[dict[str, Any]]:
    """The plan as plain values, for JSON."""
    return [dict(vars(replace(row))) for row in rows]
