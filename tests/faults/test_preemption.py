"""A scheduler takes its machines back: every rank saves and leaves with 0, and the same command goes on."""

import os
import re
import signal
import time
from collections.abc import Callable

import pytest
from launched import Launch, Place

from llm_recipes.checkpoints import manifest

pytestmark = pytest.mark.slow


def saved(run: Place, launch: Launch, why: str) -> int:
    """The step at which a launch stopped, and said so; nothing is missing and nothing is left over."""
    assert launch.wait() == 0, launch.said()
    said = re.search(
        r"stopped at step (\d+) \((.*)\), saved as (\S+); the same command goes on from there", launch.said()
    )
    assert said is not None, launch.said()
    step = int(said.group(1))
    assert why in said.group(2) and step == run.step() and run.events("stop")[-1]["reason"] == said.group(2)
    folder = run.checkpoints / manifest.folder_name(step)
    assert str(folder) == said.group(3) and manifest.damage(folder) is None
    assert not run.half_written() and not (run.run / "STOP").exists() and not (run.run / "lock.json").exists()
    assert "Traceback" not in launch.said()
    return step


def went_on(run: Place, launch: Launch, step: int) -> None:
    """Past a step of the launch before, with its next sample."""
    run.wait_for_step(step + 3)
    name, size = manifest.folder_name(step), run.config.train.global_batch_size
    assert f"resumed from {run.checkpoints / name}: step {step}, next sample {size * step}" in launch.said()


def test_a_wish_to_stop_is_a_save_and_other_processes_go_on(place: Callable[..., Place]) -> None:
    """The file `STOP` for two ranks; one process goes on, and hears SIGTERM."""
    run = place(train__steps=100_000, checkpoint__every=1000)
    first = run.launch()
    run.wait_for_step(3)
    (run.run / "STOP").touch()
    step = saved(run, first, "STOP is there")
    second = run.launch(ranks=None)
    went_on(run, second, step)
    os.kill(second.ranks()[0], signal.SIGTERM)
    last = saved(run, second, "SIGTERM")
    assert [row["step"] for row in run.steps()] == list(range(1, last + 1))
    assert [row["consumed_samples"] for row in run.steps()] == list(range(4, 4 * last + 4, 4))


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_every_wish_to_stop_on_every_number_of_processes(
    place: Callable[..., Place], report: Callable[[str, str], None]
) -> None:
    run = place(train__steps=100_000, train__global_batch_size=6, checkpoint__every=1000)
    step, told = 0, []
    for ranks, why, signals in (
        (2, "STOP is there", {}),
        (3, "SIGTERM", {1: signal.SIGTERM}),
        (1, "SIGUSR1", {0: signal.SIGUSR1}),
        (2, "SIGTERM", {0: signal.SIGTERM, 1: signal.SIGTERM}),
        (3, "SIGUSR1", {0: signal.SIGUSR1, 1: signal.SIGUSR1, 2: signal.SIGUSR1}),
        (2, "run.max_seconds=30 are nearly over", None),
        (1, "STOP is there", {}),
    ):
        launch = run.launch(*(["run.max_seconds=30"] if signals is None else []), ranks=ranks)
        run.wait_for_step(step + 3)
        if step:
            went_on(run, launch, step)
        if signals == {}:
            (run.run / "STOP").touch()
        pids = launch.all_ranks()
        for rank, number in (signals or {}).items():
            os.kill(pids[rank], number)
        asked = time.monotonic()
        step = saved(run, launch, why)
        took = f"gone {time.monotonic() - asked:.1f} s later"
        if signals is None:
            start, stop = run.events("start")[-1], run.events("stop")[-1]
            seconds = stop["time"] - start["time"] + start["seconds"]
            assert seconds < 30
            took = f"saved {seconds:.1f} s after their start"
        to = f" to {len(signals)} of them" if signals else ""
        told.append(f"| {ranks} | {why.removesuffix(' is there').removesuffix(' are nearly over')}{to} | {took} |")
    assert [row["step"] for row in run.steps()] == list(range(1, step + 1))
    assert [row["consumed_samples"] for row in run.steps()] == list(range(6, 6 * step + 6, 6))
    report(
        "Preemption",
        "One run, launched again and again: every rank exits 0 after a save, and the same command goes on at the next "
        "sample, on another number of processes.\n\n| processes | asked by | |\n|---|---|---|\n" + "\n".join(told),
    )


@pytest.mark.faults
def test_a_second_signal_does_not_wait_for_a_save(place: Callable[..., Place]) -> None:
    run = place(train__steps=100_000, train__global_batch_size=160, checkpoint__every=1000)
    launch = run.launch()
    run.wait_for_step(2)
    pids = launch.all_ranks()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        for pid in pids.values():
            os.kill(pid, number)
    assert launch.wait() == 1
    assert "SIGUSR1 again: leaving at once" in launch.said() and f"exitcode  : {128 + signal.SIGUSR1} " in launch.said()
    assert not list(run.checkpoints.iterdir())


@pytest.mark.faults
def test_a_signal_to_torchrun_and_to_its_ranks_is_one_wish(place: Callable[..., Place]) -> None:
    """As SLURM sends it to every process of a step; torchrun hands its own on to the ranks."""
    run = place(train__steps=100_000, train__global_batch_size=40, checkpoint__every=1000)
    launch = run.launch()
    run.wait_for_step(3)
    for pid in (*launch.all_ranks().values(), launch.process.pid):
        os.kill(pid, signal.SIGTERM)
    assert launch.wait() != 0  # torchrun's, whatever its ranks did
    assert "leaving at once" not in launch.said() and "stopped at step" in launch.said(), launch.said()
    assert [manifest.damage(each) for each in manifest.checkpoints(run.checkpoints)] == [None]


@pytest.mark.faults
def test_a_run_with_workers_leaves_when_it_is_stopped(place: Callable[..., Place]) -> None:
    """Those that prepare batches hear no signals: somebody has to end them."""
    run = place(train__steps=100_000, checkpoint__every=1000, data__workers=2)
    launch = run.launch(ranks=None)
    run.wait_for_step(3)
    os.kill(launch.process.pid, signal.SIGTERM)
    assert launch.wait(30) == 0, launch.said()
