"""A larger vocabulary, from a corpus to a folder: count, learn, merge, write, prove, measure, report."""

import errno
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from llm_recipes.config import ExtendVocabConfig
from llm_recipes.data.tokenizer import fingerprint, open_tokenizer
from llm_recipes.errors import UserError
from llm_recipes.folders import make_folder, remove_folders
from llm_recipes.telemetry.meter import say
from llm_recipes.vocab import fresh, proofs, report, spm, words
from llm_recipes.vocab.base import Base, open_base, write
from llm_recipes.vocab.embeddings import Summary, extend_model
from llm_recipes.vocab.learning import as_read, candidates, characters_to_add, frequencies, old_ids
from llm_recipes.vocab.measure import Findings, findings, held_out_texts
from llm_recipes.vocab.merging import merged_json, reopened
from llm_recipes.vocab.pieces import Added, Pieces
from llm_recipes.vocab.rows import NewRows
from llm_recipes.vocab.scripts import Scripts
from llm_recipes.vocab.tables import refuse_disagreement, vocabulary_tables

LEARNED_BEYOND = 1.5
"""So many times the pieces wanted are learned, so that the curve shows what more of them would bring."""


def extend(config: ExtendVocabConfig) -> Findings | None:
    """Write the folder that a configuration describes, and print its report.

    Raises:
        UserError: anything that is wrong with the base, the corpus or the output. Nothing is left behind.
    """
    console = Console(stderr=True)
    output = Path(config.output)
    if os.path.lexists(output):
        raise UserError(f"output={output}: exists; name a new folder, or remove this one")
    scripts = Scripts(config.scripts)
    made: list[Path] = []
    try:
        made += make_folder(output.absolute().parent)
        with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=f".{output.name}.") as beside:
            target = Path(beside) / "folder"
            target.mkdir()
            found = None
            if config.new:
                fresh.make(config, target, console)
            else:
                found = _extend(config, scripts, target, console)
            target.rename(output)
    except BaseException as error:
        remove_folders(made)
        if isinstance(error, OSError) and _of_the_output(error, output):
            raise UserError(f"output={output}: cannot be written ({error.strerror or error})") from error
        raise
    print(report.table(found, output) if found else f"a new tokenizer of {config.vocab_size:,} tokens: {output}")
    return found


def _of_the_output(error: OSError, output: Path) -> bool:
    """Whether a path, or the disk, of the output was refused: writing to an open file names no file."""
    if error.filename is None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return Path(str(error.filename)).is_relative_to(output.absolute().parent)


def _extend(config: ExtendVocabConfig, scripts: Scripts, target: Path, console: Console) -> Findings:
    key, path = ("model", config.model) if config.model else ("tokenizer", config.tokenizer)
    assert path is not None  # checks.check saw to it
    base = open_base(path, key, config.trust_remote_code)
    if config.vocab_size <= base.first:
        raise UserError(
            f"vocab_size={config.vocab_size}: {path} has {base.first} tokens already; ask for more than these"
        )
    old_rows = 0
    if config.model:
        assert base.folder is not None
        old_rows = vocabulary_tables(base.folder, config.trust_remote_code).rows
        refuse_disagreement(old_rows, base.first, path)
    texts = held_out_texts(config)
    inputs = words.open_texts(config.corpus, config, "corpus")
    counted = words.count(inputs, scripts, config, hold_out=not texts, console=console)
    if not texts:
        texts = {"corpus": counted.held_out}
        if not any(counted.held_out):
            raise UserError(
                f"held_out: one in {words.HELD_OUT_EACH} documents of the corpus is held out, {counted.documents} are "
                "too few; name texts to measure on (held_out.ja=ja.jsonl)"
            )

    learned, pieces = _learn(config, base, counted, scripts, console)
    added = learned[: config.vocab_size - base.first]
    _write_tokenizer(config, base, added, target)
    if config.model:
        rows = -(-max(config.vocab_size, old_rows) // config.multiple_of) * config.multiple_of
        summary = _write_model(config, base, added, counted.counts, rows, target, console)
    merged = open_tokenizer(str(target), config.trust_remote_code)
    say(console, proofs.prove(base, merged, pieces, added, texts, target))
    found = findings(base, merged, pieces, added, learned, texts)
    if config.model:
        found.tables, found.memory_added = [asdict(each) for each in summary.tables], summary.memory_added
    report.write(found, target, [pieces.shown(each.piece) for each in added])
    return found


def _learn(
    config: ExtendVocabConfig, base: Base, counted: words.Words, scripts: Scripts, console: Console
) -> tuple[Sequence[Added], Pieces]:
    """The new pieces, the best first: those wanted, and some beyond them."""
    pieces = Pieces(base.state, base.kind, scripts)
    wanted = config.vocab_size - base.first
    total = sum(counted.counts.values())
    say(console, f"learning {wanted:,} pieces from {len(counted.counts):,} words that stand {total:,} times")
    counts = as_read(counted.counts, base.state, scripts)
    for character in characters_to_add(counts, pieces, config.character_coverage):
        pieces.add(character)
    goal = int(wanted * LEARNED_BEYOND) + 1
    found, asked, tried = list[str](), goal, 0
    while len(pieces.added) < (wanted if tried else goal) and len(found) >= tried:
        # The best `asked` of them, each time twice as many: what is too long, or of other scripts too, does not count.
        found = candidates(counts, base.state, pieces, asked)
        for piece in found[tried:]:
            if pieces.characters(piece) <= config.max_piece_length:
                pieces.add(piece)
        tried, asked = asked, 2 * asked
    if len(pieces.added) < wanted:
        raise UserError(
            f"vocab_size={config.vocab_size}: the corpus gives {len(pieces.added)} new pieces, of {wanted}; give more "
            f"text, or vocab_size={base.first + len(pieces.added)} at most"
        )
    return pieces.added, pieces


def _write_tokenizer(config: ExtendVocabConfig, base: Base, added: Sequence[Added], target: Path) -> None:
    model_file = None
    if base.proto is not None:
        joined = [piece.piece for piece in base.proto.pieces if piece.type == spm.NORMAL]
        again = reopened(joined, added, Pieces(base.state, base.kind, Scripts(config.scripts)))
        if again is not None:
            raise UserError(
                f"{base.where}: its SentencePiece model has a piece {again!r} that its other pieces do not make, and "
                "new ones would; take the model file out of the folder, and only tokenizer.json will be extended"
            )
        model_file = spm.merged(base.proto, added, base.first, base.between)
    state = merged_json(base.state, base.kind, added, base.first)
    write(base, state, model_file, target, whole_model=config.model is not None)


def _write_model(
    config: ExtendVocabConfig,
    base: Base,
    added: Sequence[Added],
    counts: Mapping[str, int],
    rows: int,
    target: Path,
    console: Console,
) -> Summary:
    assert base.folder is not None
    parts = old_ids(base.state, Scripts(config.scripts), base.kind, [each.piece for each in added])
    weights = None
    if config.rows == "weighted":
        often = frequencies(counts, base.state)
        # One more for each: no piece is without a weight.
        raw = [[often[number] + 1 for number in some] for some in parts]
        weights = [[each / sum(some) for each in some] for some in raw]
    new = NewRows(base.first, parts, weights, rows, config.rows, config.seed)
    extension = {
        "first_new_row": base.first,
        "tokens": base.first + len(added),
        "tokenizer_before": fingerprint(base.tokenizer),
        "scripts": list(config.scripts),
        "rows": config.rows,
    }
    say(console, f"writing the model with {rows:,} rows in each table of its vocabulary")
    return extend_model(base.folder, target, new, extension, config.trust_remote_code)
