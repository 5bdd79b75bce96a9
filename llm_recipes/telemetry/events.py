"""What happens in a run besides its steps: a row in `metrics.jsonl`, and a word to whoever asked for it."""

import json
import logging
import os
import signal
import subprocess
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from llm_recipes.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

TOLD = ("left_out", "rollback", "save_failed", "stop", "stall", "finish")
"""Events that `run.on_event` hears of; an error it hears of too, from whoever meets it."""
SECONDS_TO_TELL = 20


def tell(on_event: str, event: dict[str, Any]) -> None:
    """Give an event to a shell command (JSON on its input, its kind in `LLM_RECIPES_EVENT`), or post it to a URL.
    What goes wrong there is logged and no more."""
    body = json.dumps(event, ensure_ascii=False)
    try:
        if on_event.startswith(("http://", "https://")):
            request = urllib.request.Request(
                on_event, body.encode(), {"Content-Type": "application/json"}, method="POST"
            )
            with urllib.request.urlopen(request, timeout=SECONDS_TO_TELL):
                return
        # What it prints is its own affair: kept here, it could be any amount.
        command = subprocess.Popen(
            on_event, shell=True, text=True, start_new_session=True, stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"LLM_RECIPES_EVENT": event["event"]},
        )  # fmt: skip
        try:
            command.communicate(body + "\n", timeout=SECONDS_TO_TELL)
        except subprocess.TimeoutExpired:
            os.killpg(command.pid, signal.SIGKILL)  # with all that it has started
            log.warning("run.on_event: not done after %d s, ended", SECONDS_TO_TELL)
            return
        if command.returncode:
            log.warning("run.on_event: status %d", command.returncode)
    except Exception as error:
        log.warning("run.on_event: %s", error)


class Events:
    """Of one run, on the rank that speaks.

    Args:
        metrics: where rows go.
        on_event: whom to tell.
        run: the run's folder, named in what is told.
    """

    def __init__(self, metrics: Metrics, on_event: str | None, run: Path, speaks: bool = True) -> None:
        self._metrics, self._on_event, self._run, self._speaks = metrics, on_event, run, speaks
        self._telling: list[threading.Thread] = []

    def write(self, kind: str, step: int, **facts: Any) -> None:
        """An event at a step."""
        if not self._speaks:
            return
        row = {"step": step, "event": kind, "time": time.time(), **facts}
        self._metrics.write(row)
        if self._on_event is not None and kind in TOLD:
            told = {"run": str(self._run), **row}
            thread = threading.Thread(target=tell, args=(self._on_event, told), daemon=True)
            thread.start()
            self._telling = [each for each in self._telling if each.is_alive()] + [thread]

    def close(self) -> None:
        """Wait until everything is told."""
        for thread in self._telling:
            thread.join(SECONDS_TO_TELL)
