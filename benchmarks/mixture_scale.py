"""Opening and seeking a mixture of any size: the claim is under 1 s and under 200 MB, flat from 10^6 to 10^12 tokens.

    python benchmarks/mixture_scale.py [cases='1e6:1e3;1e9:1e3;1e12:1e6;1e12:1e4'] [seq_len=4096] [samples=2000]
        [rounds=3] [peer=true] [folder=]

A case is TOKENS:DOCUMENT_LENGTH or TOKENS:DOCUMENT_LENGTH:FILES (token files of each source). Five sources, in the
shares of `conf/exp/swallow_ms.yaml`, are written as real Megatron files: each index is whole (documents of random
lengths around the mean), each `.bin` is a hole of the right size, so that 10^12 tokens take no disk. Every
measurement is a process of its own, after its imports:

    open    `open_sources` and `mix`, the indexes read from the disk (they are dropped from the page cache first)
    seek    the first sample read at nine tenths of an epoch
    memory  the peak of what is resident over all that, beyond what was there before; private: what of it stays when
            mapped files, which the kernel takes back when it needs the room, are left out
    stream  samples/s of `GlobalBatches` from there on, in this one process; a hole costs no disk, real text does

With a sidecar a file is opened without looking at its documents; without one, all of its index is read once, to
refuse a damaged one. The peer is what a stored shuffle alone would cost: `numpy.random.permutation` of the samples.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

SHARES = {"swallow_corpus": 78.7, "wikipedia_ja": 1.5, "pile_arxiv": 4.5, "refinedweb": 4.5, "algebraic_stack": 10.9}
VOCABULARY = 42880
DEFAULTS = {
    "cases": "1e6:1e3;1e9:1e3;1e12:1e6;1e12:1e4", "seq_len": "4096", "samples": "2000", "rounds": "3",
    "peer": "true", "folder": "", "measure": "",
}  # fmt: skip
CHUNK = 1 << 22


def write_sparse(prefix: Path, tokens: int, mean: int, seed: int) -> int:
    """A token file of about so many tokens: a whole index, a hole for tokens, a sidecar. Returns its documents."""
    from llm_recipes.data.token_file import CODE_OF_DTYPE, HEADER, MAGIC, Sidecar, smallest_dtype

    dtype = smallest_dtype(VOCABULARY)
    documents = max(1, tokens // mean)
    lengths = np.random.default_rng(seed).standard_exponential(documents, np.float32)
    lengths *= mean - 2
    lengths = np.minimum(lengths, np.float32(2**31 - 200)).astype("<i4") + np.int32(2)
    end = 0
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, CODE_OF_DTYPE[dtype], documents, documents + 1))
        lengths.tofile(file)
        for first in range(0, documents, CHUNK):
            sizes = lengths[first : first + CHUNK].astype("<i8") * dtype.itemsize
            ends = end + np.cumsum(sizes)
            (ends - sizes).tofile(file)
            end = int(ends[-1])
        for first in range(0, documents + 1, CHUNK):
            np.arange(first, min(first + CHUNK, documents + 1), dtype="<i8").tofile(file)
        file.flush()
        os.fsync(file.fileno())
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(end)
    sidecar = Sidecar("benchmark", "none", VOCABULARY, 0, 0, None, documents, end // dtype.itemsize, 0)
    Path(f"{prefix}.json").write_text(json.dumps(asdict(sidecar)))
    return documents


def drop_from_cache(folder: Path) -> None:
    for path in folder.glob("*.idx"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory() -> dict[str, int]:
    """Of this process, in bytes: resident now (VmRSS), its peak (VmHWM), and what of it is private (RssAnon)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("Vm", "RssAnon"))}


