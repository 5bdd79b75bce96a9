"""A thread that looks after a process while its main thread trains.

It hears the wish to stop (a signal, the file `STOP`, the wall clock), keeps the lock's heart beating, and notices when
nothing moves any more: a main thread that waits in a collective hears and sees nothing of all that.
"""

import contextlib
import faulthandler
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm_recipes.config import RunConfig
from llm_recipes.models.topology import Topology, launch_age
from llm_recipes.training.lock import Lock

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LOOKS_EVERY = 0.5
"""Seconds."""
ONE_WISH = 2.0
"""Seconds within which the same signal is the same wish: a scheduler signals every process of a job, and a launcher
hands its own on to its ranks. Another signal, or a later one, is a second wish."""
REPORT_AT, JUDGE_AT = 0.7, 0.85
"""Of `run.stall_seconds`: every rank writes down where it stands; then they are compared, and one is named in time."""
STALLED = 3
"""The exit status of a run that hangs: not a user's mistake, so a launcher may start it again."""


_early: list[int] = []
"""Signals that came before a `Guardian` was there."""


@contextlib.contextmanager
def early_signals() -> Iterator[None]:
    """From here on SIGUSR1 is a wish to stop, also while a model takes minutes to load: it is granted after the first
    step, and a second one ends the process. SIGTERM ends it: there is nothing to save yet, and by it launchers end
    the ranks that wait for one that died."""

    def hear(number: int, frame: Any) -> None:
        if _early:
            os._exit(128 + number)
        _early.append(number)

    _early.clear()
    on_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGUSR1, hear) if on_main else None
    try:
        yield
    finally:
        if on_main:
            signal.signal(signal.SIGUSR1, before)


class Watch:
    """Says when a run is asked to stop, and ends one that hangs. This one does neither; `Guardian` does."""

    reason: str | None = None
    """Why to stop after this step, as far as this rank knows."""

    def beat(self, doing: str) -> None:
        """The main thread has come further; `doing` is what it does next."""


