"""Promises 5 and 6 where they are needed: processes die, and the same command, or torchrun by itself, goes on."""

import os
import signal
from collections.abc import Callable

import pytest
from launched import Place, wait_for

pytestmark = pytest.mark.slow


def test_torchrun_restarts_a_run_whose_rank_is_killed(
    place: Callable[..., Place], straight: Callable[..., Place]
) -> None:
    """A rank inside the first save, then the other one in training; the curve is that of a run that nobody hurt, bit
    for bit."""
    run = place(train__steps=28)
    launch = run.launch(restarts=2)
    run.wait_for_event("first_step")
    victim = launch.all_ranks()[1]
    run.wait_for_a_save()
    os.kill(victim, signal.SIGKILL)
    run.wait_for_event("first_step", 2)
    victim = launch.all_ranks()[0]
    run.wait_for_event("checkpoint")
    os.kill(victim, signal.SIGKILL)
    assert launch.wait() == 0, launch.said()
    resumed = [each["step"] for each in run.events("start")]
    assert len(resumed) == 3 and resumed[0] == 0 and resumed[1] in (0, 4) and resumed[2] in range(4, 28, 4)
    assert list(run.curve()) == list(range(1, 29)) and run.curve() == straight(run).curve()
    assert not run.half_written()


@pytest.mark.faults
def test_ranks_without_a_launcher_keep_the_folder_until_they_are_killed(
    place: Callable[..., Place], straight: Callable[..., Place]
) -> None:
    run = place(train__steps=1000)
    first = run.launch("train.stop_at=999")
    run.wait_for_event("checkpoint")
    orphans = first.all_ranks()
    os.kill(first.process.pid, signal.SIGKILL)
    run.wait_for_more(2)  # they train on: nobody has told them
    for pid in orphans.values():  # alive, and not so far ahead that the comparison takes long
        os.kill(pid, signal.SIGSTOP)
    second = run.launch(ranks=None)
    assert second.wait() == 2
    said = [line for line in second.said().splitlines() if line]
    assert len(said) == 1 and said[0].startswith("error: ") and f"process {orphans[0]} on " in said[0], said
    assert "is writing here; wait for it, end it, or give another run.name" in said[0]
    assert first.ranks() == orphans
    for pid in orphans.values():
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not first.ranks(), "they are dead")
    reached = run.step()
    last = run.launch(f"train.stop_at={reached + 4}")
    assert last.wait() == 0, last.said()
    assert run.events("start")[-1]["step"] >= max(4, reached - 9)
    expected = straight(run, stop=reached + 4).curve()
    assert len(expected) == reached + 4 and run.curve() == expected