def measure(folder: Path, seq_len: int, samples: int) -> dict[str, float]:
    """Open, seek and stream what lies in a folder."""
    import torch

    from llm_recipes.config import DataConfig, SourceConfig
    from llm_recipes.data.sources import TokenizerFacts, mix, open_sources
    from llm_recipes.data.stream import GlobalBatches, Samples

    torch.set_num_threads(1)
    config = DataConfig(seq_len=seq_len)
    for name, share in SHARES.items():
        config.sources[name] = SourceConfig(path=str(folder / f"{name}-*"), weight=share)
    facts = TokenizerFacts("benchmark", VOCABULARY, eod=0, bos=None, bos_policy="auto", bos_token=1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, started = memory(), time.perf_counter()
    sources = open_sources(config, facts)
    dataset = Samples(sources, mix(sources, config, [0]), config.mask_documents)
    opened = time.perf_counter()
    far = sum(len(source.windows) for source in sources) * 9 // 10
    dataset.sample(far)
    sought = time.perf_counter()
    after = memory()
    steps = [range(far + first, far + first + 8) for first in range(0, samples, 8)]
    stream = time.perf_counter()
    for _ in GlobalBatches(dataset, steps, 8, 0, 1, VOCABULARY):
        pass
    return {
        "open": opened - started,
        "seek": sought - opened,
        "memory": after["VmHWM"] - before["VmRSS"],
        "private": after["RssAnon"] - before["RssAnon"],
        "stream": len(steps) * 8 / (time.perf_counter() - stream),
        "tokens": sum(source.windows.tokens for source in sources),
        "windows": sum(len(source.windows) for source in sources),
    }


def measure_shuffle(windows: int) -> dict[str, float]:
    """What a stored order of the samples takes."""
    Path("/proc/self/clear_refs").write_text("5")
    before, started = memory(), time.perf_counter()
    order = np.random.default_rng(0).permutation(windows)
    taken = time.perf_counter() - started
    after = memory()
    assert len(order) == windows
    return {"open": taken, "memory": after["VmHWM"] - before["VmRSS"], "private": after["RssAnon"] - before["RssAnon"]}


def in_a_process(*arguments: str) -> dict[str, float]:
    """What this script prints when it is started anew."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def run_case(case: str, options: dict[str, str], folder: Path) -> list[tuple[str, ...]]:
    """The table's rows of one case: with sidecars, without, and the peer."""
    tokens, mean, files = (int(float(part)) for part in f"{case}:1".split(":")[:3])
    documents = 0
    for name, share in SHARES.items():
        part = int(tokens * share / sum(SHARES.values())) // files
        for number in range(files):
            documents += write_sparse(folder / f"{name}-{number:05}", part, mean, number)
    index = sum(path.stat().st_size for path in folder.glob("*.idx"))
    what = f"{tokens:.0e} in {documents:.1e} documents, {len(SHARES) * files} files, index {index / 1e6:,.1f} MB"
    given = [f"{key}={options[key]}" for key in ("seq_len", "samples")]
    rows = []
    for sidecar in (True, False):
        if not sidecar:
            for path in folder.glob("*.json"):
                path.unlink()
        runs = []
        for _ in range(int(options["rounds"])):
            drop_from_cache(folder)
            runs.append(in_a_process(f"measure={folder}", *given))
        found = median(runs)
        rows.append((what if sidecar else "", "with sidecar" if sidecar else "without", *cells(found)))
        print(f"{what}, {rows[-1][1]}: {found}", flush=True)
    if options["peer"] == "true":
        shuffled = in_a_process(f"measure={int(found['windows'])}")
        rows.append(("", f"peer: {found['windows']:.1e} stored", *cells(shuffled)))
    return rows


def cells(found: dict[str, float]) -> list[str]:
    return [
        f"{found['open'] * 1e3:,.1f}",
        f"{found['seek'] * 1e3:,.1f}" if "seek" in found else "-",
        f"{found['memory'] / 1e6:,.1f}",
        f"{found['private'] / 1e6:,.1f}",
        f"{found['stream']:,.0f}" if "stream" in found else "-",
    ]


def main(arguments: list[str]) -> None:
    given = dict(argument.partition("=")[::2] for argument in arguments)
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(DEFAULTS)}")
    options = {**DEFAULTS, **given}
    if target := options["measure"]:
        seq_len, samples = int(options["seq_len"]), int(options["samples"])
        print(json.dumps(measure_shuffle(int(target)) if target.isdigit() else measure(Path(target), seq_len, samples)))
        return

    rows = []
    for case in options["cases"].split(";"):
        with tempfile.TemporaryDirectory(dir=options["folder"] or None) as folder:
            rows += run_case(case, options, Path(folder))
    table = Table(
        title=f"Windows of {options['seq_len']} tokens, 1 process of 1 thread, indexes read from the disk, "
        f"medians of {options['rounds']} processes"
    )
    for column in ("tokens", "", "open, ms", "seek, ms", "memory, MB", "private, MB", "samples/s"):
        table.add_column(column, justify="left" if column in ("tokens", "") else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
