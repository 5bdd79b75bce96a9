"""A verb as its user types it, in a process of its own, forked from one that has imported everything."""

import gc
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from ranks import PRELOADED, call

CLEAN = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def as_a_user(folder: str, verb: str, arguments: list[str], environment: dict[str, str]) -> None:
    """What `python -m llm_recipes.VERB ARGUMENTS` does in a folder, with its output in files beside that."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(folder)
    gc.disable()  # it would touch, and so copy, all the memory that this process shares with the one it was forked from
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ |= CLEAN | environment
    sys.argv = [verb, *arguments]
    runpy.run_module(f"llm_recipes.{verb}", run_name="__main__")


def run(folder: Path, verb: str, *arguments: str, **environment: str) -> tuple[int | None, str, str]:
    """Exit status, standard output and standard error of a verb."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process: Any = context.Process(
        target=call, args=(__file__, "as_a_user", (str(folder), verb, list(arguments), environment))
    )
    process.start()
    process.join(timeout=60)
    if process.is_alive():
        process.kill()
        process.join()
    out, err = (Path(f"{folder}.{name}").read_text(errors="replace") for name in ("out", "err"))
    return process.exitcode, out, err


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size * path.is_file(), path.stat().st_mtime_ns * path.is_file())
        for path in folder.rglob("*")
    }


def assert_one_line(done: tuple[int | None, str, str], said: str) -> None:
    status, out, err = done
    assert status == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err, err
    assert "Traceback" not in out
