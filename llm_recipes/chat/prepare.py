"""Conversations rendered, encoded and packed, once: a folder that every process opens, and every later run.

The folder's name holds a checksum of all that decides what is in it: the rows themselves, the tokenizer, the template,
the configuration. So there is nothing to go stale. It is written beside and gets its name when it is whole.
"""

import glob
import hashlib
import heapq
import json
import logging
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from llm_recipes.chat import packing
from llm_recipes.chat.encoding import ChatEncoder, Encoded, Recipe
from llm_recipes.chat.packs import ORDER, REPORT, STARTS, TRAINED
from llm_recipes.data.permutation import keys, permutation
from llm_recipes.data.reading import Input, readable_blocks
from llm_recipes.data.rows import Block
from llm_recipes.data.sidecar import Sidecar
from llm_recipes.data.token_file import TokenFile, TokenFileWriter, checksum
from llm_recipes.data.workers import in_order, worthwhile
from llm_recipes.errors import UserError
from llm_recipes.folders import make_folder, remove_folders, write_json
from llm_recipes.telemetry.meter import Meter

log = logging.getLogger(__name__)

FORMAT = 2
LOOKS_EVERY = 0.5
"""Seconds between two looks for a folder that another process prepares."""
GONE_AFTER = 600.0
"""Seconds without a sign of life after which it is taken for dead."""
BEATS_EVERY = 5.0
BARS = 12
"""Of the histogram of lengths: up to 1/12 of the window, 2/12 ..."""
SHOWN = 3
"""Rows that a preview may show."""
JUDGED = 256
"""Conversations that a preview may judge."""
PADDING = 0.01
"""Share of the positions above which packing is worth a word."""


