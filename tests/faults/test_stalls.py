"""A process that hangs is named, and nobody waits for it until the job's wall clock."""

import os
import signal
import time
from collections.abc import Callable

import pytest
from launched import Place, wait_for

from llm_recipes.training.watch import LOOKS_EVERY, STALLED

pytestmark = pytest.mark.slow
STALL_SECONDS = 4


def stalled(run: Place, victim: int, step: int) -> float:
    """Stop a rank that has got so far; the seconds until it is named."""
    before = len(run.events("stall"))
    launch = run.launches[-1]
    run.wait_for_step(step)
    pid = launch.all_ranks()[victim]
    os.kill(pid, signal.SIGSTOP)
    stopped = time.time()
    wait_for(lambda: len(run.events("stall")) > before, f"rank {victim} is named")
    [row] = run.events("stall")[before:]
    assert f"no progress for {STALL_SECONDS} s: rank {victim} does not answer" in row["message"]
    assert f"error: {row['message']}" in launch.said()
    return float(row["time"]) - stopped


def test_a_stopped_rank_is_named_in_time_and_the_run_leaves(place: Callable[..., Place]) -> None:
    run = place(train__steps=100_000, run__stall_seconds=STALL_SECONDS)
    # torchrun waits half a minute for a process that cannot hear its SIGTERM, if nobody tells it otherwise.
    launch = run.launch(TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1")
    assert stalled(run, victim=1, step=5) < STALL_SECONDS + LOOKS_EVERY + 1
    assert launch.wait() == 1 and f"exitcode  : {STALLED} " in launch.said()
    assert [path.name for path in (run.run / "stalls").glob("*/rank-*.txt")] == ["rank-00000.txt"]


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_torchrun_goes_on_after_each_stall(
    place: Callable[..., Place], straight: Callable[..., Place], report: Callable[[str, str], None]
) -> None:
    run = place(train__steps=100_000, run__stall_seconds=STALL_SECONDS)
    launch = run.launch(restarts=3, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1")
    seconds = []
    for number, victim in enumerate((1, 0, 1)):
        run.wait_for_event("first_step", number + 1)
        seconds.append(stalled(run, victim, run.step() + 5 + number))
    run.wait_for_event("first_step", 4)
    (run.run / "STOP").touch()
    assert launch.wait() == 0, launch.said()
    assert run.curve() == straight(run, stop=run.step()).curve()
    assert max(seconds) < STALL_SECONDS + LOOKS_EVERY + 1
    report(
        "Hangs",
        f"SIGSTOP of rank 1, 0 and 1 with `run.stall_seconds={STALL_SECONDS}`: named after "
        f"{', '.join(f'{each:.1f} s' for each in seconds)}; every time torchrun started the ranks again "
        "(`TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1`: by itself it waits 30 s for a stopped process), and the loss curve is "
        "bitwise that of an uninterrupted run.",
    )
