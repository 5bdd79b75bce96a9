"""What goes wrong at odd moments: a file system that answers strangely, a kill in the first save, a signal twice."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from whole_runs import run

from llm_recipes.checkpoints import manifest, retention
from llm_recipes.config import GuardConfig, RunConfig
from llm_recipes.errors import UserError
from llm_recipes.telemetry import metrics
from llm_recipes.training.guard import FINE, NOT_FINITE, Guard
from llm_recipes.training.lock import Lock

Workplace = Callable[[str], Path]


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


def test_a_damaged_newer_checkpoint_takes_no_whole_one_s_place(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    """keep=1, the newest is damaged, the run goes on from the one before and is preempted: its save must stay."""
    folder, model = workplace("run"), tiny_models["mistral"]
    assert ranks(1, run, tiny.pretrain_config(folder, model, train__stop_at=8)) == [None]
    assert kept(folder) == ["step-00000004", "step-00000008"]
    (folder / "run" / "checkpoints" / "step-00000008" / "manifest.json").write_text("{")
    config = tiny.pretrain_config(folder, model, train__stop_at=6, checkpoint__keep=1)
    assert ranks(1, run, config) == [None]
    root = folder / "run" / "checkpoints"
    assert [path.name for path in manifest.checkpoints(root) if manifest.damage(path) is None] == ["step-00000006"]
    assert ranks(1, run, tiny.pretrain_config(folder, model)) == [None]


def killed_in_first_save(config: Any) -> None:
    """A process that is killed while its first checkpoint is still being written, some steps later."""
    from llm_recipes.checkpoints import shards
    from llm_recipes.training import trainer
    from llm_recipes.training.run import pretrain

    log = trainer.Trainer._log

    def dying(self: Any, step: Any, bar: Any) -> None:
        log(self, step, bar)
        if step.number == 6:
            os._exit(9)

    trainer.Trainer._log = dying  # type: ignore[method-assign]
    shards.write_pieces = lambda path, pieces: time.sleep(100) or {}  # type: ignore[assignment]
    pretrain(config)


def test_a_kill_inside_the_first_save_of_a_run_is_gone_on_from(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    from ranks import FailedOnRank

    folder, model = workplace("run"), tiny_models["mistral"]
    with pytest.raises(FailedOnRank):
        ranks(1, killed_in_first_save, tiny.pretrain_config(folder, model))
    assert max(row["step"] for row in metrics.lines(folder / "run" / "metrics.jsonl")) == 6
    assert ranks(1, run, tiny.pretrain_config(folder, model)) == [None]


class Alone:
    rank, ranks, is_first = 0, 1, True


def guardian(folder: Path) -> Any:
    from llm_recipes.training.watch import Guardian

    return Guardian(
        RunConfig(name="x", stall_seconds=None),
        folder,
        "now",
        Alone(),
        None,
        lambda: 1.0,
        lambda *_: None,  # type: ignore[arg-type]
    )


def test_a_folder_that_cannot_be_looked_into_does_not_make_a_run_deaf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system answers ESTALE now and then."""
    exists, trouble = Path.exists, [False]

    def stale(self: Path) -> bool:
        if trouble[0] and self.name == "STOP":
            raise OSError(errno.ESTALE, "Stale file handle", str(self))
        return exists(self)

    monkeypatch.setattr(Path, "exists", stale)
    with guardian(tmp_path) as watch:
        trouble[0] = True
        time.sleep(1.2)
        trouble[0] = False
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(40):
            time.sleep(0.05)
            if watch.reason:
                break
        assert watch._thread.is_alive() and watch.reason == "SIGTERM"


