"""Multiple-choice items judged by our engine, beside lm-eval's own model: no slower than it is, is the claim.

    python benchmarks/evaluation.py [model=FOLDER] [items=60] [shots=0,4] [rounds=3] [batch_sizes=1,8,32,auto]
        [dtype=float32] [threads=1]

The items are the library's own (`mini_choice_en`, `mini_choice_ja`, `mini_arithmetic_en`; `items` of each), with so
many examples before each question. Without `model` it is the quickstart's SmolLM2-135M where that has been prepared,
else a model of its shape with random weights.

Both have their own copy of the weights in one process, in the same dtype, on the same threads. In each round all ways
take their turn, in an order that is reversed from round to round; the first round warms up and does not count. A way is
timed from lm-eval's requests (texts) to its answers: tokenizing, batching, forward passes. lm-eval is asked with every
one of `batch_sizes`; its best is the one with the lowest median by the processor time (on a GPU by the clock).

    seconds      by the clock, and of this process's processor time (which other work on the machine disturbs less; on a
                 GPU only the clock counts)
    ratio        median seconds of lm-eval's best / median seconds of ours, by either: above 1 we are faster
    fed          tokens that went through the model, padding included, as a share of lm-eval's (ours only)

Every way must give the same scores, item by item (the greatest likelihood's choice), and the same log-likelihoods to
1e-3 in fp32; else it ends with an error.
"""

import contextlib
import io
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would measure the other work on the machine

import torch
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from rich.table import Table

from llm_recipes.config import ModelConfig, ParallelConfig
from llm_recipes.data.tokenizer import open_tokenizer
from llm_recipes.evaluation import suites, tasks
from llm_recipes.evaluation.language_model import LanguageModel
from llm_recipes.models import causal, loading, topology

