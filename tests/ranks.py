"""A few processes, started once for the session, that run a function on every rank of a small world.

Starting torchrun costs seconds each time; a call here costs what the function does. The processes are forked from one
that has imported everything, and a world of any size up to `MOST` is made of the first of them, by gloo, and ended
again with each call.
"""

import importlib.util
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MOST = 4
PRELOADED = [
    "llm_recipes.training.run", "llm_recipes.checkpoints.export", "llm_recipes.data.tokenizing", "llm_recipes.command",
    "transformers.models.auto.modeling_auto", "transformers.models.mistral.modeling_mistral",
    "transformers.integrations.mistral.tokenizer", "hydra._internal.hydra", "fastokens",
    "lm_eval.evaluator", "lm_eval.models.huggingface", "ranks",
]  # fmt: skip


class FailedOnRank(AssertionError):
    """What a function raised on a rank, with that rank's traceback."""


def call(file: str, name: str, arguments: tuple[Any, ...]) -> Any:
    """A function of a test file, by the file's path: test files are no importable modules."""
    key = f"on_ranks_{Path(file).stem}"
    module = sys.modules.get(key)
    if module is None:
        spec = importlib.util.spec_from_file_location(key, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        spec.loader.exec_module(module)
    return getattr(module, name)(*arguments)


def receive(calls: Connection) -> Any:
    """The next call; None where there will be none."""
    try:
        return calls.recv()
    except EOFError:
        return None


def serve(number: int, calls: Connection) -> None:
    """One process: join a world, call, answer, leave the world; until told to end."""
    import torch
    import torch.distributed as dist

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these worlds are gloo's, on any machine
    torch.set_num_threads(1)
    while (message := receive(calls)) is not None:
        ranks, store, file, name, arguments = message
        os.environ |= {"RANK": str(number), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(number)}
        os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=ranks)
            dist.barrier()  # a function that talks to nobody would leave while another rank still connects
            answer = (call(file, name, arguments), None)
        except BaseException:
            answer = (None, traceback.format_exc())
        if answer[1] is not None:
            # Others may wait for this rank in a collective: the pool is started anew.
            calls.send(answer)
            os._exit(1)
        if dist.is_initialized():
            dist.destroy_process_group()
        calls.send(answer)


class Ranks:
    """`ranks(2, function, ...)` calls a top-level function of the caller's file on both ranks of a world of two, and
    gives the list of what it returned on each. Arguments and results are pickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._calls = 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._processes: list[tuple[Any, Connection]] = []

    def _start(self) -> None:
        for number in range(MOST):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=serve, args=(number, theirs))
            process.start()
            theirs.close()
            self._processes.append((process, ours))

    def __call__(self, ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if not self._processes:
            self._start()
        self._calls += 1
        store = self._folder / f"store-{self._calls}"
        connections = [connection for _, connection in self._processes[:ranks]]
        for connection in connections:
            connection.send((ranks, store, function.__code__.co_filename, function.__name__, arguments))
        answers = [self._answer(connection) for connection in self._first_failed_first(connections)]
        failures = [trouble for _, trouble in answers if trouble is not None]
        if failures:
            self.stop(kill=True)
            raise FailedOnRank("\n".join(failures))
        return [value for value, _ in answers]

    def _first_failed_first(self, connections: list[Connection]) -> list[Connection]:
        """As they are, once all have answered, or one has failed."""
        from multiprocessing.connection import wait

        waiting, self._ready = list(connections), {}
        while waiting:
            for connection in wait(waiting):
                assert isinstance(connection, Connection)
                try:
                    self._ready[connection] = connection.recv()
                except EOFError:
                    self._ready[connection] = (None, "the process ended")
                waiting.remove(connection)
                if self._ready[connection][1] is not None:
                    return [each for each in connections if each in self._ready]
        return connections

    def _answer(self, connection: Connection) -> tuple[Any, str | None]:
        return self._ready[connection]

    def stop(self, kill: bool = False) -> None:
        """End the processes; the next call starts others."""
        for process, connection in self._processes:
            if kill:
                process.kill()
            else:
                connection.send(None)
        for process, _ in self._processes:
            process.join(timeout=10)
        self._processes = []