def test_the_same_signal_from_a_scheduler_and_from_its_launcher_is_one_wish(tmp_path: Path) -> None:
    """SLURM signals every process of a step, and torchrun hands its own on to its workers."""
    child = os.fork()
    if child == 0:
        with guardian(tmp_path) as watch:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)
            os._exit(0 if watch.reason == "SIGTERM" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_old_checkpoint_that_is_damaged_does_not_end_a_run(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder, model = workplace("run"), tiny_models["mistral"]
    config = tiny.pretrain_config(
        folder, model, checkpoint__every=2, checkpoint__keep=1, checkpoint__keep_every=2,
        checkpoint__keep_every_dtype="bfloat16",
    )  # fmt: skip
    assert ranks(2, run_with_spoiled_step_2, config) == [None] * 2
    assert (folder / "run" / "checkpoints" / "step-00000008").is_dir()


def run_with_spoiled_step_2(config: Any) -> str | None:
    """Step 2's manifest is damaged once step 3 is done, before it is retired."""
    from llm_recipes.training import trainer

    log = trainer.Trainer._log

    def spoiling(self: Any, step: Any, bar: Any) -> None:
        log(self, step, bar)
        if step.number == 3 and self.place.is_first:
            (self.folder.checkpoints / "step-00000002" / "manifest.json").write_text("{")

    trainer.Trainer._log = spoiling  # type: ignore[method-assign]
    config.checkpoint.async_save = False
    try:
        return run(config)
    finally:
        trainer.Trainer._log = log  # type: ignore[method-assign]


def test_weights_that_are_kept_for_good_are_those_that_were_saved(tmp_path: Path) -> None:
    """Bits that turned since the save do not get a checksum of their own."""
    from llm_recipes.checkpoints import shards

    folder = tmp_path / "step-00000002"
    (folder / "model").mkdir(parents=True)
    box = shards.Box("a", torch.float32, (4,), (0,))
    name = "model/shard-00001-model-00001-of-00001.safetensors"
    entry = shards.write(folder / name, [box], [torch.ones(4)])
    (folder / "model" / "config.json").write_text("{}")
    files = {name: entry} | manifest.describe(folder, ["model/config.json"])
    manifest.write(folder, {"step": 2, "files": files})
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 64
    (folder / name).write_bytes(data)
    with pytest.raises(OSError, match="checksum"):
        names = retention.begin(folder, "bfloat16")
        retention.commit(folder, retention.convert(folder, names, "bfloat16"))
    assert manifest.damage(folder) is not None


@pytest.mark.parametrize("every", [1, 4, 40])
def test_what_is_skipped_does_not_depend_on_when_the_guard_is_read(every: int) -> None:
    guard = Guard(GuardConfig(window=16, patience=3), torch.device("cpu"))
    bad = (20, 22, 23, 25, 26)
    for step in range(1, 41):
        loss = torch.tensor(float("inf") if step in bad else 1.0)
        verdict = guard.judge(loss, torch.tensor(1.0))
        assert int(verdict) == (NOT_FINITE if step in bad else FINE)
        guard.add(step, range(step * 2, step * 2 + 2), loss, torch.tensor(1.0), verdict)
        if step % every == 0:
            guard.read()
            if guard.too_many:
                break
    assert guard.too_many and [each.step for each in guard.recent] == [20, 22, 23]


def test_a_lock_that_cannot_be_read_for_a_moment_is_not_a_dead_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS a file that was replaced is ESTALE to who had it open: a sign of life, if any."""
    path = tmp_path / "lock.json"
    content = {"id": "theirs", "host": "elsewhere", "pid": 7, "started": "1", "beats": 3}
    path.write_text(json.dumps(content))
    read_text, waited = Path.read_text, [0]

    def stale(self: Path, *args: Any, **kwargs: Any) -> str:
        if self == path and waited[0] == 4:
            raise OSError(errno.ESTALE, "Stale file handle", str(self))
        return read_text(self, *args, **kwargs)

    def wait(seconds: float) -> None:
        waited[0] += 1
        if waited[0] == 5:
            path.write_text(json.dumps(content | {"beats": 4}))

    monkeypatch.setattr(Path, "read_text", stale)
    with pytest.raises(UserError, match="process 7 on elsewhere is writing here"):
        Lock(tmp_path).take(wait)
    assert json.loads(path.read_text())["id"] == "theirs"


def asked_where_it_validates(config: Any) -> tuple[list[str], str | None]:
    """A run that is asked to stop in a step after which it would validate; what it did, in order."""
    from llm_recipes.training import loop, trainer

    did: list[str] = []
    validate, save, to_device = trainer.Trainer._validate, trainer.Trainer._save, loop.to_device
    seen = []

    def sending(batch: Any, device: Any) -> Any:
        seen.append(batch)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.0)
        return to_device(batch, device)

    def noting(name: str, work: Any) -> Any:
        def noted(self: Any, *words: Any) -> Any:
            did.append(f"{name} {self.training.progress.step}")
            return work(self, *words)

        return noted

    trainer.Trainer._validate, trainer.Trainer._save = noting("validate", validate), noting("save", save)  # type: ignore[method-assign]
    loop.to_device = sending
    try:
        return did, run(config)
    finally:
        trainer.Trainer._validate, trainer.Trainer._save = validate, save  # type: ignore[method-assign]
        loop.to_device = to_device


def test_who_is_asked_to_stop_saves_before_anything_else(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    """A scheduler gives half a minute; a validation may take many."""
    config = tiny.pretrain_config(
        workplace("run"), tiny_models["mistral"], validation__every=1, train__micro_batch_size=4
    )
    [(did, problem)] = ranks(1, asked_where_it_validates, config)
    assert problem is None and did[-1] == "save 2" and "validate 2" not in did


def unreadable_at_step_4(config: Any) -> str | None:
    """Beside the checkpoints nothing of the run's folder can be read when the first save begins."""
    read_text, failed = Path.read_text, []

    def refusing(self: Path, *args: Any, **kwargs: Any) -> str:
        if self.name == "environment.json" and not failed:
            failed.append(self)
            raise OSError(errno.EIO, "Input/output error", str(self))
        return read_text(self, *args, **kwargs)

    Path.read_text = refusing  # type: ignore[method-assign]
    try:
        return run(config)
    finally:
        Path.read_text = read_text  # type: ignore[method-assign]


def test_a_disk_that_refuses_what_goes_along_fails_the_save_and_not_the_run(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder = workplace("run")
    config = tiny.pretrain_config(folder, tiny_models["mistral"], checkpoint__async_save=False)
    assert ranks(2, unreadable_at_step_4, config) == [None] * 2
    assert kept(folder)[-1] == "step-00000008"


def test_an_account_that_is_damaged_is_one_line(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder, model = workplace("run"), tiny_models["mistral"]
    assert ranks(1, run, tiny.pretrain_config(folder, model, train__stop_at=4)) == [None]
    (folder / "run" / "rollbacks.json").write_text("")
    [said] = ranks(1, run, tiny.pretrain_config(folder, model))
    assert said is not None and "rollbacks.json: damaged" in said


def in_a_child(work: Callable[[], None]) -> int:
    """The exit status of a forked process that does this; 0 where it comes through."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def until(what: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    return what()


def test_a_signal_of_another_kind_ends_a_process_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        with guardian(tmp_path) as watch:
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: watch.reason == "SIGTERM")
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(20)

    assert in_a_child(twice) == 128 + signal.SIGUSR1


def test_a_process_whose_lock_is_taken_over_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_recipes.training.lock.BEATS_EVERY", 0.05)

    def robbed() -> None:
        lock = Lock(tmp_path)
        lock.take()
        watch = guardian(tmp_path)
        watch.lock = lock
        with watch:
            while not lock.lost:  # a beat may be on its way
                (tmp_path / "lock.json").write_text(json.dumps({"id": "another", "host": "elsewhere", "pid": 1}))
                time.sleep(0.1)
            time.sleep(20)

    assert in_a_child(robbed) == 3


def refused_commit(config: Any) -> tuple[str | None, list[str]]:
    """A run whose folder is another's when its checkpoint is to get its name; what the manifests were written into."""
    from llm_recipes.training import trainer

    write, mine, seen = manifest.write, trainer.Lock.is_ours, []
    manifest.write = lambda folder, content: seen.append(folder.name) or write(folder, content)
    trainer.Lock.is_ours = lambda self: False  # type: ignore[method-assign]
    try:
        return run(config), seen
    finally:
        manifest.write, trainer.Lock.is_ours = write, mine  # type: ignore[method-assign]


def test_nothing_is_committed_into_a_folder_that_is_another_s(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder = workplace("run")
    config = tiny.pretrain_config(folder, tiny_models["mistral"], checkpoint__async_save=False)
    for problem, seen in ranks(2, refused_commit, config):
        assert problem is not None and "another process has taken the run's folder over" in problem and seen == []
    assert kept(folder) == []


def where_manifests_go(config: Any) -> tuple[str | None, list[str]]:
    write, seen = manifest.write, []
    manifest.write = lambda folder, content: seen.append(folder.name) or write(folder, content)
    try:
        return run(config), seen
    finally:
        manifest.write = write


def test_a_checkpoint_gets_its_name_after_its_manifest(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder = workplace("run")
    config = tiny.pretrain_config(folder, tiny_models["mistral"], checkpoint__async_save=False)
    [(problem, seen)] = ranks(1, where_manifests_go, config)
    assert problem is None and seen == ["step-00000004.partial", "step-00000008.partial"]


def test_checkpoints_of_a_course_that_was_given_up_are_swept_at_the_start(tmp_path: Path) -> None:
    """Killed between the account and the sweep: the newer checkpoint lacks the rollback that it lies behind."""
    from llm_recipes.training import rollback

    account = [rollback.Rollback(8, 4, (20, 30), 1.0, {"loss_spike": 3})]
    for step, known in ((4, []), (6, []), (10, rollback.dump(account))):
        folder = tmp_path / manifest.folder_name(step)
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"rollbacks": known}))
    assert [path.name for path in rollback.given_up(tmp_path, account)] == ["step-00000006"]
    rollback.write(tmp_path / "rollbacks.json", account)
    assert rollback.read(tmp_path / "rollbacks.json") == account
    rollback.sweep(tmp_path, account)
    assert [manifest.step_of(path) for path in manifest.checkpoints(tmp_path)] == [10, 4]


def asked_while_it_loads(config: Any) -> str | None:
    """A run that gets SIGUSR1 before its model is there."""
    from llm_recipes.models import causal

    build = causal.build

    def asking(*words: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return build(*words, **named)

    causal.build = asking
    try:
        return run(config)
    finally:
        causal.build = build


def test_a_wish_to_stop_while_a_model_loads_is_granted_after_the_first_step(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder = workplace("run")
    assert ranks(2, asked_while_it_loads, tiny.pretrain_config(folder, tiny_models["mistral"])) == [None] * 2
    assert kept(folder) == ["step-00000001"]
    assert ranks(2, run, tiny.pretrain_config(folder, tiny_models["mistral"])) == [None] * 2


def crashing(config: Any) -> str:
    from llm_recipes.training import trainer
    from llm_recipes.training.run import pretrain

    log = trainer.Trainer._log

    def breaking(self: Any, step: Any, bar: Any) -> None:
        raise RuntimeError("out of memory")

    trainer.Trainer._log = breaking  # type: ignore[method-assign]
    try:
        pretrain(config)
    except RuntimeError as error:
        return str(error)
    finally:
        trainer.Trainer._log = log  # type: ignore[method-assign]
    return ""


def test_a_crash_and_a_refused_start_are_told(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder = workplace("run")
    heard = folder / "heard"
    told = {"run__on_event": f"cat >> {heard}"}
    config = tiny.pretrain_config(folder, tiny_models["mistral"], **told)
    assert ranks(1, crashing, config) == ["out of memory"]
    config = tiny.pretrain_config(folder, tiny_models["mistral"], optim__lr=1e-5, **told)
    [refused] = ranks(1, run, config)
    assert refused is not None and "belongs to another configuration" in refused
    events = [json.loads(line) for line in heard.read_text().splitlines()]
    assert [event["event"] for event in events] == ["error", "error"]
    assert events[0]["message"] == "RuntimeError: out of memory" and events[1]["message"] == refused
