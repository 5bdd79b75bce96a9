"""What looks after a run: the lock of its folder, the account of a stall, the wish to stop, and who is told."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny

from llm_recipes.errors import UserError
from llm_recipes.telemetry import events, metrics
from llm_recipes.training.lock import DEAD_AFTER, Lock, pid_space, started
from llm_recipes.training.watch import account_of

Workplace = Callable[[str], Path]


def dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def written(folder: Path, **facts: Any) -> Path:
    """Somebody's lock."""
    path = folder / "lock.json"
    here = {"host": socket.gethostname(), "space": pid_space()}
    path.write_text(json.dumps({"id": "theirs", **here, "started": "1", "beats": 3} | facts))
    return path


def test_a_folder_has_one_writer_and_is_free_again_after_it(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "new" / "run")
    lock.take()
    assert lock.is_ours() and lock.beat()
    other = subprocess.run(
        [sys.executable, "-c", "import sys; from pathlib import Path; from llm_recipes.training.lock import Lock\n"
         f"Lock(Path({str(tmp_path / 'new' / 'run')!r})).take()"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert f"process {os.getpid()} on {socket.gethostname()} is writing here" in other.stderr
    lock.release()
    assert list(tmp_path.iterdir()) == [], "nothing is left of a run that wrote nothing"


def test_the_lock_of_a_dead_process_is_taken_over_and_of_one_that_reuses_its_number_too(tmp_path: Path) -> None:
    for facts in (
        {"pid": dead_process()},
        {"pid": 1, "started": "another time"},
        {"pid": os.getpid(), "started": started(os.getpid())},
    ):
        written(tmp_path, **facts)
        lock = Lock(tmp_path)
        lock.take()
        assert lock.is_ours() and [path.name for path in tmp_path.iterdir()] == ["lock.json"]
        lock.release()


@pytest.mark.parametrize("alive", [True, False])
def test_a_writer_on_another_host_is_alive_if_its_lock_changes_while_we_look(tmp_path: Path, alive: bool) -> None:
    path = written(tmp_path, host="elsewhere", pid=7, job="4711")
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if alive and len(waited) == 6:
            written(tmp_path, host="elsewhere", pid=7, job="4711", beats=4)

    lock = Lock(tmp_path)
    if alive:
        with pytest.raises(UserError, match="process 7 on elsewhere, job 4711 is writing here"):
            lock.take(wait)
        assert json.loads(path.read_text())["id"] == "theirs"
    else:
        lock.take(wait)
        assert lock.is_ours() and sum(waited) == DEAD_AFTER


def test_who_buries_the_dead_never_buries_a_living_one(tmp_path: Path) -> None:
    """Two find the same dead lock; the slower one's rename takes the faster one's new lock, and puts it back."""
    written(tmp_path, pid=dead_process())
    slow, fast = Lock(tmp_path), Lock(tmp_path)
    dead = slow._read()
    fast.take()
    slow._bury(dead)
    assert fast.is_ours() and not slow.is_ours()


def test_a_lock_beats_by_itself_and_notices_when_it_is_another_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_recipes.training.lock.BEATS_EVERY", 0.01)
    lock = Lock(tmp_path)
    lock.take()
    deadline = time.monotonic() + 20
    while (beats := json.loads((tmp_path / "lock.json").read_text())["beats"]) < 3:
        assert time.monotonic() < deadline, beats
    assert not lock.lost
    written(tmp_path, pid=1)
    while not lock.lost and time.monotonic() < deadline:
        if lock.is_ours():  # a beat was on its way
            written(tmp_path, pid=1)
    assert lock.lost and not lock.beat() and not lock.is_ours()
    lock.release()
    assert (tmp_path / "lock.json").exists(), "only our own is removed"


def test_a_stall_s_account_names_who_is_waited_for() -> None:
    def of(rank: int, beats: int, doing: str) -> dict[str, Any]:
        return {"rank": rank, "host": "n1", "pid": 10 + rank, "beats": beats, "doing": doing}

    silent = {rank: of(rank, 9, "step 3") for rank in (0, 1, 3)}
    assert "rank 2 does not answer" in account_of(silent, 4, 60)
    behind = {rank: of(rank, 9, "step 3") for rank in range(3)} | {3: of(3, 8, "reading the data of step 3")}
    said = account_of(behind, 4, 60)
    assert "rank 3 (n1, pid 13) does not come out of 'reading the data of step 3'" in said
    assert "all ranks stand at the same place (step 3)" in account_of({0: of(0, 9, "step 3")}, 1, 60)


class Listener(BaseHTTPRequestHandler):
    heard: list[Any] = []  # noqa: RUF012

    def do_POST(self) -> None:
        self.heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


def test_events_are_told_to_a_command_and_to_a_webhook_and_neither_can_stop_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "SECONDS_TO_TELL", 1)
    server = HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path, copy = tmp_path / "metrics.jsonl", tmp_path / "copy"
    for whom in (
        f"(echo $LLM_RECIPES_EVENT; cat) >> {copy}", f"http://127.0.0.1:{server.server_port}/",
        "yes; exit 3", "cat > /dev/null; exit 3", "http://127.0.0.1:9/",
    ):  # fmt: skip
        told = events.Events(metrics.Metrics(path), whom, tmp_path)
        told.write("rollback", 12, skipped=[3, 5], reason="日本語 'quoted'")
        told.write("checkpoint", 13)
        told.close()
    server.shutdown()
    kind, body = copy.read_text().split("\n", 1)
    assert kind == "rollback" and Listener.heard == [json.loads(body) | {"time": Listener.heard[0]["time"]}]
    assert Listener.heard[0]["run"] == str(tmp_path) and Listener.heard[0]["reason"] == "日本語 'quoted'"
    assert [row["event"] for row in metrics.lines(path)] == ["rollback", "checkpoint"] * 5
    assert (
        "status 3" in caplog.text and "not done after 1 s, ended" in caplog.text and "Connection refused" in caplog.text
    )


def test_rows_wait_for_a_disk_that_refuses_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "folder" / "metrics.jsonl"
    path.parent.write_text("a file where the folder was")
    written = metrics.Metrics(path)
    for step in (1, 2):
        written.write({"step": step, "loss": float("nan")})
    assert caplog.text.count("its rows wait") == 1
    path.parent.unlink()
    path.parent.mkdir()
    written.write({"step": 3, "list": [float("inf")]})
    assert metrics.lines(path) == [
        {"step": 1, "loss": "nan"}, {"step": 2, "loss": "nan"}, {"step": 3, "list": ["inf"]}
    ]  # fmt: skip


def run(config: Any) -> tuple[str | None, bool]:
    """A whole run on this rank; the user's mistake, and whether a signal's handler of its own is left behind."""
    import signal

    from llm_recipes.training.run import pretrain

    before = signal.getsignal(signal.SIGTERM)
    try:
        pretrain(config)
    except UserError as error:
        return str(error), signal.getsignal(signal.SIGTERM) is before
    return None, signal.getsignal(signal.SIGTERM) is before


def of_run(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in metrics.read(folder / "run" / "metrics.jsonl") if row.get("event") == kind]


@pytest.mark.parametrize("how", ["STOP", "max_seconds"])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_where_it_was(
    ranks: Any, tiny_models: Any, workplace: Workplace, how: str
) -> None:
    straight, folder, model = workplace("straight"), workplace("run"), tiny_models["mistral"]
    options = {"train__steps": 12, "logging__every": 1, "checkpoint__every": 1000, "data__validation": {}}
    assert ranks(2, run, tiny.pretrain_config(straight, model, **options)) == [(None, True)] * 2
    if how == "STOP":
        (folder / "run").mkdir()
        (folder / "run" / "STOP").touch()
        config = tiny.pretrain_config(folder, model, **options)
    else:
        config = tiny.pretrain_config(folder, model, **options, run__max_seconds=0.001)
    assert ranks(2, run, config) == [(None, True)] * 2
    [stopped] = of_run(folder, "stop")
    assert stopped["step"] == 1 and {"STOP": "STOP", "max_seconds": "max_seconds"}[how] in stopped["reason"]
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == [f"step-{stopped['step']:08d}"]
    assert not (folder / "run" / "STOP").exists(), "the wish was granted, the next launch goes on"
    assert ranks(2, run, tiny.pretrain_config(folder, model, **options)) == [(None, True)] * 2
    found = [
        [(row["step"], row["loss"]) for row in metrics.read(each / "run" / "metrics.jsonl") if "loss" in row]
        for each in (straight, folder)
    ]
    assert found[0] == found[1] and len(found[0]) == 12
    assert not (folder / "run" / "lock.json").exists()


def signalled(config: Any, name: str) -> tuple[str | None, int]:
    """A run whose process, and each of its children, is sent a signal in its third step; and how many children."""
    import multiprocessing
    import signal

    from llm_recipes.training import loop
    from llm_recipes.training.run import pretrain

    to_device, seen, children = loop.to_device, [], []

    def sending(batch: Any, device: Any) -> Any:
        seen.append(batch)
        if len(seen) == 3:
            children.extend(each.pid for each in multiprocessing.active_children())
            for pid in (*children, os.getpid()):
                os.kill(pid, getattr(signal, name))
        return to_device(batch, device)

    loop.to_device = sending
    try:
        pretrain(config)
    except UserError as error:
        return str(error), len(children)
    finally:
        loop.to_device = to_device
    return None, len(children)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_every_process_of_a_job_is_one_wish_to_stop(
    ranks: Any, tiny_models: Any, workplace: Workplace, name: str
) -> None:
    """Also to the processes that prepare batches: they serve the step in hand, and are not heard twice."""
    folder = workplace("run")
    config = tiny.pretrain_config(
        folder, tiny_models["mistral"], train__steps=100, data__workers=2, train__micro_batch_size=4
    )
    [(problem, children)] = ranks(1, signalled, config, name)
    assert problem is None and children >= 2
    [stopped] = of_run(folder, "stop")
    assert stopped["reason"] == name and stopped["step"] < 100
    assert (folder / "run" / "checkpoints" / f"step-{stopped['step']:08d}").is_dir()


def test_a_run_whose_folder_another_process_writes_is_refused(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder = workplace("run")
    (folder / "run").mkdir()
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        written(folder / "run", pid=alive.pid, started=started(alive.pid))
        found = ranks(2, run, tiny.pretrain_config(folder, tiny_models["mistral"]))
    finally:
        alive.communicate(b"\n")
    assert all(problem is not None and f"process {alive.pid} on" in problem for problem, _ in found)
    assert [path.name for path in (folder / "run").iterdir()] == ["lock.json"]
    assert ranks(2, run, tiny.pretrain_config(folder, tiny_models["mistral"])) == [(None, True)] * 2
