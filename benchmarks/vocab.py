"""What a larger vocabulary costs to make, and how good it is beside the usual way.

    python benchmarks/vocab.py [text=FILES] [held_out=FILE] [english=FILES] [sizes=100,1000] [pieces=10880] [rounds=15]
        [peer=true]

Without `text` it takes what `make quickstart` prepared. The base is Mistral-7B's own tokenizer (32,000 pieces, from the
package mistral-common). Four tables:

learning    the words of `sizes` megabytes (the paragraphs of the text, drawn again and again), and the pieces out of
            them: seconds and the peak memory of the process, each in a process of its own. Beside it the usual way:
            `sentencepiece` trains a model of its own on the first size.
compression tokens of the held-out text with so many pieces more: ours, which are learned from where the old tokenizer
            stops, and the usual way's, put below the old pieces in their order.
merging     seconds for the pieces into both forms of the tokenizer, and for all that is proved of them.
loading     `AutoTokenizer.from_pretrained` of the result, beside one of its size that was trained as one; alternating.
"""

import gc
import glob
import json
import multiprocessing
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table

from llm_recipes.config import ExtendVocabConfig
from llm_recipes.vocab import base, fresh, learning, merging, proofs, spm, words
from llm_recipes.vocab.pieces import Added, Pieces
from llm_recipes.vocab.scripts import Scripts

DEFAULTS = {
    "text": "outputs/quickstart/text/ja.jsonl", "held_out": "outputs/quickstart/text/held_out_ja.jsonl",
    "english": "outputs/quickstart/text/en.jsonl", "sizes": "100,1000", "pieces": "10880", "rounds": "15",
    "peer": "true",
}  # fmt: skip
CONFIG = ExtendVocabConfig(corpus="", output="", vocab_size=1)
console = Console(highlight=False, width=130)