DEFAULTS = {
    "model": "", "items": "60", "shots": "0,4", "rounds": "3", "batch_sizes": "1,8,32,auto", "dtype": "float32",
    "threads": "1",
}  # fmt: skip
QUICKSTART = Path("outputs/quickstart/models/smollm2-135m")
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
TASKS = ("choice_en", "choice_ja", "arithmetic_en")
console = Console(highlight=False, width=130)
Answers = list[tuple[float, bool]]


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """lm-eval's bars and lines go nowhere."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def read_options() -> dict[str, str]:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown or len(given) != len(sys.argv) - 1:
        sys.exit(f"unknown option {unknown or sys.argv[1:]}; known: {', '.join(DEFAULTS)}")
    return DEFAULTS | given


def random_model(folder: Path) -> Path:
    """The shape of SmolLM2-135M, and a tokenizer of bytes."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import tiny
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.for_model(
        "llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(shape, dtype=torch.float32).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def requests_of(items: int, shots: int, tokenizer: Any) -> tuple[list[Any], list[int]]:
    """lm-eval's requests for likelihoods, and the number of choices of each item."""
    suite = suites.with_options(suites.load("mini"), shots=shots, items=items)
    opened, missing = tasks.open_tasks(suite, tokenizer)
    assert not missing, missing
    requests: list[Any] = []
    choices = []
    for name in TASKS:
        task = opened[name].task
        with silence():
            task.build_all_requests(samples=opened[name].samples, rank=0, world_size=1)
        by_item: dict[int, int] = {}
        for request in task.instances:
            by_item[request.doc_id] = by_item.get(request.doc_id, 0) + 1
        requests += task.instances
        choices += by_item.values()
    return requests, choices


def picked(answers: Answers, choices: list[int]) -> list[int]:
    """The choice of the greatest likelihood, item by item."""
    found, at = [], 0
    for count in choices:
        likelihoods = [likelihood for likelihood, _ in answers[at : at + count]]
        found.append(likelihoods.index(max(likelihoods)))
        at += count
    return found


def main() -> None:
    options = read_options()
    loading.quiet_libraries()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(int(options["threads"]))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(options["model"] or QUICKSTART)
        if not folder.is_dir():
            folder = random_model(Path(place))
        measure(folder, options)


def measure(folder: Path, options: dict[str, str]) -> None:
    parallel = ParallelConfig(sharding="no_shard", precision=PRECISIONS[options["dtype"]])
    where = topology.start(parallel)
    tokenizer = open_tokenizer(str(folder))
    lm = causal.build(ModelConfig(path=str(folder)), parallel, where, str(folder), False, 0)
    ours = LanguageModel(lm, tokenizer)
    table = Table(title=f"{folder.name}, {options['dtype']}, {options['threads']} threads, {where.device}")
    for column in ("shots", "requests", "way", "seconds", "ratio", "processor", "ratio", "fed"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for shots in map(int, options["shots"].split(",")):
        requests, choices = requests_of(int(options["items"]), shots, tokenizer)
        ways: dict[str, Callable[[], Answers]] = {"ours": lambda asked=requests: ours.loglikelihood(asked)}
        for size in options["batch_sizes"].split(","):
            theirs = HFLM(
                pretrained=str(folder), device=str(where.device), dtype=options["dtype"], batch_size=size,
                softmax_dtype="float32",
            )  # fmt: skip
            ways[f"lm-eval, batch {size}"] = lambda model=theirs, asked=requests: silently(model, asked)
        seconds, answers = run(ways, int(options["rounds"]) + 1)
        counts = 0 if where.device.type == "cuda" else 1
        best = min((name for name in ways if name != "ours"), key=lambda name: seconds[name][counts])
        expected = answers[best]
        largest = max(abs(one - two) for (one, _), (two, _) in zip(answers["ours"], expected, strict=True))
        if picked(answers["ours"], choices) != picked(expected, choices):
            assert options["dtype"] != "float32", "the scores differ"
        assert options["dtype"] != "float32" or largest < 1e-3, f"log-likelihoods differ by {largest}"
        share = f"{fed(ours, requests) / padded(tokenizer, requests):.0%}"
        for name in ways:
            cells = []
            for mine, its in zip(seconds[name], seconds[best], strict=True):
                cells += [f"{mine:.2f}", f"{its / mine:.2f}"]
            table.add_row(str(shots), f"{len(requests):,}", name, *cells, share if name == "ours" else "")
        console.print(f"{shots} shots: log-likelihoods of ours and of {best} differ by {largest:.1e} at most")
    console.print(table)


def silently(model: HFLM, requests: list[Any]) -> Answers:
    with silence():
        return model.loglikelihood(requests, disable_tqdm=True)


def run(
    ways: dict[str, Callable[[], Answers]], rounds: int
) -> tuple[dict[str, tuple[float, float]], dict[str, Answers]]:
    """Median seconds of each way, by the clock and of the processor; and its answers."""
    clock: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    answers = {}
    for number in range(rounds):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            started = time.perf_counter(), time.process_time()
            answers[name] = ways[name]()
            clock[name].append(time.perf_counter() - started[0])
            processor[name].append(time.process_time() - started[1])
    return {
        name: (statistics.median(clock[name][1:]), statistics.median(processor[name][1:])) for name in ways
    }, answers


def fed(model: LanguageModel, requests: list[Any]) -> int:
    """Tokens that go through our model, padding included."""
    counted = 0
    logits = model._logits

    def counting(batch: Any) -> torch.Tensor:
        nonlocal counted
        counted += batch.input_ids.numel()
        return logits(batch)

    model._logits = counting  # type: ignore[method-assign]
    try:
        model.loglikelihood(requests)
    finally:
        model._logits = logits  # type: ignore[method-assign]
    return counted


def padded(tokenizer: Any, requests: list[Any]) -> int:
    """Tokens that go through lm-eval's at batch size 1: each request but its last token, equal ones once."""
    rows = {tuple(tokenizer("".join(each.args))["input_ids"][:-1]) for each in requests}
    return sum(map(len, rows))


if __name__ == "__main__":
    main()
