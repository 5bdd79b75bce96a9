"""A run's folder has one writer: `lock.json` in it names host, job and process, and its heart beats."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_recipes.errors import UserError
from llm_recipes.folders import make_folder, remove_folders

BEATS_EVERY = 5.0
"""Seconds."""
DEAD_AFTER = 30.0
"""Seconds without a beat of a process on another host."""
JOB_IDS = ("SLURM_JOB_ID", "PBS_JOBID", "JOB_ID", "LSB_JOBID")


def started(pid: int) -> str | None:
    """When a process of this host began, as the kernel counts; None where there is none, or it only waits to be
    buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def pid_space() -> str | None:
    """Two containers of one name may each have a process 7: which of the kernel's numberings this one's is."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


class Lock:
    """Taken by the first rank before anything is written, until `release`; its heart beats in a thread of its own,
    also while a model takes minutes to load.

    Clocks of two hosts are not compared: another host's writer is alive if its file changes while we look.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock.json"
        self._mine: dict[str, Any] = {
            "id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "started": started(os.getpid()),
            "job": next((os.environ[name] for name in JOB_IDS if name in os.environ), None), "space": pid_space(),
            "beats": 0,
        }  # fmt: skip
        self._made: list[Path] = []
        self._released = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = False
        """Whether another process has become the folder's writer."""

    def take(self, wait: Callable[[float], None] = time.sleep) -> None:
        """Become the folder's writer.

        Raises:
            UserError: another one is alive.
            OSError: the folder cannot be written.
        """
        self._made = make_folder(self.path.parent)
        for _ in range(3):
            if self._create():
                self._thread = threading.Thread(target=self._live, name="lock", daemon=True)
                self._thread.start()
                return
            before = self._read()
            if before is not None and self._is_alive(before, wait):
                raise UserError(
                    f"{self.path.parent}: {_who(before)} is writing here; wait for it, end it, or give another run.name"
                )
            self._bury(before)
        raise UserError(f"{self.path}: others want it at the same time; start the run again")

    def _create(self) -> bool:
        """Put our file there, whole, if none is."""
        own = self.path.with_name(f"lock.{self._mine['id']}.json")
        own.write_text(json.dumps(self._mine) + "\n", encoding="utf-8")
        try:
            os.link(own, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                with open(self.path, "x", encoding="utf-8") as file:
                    file.write(json.dumps(self._mine) + "\n")
            except FileExistsError:
                return False
        finally:
            own.unlink()
        return True

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _is_alive(self, other: dict[str, Any], wait: Callable[[float], None]) -> bool:
        if all(other.get(key) == self._mine[key] for key in ("host", "space")):
            if all(other.get(key) == self._mine[key] for key in ("pid", "started")):
                return False  # our own, of a run that ended in an error
            pid, began = other.get("pid"), other.get("started")
            return isinstance(pid, int) and began is not None and started(pid) == began
        for _ in range(int(DEAD_AFTER)):
            wait(1.0)
            if not os.path.lexists(self.path):
                return False
            now = self._read()
            if now is None:
                continue  # replaced as we read it: a sign of life, if any
            if now.get("id") != other.get("id") or now.get("beats") != other.get("beats"):
                return True
        return False

    def _bury(self, dead: dict[str, Any] | None) -> None:
        """Take the dead one's file away. If another came first, its file is put back."""
        aside = self.path.with_name(f"lock.{self._mine['id']}.dead")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        try:
            taken = json.loads(aside.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            taken = None
        if taken is not None and (dead is None or taken.get("id") != dead.get("id")):
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink()

    def is_taken(self, wait: Callable[[float], None] = time.sleep) -> bool:
        """Whether another living process is the folder's writer."""
        found = self._read()
        return found is not None and self._is_alive(found, wait)

    def owner(self) -> str:
        """What has become of it."""
        found = self._read()
        return f"is another's: {_who(found)}" if found else "is gone: the run's folder was deleted or moved"

    def is_ours(self) -> bool:
        """False only where the file says so: a file system that does not answer is no reason to give up."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return bool(found["id"] == self._mine["id"])
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError):
            return True

    def _live(self) -> None:
        while not self.lost and not self._released.wait(BEATS_EVERY):
            self.lost = not self.beat()

    def beat(self) -> bool:
        """Show that we are alive; whether the folder is still ours."""
        if not self.is_ours():
            return False
        self._mine["beats"] += 1
        beside = self.path.with_name(f"lock.{self._mine['id']}.json")
        try:
            beside.write_text(json.dumps(self._mine) + "\n", encoding="utf-8")
            os.replace(beside, self.path)
        except OSError:
            return True  # a full or failing disk: the saves will tell
        return True

    def release(self) -> None:
        """Leave the folder to others; where nothing was written, nothing is left."""
        self._released.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            if self.is_ours():
                self.path.unlink(missing_ok=True)
            remove_folders(self._made)


def _who(found: dict[str, Any]) -> str:
    job = f", job {found['job']}" if found.get("job") else ""
    return f"process {found.get('pid')} on {found.get('host')}{job}"
