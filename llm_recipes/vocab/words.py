"""The words of a corpus and how often they stand there, in bounded memory whatever the corpus's size."""

import random
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from llm_recipes.config import ExtendVocabConfig, TokenizeConfig
from llm_recipes.data.reading import Input, open_inputs, readable_blocks
from llm_recipes.data.rows import NOT_UTF8, Block, Problem, rows
from llm_recipes.data.workers import in_order, worthwhile
from llm_recipes.errors import UserError
from llm_recipes.telemetry.meter import Meter
from llm_recipes.vocab.scripts import Scripts

MOST_WORDS = 2_000_000
"""Different words that are counted at once: about 400 MB."""
HELD_OUT_EACH = 50
"""Of the corpus one document in so many is held out, where nothing else is named for it."""
HELD_OUT_CHARACTERS = 500_000


@dataclass
class Words:
    """What a corpus is made of."""

    counts: dict[str, int] = field(default_factory=dict)
    """How often each word stands there, or is reckoned to (see `thin`)."""
    documents: int = 0
    bytes: int = 0
    """UTF-8 bytes of all documents."""
    held_out: list[str] = field(default_factory=list)
    """Documents that were not counted."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""


def open_texts(paths: Any, config: ExtendVocabConfig, key: str) -> list[Input]:
    """The files or datasets that a key names."""
    found = TokenizeConfig(
        input=paths, output="", tokenizer="", format=config.format, config=config.config, split=config.split,
        text_key=config.text_key, messages_key=config.messages_key,
    )  # fmt: skip
    return open_inputs(found, key)


def count(inputs: list[Input], scripts: Scripts, config: ExtendVocabConfig, hold_out: bool, console: Console) -> Words:
    """Read a corpus and count its words in the scripts.

    Args:
        hold_out: keep some documents apart, to measure on.

    Raises:
        UserError: a row is broken and `on_error` is `stop`, or there is no word.
    """
    result = Words()
    limit, threshold = MOST_WORDS, 1
    dice = random.Random(config.seed)
    room = HELD_OUT_CHARACTERS
    total = sum(each.size for each in inputs)
    counter = _Counter(scripts.names, config.nfkc, config.words, config.text_key, config.messages_key,
                       config.on_error == "stop", hold_out)  # fmt: skip
    blocks = readable_blocks(inputs, config.on_error == "stop", result.skipped)
    workers = config.workers or worthwhile(total)
    found = in_order(blocks, _counting, counter, workers)
    try:
        with Meter("reading", total, console) as meter, closing(found):
            for part, done in found:
                result.documents += part.documents
                result.bytes += part.bytes
                result.skipped.update(part.skipped)
                _add(result.counts, part.counts)
                for text in part.held_out:
                    if room > 0:
                        result.held_out.append(text)
                        room -= len(text)
                    else:
                        _add(result.counts, counter.words(text))
                while len(result.counts) > limit:
                    threshold *= 2
                    result.counts = thin(result.counts, threshold, dice)
                meter.show(done, f"{result.documents:,} documents, {len(result.counts):,} words")
    except BrokenProcessPool as error:
        raise UserError(f"a worker process died (for lack of memory, perhaps): try fewer than {workers=}") from error
    if not result.counts:
        said = f", and {result.skipped.total()} rows were left out" if result.skipped else ""
        raise UserError(
            f"corpus: no character of the scripts {', '.join(scripts.names)} in its {result.documents} documents{said};"
            " is it the right text, and the right `scripts`?"
        )
    return result


def is_held_out(text: str) -> bool:
    """By a checksum: a copy of the document is held out too, and cutting the corpus into files changes nothing."""
    return zlib.crc32(text.encode()) % HELD_OUT_EACH == 0


def thin(counts: Mapping[str, int], threshold: int, dice: random.Random) -> dict[str, int]:
    """Fewer words that stand for all: what counts less than the threshold is kept with a probability of count over
    threshold, and then counts as the threshold. Every sum of counts is expected to be what it was (Duffield, Lund and
    Thorup, "Learn more, sample less", 2005)."""
    return {
        word: max(count, threshold)
        for word, count in counts.items()
        if count >= threshold or dice.random() * threshold < count
    }


def _add(counts: dict[str, int], more: Mapping[str, int]) -> None:
    for word, number in more.items():
        counts[word] = counts.get(word, 0) + number


def texts_of(block: Block, text_key: str, messages_key: str) -> Iterator[tuple[int, str | Problem]]:
    """Each row's number and text; of a conversation, what is said in it."""
    for number, value in rows(block, text_key, messages_key):
        if isinstance(value, list):
            said = (message.get("content") for message in value)
            value = "\n".join(each for each in said if isinstance(each, str))
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                value = Problem(NOT_UTF8, "half of a surrogate pair, which is no character")
        yield number, value


def all_texts(paths: Any, config: ExtendVocabConfig, key: str) -> Iterator[str]:
    """Every text that a key names, in order.

    Raises:
        UserError: one is broken, and `on_error` is `stop`.
    """
    stop = config.on_error == "stop"
    for block, _ in readable_blocks(open_texts(paths, config, key), stop, Counter()):
        for number, text in texts_of(block, config.text_key, config.messages_key):
            if isinstance(text, str):
                yield text
            elif stop:
                raise UserError(f"{key}: {block.place(number)}: {text.detail}; on_error=skip leaves such rows out")


@dataclass
class _Counter:
    """Counts the words of blocks; one in each worker."""

    scripts: tuple[str, ...]
    nfkc: bool
    analyser: str | None
    text_key: str
    messages_key: str
    stop: bool
    hold_out: bool

    def ready(self) -> None:
        self._scripts = Scripts(self.scripts)
        self._tagger = open_analyser() if self.analyser else None

    def words(self, text: str) -> Counter[str]:
        if not hasattr(self, "_scripts"):
            self.ready()
        if self.nfkc:
            text = unicodedata.normalize("NFKC", text)
        if self._tagger is None:
            return Counter(self._scripts.words(text))
        found: Counter[str] = Counter()
        for run in self._scripts.words(text):
            # MeCab takes a line at a time; a run has no white space in it.
            found.update(part for word in self._tagger.parse(run).split() for part in self._scripts.words(word))
        return found

    def block(self, block: Block) -> Words:
        result = Words()
        counts: Counter[str] = Counter()
        for number, text in texts_of(block, self.text_key, self.messages_key):
            if isinstance(text, Problem):
                if self.stop:
                    raise UserError(f"{block.place(number)}: {text.detail}; on_error=skip leaves such rows out")
                result.skipped[text.reason] += 1
                continue
            result.documents += 1
            result.bytes += len(text.encode())
            if self.hold_out and is_held_out(text):
                result.held_out.append(text)
            else:
                counts.update(self.words(text))
        result.counts = counts
        return result


def open_analyser() -> Any:
    """MeCab with the UniDic that comes as a package, giving words with spaces between them.

    Raises:
        UserError: it is not installed.
    """
    try:
        import fugashi
        import unidic_lite
    except ImportError as error:
        raise UserError(f"words=fugashi: {error.name} is not installed; pip install 'llm_recipes[japanese]'") from error
    return fugashi.GenericTagger(f"-Owakati -d {unidic_lite.DICDIR} -r {unidic_lite.DICDIR}/dicrc")


def _counting(counter: _Counter) -> Callable[[Block], Words]:
    """A worker's work."""
    counter.ready()
    return counter.block