class Guardian(Watch):
    """The thread, between `__enter__` and `__exit__`.

    Args:
        folder: the run's.
        launch: names this launch, on all ranks alike.
        lock: the run's, on the first rank.
        seconds_to_save: how long a save may take, and a step before it.
        on_stall: told on one rank, with the account, before the process ends.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        launch: str,
        topology: Topology,
        lock: Lock | None,
        seconds_to_save: Callable[[], float],
        on_stall: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self.config, self.folder, self.topology, self.lock = config, folder, topology, lock
        self.seconds_to_save, self.on_stall = seconds_to_save, on_stall
        self._stop_file = folder / "STOP"
        self._reports = folder / "stalls" / launch
        self._beats, self._doing, self._last = 0, "starting", time.monotonic()
        self._reported = False
        self._heard: tuple[int, float] | None = None
        """The first signal, and when it came."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def beat(self, doing: str) -> None:
        self._beats, self._doing, self._last = self._beats + 1, doing, time.monotonic()

    def __enter__(self) -> "Guardian":
        # The bytes arrive although the main thread waits in C++, where no handler of Python's would run.
        self._ears, mouth = socket.socketpair()
        mouth.setblocking(False)
        self._mouth = mouth
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, lambda *_: None) for each in SIGNALS}
            signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        self._last = time.monotonic()
        for number in _early:
            self._hear(number)
        if self.topology.is_first:
            self._look_around()
        if self.reason is not None:
            log.warning("%s: there will be one step, a save, and the end", self.reason)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
            for each, handler in self._before.items():
                signal.signal(each, handler)
        self._ears.close()
        self._mouth.close()

    def stopped(self) -> None:
        """The wish was granted: the next launch goes on."""
        if self.topology.is_first:
            with contextlib.suppress(OSError):
                self._stop_file.rmdir() if self._stop_file.is_dir() else self._stop_file.unlink(missing_ok=True)

    def _look(self) -> None:
        while not self._ended.is_set():
            ready, _, _ = select.select([self._ears], [], [], LOOKS_EVERY)
            for number in self._ears.recv(64) if ready else b"":
                self._hear(number)
            try:
                if self.topology.is_first:
                    self._look_around()
                self._look_for_a_stall()
            except Exception:  # whatever it is: without this thread a run is deaf
                log.exception("the watch met an error, and goes on")

    def _hear(self, number: int) -> None:
        if number not in SIGNALS:
            return
        name, now = signal.Signals(number).name, time.monotonic()
        if self._heard is not None and self._heard[0] == number and now - self._heard[1] < ONE_WISH:
            return
        if self._heard is not None:
            print(f"{name} again: leaving at once", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self._heard = (number, now)
        self.reason = name

    def _look_around(self) -> None:
        """What one rank knows for all."""
        if self.lock is not None and self.lock.lost:
            print(f"error: {self.lock.path} {self.lock.owner()}; leaving", file=sys.stderr, flush=True)
            os._exit(STALLED)
        if os.path.exists(self._stop_file):  # which never raises: a network file system has its moments
            self.reason = self.reason or f"{self._stop_file} is there"
        limit = self.config.max_seconds
        if limit is not None and launch_age() + self.seconds_to_save() > limit:
            self.reason = self.reason or f"run.max_seconds={limit:g} are nearly over"

    def _look_for_a_stall(self) -> None:
        limit, now = self.config.stall_seconds, time.monotonic()
        if limit is None:
            return
        quiet = now - self._last
        mine = self._reports / f"rank-{self.topology.rank:05d}.txt"
        if quiet < REPORT_AT * limit:
            if self._reported:  # it only took long
                self._reported = False
                with contextlib.suppress(OSError):
                    mine.unlink()
            return
        if not self._reported:
            self._reported = True
            self._report(mine)
        if quiet >= JUDGE_AT * limit:
            self._judge()

    def _report(self, path: Path) -> None:
        """Where this rank stands, and the stacks of all its threads."""
        where = {
            "rank": self.topology.rank, "host": socket.gethostname(), "pid": os.getpid(), "beats": self._beats,
            "doing": self._doing,
        }  # fmt: skip
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                file.write(json.dumps(where) + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

    def _judge(self) -> None:
        """Name the rank that the others wait for, once, and leave."""
        assert self.config.stall_seconds is not None
        account = self._reports / "account.txt"
        reports = self._read_reports()
        if min(reports, default=self.topology.rank) < self.topology.rank:
            for _ in range(100):  # the lowest rank speaks; a launcher ends everybody when the first one leaves
                if os.path.exists(account):
                    break
                self._ended.wait(0.1)
            os._exit(STALLED)
        said = account_of(reports, self.topology.ranks, self.config.stall_seconds)
        line = f"{said}; stacks of all ranks: {self._reports}"
        print(f"error: {line}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            self.on_stall(line, {"ranks": [reports.get(rank) for rank in range(self.topology.ranks)]})
        with contextlib.suppress(OSError):
            account.write_text(line + "\n", encoding="utf-8")
        os._exit(STALLED)

    def _read_reports(self) -> dict[int, dict[str, Any]]:
        """By rank."""
        found = {}
        for path in self._reports.glob("rank-*.txt"):
            with contextlib.suppress(OSError, ValueError):
                where = json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0])
                found[where["rank"]] = where
        return found


def account_of(reports: dict[int, dict[str, Any]], ranks: int, seconds: float) -> str:
    """Who holds the others up, from what each rank reports of itself.

    Every rank does the same things in the same order: the one that has done the fewest is waited for.
    """
    start = f"no progress for {seconds:g} s"
    silent = [rank for rank in range(ranks) if rank not in reports]
    if silent:
        names = ", ".join(map(str, silent))
        return f"{start}: rank {names} does not answer (its process is stopped, or its host is gone)"
    fewest = min(each["beats"] for each in reports.values())
    behind = [each for each in reports.values() if each["beats"] == fewest]
    if len(behind) == ranks:
        return f"{start}: all ranks stand at the same place ({behind[0]['doing']})"
    named = ", ".join(f"rank {each['rank']} ({each['host']}, pid {each['pid']})" for each in behind)
    return f"{start}: {named} does not come out of '{behind[0]['doing']}', and the others wait"
