"""A hundred kills of one run, a third of them inside a save: what it costs, and that it changes nothing."""

import json
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from launched import Launch, Place, alive, started, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.timeout(7200)]

KILLS = int(os.environ.get("KILLS", "100"))
STEPS_BETWEEN = 60
RESTARTS = 3
STARTING, TRAINING, SAVING = "while it starts", "between saves", "inside a save"
RANK, RANKS, LAUNCHER = "SIGKILL of one rank", "SIGKILL of all ranks", "SIGKILL of the launcher"


@dataclass
class Kill:
    who: str
    when: str
    """Where it really hit: a save is short."""
    at: float
    """Seconds since 1970, as all that follows."""
    by: str = ""
    """Who started the ranks again."""
    detected: float | None = None
    """When somebody could do something about it: torchrun has started new ranks, or has left."""
    locked: float | None = None
    """The ranks have met, and the folder is theirs."""
    first_step: float | None = None
    reached: int = 0
    resumed: int | None = None

    @property
    def lost(self) -> tuple[float, float, float] | None:
        """Seconds of detection, restart and load; None where another kill came in between."""
        if self.detected is None or self.locked is None or self.first_step is None:
            return None
        return self.detected - self.at, self.locked - self.detected, self.first_step - self.locked


class Killer:
    """Launches a run, kills it, and writes down what came of it."""

    def __init__(self, run: Place, chance: random.Random) -> None:
        self.run, self.chance = run, chance
        self.kills: list[Kill] = []
        self.launch: Launch | None = None
        self.restarts = 0
        self.locks: dict[str, float] = {}
        self.start_seconds = 6.0

    def go(self, who: str, when: str) -> None:
        run, chance = self.run, self.chance
        if self.launch is None:
            self.restarts = chance.choice((0, RESTARTS))
            self.launch = run.launch(restarts=self.restarts)
        pids = self.launch.all_ranks()
        if when == STARTING:
            until = time.time() + chance.uniform(0, self.start_seconds)
            wait_for(lambda: time.time() >= until or self._runs(), "it starts")
        else:
            self.wait_until_it_runs()
            run.wait_for_step(run.step() + round(chance.expovariate(1 / STEPS_BETWEEN)), 300)
            if when == SAVING:
                run.wait_for_a_save()
            until = time.time() + chance.uniform(0, 0.06)
            wait_for(lambda: time.time() >= until, "an instant", every=0.001)
        at = time.time()
        victims = {RANK: [chance.choice(list(pids.values()))], RANKS: list(pids.values()), LAUNCHER: []}[who]
        for pid in victims or [self.launch.process.pid]:
            os.kill(pid, signal.SIGKILL)
        inside = bool(run.half_written())
        hit = SAVING if inside else TRAINING if len(run.events("first_step")) > self._attempts_done else STARTING
        self.kills.append(Kill(who, hit, at))
        self._clean_up(self.kills[-1], pids)

    _attempts_done = 0
    """`first_step` events before the attempt that runs now."""

    def _runs(self) -> bool:
        """The first step of this attempt is done; notes on the way when the lock was taken."""
        try:
            path = self.run.run / "lock.json"
            self.locks.setdefault(json.loads(path.read_text())["id"], path.stat().st_mtime)
        except (OSError, ValueError):
            pass
        return len(self.run.events("first_step")) > self._attempts_done

    def wait_until_it_runs(self) -> None:
        assert self.launch is not None
        process, said = self.launch.process, self.launch.said

        def look() -> bool:
            assert process.poll() is None, said()[-5000:]
            return self._runs()

        wait_for(look, "the first step", 180)
        first, start = self.run.events("first_step")[-1], self.run.events("start")[-1]
        self.start_seconds = first["seconds"]
        if self.kills and self.kills[-1].first_step is None:
            kill = self.kills[-1]
            kill.first_step, kill.resumed, kill.locked = first["time"], start["step"], max(self.locks.values())
            safe = max((row["step"] for row in self.run.events("checkpoint") if row["time"] < kill.at), default=0)
            assert safe <= start["step"] <= kill.reached, (safe, start["step"], kill.reached)

    def _clean_up(self, kill: Kill, pids: dict[int, int]) -> None:
        """See to it that another attempt is on its way."""
        assert self.launch is not None
        if kill.who == LAUNCHER:
            if kill.when != STARTING and self.chance.random() < 0.5:
                self.run.wait_for_more(self.chance.randint(1, 10))  # orphans go on
            self.launch.end()
            kill.by, self.launch = "the same command", None
        elif self.restarts:
            self.restarts -= 1
            wait_for(lambda: not any(alive(pid) for pid in pids.values()), "torchrun ends the others", 60)
            new = self.launch.all_ranks()
            kill.by, kill.detected = "torchrun", min(map(started, new.values()))
        else:
            assert self.launch.wait(90) != 0
            kill.by, kill.detected, self.launch = "the same command", time.time(), None
        kill.reached = self.run.step()
        self._attempts_done = len(self.run.events("first_step"))


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def test_a_hundred_kills_change_nothing(
    place: Callable[..., Place], straight: Callable[..., Place], tmp_path: Path,
    report: Callable[[str, str], None], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = place(
        model=tiny.save_model(tmp_path / "model", num_hidden_layers=1, hidden_size=64),
        train__steps=200 * KILLS, train__global_batch_size=2, checkpoint__every=10,
    )  # fmt: skip
    chance = random.Random(0)
    whens = [SAVING] * -(-KILLS // 3) + [STARTING] * (KILLS // 10)
    whens += [TRAINING] * (KILLS - len(whens))
    whos = [(RANK, RANKS, LAUNCHER, RANK)[number % 4] for number in range(KILLS)]
    chance.shuffle(whens)
    chance.shuffle(whos)
    killer, began = Killer(run, chance), time.time()
    for who, when in zip(whos, whens, strict=True):
        killer.go(who, when)
        with capsys.disabled():
            last = killer.kills[-1]
            print(f"{time.time() - began:6.0f} s, step {run.step()}: {last.who}, {last.when}", flush=True)
    launch = killer.launch = killer.launch or run.launch()
    killer.wait_until_it_runs()
    (run.run / "STOP").touch()
    assert launch.wait() == 0, launch.said()
    seconds = time.time() - began

    kills, productive, done = killer.kills, run.step(), len(run.steps())
    curve = run.curve()
    assert list(curve) == list(range(1, productive + 1))
    assert curve == straight(run, stop=productive).curve()

    counted = Counter((each.who, each.when) for each in kills)
    report(
        "Kills",
        f"{len(kills)} kills of one run on two ranks, one every {done / len(kills):.0f} steps; all {len(kills)} "
        f"resumed, none of them before the last checkpoint. Loss and gradient norm of all {productive:,} steps are "
        "bitwise those of an uninterrupted run.\n\n"
        + table(
            ["", STARTING, TRAINING, SAVING, "all"],
            [[who, *(str(counted[who, when]) for when in (STARTING, TRAINING, SAVING)),
              str(sum(each.who == who for each in kills))] for who in (RANK, RANKS, LAUNCHER)],
        ),
    )  # fmt: skip
    step_seconds = statistics.median(row["seconds"] for row in run.steps())
    report(
        "Goodput",
        f"`checkpoint.every=10`, a kill every {done / len(kills):.0f} steps: {productive:,} productive steps of "
        f"{done:,} done, **{productive / done:.1%}**; {(done - productive) / len(kills):.1f} steps are done again per "
        f"kill. Of the {seconds / 60:.0f} minutes by the clock the productive steps took "
        f"{productive * step_seconds / seconds:.0%} ({1000 * step_seconds:.0f} ms a step): what a start costs is "
        "mostly imports, and a run on GPUs is not killed every few seconds.",
    )
    rows = []
    for by in ("torchrun", "the same command"):
        of = [(each.lost, each.reached - each.resumed) for each in kills
              if each.by == by and each.lost is not None and each.resumed is not None]  # fmt: skip
        parts = [[lost[at] for lost, _ in of if lost is not None] for at in range(3)]
        parts.append([again * step_seconds for _, again in of])
        shown = [f"{statistics.median(each):.2f} ({max(each):.2f})" if each else "-" for each in parts]
        rows.append([by, str(len(of)), *shown])
    report(
        "Time lost per fault",
        "Median seconds (largest). Detection: from the kill until torchrun has started new ranks, or has left. "
        "Restart: until the ranks have met and hold the folder's lock (interpreter, imports, opening the data; with "
        "the command torchrun's own imports too). Load: until the first step is done (checkpoint verified and read, "
        "proofs). Recomputation: the steps done again. Kills of the launcher, which nobody detects, and kills on which "
        "another kill followed during the start are not counted.\n\n"
        + table(["started again by", "faults", "detection", "restart", "load", "recomputation"], rows),
    )