def read_texts(pattern: str) -> list[str]:
    paths = sorted(path for each in pattern.split(",") for path in glob.glob(each))
    if not paths:
        sys.exit(f"no file matches {pattern}: run make quickstart first, or give text=FILES")
    return [json.loads(line)["text"] for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_corpus(texts: list[str], path: Path, size: int) -> None:
    """Documents of paragraphs drawn at random, up to `size` bytes."""
    paragraphs = [each for text in texts for each in text.split("\n") if each.strip()]
    draw, written = random.Random(0), 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            text = "\n".join(draw.choices(paragraphs, k=40))
            written += len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def mistral() -> base.Base:
    import mistral_common

    return base.open_base(str(Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"), "tokenizer", False)


def apart(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float, float]:
    """What a function returns in a process of its own, its seconds, and that process's peak memory in MB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (function, arguments))


def _measured(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, float, float]:
    started = time.monotonic()
    result = function(*arguments)
    return result, time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def count_words(path: str) -> dict[str, int]:
    inputs = words.open_texts(path, CONFIG, "text")
    CONFIG.workers = 1  # in this process, whose memory is measured
    return words.count(inputs, Scripts(CONFIG.scripts), CONFIG, False, Console(file=open(os.devnull, "w"))).counts


def learn(path: str, wanted: int) -> tuple[list[Added], float]:
    """The pieces, and how many seconds of the time went into reading and counting."""
    started = time.monotonic()
    counts = count_words(path)
    counted = time.monotonic() - started
    old = mistral()
    pieces = Pieces(old.state, old.kind, Scripts(CONFIG.scripts))
    for character in learning.characters_to_add(counts, pieces, CONFIG.character_coverage):
        pieces.add(character)
    for piece in learning.candidates(counts, old.state, pieces, int(wanted * 1.5)):
        if pieces.characters(piece) <= CONFIG.max_piece_length:
            pieces.add(piece)
    return pieces.added[:wanted], counted


def learn_usual(path: str, wanted: int) -> list[str]:
    """The usual way: a SentencePiece model of the corpus's own, of which the pieces in the scripts are taken, its first
    ones first, that are not there yet."""
    import io

    import sentencepiece

    scripts, written = Scripts(CONFIG.scripts), io.BytesIO()
    rows = Path(path).read_text(encoding="utf-8").splitlines()
    texts = (line for row in rows for line in json.loads(row)["text"].splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=written, model_type="bpe", vocab_size=wanted * 2,
        character_coverage=CONFIG.character_coverage, byte_fallback=True, normalization_rule_name="identity",
        max_sentencepiece_length=CONFIG.max_piece_length, num_threads=2, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    every = [model.id_to_piece(number) for number in range(model.get_piece_size())]
    known = set(mistral().state["model"]["vocab"])
    # Characters stand last in such a model, and all else needs them.
    found = sorted((each for each in every if scripts.has(each) and "▁" not in each), key=lambda each: len(each) > 1)
    return [each for each in found if each not in known][:wanted]


def tokens_of(old: base.Base, added: list[Added], texts: list[str]) -> int:
    import tokenizers

    state = merging.merged_json(old.state, old.kind, added, old.first)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    return sum(len(each.ids) for each in tokenizer.encode_batch(texts, add_special_tokens=False))


def merge(old: base.Base, added: list[Added], target: Path) -> None:
    target.mkdir()
    model_file = spm.merged(old.proto, added, old.first, old.between)
    base.write(old, merging.merged_json(old.state, old.kind, added, old.first), model_file, target, False)


def loading(folder: Path, corpus: list[str], size: int, rounds: int) -> tuple[float, float]:
    """Median seconds to open the result, and a SentencePiece tokenizer of its size, trained as one; alternating."""
    from transformers import AutoTokenizer

    whole = folder.parent / "whole"
    whole.mkdir()
    write_corpus(corpus, folder.parent / "whole.jsonl", sum(len(text.encode()) for text in corpus))
    config = ExtendVocabConfig(
        corpus=str(folder.parent / "whole.jsonl"), output="", vocab_size=size, new="sentencepiece"
    )
    fresh.make(config, whole, Console(file=open(os.devnull, "w")))  # noqa: SIM115
    AutoTokenizer.from_pretrained(whole).save_pretrained(whole)  # as such tokenizers are given out
    times: dict[Path, list[float]] = {folder: [], whole: []}
    for number in range(rounds):
        for each in (folder, whole) if number % 2 else (whole, folder):
            gc.collect()
            started = time.monotonic()
            AutoTokenizer.from_pretrained(each)
            times[each].append(time.monotonic() - started)
    return statistics.median(times[folder]), statistics.median(times[whole])


def main() -> None:
    options = dict(DEFAULTS)
    for argument in sys.argv[1:]:
        key, equals, value = argument.partition("=")
        if key not in options or not equals:
            sys.exit(f"{argument}: known are {', '.join(f'{each}=' for each in options)}")
        options[key] = value
    texts, held_out = read_texts(options["text"]), read_texts(options["held_out"])
    wanted, sizes = int(options["pieces"]), [int(each) for each in options["sizes"].split(",")]
    old = mistral()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        table = Table(title=f"Learning {wanted:,} pieces", title_justify="left")
        for name in ("", "MB of text", "seconds", "of them reading", "peak memory, MB"):
            table.add_column(name, justify="right" if name else "left")
        added: list[Added] = []
        for size in sizes:
            path = folder / "corpus.jsonl"
            write_corpus(texts, path, size * 1_000_000)
            (added, counted), seconds, memory = apart(learn, str(path), wanted)
            table.add_row("ours, one process", f"{size}", f"{seconds:.1f}", f"{counted:.1f}", f"{memory:,.0f}")
            if size == sizes[0] and options["peer"] == "true":
                usual, seconds, memory = apart(learn_usual, str(path), wanted)
                table.add_row("sentencepiece, two threads", f"{size}", f"{seconds:.1f}", "", f"{memory:,.0f}")
            path.unlink()
        console.print(table)
        if len(added) < wanted:
            sys.exit(f"the text gives {len(added)} pieces, of {wanted}: give more text=, or fewer pieces=")

        table = Table(title="Tokens of the held-out text", title_justify="left")
        for name in ("", "pieces more", "tokens", "fewer"):
            table.add_column(name, justify="right" if name else "left")
        before = tokens_of(old, [], held_out)
        table.add_row("as it was", "0", f"{before:,}", "")
        ways = {"ours": added}
        if options["peer"] == "true":
            ways["sentencepiece's own, merged"] = [Added(piece, None) for piece in usual]
        for name, pieces in ways.items():
            after = tokens_of(old, pieces, held_out)
            table.add_row(name, f"{len(pieces):,}", f"{after:,}", f"{1 - after / before:.1%}")
        console.print(table)

        started = time.monotonic()
        merge(old, added, folder / "merged")
        merging_seconds = time.monotonic() - started
        from transformers import AutoTokenizer

        merged = AutoTokenizer.from_pretrained(folder / "merged")
        started = time.monotonic()
        proofs.prove(old, merged, Pieces(old.state, old.kind, Scripts(CONFIG.scripts)), added, {"held out": held_out},
                     folder / "merged")  # fmt: skip
        console.print(f"merging {len(added):,} pieces, both forms written: {merging_seconds:.1f} s (goal: 60 s); "
                      f"proving it: {time.monotonic() - started:.1f} s")  # fmt: skip
        corpus = texts + read_texts(options["english"])
        ours, theirs = loading(folder / "merged", corpus, old.first + len(added), int(options["rounds"]))
        console.print(f"loading: {ours:.3f} s, {ours / theirs:.2f}x of one of its size ({theirs:.3f} s)")


if __name__ == "__main__":
    main()
