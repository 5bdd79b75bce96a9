"""Work on every core, its results in the order in which it was given out. Imports no torch."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing.connection import wait
from typing import Any, TypeVar

WAITING_PER_WORKER = 3
BYTES_PER_WORKER = 4 << 20
"""Another process is worth its start from about so much input."""

Item = TypeVar("Item")
Mark = TypeVar("Mark")
Recipe = TypeVar("Recipe")
Result = TypeVar("Result")


def worthwhile(input_bytes: int) -> int:
    """How many processes so much input is worth, up to the cores there are."""
    return min(len(os.sched_getaffinity(0)), 1 + input_bytes // BYTES_PER_WORKER)


def in_order(
    items: Iterator[tuple[Item, Mark]],
    ready: Callable[[Recipe], Callable[[Item], Result]],
    recipe: Recipe,
    workers: int,
) -> Generator[tuple[Result, Mark], None, None]:
    """What the work makes of each item, with the item's mark. A few items per worker are under way at any time, so
    memory does not grow with their number.

    Args:
        ready: gives the work; called with `recipe` once in each worker, and here where it is one.

    Raises:
        BrokenProcessPool: a worker died.
    """
    if workers == 1:
        work = ready(recipe)
        for item, mark in items:
            yield work(item), mark
        return
    # Spawned, not forked: this process has imported torch and has threads.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (ready, recipe))
    waiting: deque[tuple[Future[Result], Mark]] = deque()
    try:
        while True:
            for item, mark in islice(items, workers * WAITING_PER_WORKER - len(waiting)):
                waiting.append((pool.submit(_work_on, item), mark))
            if not waiting:
                return
            future, mark = waiting.popleft()
            yield future.result(), mark
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any] | None = None
"""Of this worker process."""


def _work_on(item: Any) -> Any:
    assert _work is not None
    return _work(item)


def _start_worker(ready: Callable[[Any], Callable[[Any], Any]], recipe: Any) -> None:
    """Make a worker process ready: one thread, and no life of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends the pool
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    for name in ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global _work
    _work = ready(recipe)


def _end_with(sentinel: int) -> None:
    """A killed parent must not leave workers that wait for work for ever."""
    wait([sentinel])
    os._exit(1)
