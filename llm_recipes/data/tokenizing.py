"""Text to a token file: reading here, encoding on every core, writing here, in the order of the input.

The parent process cuts the inputs into blocks and writes what comes back; it never parses a row. A few blocks
per worker are under way at any time, so memory does not grow with the input. See `encoding` for what a
document's ids are, and `reading` for what a row is.
"""

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from llm_recipes.config import TokenizeConfig
from llm_recipes.data.backends import Disagreement, prepared_json
from llm_recipes.data.encoding import Encoded, Encoder, Recipe
from llm_recipes.data.reading import Input, all_blocks, open_inputs, readable_blocks
from llm_recipes.data.rows import Block
from llm_recipes.data.sidecar import Sidecar
from llm_recipes.data.token_file import TokenFileWriter, smallest_dtype
from llm_recipes.data.tokenizer import bos_of, eod_of, fingerprint, open_tokenizer, vocabulary_size
from llm_recipes.data.workers import in_order, worthwhile
from llm_recipes.errors import UserError
from llm_recipes.telemetry.meter import Meter, say

SAMPLED_INPUTS = 8
SAMPLE_CHARACTERS = 200_000


@dataclass
class Summary:
    """What came of tokenizing."""

    output: str
    documents: int
    tokens: int
    bytes: int
    """UTF-8 bytes of the raw text."""
    seconds: float
    """From the first block to the last, without opening tokenizer and inputs."""
    backend: str
    workers: int
    skipped: dict[str, int]
    """Rows left out, by reason."""

    def __str__(self) -> str:
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items())
        rate = self.bytes / 1e6 / max(self.seconds, 1e-9)
        return "\n".join(
            f"{name:<16} {value}"
            for name, value in (
                ("documents", f"{self.documents:,}"),
                ("tokens", f"{self.tokens:,}"),
                ("UTF-8 bytes", f"{self.bytes:,}"),
                ("bytes per token", f"{self.bytes / self.tokens:.2f}"),
                ("MB/s", f"{rate:,.1f} ({self.seconds:.1f} s)"),
                ("backend", f"{self.backend}, {self.workers} process{'es' if self.workers > 1 else ''}"),
                ("rows left out", left_out or "none"),
                ("token file", f"{self.output}.bin, .idx, .bytes, .json"),
            )
        )


def tokenize(config: TokenizeConfig, console: Console | None = None) -> Summary:
    """Write the token file `config.output` from the rows of `config.input`.

    Args:
        console: where progress and notices go; standard error when None.

    Raises:
        UserError: an input is missing, empty or broken; the output exists or cannot be written; the tokenizer
            does not open; a worker process died. Nothing is left behind.
    """
    console = console or Console(stderr=True)
    if config.workers is not None and config.workers < 1:
        raise UserError(f"workers={config.workers}: must be at least 1")
    _refuse_output(config)
    inputs = open_inputs(config)
    tokenizer = open_tokenizer(config.tokenizer, config.trust_remote_code)
    recipe = make_recipe(tokenizer, config)
    recipe = _choose_backend(recipe, inputs, config, console)
    try:
        return _run(inputs, recipe, tokenizer, config, console)
    except Disagreement as error:
        if config.backend == "fastokens":
            raise UserError(f"backend=fastokens: {error}; backend=auto would fall back to tokenizers") from error
        say(console, f"{error}: starting again with tokenizers")
    return _run(inputs, replace(recipe, backend="tokenizers"), tokenizer, config, console)