@dataclass
class Report:
    """What became of a source's rows; `prepared.json`."""

    seq_len: int
    shape: str
    rows: int = 0
    conversations: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows that gave nothing, by reason."""
    changed: dict[str, int] = field(default_factory=dict)
    """Conversations of which something was left out, by reason."""
    tokens: int = 0
    trained_tokens: int = 0
    trained_bytes: int = 0
    """UTF-8 bytes of what trains, without control tokens."""
    windows: int = 0
    padding: float = 0.0
    """Share of all positions."""
    lengths: list[int] = field(default_factory=list)
    """Conversations by length, in twelfths of the window."""
    longest: int = 0
    """Tokens."""
    checksums: dict[str, str] = field(default_factory=dict)
    """xxh3-128 of the marks, the order and the starts."""
    end: int | None = None
    """The token that ends most conversations."""
    shown: list[dict[str, Any]] = field(default_factory=list)
    judged: list[dict[str, Any]] = field(default_factory=list)


def key(recipe: Recipe, inputs: Iterable[Input], fingerprint: str, limit: int | None, packed: bool) -> str:
    """16 hexadecimal digits over everything that decides what is prepared. Reads all inputs once."""
    source = asdict(recipe.source)
    for name in ("path", "epochs", "weight", "max_epochs", "limit", "language", "licence"):
        del source[name]
    about = {
        "format": FORMAT,
        "tokenizer": fingerprint,
        "template": asdict(recipe.template) if recipe.template else None,
        "source": source,
        "limit": limit,
        "packing": packed,
        "inputs": [{name: value for name, value in each.source().items() if name != "path"} for each in inputs],
        **{name: getattr(recipe, name) for name in ("shape", "bos", "eod", "seq_len", "train_on", "split", "truncate")},
        "skips": not recipe.stop_on_error,
        "seed": recipe.seed,
        "where": recipe.where,  # by which the order is drawn
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]


def prepared(
    folder: Path, recipe: Recipe, inputs: list[Input], sidecar: Sidecar, limit: int | None, packed: bool, here: bool
) -> Path:
    """The folder, whole: made if it is not there, by this process or another.

    Args:
        sidecar: what is known beforehand of the token file.
        here: whether this process makes it; else it waits for the one that does.

    Raises:
        UserError: a row cannot be used, nothing is left to train on, the disk refuses, or the other process is gone.
    """
    if (folder / REPORT).is_file():
        return folder
    life = folder.with_name(f"{folder.name}.preparing")
    if not here:
        _wait(folder, life)
        return folder
    beside = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.partial")
    made: list[Path] = []
    _remove_what_was_killed(folder)
    try:
        made = make_folder(beside)
        life.touch()
        _write(beside, folder.name, recipe, inputs, sidecar, limit, packed, life)
        try:
            os.rename(beside, folder)
        except OSError as error:
            # Where there is one, another launch was as fast: theirs is the same.
            if folder.is_dir() and not (folder / REPORT).is_file():
                raise UserError(f"{folder}: without its {REPORT}; remove it, and it is made again") from error
            if not folder.is_dir():
                raise
    except OSError as error:
        raise UserError(f"{folder}: conversations cannot be prepared here ({error}); see data.prepared") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        life.unlink(missing_ok=True)
        remove_folders(made)
    return folder


def _remove_what_was_killed(folder: Path) -> None:
    """What processes of this host that are no more have left beside a folder."""
    for left in folder.parent.glob(f"{glob.escape(folder.name)}.{glob.escape(socket.gethostname())}.*.partial"):
        try:
            os.kill(int(left.suffixes[-2][1:]), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (ValueError, OSError):
            continue  # not one of ours, or another user's process


def _wait(folder: Path, life: Path) -> None:
    seen = time.time()
    while not (folder / REPORT).is_file():
        if life.is_file():
            seen = max(seen, life.stat().st_mtime)
        if time.time() - seen > GONE_AFTER:
            raise UserError(
                f"{folder}: not prepared, and the first process has shown no sign of life for {GONE_AFTER:.0f} s; is "
                "run.dir (or data.prepared) a folder that all hosts share?",
                everywhere=False,
            )
        time.sleep(LOOKS_EVERY)


def _write(
    beside: Path, name: str, recipe: Recipe, inputs: list[Input], sidecar: Sidecar, limit: int | None, packed: bool,
    life: Path,
) -> None:  # fmt: skip
    report = Report(recipe.seq_len, recipe.shape)
    left_out: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    ends: Counter[int] = Counter()
    judged: list[tuple[int, dict[str, Any]]] = []
    total = sum(each.size for each in inputs)
    beaten = time.monotonic()
    writer = TokenFileWriter(beside / name, np.dtype(recipe.dtype))
    try:
        with (
            open(beside / TRAINED, "wb") as marks,
            Meter(recipe.where, total, Console(stderr=True)) as meter,
            closing(_encoded(inputs, recipe, worthwhile(total), left_out)) as results,
        ):
            for encoded, done in results:
                writer.append(encoded.tokens, encoded.lengths, encoded.text_bytes)
                marks.write(encoded.trained.tobytes())
                report.rows += encoded.rows
                left_out.update(encoded.left_out)
                changed.update(encoded.changed)
                ends.update(encoded.ends)
                report.shown = (report.shown + encoded.shown)[:SHOWN]
                judged = heapq.nsmallest(JUDGED, judged + encoded.judged, key=lambda each: each[0])
                meter.show(done, f"{writer.documents:,} conversations")
                if time.monotonic() - beaten > BEATS_EVERY:
                    life.touch()
                    beaten = time.monotonic()
        if writer.documents == 0:
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "no rows"
            raise UserError(f"{recipe.where}: nothing is left to train on ({report.rows} rows: {reasons})")
        sidecar.documents, sidecar.tokens, sidecar.bytes = writer.documents, writer.tokens, writer.bytes
        sidecar.largest_token_id, sidecar.skipped_rows = writer.largest_token_id, left_out.total()
        writer.close(sidecar)
    except BaseException:
        writer.abort()
        raise
    report.left_out, report.changed = dict(left_out), {name: count for name, count in changed.items() if count}
    report.end = ends.most_common(1)[0][0] if ends else None
    report.judged = [each for _, each in judged]
    _pack(beside, TokenFile(beside / name), report, recipe, limit, packed)
    write_json(beside / REPORT, asdict(report))


def _pack(folder: Path, file: TokenFile, report: Report, recipe: Recipe, limit: int | None, packed: bool) -> None:
    """Windows of conversations, taken in an order that the seed names, so that a block is a fair part of all."""
    starts = np.append(file.document_starts(0, file.documents), file.tokens)
    lengths = np.diff(starts)
    order = permutation(file.documents, keys(recipe.seed, recipe.where, "order"))
    if limit is not None and limit < len(order):
        report.left_out["past the limit"] = len(order) - limit
        order = order[:limit]
    if packed:
        items, bounds = packing.pack(lengths - 1, order, recipe.seq_len)
    else:
        items, bounds = order.astype(np.int64), np.arange(len(order) + 1, dtype=np.int64)
    np.save(folder / ORDER, items)
    np.save(folder / STARTS, bounds)
    report.checksums = {name: checksum(folder / name) for name in (TRAINED, ORDER, STARTS)}
    marks = np.memmap(folder / TRAINED, np.bool_, "r")
    text_bytes = file.document_bytes()
    assert text_bytes is not None
    # A conversation's first token is no target, marked or not.
    per = np.add.reduceat(marks, starts[:-1], dtype=np.int64) - marks[starts[:-1]]
    own = lengths[order]
    report.conversations, report.windows = len(order), len(bounds) - 1
    report.tokens, report.trained_tokens = int(own.sum()), int(per[order].sum())
    report.trained_bytes = int(text_bytes[order].sum(dtype=np.int64))
    report.padding = 1 - int((own - 1).sum()) / (report.windows * recipe.seq_len)
    report.longest = int(own.max())
    bars = np.minimum((own - 2) * BARS // recipe.seq_len, BARS - 1)
    report.lengths = np.bincount(bars, minlength=BARS).tolist()


def encode_blocks(recipe: Recipe) -> Callable[[Block], Encoded]:
    """A worker's work."""
    return ChatEncoder(recipe).encode_block


def _encoded(inputs: list[Input], recipe: Recipe, workers: int, left_out: Counter[str]) -> Any:
    blocks = readable_blocks(inputs, recipe.stop_on_error, left_out)
    try:
        yield from in_order(blocks, encode_blocks, recipe, workers)
    except BrokenProcessPool as error:
        raise UserError(f"{recipe.where}: a worker process died (for lack of memory, perhaps)") from error