def make_recipe(tokenizer: Any, config: TokenizeConfig) -> Recipe:
    """What the workers need to know of a transformers tokenizer and the configuration."""
    bos, eod = bos_of(tokenizer, config.bos), eod_of(tokenizer, config.eod)
    tokenizer_json, control = prepared_json(tokenizer.backend_tokenizer.to_str(), bos, eod)
    template = tokenizer.chat_template
    return Recipe(
        tokenizer_json=tokenizer_json,
        eod=eod,
        bos=bos,
        eod_text=str(tokenizer.convert_ids_to_tokens(eod)),
        bos_text=tokenizer.bos_token,
        control_tokens=control,
        dtype=smallest_dtype(vocabulary_size(tokenizer)).name,
        backend="tokenizers" if config.backend == "tokenizers" else "fastokens",
        text_key=config.text_key,
        messages_key=config.messages_key,
        stop_on_error=config.on_error == "stop",
        chat_template=template.get("default") if isinstance(template, dict) else template,
        special_tokens={name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    )


def _refuse_output(config: TokenizeConfig) -> None:
    """An existing token file is not written over by accident."""
    prefix = config.output
    for ending in (".bin", ".idx", ".jsonl"):
        if prefix.endswith(ending):
            raise UserError(f"output={prefix}: the token file's name without an ending, so {prefix[: -len(ending)]}")
    if prefix.endswith("/") or Path(prefix).is_dir():
        raise UserError(f"output={prefix}: a folder; name the token file in it, for example {prefix.rstrip('/')}/ja")
    # A kill while the files were getting their names leaves some, but never the index.
    interrupted = not Path(f"{prefix}.idx").exists() and Path(f"{prefix}.idx.partial").exists()
    if config.overwrite or interrupted:
        return
    for ending in ("idx", "bin", "json", "bytes"):
        if Path(f"{prefix}.{ending}").exists():
            raise UserError(f"{prefix}.{ending} exists already; overwrite=true replaces it")


def _choose_backend(recipe: Recipe, inputs: list[Input], config: TokenizeConfig, console: Console) -> Recipe:
    """Keep `fastokens` only if it gives the ids of `tokenizers` on the first rows of some inputs, and on probes."""
    if recipe.backend == "tokenizers":
        return recipe
    try:
        encoder = Encoder(recipe)
        encoder.compare(encoder.probes(), plain=True)
        step = max(1, math.ceil(len(inputs) / SAMPLED_INPUTS))
        for source in inputs[::step]:
            first = next((block for block, _ in all_blocks([source])), None)
            if isinstance(first, Block):
                _compare_start(encoder, first)
    except Disagreement as error:
        if config.backend == "fastokens":
            raise UserError(f"backend=fastokens: {error}; backend=auto would fall back to tokenizers") from error
        say(console, f"{error}: using tokenizers")
        return replace(recipe, backend="tokenizers")
    return recipe


def _compare_start(encoder: Encoder, block: Block) -> None:
    """Compare both libraries on the first rows of a block."""
    documents, _ = encoder.documents(block)
    left = SAMPLE_CHARACTERS // SAMPLED_INPUTS
    sample: dict[bool, list[str]] = {True: [], False: []}
    for text, plain, _, _ in documents:
        sample[plain].append(text[:left])
        left -= len(text)
        if left <= 0:
            break
    for plain, texts in sample.items():
        encoder.compare([*texts, *encoder.probes()] if texts else [], plain)


def _run(inputs: list[Input], recipe: Recipe, tokenizer: Any, config: TokenizeConfig, console: Console) -> Summary:
    """Tokenize everything with one backend; on any exception nothing is left behind."""
    total = sum(source.size for source in inputs)
    workers = config.workers or worthwhile(total)
    skipped: Counter[str] = Counter()
    referred: Counter[str] = Counter()
    with _writing(config.output):
        writer = TokenFileWriter(config.output, np.dtype(recipe.dtype))
    try:
        results = _encoded(inputs, recipe, workers, skipped)
        with Meter("tokenizing", total, console) as meter, closing(results):
            for encoded, done in results:
                skipped.update(encoded.skipped)
                referred.update(encoded.referred)
                with _writing(config.output):
                    writer.append(encoded.tokens, encoded.lengths, encoded.text_bytes)
                meter.show(done, f"{writer.documents:,} documents, {writer.tokens:,} tokens", writer.bytes)
        if writer.documents == 0:
            reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no rows"
            raise UserError(f"{config.output}: no document is left of the input ({reasons})")
        sidecar = _sidecar(inputs, recipe, writer, tokenizer, config, skipped)
        with _writing(config.output):
            writer.close(sidecar)
    except BaseException:
        writer.abort()
        raise
    for reason, count in referred.items():
        say(console, f"fastokens refused {count:,} texts, encoded by tokenizers in its place: {reason}")
    return Summary(
        output=config.output,
        documents=writer.documents,
        tokens=writer.tokens,
        bytes=writer.bytes,
        seconds=meter.seconds,
        backend=recipe.backend,
        workers=workers,
        skipped=dict(skipped),
    )


@contextmanager
def _writing(output: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from error


def _sidecar(
    inputs: list[Input],
    recipe: Recipe,
    writer: TokenFileWriter,
    tokenizer: Any,
    config: TokenizeConfig,
    skipped: Counter[str],
) -> Sidecar:
    return Sidecar(
        tokenizer=fingerprint(tokenizer),
        tokenizer_name=config.tokenizer,
        vocab_size=vocabulary_size(tokenizer),
        largest_token_id=writer.largest_token_id,
        eod_token_id=recipe.eod,
        bos_token_id=recipe.bos,
        documents=writer.documents,
        tokens=writer.tokens,
        bytes=writer.bytes,
        licence=config.licence,
        language=config.language,
        sources=[source.source() for source in inputs],
        skipped_rows=skipped.total(),
    )


def _encoded(
    inputs: list[Input], recipe: Recipe, workers: int, skipped: Counter[str]
) -> Generator[tuple[Encoded, int], None, None]:
    """Every block's documents in the order of the input, with the bytes of input they end at."""

    blocks = readable_blocks(inputs, recipe.stop_on_error, skipped)
    try:
        yield from in_order(blocks, encode_blocks, recipe, workers)
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process died (for lack of memory, perhaps): try fewer than workers={workers}, "
            "or backend=tokenizers"
        ) from error


def encode_blocks(recipe: Recipe) -> Callable[[Block], Encoded]:
    """A worker's work."""
    return Encoder(recipe).encode_block
